"""Signals that stop a training run after its current step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxlm.devices import distributed


@contextmanager
def stop_signals() -> Iterator[Callable[[int], int]]:
    """Catches SIGINT and SIGTERM, so that the run can stop after the current step.

    Yields a function that returns the number of the signal after which the run is to stop at a step, 0 for none. A
    second signal raises KeyboardInterrupt. Nothing is caught outside the main thread. A signal that the process ignores
    stays ignored. In a run of several processes, jax catches SIGTERM in any of them, and all stop after the same step;
    it is the signal of a cluster that takes a machine back.
    """
    if distributed.is_multiprocess():
        yield lambda number: signal.SIGTERM if distributed.preempted(number) else 0
        return
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        os.write(2, b"\nstopping after this step; a second signal stops immediately\n")  # print is not reentrant

    alone = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if alone}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda number: received[0] if received else 0
    except Exception as error:
        if len(received) > 1:  # numpy raises other errors in place of one that is raised while it converts a value
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
