"""A thread in which oneDNN's compiler was refused memory is left behind, and training goes on in another."""

import threading
from collections.abc import Callable

import pytest
import torch

from ondevice_trgl.run.hands import Hands

SPOILT = """
import threading, torch
from ondevice_trgl.device.limit import limit_for
from ondevice_trgl.run.hands import Hands

def convolve(size):
    return torch.nn.functional.conv2d(torch.ones(2, 8, size, size), torch.ones(8, 8, 3, 3))

torch.set_num_threads(2)
limit = limit_for(torch.device("cpu"))
hands = Hands(apart=limit.refuses_code)
assert not hands.renew()
if limit.refuses_code:
    limit.set(1)
    try:
        hands.do(lambda: convolve(40))
    except RuntimeError as error:
        print(error)
    limit.lift()
    if hands.renew():
        print("renewed", hands.do(torch.get_num_threads))
    print(hands.do(lambda: convolve(41)).shape, convolve(42).shape)
    hands.close()
print(threading.active_count())
"""


def test_a_spoilt_thread_is_replaced(run_python: Callable[..., str]) -> None:
    lines = run_python(SPOILT).splitlines()
    if len(lines) == 1:
        pytest.skip("needs RLIMIT_DATA")
    if "could not create a primitive" in lines[0]:
        assert lines[1] == "renewed 2"
    assert lines[-2:] == ["torch.Size([2, 8, 39, 39]) torch.Size([2, 8, 40, 40])", "1"]


def test_in_the_callers_thread_errors_pass_and_nothing_is_renewed() -> None:
    hands = Hands(apart=False)
    with pytest.raises(ZeroDivisionError):
        hands.do(lambda: 1 // 0)
    assert hands.renew() is False
    assert hands.do(threading.get_ident) == threading.get_ident()
    hands.close()


def test_a_thread_of_its_own_raises_its_errors_here_and_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(apart=True)
    first = hands.do(threading.current_thread)
    monkeypatch.setattr("ondevice_trgl.run.hands._compiles", lambda: False)
    assert hands.renew()
    try:
        assert hands.do(threading.current_thread) not in (first, threading.current_thread())
        assert not first.is_alive()
        assert hands.do(torch.is_grad_enabled)
        with pytest.raises(ZeroDivisionError):
            hands.do(lambda: 1 // 0)
    finally:
        hands.close()
    assert hands.do(threading.get_ident) == threading.get_ident()
