"""Interrupt a synchronous call that takes too long.

The call stays in the main thread and is interrupted there by a signal. A worker thread that is merely waited for
would not do: what graders get stuck in (one regular expression that backtracks without end, one power of huge
integers) holds the interpreter, so that no other thread runs at all. It does check for signals, but only in the main
thread.
"""

import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_REPEAT = 0.25  # seconds after which a call that survived an interruption is interrupted again


class TimeLimitExceeded(BaseException):
    """The call took longer than its limit. Not an `Exception`, so that no `except Exception` swallows it."""


def can_interrupt() -> bool:
    """Whether `call_within` works here: in the main thread, where there are POSIX signals."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """Return `function()`, or raise `TimeLimitExceeded` from inside it after `seconds`.

    Interrupts Python code, regular expressions, arithmetic on long integers, locks, sleeping, files and sockets.
    C code that neither returns to Python nor checks for signals goes on to its end. Uses SIGVTALRM, so `signal.alarm`
    stays free for `function` (math-verify has time limits of its own), and leaves no thread behind.

    Args:
        seconds: wall-clock limit, positive.
        function: called in this thread, which must be the main one (see `can_interrupt`).
    """
    armed = True
    deadline = time.monotonic() + seconds

    def interrupt(signal_number, frame):
        nonlocal deadline
        if armed and time.monotonic() >= deadline:
            deadline = time.monotonic() + _REPEAT / 2  # a second signal must not interrupt the clean-up
            raise TimeLimitExceeded

    def watch():
        pause = seconds
        while not over.wait(pause):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGVTALRM)
            pause = _REPEAT

    # Two clocks: a watcher for a call that sleeps, and the kernel's for one that keeps the watcher from running. The
    # latter counts the processor time of all threads, so it may strike early; then the handler lets it pass.
    over = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    # The handler stays: a signal that comes late must not find the default one, which ends the process.
    signal.signal(signal.SIGVTALRM, interrupt)
    try:
        try:
            watcher.start()
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _REPEAT)
            return function()
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        over.set()
        watcher.join()
