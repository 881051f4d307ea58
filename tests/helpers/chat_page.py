"""A tab of a browser with the chat page, and a server whose answers the test sets."""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlm.server import responses
from jaxlm.server.static_files import page_routes

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"narrow": (390, 844), "wide": (1280, 800)}


@dataclass
class Reply:
    """An answer to one chat request.

    Attributes:
        deltas: The deltas of its stream.
        status: Status. Others than 200 have an error with this message.
        headers: Further headers.
        waits: Whether the stream waits for Fake.release after its deltas.
        breaks: Whether the connection breaks after the deltas.
        ends_early: Whether the answer ends after the deltas, without the end of the protocol.
        error: The message of an error event after the deltas.
        finish_reason: The reason of the last chunk.
    """

    deltas: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    waits: bool = False
    breaks: bool = False
    ends_early: bool = False
    error: str = ""
    finish_reason: str = "stop"


def text(content: str, size: int = 7, **options: Any) -> Reply:
    """A reply that streams a text in parts of this size."""
    return Reply([{"content": content[i : i + size]} for i in range(0, len(content), size)], **options)


class Fake:
    """A server of chunks that are given. requests: the bodies that came."""

    def __init__(self) -> None:
        self.models: list[str] = ["fake"]
        self.key: str | None = None
        self.replies: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.release: threading.Event = threading.Event()
        self.left: threading.Event = threading.Event()  # a client has closed its stream
        self.url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                *page_routes(),
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    def refusal(self, http: HttpRequest) -> Response | None:
        if self.key is None or http.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse(responses.error("the API key is missing or wrong", "authentication_error"), 401)

    async def list_models(self, http: HttpRequest) -> Response:
        return self.refusal(http) or JSONResponse({"data": [{"id": name} for name in self.models]})

    async def chat(self, http: HttpRequest) -> Response:
        if (refused := self.refusal(http)) is not None:
            return refused
        self.requests.append(await http.json())
        reply = self.replies.pop(0)
        if reply.status != 200:
            return JSONResponse(responses.error(reply.message, "error"), reply.status, reply.headers)
        return StreamingResponse(self.events(reply), media_type="text/event-stream")

    async def events(self, reply: Reply) -> AsyncIterator[str]:
        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps({'choices': choices, **more})}\n\n"

        try:
            for delta in reply.deltas:
                yield event([{"index": 0, "delta": delta, "finish_reason": None}])
                await asyncio.sleep(0.001)
            while reply.waits and not self.release.is_set():
                await asyncio.sleep(0.005)
            if reply.breaks:
                raise ConnectionError
            if reply.ends_early:
                return
            if reply.error:
                yield f"data: {json.dumps(responses.error(reply.error, 'error'))}\n\n"
                return
            yield event([{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}])
            yield event([], usage={"completion_tokens": len(reply.deltas)})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of an application on loopback."""
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join()


class Tab:
    """A page that is open, and what it did: requests and messages of the console."""

    def __init__(self, browser: Any, url: str, size: str = "wide", **options: Any):
        width, height = SIZES[size]
        self.url: str = url
        self.context: Any = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page: Any = self.context.new_page()
        self.page.set_default_timeout(5000)
        self.requests: list[str] = []
        self.console: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"exception: {error}"))
        self.page.on("dialog", lambda dialog: (self.console.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(url)

    def send(self, message: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(message)
        self.page.keyboard.press("Enter")

    def wait_for_answer(self) -> None:
        self.page.wait_for_selector("#send[aria-label=Send]", state="attached")

    def ask(self, message: str) -> None:
        self.send(message)
        self.wait_for_answer()

    def wait_until(self, expression: str) -> None:
        """Waits for a condition in JavaScript. Playwright's function needs eval, which the page's policy forbids."""
        end = time.monotonic() + 5
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(10)

    def answers(self) -> list[str]:
        return self.page.locator(".markdown").all_inner_texts()

    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


def user_texts(tab: Tab) -> list[str]:
    return tab.page.locator(".user-text").all_inner_texts()


def error_text(tab: Tab) -> str:
    return tab.page.locator(".error p").last.inner_text()


def expect_status(tab: Tab, *statuses: int) -> None:
    """The browser writes answers that are errors to the console."""
    found = [int(code) for line in tab.console for code in re.findall(r"with a status of (\d+)", line)]
    assert found == [*statuses], tab.console
    tab.console.clear()
