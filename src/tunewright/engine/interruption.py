"""SIGTERM and SIGINT: the step under way is finished and saved, then the process leaves; a second Ctrl-C ends it now.

Knows signals and nothing of training. Outside a step (reading, measuring, reporting) there is nothing to save that is
not saved, so there the first signal interrupts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells count


class Interrupted(BaseException):
    """Somebody wants this process to end. No Exception: nobody may take it for a fault and go on."""

    def __init__(self, number: int) -> None:
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        super().__init__(signal.Signals(number).name)


_protected = 0
_waiting = 0  # the signal that came during a step, 0 for none


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Both signals mean `Interrupted` within the block; outside the main thread they are left alone."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _heard) for number in EXIT_CODES}
    try:
        yield
    finally:
        _waiting = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def protected() -> Iterator[None]:
    """A step, a save, or what several processes do together: a signal waits until `leave_if_asked`."""
    global _protected
    _protected += 1
    try:
        yield
    finally:
        _protected -= 1


def leave_if_asked(agree: Callable[[int], int] = int) -> None:
    """Raise `Interrupted` if a signal has come.

    agree: the largest number of all processes, so that all leave together.
    """
    global _waiting
    number = agree(_waiting)
    _waiting = 0
    if number:
        raise Interrupted(number)


def _heard(number: int, frame: FrameType | None) -> None:
    global _waiting
    if not _protected:
        raise Interrupted(number)
    if _waiting and number == signal.SIGINT:
        os._exit(EXIT_CODES[signal.SIGINT])  # asked twice: without a save, as asked
    _waiting = number
