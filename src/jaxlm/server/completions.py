"""The endpoints that generate: chats and completions, whole and streamed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxlm.inference.completion import CompletionChunk, join_chunks
from jaxlm.inference.prompts import split_prompts, to_ids
from jaxlm.inference.requests import Request
from jaxlm.processing.chat_template import THINKING
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.server import responses
from jaxlm.server.connections import answered
from jaxlm.server.logprobs import CompletionLogprobs, chat_logprobs, echoed
from jaxlm.server.reasoning import Splitter
from jaxlm.server.responses import Envelope
from jaxlm.server.schemas import ChatBody, CompletionBody, SamplingBody
from jaxlm.server.state import Refused, Served, Server, as_refused
from jaxlm.server.tool_calls import check_parameters, forced_grammar, form_of, names_of


async def chat(server: Server, http: HttpRequest) -> Response:
    server.check_load()
    body = await server.read(http, ChatBody)
    served = server.served(body.model)
    template = served.model.tokenizer
    if body.callable_tools and not (template is not None and template.template_accepts("tools")):
        way_out = "describe them in a message, or use a model whose template has tools"
        raise Refused(400, f"tools: the chat template of {served.name} does not write them: {way_out}")
    requests, splitters = await asyncio.to_thread(_prepared, server, served, body)
    tokenizer = served.model.tokenizer
    assert tokenizer is not None  # else the prompt would have raised
    envelope = Envelope("chat.completion", served.name)

    def choice(n: int, chunk: CompletionChunk, last: bool, name: str) -> dict[str, Any]:
        message = responses.message(splitters[n].add(str(chunk), last))
        reason = "tool_calls" if chunk.finish_reason == "stop" and splitters[n].count else chunk.finish_reason
        return {
            "index": n,
            name: message,
            "logprobs": chat_logprobs(chunk.logprobs, chunk.tokens, tokenizer),
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
        for call in each["message"].get("tool_calls", ()):
            del call["index"]  # that of a part of a stream
    return JSONResponse(envelope.whole(choices, responses.usage(answers, 1)))


async def complete(server: Server, http: HttpRequest) -> Response:
    server.check_load()
    body = await server.read(http, CompletionBody)
    served = server.served(body.model)
    prompts, _ = split_prompts(body.prompt)
    server.check_load(len(prompts) * body.n)
    requests = await asyncio.to_thread(server.requests, served, prompts, body.options(), body.n)
    if body.max_tokens == 0:  # the prompt is all that is asked for
        for request in requests:
            request.max_tokens = 0
    envelope, tokenizer = Envelope("text_completion", served.name), served.model.tokenizer
    echoes: dict[int, tuple[str, list[int]]] = {}
    for n, request in enumerate(requests if body.echo else []):
        echoes[n] = await asyncio.to_thread(echoed, tokenizer, prompts[request.index], request.ids)
    lengths = [0] * len(requests)  # characters of the text so far
    columns = [CompletionLogprobs(tokenizer, r.ids, len(echoes[n][0]) if echoes else 0) for n, r in enumerate(requests)]

    def choice(n: int, chunk: CompletionChunk) -> dict[str, Any]:
        text, scores, echo = str(chunk), None, echoes.pop(n, None)
        if echo is not None:
            text = echo[0] + text
        lengths[n] += len(text)
        if chunk.logprobs is not None:
            scores = columns[n].add(chunk.logprobs, chunk.tokens, lengths[n])
            if echo is not None:
                ids = requests[n].ids
                first = columns[n].columns(chunk.prompt_logprobs or [], ids, echo[1])
                scores = {name: first[name] + scores[name] for name in first}
        return {"index": n, "text": text, "logprobs": scores, "finish_reason": chunk.finish_reason}

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

    await answered(http, collect())
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

    async def first_chunk() -> CompletionChunk:
        return await anext(chunks)

    head = await answered(http, first_chunk())

    async def events() -> AsyncIterator[str]:
        last: dict[int, CompletionChunk] = {}
        more = {"usage": None} if body.includes_usage else {}

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps(envelope.part(choices, **more), ensure_ascii=False)}\n\n"

        def each(chunk: CompletionChunk) -> str:
            n = numbers[chunk.request]
            started = n in last
            last[n] = chunk
            parts = [choice(n, chunk)]
            if first is not None and not started:
                parts.insert(0, first(n))
            if first is not None and (reason := parts[-1]["finish_reason"]) is not None:
                # In a chunk of its own, as from OpenAI: their client takes a tool call for complete in a later chunk.
                parts[-1]["finish_reason"] = None
                parts.append({"index": n, "delta": {}, "logprobs": None, "finish_reason": reason})
            return "".join(event([part], **more) for part in parts)

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


def _prepared(server: Server, served: Served, body: ChatBody) -> tuple[list[Request], list[Splitter]]:
    """The requests of a chat, and what splits their answers. Runs in a thread."""
    model, options = served.model, body.options()
    ids = to_ids(model, body.messages, options.pop("template_args"))
    assert model.tokenizer is not None  # else the prompt would have raised
    reasoning = _reasoning(model.tokenizer, ids)
    tools, form = body.callable_tools, form_of(model)
    several, reasons = body.takes_several_calls, model.tokenizer.thinking is not None
    tags = [*(THINKING if reasons else ()), *(form.tags if tools else ())]
    added = model.tokenizer.hf.get_added_vocab()
    if {added.get(tag) for tag in tags} & model.tokenizer.special_ids:
        options["skip_special_tokens"] = False  # some tokenizers have the tags as special tokens
    if body.is_forced:
        options["grammar"] = forced_grammar(form, tools, several, model.tokenizer, reasoning)
    try:
        requests = server.requests(served, [ids], options, body.n)
    except ValueError:
        if body.is_forced:
            check_parameters(model, tools)
        raise
    named = (form if tools else None, names_of(tools), None if several else 1)
    return requests, [Splitter(reasons, reasoning == "open", *named) for _ in requests]


def _reasoning(tokenizer: Tokenizer, ids: list[int]) -> Literal["open", "closed", ""]:
    """Whether the prompt ends inside of reasoning, or after it, as the templates of some models render it."""
    if tokenizer.thinking is None:
        return ""
    start, end = tokenizer.thinking
    text = tokenizer.decode(ids[-16:], skip_special=False)
    if text.rfind(start) > text.rfind(end):
        return "open"
    return "closed" if text.rstrip().endswith(end) else ""
