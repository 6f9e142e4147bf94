"""Ctrl-C and SIGTERM let a work come to a good end; a second one stops it at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def ending_well(say: Callable[[str], None], told: str) -> Iterator[Callable[[], str]]:
    """Inside, the first signal to stop says `told`, and the second raises KeyboardInterrupt.

    Yields a function that gives the name of the signal that came, or nothing. Only a process's main thread
    may set what a signal does: in another one all stays as it was.
    """
    came: list[str] = []

    def stop(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(signal.Signals(number).name)
        say(told)

    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if mine}
    try:
        yield lambda: came[0] if came else ""
    finally:
        for number, action in before.items():
            signal.signal(number, action)
