"""A run that is asked to end, by Ctrl-C or a scheduler's SIGTERM, ends after the step under way, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxlm.devices import distributed


class Ended(KeyboardInterrupt):
    """A run that has ended because it was asked to; its state is saved. signal: by which number it was asked."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.signal = number


@contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Meanwhile SIGINT and SIGTERM only leave a note; the yielded function gives its number, 0 for none. A second one
    ends the process's work at once. Several processes could not end after the same step, and are not listened for; nor
    is anything outside the main thread, or a signal that is ignored.
    """
    asked: list[int] = []

    def hear(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nending after this step (once more: at once)\n")  # no print: one may be under way

    here = threading.current_thread() is threading.main_thread() and not distributed.is_multiprocess()
    wanted = (signal.SIGINT, signal.SIGTERM) if here else ()
    before = {number: signal.getsignal(number) for number in wanted}
    for number in (heard := [number for number in wanted if before[number] is not signal.SIG_IGN]):
        signal.signal(number, hear)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number in heard:
            signal.signal(number, before[number])
