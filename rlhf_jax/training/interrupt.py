"""Turns Ctrl-C and SIGTERM into a request to stop at the next step. Imports nothing of the project."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """``requested`` names the signal that asked to stop, or is None."""

    def __init__(self) -> None:
        self.requested: str | None = None


class Interrupted(Exception):
    """A run stopped on request after saving; the message says where, and how to go on."""


def check(stop: StopRequest, kept: str) -> None:
    """Raises Interrupted where work that keeps nothing half-done was asked to stop; ``kept`` says so."""
    if stop.requested is not None:
        raise Interrupted(f"{stop.requested}: {kept}; run the same command again")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM set a flag; a second SIGINT raises KeyboardInterrupt at once."""
    request = StopRequest()

    def handle(number, _frame):
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.requested = signal.Signals(number).name

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
