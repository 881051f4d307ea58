"""Ctrl-C ends a command, whatever runs at that moment.

Python raises KeyboardInterrupt between two steps of the code that runs. In three places that loses or delays a Ctrl-C:

- A callback of the garbage collector or a finalizer. Python prints an exception there and drops it. jax registers such
  a callback, and loading a tokenizer collects garbage often. A dropped KeyboardInterrupt is raised again.
- An import. An extension module may end it with an ImportError instead. While a command starts and loads, Ctrl-C ends
  the process without an exception.
- A long call of compiled code, such as a compilation. A second Ctrl-C ends the process without waiting for it.

`install` is called by the entry point alone: a program that imports jaxlm keeps its own handling.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

STATUS = 128 + signal.SIGINT
AGAIN = b"\0"  # read by the watching thread: raise a dropped KeyboardInterrupt again
PAUSE = 0.01  # seconds until then, so that the callback has ended


@dataclass
class _State:
    """What is known of the signals of this process."""

    installed: bool = False
    at_once: int = 0  # more than 0: end the process without an exception
    arrived: int = 0  # signals that the watching thread saw
    handled: int = 0  # signals for which Python raised KeyboardInterrupt
    write_end: int = -1  # of the pipe to the watching thread
    restore: Callable[[], None] | None = None  # resets the terminal
    ending: threading.Lock = field(default_factory=threading.Lock)  # held while the process ends


_state = _State()


def install() -> None:
    """Handles SIGINT for this process, unless the process ignores it (as after nohup)."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    read_end, _state.write_end = os.pipe()
    os.set_blocking(_state.write_end, False)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()
    sys.unraisablehook = _raise_again
    signal.signal(signal.SIGINT, _handle)
    _state.installed = True
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reset_in_child)
    renew()


def _reset_in_child() -> None:
    """Gives a forked process Python's own handling. It must not write to the pipe of its parent."""
    signal.set_wakeup_fd(-1)
    sys.unraisablehook = sys.__unraisablehook__
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def renew() -> None:
    """Connects the watching thread to signals again, after an event loop took its place."""
    if _state.installed:
        with suppress(ValueError):  # not in the main thread
            signal.set_wakeup_fd(_state.write_end, warn_on_full_buffer=False)


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process without an exception: while nothing is written and nothing needs to be cleaned up."""
    _state.at_once += 1
    try:
        yield
    finally:
        _state.at_once -= 1


def on_exit(restore: Callable[[], None] | None) -> None:
    """Sets what resets the terminal when the process ends at once; None for nothing."""
    _state.restore = restore


def _handle(number: int, frame: FrameType | None) -> None:
    _state.handled += 1
    if _state.at_once:
        _end()
    raise KeyboardInterrupt


def _watch(read_end: int) -> None:
    """Reads the number of each signal, also of those that Python has not handled yet."""
    while number := os.read(read_end, 1):
        if number == AGAIN:
            time.sleep(PAUSE)
            _interrupt_main()
        elif number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is _handle:  # not that of training
            _state.arrived += 1
            if _state.at_once or _state.arrived - _state.handled > 1:
                _end()


def _interrupt_main() -> None:
    if hasattr(signal, "pthread_kill"):  # also ends a sleep of the main thread
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def _raise_again(dropped: Any) -> None:
    """The hook for exceptions that Python drops."""
    if dropped.exc_type is not None and issubclass(dropped.exc_type, KeyboardInterrupt):
        os.write(_state.write_end, AGAIN)
    else:
        sys.__unraisablehook__(dropped)


def _end() -> None:
    """Ends the process. Runs in a signal handler or beside the main thread, so it prints without sys.stderr."""
    if not _state.ending.acquire(blocking=False):  # the other thread ends it
        time.sleep(1)
        os._exit(STATUS)
    with suppress(Exception):
        if _state.restore is not None:
            _state.restore()
    with suppress(OSError):
        show_cursor = (
            b"\033[?25h" if os.isatty(2) and os.environ.get("TERM") != "dumb" else b""
        )  # progress bars hide it
        os.write(2, show_cursor + b"\ninterrupted\n")
    os._exit(STATUS)
