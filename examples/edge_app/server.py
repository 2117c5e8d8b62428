"""The app's socket: JSON over HTTP, for programs on this machine alone."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any

import torch

from examples.edge_app.frames import Camera, Classifier, Foreground
from examples.edge_app.network import as_input
from examples.edge_app.training import BackgroundTrainer, ConflictError
from ondevice_trgl import (
    BudgetExceededError,
    BudgetInfeasibleError,
    PartitionError,
    RunDirError,
    StorageError,
    TrglError,
    UsageError,
)

MOST_BYTES = 4096
"""Of a request's body; nothing that is asked for here takes more."""

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (ConflictError, 409),
    (RunDirError, 409),
    (UsageError, 400),
    (PartitionError, 400),
    (BudgetInfeasibleError, 422),
    (BudgetExceededError, 507),
    (StorageError, 507),
    (MemoryError, 503),
)
"""The first that fits; all else is 500."""

Answer = tuple[int, dict[str, Any]]


class RequestError(Exception):
    """A request that is answered with `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def refusal(error: Exception) -> Answer:
    """What a client is told about `error`."""
    status = error.status if isinstance(error, RequestError) else 500
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), status)
    said: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, TrglError):
        said |= {"message": error.message, "hint": error.hint}
    if isinstance(error, BudgetInfeasibleError):
        said["smallest_feasible_budget_bytes"] = error.smallest_feasible_budget_bytes
    return status, said


class App:
    """What each request comes to."""

    def __init__(
        self, trainer: BackgroundTrainer, classifier: Classifier, camera: Camera, foreground: Foreground
    ) -> None:
        self._trainer, self._classifier, self._camera = trainer, classifier, camera
        self._foreground = foreground
        self.routes: dict[str, dict[str, Callable[[bytes], Answer]]] = {
            "/start": {"POST": self._start},
            "/pause": {"POST": self._pause},
            "/status": {"GET": self._status},
            "/budget": {"PUT": self._budget},
            "/classify": {"POST": self._classify},
        }

    def _start(self, body: bytes) -> Answer:
        self._trainer.start()
        return 202, self._trainer.status()

    def _pause(self, body: bytes) -> Answer:
        self._trainer.pause()
        return self._status(body)

    def _status(self, body: bytes) -> Answer:
        frames = {"seen": self._camera.seen, "right": self._camera.right}
        return 200, {**self._trainer.status(), "frames": frames}

    def _budget(self, body: bytes) -> Answer:
        self._trainer.set_budget(_text(body).strip().strip('"'))
        return self._status(body)

    def _classify(self, body: bytes) -> Answer:
        self._foreground.request()
        try:
            pixels = torch.tensor(json.loads(_text(body)), dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise RequestError(400, "expected a JSON list of 64 numbers from 0 to 255") from error
        if pixels.shape != (64,) or not bool(((pixels >= 0) & (pixels <= 255)).all()):
            raise RequestError(400, f"expected 64 numbers from 0 to 255, not {tuple(pixels.shape)}")
        return 200, {"class": self._classifier.classify(as_input(pixels))}


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(400, "the body is not UTF-8") from error


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: "Server"
    timeout = 10.0  # for a client that sends nothing
    protocol_version = "HTTP/1.0"  # a connection each: none keeps a thread

    def _answer(self) -> None:
        try:
            status, said = self._called()
        except Exception as error:  # the app goes on
            status, said = refusal(error)
        self._send(status, said)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer  # noqa: N815

    def _called(self) -> Answer:
        if self.headers.get("Origin") is not None:
            raise RequestError(403, "pages in a browser are no clients of this app")
        routes = self.server.app.routes
        methods = routes.get(self.path)
        if methods is None:
            raise RequestError(404, f"unknown path {self.path!r}; there are: {', '.join(routes)}")
        if self.command not in methods:
            raise RequestError(405, f"{self.path} takes {' or '.join(methods)}, not {self.command}")
        return methods[self.command](self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") is not None:
            raise RequestError(411, "say the length of the body, in Content-Length")
        stated = self.headers.get("Content-Length", "0")
        if not (stated.isascii() and stated.isdecimal()):
            raise RequestError(400, f"Content-Length {stated!r} is not a number")
        if int(stated) > MOST_BYTES:
            raise RequestError(413, f"the body has {stated} bytes, more than {MOST_BYTES}")
        return self.rfile.read(int(stated))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library finds wrong with a request, as JSON too."""
        self._send(code, {"error": "RequestError", "message": message or str(code)})

    def _send(self, status: int, said: dict[str, Any]) -> None:
        text = json.dumps(said).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: status says what there is to say."""


class Server(ThreadingHTTPServer):
    """Listens on 127.0.0.1."""

    daemon_threads = True

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Clients that leave before the answer are nothing to tell of."""
