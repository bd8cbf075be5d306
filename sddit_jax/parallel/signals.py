"""SIGTERM and SIGINT as a request to stop, for code that chooses when to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Gives a list that gets the name of the first SIGTERM or SIGINT; a second one has its usual effect."""
    received: list[str] = []

    def handler(number: int, frame: Any) -> None:
        del frame
        received.append(signal.Signals(number).name)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
