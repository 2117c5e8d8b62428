"""python -m examples.edge_app: see README.md beside this file."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from examples.edge_app.frames import Camera, Classifier, Foreground
from examples.edge_app.network import TEST, Digits, make_network
from examples.edge_app.server import App, Server
from examples.edge_app.training import BackgroundTrainer
from ondevice_trgl import TrglError


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; then checkpoint what trains, and exit 0."""
    parser = argparse.ArgumentParser(
        prog="edge_app", description="A service that trains its network in the background."
    )
    parser.add_argument("--port", type=int, default=8765, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--state", type=Path, default=Path("edge_app-state"), help="folder of the run")
    parser.add_argument("--budget", default="400MB", help="for the whole process: 400MB, or bytes")
    parser.add_argument("--epochs", type=int, default=10, help="of each module")
    parser.add_argument("--start", action="store_true", help="train at once, as POST /start does")
    parser.add_argument("--burst", type=int, default=20, help="requests to /classify that make the app busy")
    parser.add_argument("--burst-seconds", type=float, default=2.0, help="within which they come")
    given = parser.parse_args(arguments)

    classifier, foreground = Classifier(make_network()), Foreground(given.burst, given.burst_seconds)
    camera = Camera(classifier, Digits(TEST), every_seconds=0.05)
    # enforce=False: a limit on the process would refuse memory to the threads that serve, not only to training; a step
    # that goes over is answered by a smaller one, and the system's own limit (MemoryMax=) stands behind
    settings = {"epochs": given.epochs, "threads": 1, "checkpoint_every": "10s", "enforce": False}
    try:
        trainer = BackgroundTrainer(given.state, given.budget, settings, classifier, foreground)
        server = Server(App(trainer, classifier, camera, foreground), given.port)
    except (TrglError, OSError, OverflowError) as error:
        print(f"edge_app: {error}", file=sys.stderr)
        return 2

    # a pipe: a handler may interrupt anything, and must not wait for a lock; a second signal changes nothing
    woken, wake = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(wake, b"!"))
    camera.start()
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    if given.start or trainer.status()["state"] == "completed":  # then the trained network is loaded
        threading.Thread(target=_started, args=(trainer,), daemon=True).start()
    os.read(woken, 1)
    server.shutdown()
    trainer.close()
    camera.close()
    print(f"stopped, the run is {trainer.status()['state']}", flush=True)
    return 0


def _started(trainer: BackgroundTrainer) -> None:
    try:
        trainer.start()
    except Exception as error:
        print(f"edge_app: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
