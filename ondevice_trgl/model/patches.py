"""What a recording puts in place of torch's own while it runs: how modules, functions and attributes are called."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

ONE_AT_A_TIME = threading.RLock()
"""Two recordings at once would put back what the other has put in place; two proofs, draw from each other's numbers."""


@contextlib.contextmanager
def patched(
    call: Callable[..., Any], assign: Callable[..., Any], apply: Callable[..., Any], script: Callable[..., Any]
) -> Iterator[None]:
    """While it holds, each is called with torch's own function first, then with what that was called with.

    `call` in place of calling a module, `assign` of setting an attribute of one, `apply` of an autograd Function,
    `script` of a function of TorchScript.
    """
    with ONE_AT_A_TIME:
        functions = torch.autograd.Function
        calling, setting, scripting = nn.Module.__call__, nn.Module.__setattr__, torch.jit.ScriptFunction.__call__
        applying = functions.__dict__["apply"]  # not bound to that class, as an attribute would be

        def called(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            return call(calling, module, args, kwargs)

        def assigned(module: nn.Module, name: str, value: Any) -> None:
            assign(setting, module, name, value)

        def applied(kind: Any, /, *args: Any, **kwargs: Any) -> Any:
            return apply(applying.__func__, kind, args, kwargs)

        def scripted(function: Any, /, *args: Any, **kwargs: Any) -> Any:
            return script(scripting, function, args, kwargs)

        nn.Module.__call__, nn.Module.__setattr__ = called, assigned  # type: ignore[method-assign,assignment]
        functions.apply = classmethod(applied)  # type: ignore[assignment,method-assign]
        torch.jit.ScriptFunction.__call__ = scripted  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.__call__, nn.Module.__setattr__ = calling, setting  # type: ignore[method-assign]
            functions.apply = applying  # type: ignore[method-assign]
            torch.jit.ScriptFunction.__call__ = scripting  # type: ignore[method-assign]
