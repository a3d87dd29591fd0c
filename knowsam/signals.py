"""Signals that ask for an orderly end."""

import signal
from contextlib import suppress
from typing import Any


class StopSignal:
    """While entered, SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C only set ``name``; a second Ctrl-C ends at once.

    SIGUSR1 and SIGUSR2 are what batch systems are asked to send, and submitit sends, before a time limit.

    Attributes:
        name: of the last signal that came, such as ``SIGTERM``; empty before the first.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            # Only the main thread may set handlers; elsewhere (a notebook's worker, Ray) signals stay as they are.
            with suppress(ValueError):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
