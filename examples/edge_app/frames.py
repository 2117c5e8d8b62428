"""The app's own work, which training must not be in the way of: frames of a camera, and requests of clients."""

import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.edge_app.network import Digits


class Classifier:
    """The network that answers now. While it is trained anew, the one before goes on answering."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()

    def use(self, network: nn.Module) -> None:
        """From now on, answer by `network`."""
        self._network = network.eval()  # one assignment: whoever is answering keeps the one they have

    def classify(self, frame: Tensor) -> int:
        """The class of one frame."""
        network = self._network
        with torch.no_grad():
            return int(network(frame[None]).argmax())


class Camera:
    """Frames that come whether anybody asks or not: here digits in turn. Counts those that were recognised."""

    def __init__(self, classifier: Classifier, frames: Digits, every_seconds: float) -> None:
        self._classifier, self._frames, self._every = classifier, frames, every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="camera", daemon=True)
        self.seen = self.right = 0

    def start(self) -> None:
        """Begin to look at frames."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait until that is so."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self._every):
            frame, label = self._frames[self.seen % len(self._frames)]
            self.seen += 1
            self.right += self._classifier.classify(frame) == label


class Foreground:
    """Whether clients keep the app busy: `burst` requests or more within the last `seconds`."""

    def __init__(self, burst: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._last: deque[float] = deque(maxlen=max(1, burst))

    def request(self) -> None:
        """A client asked for something."""
        self._last.append(self._clock())

    def seconds_left(self) -> float:
        """How long it stays busy if nobody asks again; 0 where it is not."""
        last = tuple(self._last)
        if len(last) < (self._last.maxlen or 0):
            return 0.0
        return max(0.0, last[0] + self._seconds - self._clock())
