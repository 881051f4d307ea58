"""Streams: iterators over the chunks of a request that a thread of the engine decodes."""

from queue import SimpleQueue
from typing import TYPE_CHECKING

from jaxlm.inference.completion import CompletionChunk
from jaxlm.inference.requests import Request

if TYPE_CHECKING:
    from jaxlm.inference.engine import Engine


class Stream:
    """Yields the chunks of a request. Closing or dropping it cancels the request."""

    def __init__(self, engine: "Engine", request: Request, chunks: "SimpleQueue[CompletionChunk]"):
        self.request: Request = request
        self._engine, self._chunks, self._ended = engine, chunks, False

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> CompletionChunk:
        if self._ended:
            raise StopIteration
        chunk = self._chunks.get()
        self._ended = chunk.finish_reason is not None
        return checked(chunk)

    def close(self) -> None:
        """Cancels the request if it has not ended."""
        self._ended = True
        self._engine.cancel(self.request)

    def __del__(self) -> None:
        self.close()


def checked(chunk: CompletionChunk) -> CompletionChunk:
    """Raises the error of a chunk, if it has one."""
    if chunk.error is not None:
        raise chunk.error
    return chunk
