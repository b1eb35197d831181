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


class Interrupted(SystemExit):
    """Somebody wants this process to end. No Exception: nobody may take it for a fault and go on.

    A script that does not catch it leaves with the shell's code, as the command does.
    """

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        super().__init__(EXIT_CODES[signal.Signals(number)])

    def __str__(self) -> str:
        return self.name


_protected = 0
_waiting = 0  # the signal that came, 0 for none


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Both signals mean `Interrupted` within the block; outside the main thread they are left alone."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _heard) for number in EXIT_CODES}
    try:
        with _watched():
            yield
    finally:
        _waiting = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """A thread hears the second Ctrl-C while the main thread is deep in a backward pass: Python runs handlers only
    between its own instructions, and a backward pass of minutes is one of them."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        heard = 0
        while numbers := os.read(reading, 1):
            heard += numbers[0] in EXIT_CODES
            if heard > 1 and numbers[0] == signal.SIGINT:
                os._exit(EXIT_CODES[signal.SIGINT])  # asked twice: without a save, as asked
        os.close(reading)

    threading.Thread(target=watch, name="second Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


# a child's Ctrl-C is its own matter: it would count as a second one here
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


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
    number = agree(_waiting)
    if number:
        raise Interrupted(number)


def _heard(number: int, frame: FrameType | None) -> None:
    """Kept even where it interrupts at once: Python drops what is raised while an object is being thrown away."""
    global _waiting
    _waiting = number
    if not _protected:
        raise Interrupted(number)
