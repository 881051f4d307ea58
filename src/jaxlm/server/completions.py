"""The endpoints that generate: chats and completions, whole and streamed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxlm.inference.completion import CompletionChunk, join_chunks
from jaxlm.inference.prompts import split_prompts
from jaxlm.inference.requests import Request
from jaxlm.server import responses
from jaxlm.server.reasoning import Splitter
from jaxlm.server.responses import Envelope
from jaxlm.server.schemas import ChatBody, CompletionBody, SamplingBody
from jaxlm.server.state import Refused, Server, as_refused


async def chat(server: Server, http: HttpRequest) -> Response:
    body = await server.read(http, ChatBody)
    template = server.model.tokenizer
    if body.tools and not (template is not None and template.template_accepts("tools")):
        raise Refused(400, f"tools: the chat template of {server.name} does not write them")
    requests = await asyncio.to_thread(server.requests, [body.messages], body)
    tokenizer = server.model.tokenizer
    assert tokenizer is not None  # else the prompt would have raised
    opened = _inside_reasoning(server, requests[0])
    splitters = [Splitter(tokenizer.thinking is not None, opened, bool(body.tools)) for _ in requests]
    envelope = Envelope("chat.completion", server.name)

    def choice(n: int, chunk: CompletionChunk, last: bool, name: str) -> dict[str, Any]:
        message = responses.message(splitters[n].add(str(chunk), last))
        reason = "tool_calls" if chunk.finish_reason == "stop" and splitters[n].count else chunk.finish_reason
        return {
            "index": n,
            name: message,
            "logprobs": responses.chat_logprobs(chunk.logprobs),
            "finish_reason": reason,
        }

    if body.stream:

        def first(n: int) -> dict[str, Any]:
            return {"index": n, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

        def part(n: int, chunk: CompletionChunk) -> dict[str, Any]:
            return choice(n, chunk, chunk.finish_reason is not None, "delta")

        return await _streamed(server, http, envelope, requests, body, part, first)
    answers = await _whole(server, http, requests)
    choices = [choice(n, answer, True, "message") for n, answer in enumerate(answers)]
    for each in choices:
        each["message"]["role"] = "assistant"
    return JSONResponse(envelope.whole(choices, responses.usage(answers, 1)))


async def complete(server: Server, http: HttpRequest) -> Response:
    body = await server.read(http, CompletionBody)
    prompts, _ = split_prompts(body.prompt)
    requests = await asyncio.to_thread(server.requests, prompts, body)
    envelope = Envelope("text_completion", server.name)
    lengths = [0] * len(requests)

    def choice(n: int, chunk: CompletionChunk) -> dict[str, Any]:
        at, lengths[n] = lengths[n], lengths[n] + len(chunk)
        tokenizer = server.model.tokenizer if chunk.logprobs is not None else None
        texts = [tokenizer.token_text(i) for i in chunk.tokens] if tokenizer else []
        scores = responses.completion_logprobs(chunk.logprobs, texts, at)
        return {"index": n, "text": str(chunk), "logprobs": scores, "finish_reason": chunk.finish_reason}

    if body.stream:
        return await _streamed(server, http, envelope, requests, body, choice, None)
    answers = await _whole(server, http, requests)
    choices = [choice(n, answer) for n, answer in enumerate(answers)]
    ordered = [*answers[:: body.n], *(answer for n, answer in enumerate(answers) if n % body.n)]
    return JSONResponse(envelope.whole(choices, responses.usage(ordered, len(prompts))))


async def _whole(server: Server, http: HttpRequest, requests: list[Request]) -> list[Any]:
    """The answers, when all of them are there. They end if the client is gone."""
    chunks: dict[Request, list[CompletionChunk]] = {request: [] for request in requests}

    async def collect() -> None:
        async for chunk in server.run(requests):
            chunks[chunk.request].append(chunk)

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Refused(499, "the client has closed the connection")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
    return [join_chunks(chunks[request]) for request in requests]


async def _streamed(
    server: Server,
    http: HttpRequest,
    envelope: Envelope,
    requests: list[Request],
    body: SamplingBody,
    choice: Callable[[int, CompletionChunk], dict[str, Any]],
    first: Callable[[int], dict[str, Any]] | None,
) -> Response:
    """Server-sent events. An error before the first chunk is an answer with its status; a later one is an event."""
    numbers = {request: n for n, request in enumerate(requests)}
    chunks = server.run(requests)
    try:
        head = await anext(chunks)
    except StopAsyncIteration:
        raise AssertionError("requests without a chunk") from None

    async def events() -> AsyncIterator[str]:
        last: dict[int, CompletionChunk] = {}
        more = {"usage": None} if body.includes_usage else {}

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps(envelope.part(choices, **more), ensure_ascii=False)}\n\n"

        def each(chunk: CompletionChunk) -> str:
            n = numbers[chunk.request]
            started = n in last
            last[n] = chunk
            beginning = "" if started or first is None else event([first(n)], **more)
            return beginning + event([choice(n, chunk)], **more)

        try:
            yield each(head)
            async for chunk in chunks:
                yield each(chunk)
            if body.includes_usage:
                answers = [last[n] for n in range(len(requests))]
                prompts = len(requests) // body.n
                ordered = [*answers[:: body.n], *(answer for n, answer in enumerate(answers) if n % body.n)]
                yield event([], usage=responses.usage(ordered, prompts))
            yield "data: [DONE]\n\n"
        except Exception as error:
            refused = as_refused(error)
            yield f"data: {json.dumps(responses.error(str(refused), refused.kind))}\n\n"
        finally:
            await chunks.aclose()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _inside_reasoning(server: Server, request: Request) -> bool:
    """Whether the prompt ends inside of reasoning, as the templates of some models render it."""
    tokenizer = server.model.tokenizer
    if tokenizer is None or tokenizer.thinking is None:
        return False
    start, end = tokenizer.thinking
    text = tokenizer.decode(request.ids[-16:], skip_special=False)
    return text.rfind(start) > text.rfind(end)
