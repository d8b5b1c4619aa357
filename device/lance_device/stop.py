"""Stopping on request: Ctrl-C and SIGTERM end a run at the next micro-batch, or within a graph that runs long.

Python's own handler waits until the library that is at work returns.  So a thread hears of the signal too (by
`signal.set_wakeup_fd`) and asks the runtime to leave its graph: the step is not made, and costs no state.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from lance_edge.errors import Interrupted


def _heard_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C, a polite kill, and the end of the terminal unless it was told to be ignored (nohup)."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return (signal.SIGINT, signal.SIGTERM)
    return (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Leave the work at hand.

        Raises:
            Interrupted: if a stop was asked for.
        """
        if self.requested:
            raise Interrupted("stopped on request")


@contextlib.contextmanager
def stop_on_signals(
    notify: Callable[[str], None],
    interrupt: Callable[[bool], None] = lambda wanted: None,
    request: StopRequest | None = None,
) -> Iterator[StopRequest]:
    """A request that Ctrl-C or SIGTERM sets; a second signal ends the process at once.

    Outside the main thread no handler can be set and the request stays as it is.

    Args:
        interrupt: called with true, from any thread, as soon as a signal has come; with false at the end.
        request: to be set; a new one by default.
    """
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.requested = True
        interrupt(True)  # the listener may not have come to it yet
        for heard in previous:  # a terminal that closes says so twice, by its shell and by the kernel
            signal.signal(heard, signal.SIG_IGN if heard == signal.SIGHUP else signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # the signal may have come amid a write to the same stream
            notify("stopping after this micro-batch; a second Ctrl-C stops at once, without saving")

    previous = {number: signal.signal(number, on_signal) for number in _heard_signals()}
    try:
        with _heard_by_a_thread(lambda: interrupt(True)):
            yield request
    finally:
        interrupt(False)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block a polite kill, or the end of the terminal, is what Ctrl-C is: what was begun is cleared.

    For work that keeps nothing when it is stopped.  Outside the main thread no handler can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        for heard in previous:  # clearing up is not disturbed; it takes no time
            signal.signal(heard, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, on_signal) for number in _heard_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _heard_by_a_thread(interrupt: Callable[[], None]) -> Iterator[None]:
    """Calls `interrupt` for every signal with a handler, whatever the main thread is doing."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def listen() -> None:
        while os.read(readable, 64):
            interrupt()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writable)  # the listener reads the end, and ends
        listener.join()
        os.close(readable)
