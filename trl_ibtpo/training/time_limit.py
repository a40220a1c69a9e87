"""Interrupt a synchronous call that takes too long, in the main thread (`call_within`) or beside it (`LimitedCalls`).

In the main thread a call is interrupted by a signal. For graders a worker thread that is merely waited for would not
do: what graders get stuck in (one regular expression that backtracks without end, one power of huge
integers) holds the interpreter, so that no other thread runs at all. It does check for signals, but only in the main
thread.
"""

import ctypes
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

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


class LimitedCalls:
    """Calls that run beside the main thread, each for no longer than a limit.

    A call has a thread of its own, so that whoever waits for it can go on after the limit. The thread is interrupted
    where it executes Python code; one that is inside a single long operation of C code (`time.sleep(3600)`, a query
    without a timeout) ends when that does, and what it returns is dropped. How many such threads there may be is
    limited: no training run collects them without end.

    Args:
        seconds: wall-clock limit of one call; None for none.
        most_stuck: threads beyond their limit, after which a further one is an error.
    """

    def __init__(self, seconds: float | None, most_stuck: int = 64):
        self.seconds = seconds
        self._most_stuck = most_stuck
        self._stuck: dict[threading.Thread, str] = {}
        self._lock = threading.Lock()

    def call(self, name: str, function: Callable[[], T]) -> T:
        """Return `function()`, or raise `LimitReached` after the limit; `name` is for messages."""
        if self.seconds is None:
            return function()
        outcome: list = []

        def run():
            try:
                outcome.append((function(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=run, daemon=True, name=f"limited-{name}")
        thread.start()
        thread.join(self.seconds)
        if not outcome:
            with self._lock:
                self._stuck[thread] = name
            if self.interrupt_stuck() > self._most_stuck:
                raise TooManyStuckCalls(
                    f"{self._most_stuck + 1} calls still run after their limit of {self.seconds} seconds: "
                    f"{', '.join(sorted(set(self._stuck.values())))}. A call that is inside one long operation of C "
                    "code cannot be interrupted; give that operation a timeout of its own."
                )
            raise LimitReached
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def interrupt_stuck(self) -> int:
        """Interrupt what is still beyond its limit, once more where it was before; how many calls that are."""
        with self._lock:
            self._stuck = {thread: name for thread, name in self._stuck.items() if thread.is_alive()}
            for thread in self._stuck:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(TimeLimitExceeded)
                )
            return len(self._stuck)


class DaemonThreads:
    """Runs calls in threads that keep no process from ending, whatever they are in.

    Those of `ThreadPoolExecutor` do: Python waits for them before it exits, for ever where a call never returns.

    Args:
        most: calls that run at the same time.
        name: what the names of the threads begin with.
    """

    def __init__(self, most: int, name: str):
        self._most, self._name = most, name
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., T], *args: Any) -> "Future[T]":
        future: Future[T] = Future()
        self._calls.put((future, function, args))
        if len(self._threads) < self._most:
            name = f"{self._name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, daemon=True, name=name))
            self._threads[-1].start()
        return future

    def close(self) -> None:
        """Begin no further call, and wait for none."""
        with suppress(queue.Empty):
            while True:
                if (call := self._calls.get_nowait()) is not None:
                    call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, args = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    future.set_exception(error)
            del call, future, function, args  # nothing is kept of a call while the next is waited for


class LimitReached(Exception):
    """A call beside the main thread took longer than its limit."""


class TooManyStuckCalls(BaseException):
    """Not an `Exception`: nobody may take it for the error of one call."""
