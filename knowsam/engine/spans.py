"""Named stretches of a training step, timed only while somebody collects them."""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Collector(Protocol):
    """What :func:`collect` installs: called at the begin and at the end of every span, in order, properly nested."""

    def begin(self, name: str) -> None:
        """A span begins."""

    def end(self, name: str) -> None:
        """It ends."""


_collector: Collector | None = None


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Mark a stretch of a step; costs nothing to speak of while nobody collects."""
    if _collector is None:
        yield
        return
    _collector.begin(name)
    try:
        yield
    finally:
        _collector.end(name)


@contextlib.contextmanager
def collect(collector: Collector) -> Iterator[None]:
    """Send the spans of this process to ``collector`` meanwhile."""
    global _collector
    before, _collector = _collector, collector
    try:
        yield
    finally:
        _collector = before
