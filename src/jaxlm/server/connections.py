"""Answers that end when the client is gone, or after too long a time."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from jaxlm.server.state import Refused

Result = TypeVar("Result")


async def answered(http: HttpRequest, answer: Coroutine[Any, Any, Result], timeout: float | None) -> Result:
    """The result of a coroutine, which is cancelled when the client closes the connection.

    Args:
        http: The HTTP request. Its body has been read.
        answer: The coroutine.
        timeout: Seconds after which it is cancelled; None for no limit.

    Raises:
        Refused: The client is gone, or the time is over.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(answer), asyncio.create_task(gone())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            return tasks[0].result()  # type: ignore[return-value]
        if done:
            raise Refused(499, "the client has closed the connection")
        raise too_late(timeout)
    finally:
        for task in tasks:
            task.cancel()


def too_late(timeout: float | None) -> Refused:
    """The answer to a request that took too long."""
    return Refused(504, f"the answer took more than {timeout:g} s: ask for fewer tokens", "timeout_error")
