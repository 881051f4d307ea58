"""A lock that many threads share, unless one of them needs it alone (a readers-writer lock)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Held by any number of threads in `shared`, or by one in `exclusive`. It cannot be taken twice by one thread.

    A thread that waits for `exclusive` goes before later ones that want `shared`.
    """

    def __init__(self) -> None:
        self._entrance = threading.Lock()
        self._left = threading.Condition()
        self._holders = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._entrance, self._left:
            self._holders += 1
        try:
            yield
        finally:
            with self._left:
                self._holders -= 1
                self._left.notify()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._entrance:
            with self._left:
                self._left.wait_for(lambda: not self._holders)
            yield
