"""Ctrl-C at moments of our choosing: an exception between two lines of the engine leaves its books half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C is only noted, to be asked for; a second one does what it did before. Off the main thread,
    where Python delivers none, nothing is done."""
    pressed = False
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held_back() -> Iterator[None]:
    """Within, a first Ctrl-C waits for the end; a second one does not."""
    pressed: Callable[[], bool] = bool
    try:
        with noted() as pressed:
            yield
    finally:  # also where an error is on its way: the key was pressed
        if pressed():
            signal.raise_signal(signal.SIGINT)
