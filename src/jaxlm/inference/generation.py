"""generate and stream: text from prompts in any format, with token counts and speeds."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np

from jaxlm.devices import distributed, hardware
from jaxlm.inference import engine
from jaxlm.inference.decoding import CompiledSteps
from jaxlm.inference.memory import check_memory
from jaxlm.inference.prompts import resolve_max_tokens, split_prompts, stop_ids, to_ids
from jaxlm.inference.sampling import bias_of, request_key
from jaxlm.inference.sampling_params import SamplingOptions, SamplingParams, from_kwargs
from jaxlm.processing.detokenizer import TextStream

if TYPE_CHECKING:
    from jaxlm.model import Model

Message = Mapping[str, Any]  # {"role", "content"}, for a chat template
# One prompt: text, messages, or token ids.
Prompt = str | Sequence[Message] | Sequence[int]


class CompletionChunk(str):
    """A str with the new text of one completion and the state of the completion so far; yielded by `stream`.

    Attributes:
        index: Index of the prompt.
        tokens: Token ids of the text.
        logprobs: One engine.Logprobs per token if `logprobs` was set, else None.
        prompt_tokens, generation_tokens: Token counts so far.
        first_token_seconds: Time to the first token in seconds, without compilation.
        tokens_per_second: Decoding speed after the first token, without compilation.
        compile_seconds: Time spent compiling, in seconds.
        finish_reason: On the last chunk "stop" (a stop token or stop string) or "length", else None.
        seed: The seed that reproduces the text.
    """

    index: int
    tokens: list[int]
    logprobs: list[engine.Logprobs] | None
    prompt_tokens: int
    generation_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    compile_seconds: float
    finish_reason: str | None
    seed: int

    @property
    def text(self) -> str:
        return str(self)


class Completion(str):
    """A str with the text of one completion. The attributes are those of CompletionChunk, for the whole text."""

    tokens: list[int]
    logprobs: list[engine.Logprobs] | None
    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    compile_seconds: float
    seed: int

    @property
    def text(self) -> str:
        return str(self)


@overload
def generate(
    model: "Model",
    prompt: Prompt,
    *,
    batch_size: int | None = None,
    template_args: Mapping[str, Any] | None = None,
    **options: Unpack[SamplingOptions],
) -> Completion: ...


@overload
def generate(
    model: "Model",
    prompt: Sequence[Prompt],
    *,
    batch_size: int | None = None,
    template_args: Mapping[str, Any] | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Completion]: ...


def generate(
    model: "Model",
    prompt: Prompt | Sequence[Prompt],
    *,
    batch_size: int | None = None,
    template_args: Mapping[str, Any] | None = None,
    **options: Unpack[SamplingOptions],
) -> Completion | list[Completion]:
    """Generates the continuation of a prompt, or the answer to a chat.

    Args:
        model: The model.
        prompt: A str (continued without the chat template), a list of messages {"role", "content"} (rendered by the
            chat template; a last message of the assistant is continued) or a list of token ids. A list of these is a
            batch.
        batch_size: Number of prompts to decode together (continuous batching). The default depends on the platform.
        template_args: Variables of the chat template, such as {"enable_thinking": False}.
        **options: Fields of `SamplingParams`. The default values come from the checkpoint's generation_config.json.

    Returns:
        A Completion, which is a str; a list of them for a batch.

    Raises:
        ValueError: A prompt or an option is invalid.
        MemoryError: The KV cache does not fit.
    """
    if isinstance(model, str | Path):
        raise ValueError(f"generate needs a model, not a name: jaxlm.generate(jaxlm.load({str(model)!r}), …)")
    prompts, single = split_prompts(prompt)
    chunks: list[list[CompletionChunk]] = [[] for _ in prompts]
    for chunk in _stream(model, prompts, resolve(model, options), batch_size, template_args or {}):
        chunks[chunk.index].append(chunk)
    completions = [join_chunks(each) for each in chunks]
    return completions[0] if single else completions


def stream(
    model: "Model",
    prompt: Prompt | Sequence[Prompt],
    *,
    batch_size: int | None = None,
    template_args: Mapping[str, Any] | None = None,
    **options: Unpack[SamplingOptions],
) -> Iterator[CompletionChunk]:
    """Like `generate`, but yields each CompletionChunk as soon as its text is final.

    `index` is the index of a chunk's prompt. A chunk never ends inside a character or inside a possible stop string.
    The arguments and errors are those of `generate`.
    """
    prompts, _ = split_prompts(prompt)
    return _stream(model, prompts, resolve(model, options), batch_size, template_args or {})


def resolve(model: "Model", options: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters with all values set: the given value, else that of generation_config.json, else the neutral
    value. Without a given seed, a random one is drawn; all processes use that of the coordinator."""
    given = from_kwargs(**options)
    seed = int.from_bytes(os.urandom(4), "little") if given.seed is None else given.seed
    seed = int(distributed.broadcast(str(seed))) if given.seed is None and model.is_multiprocess else seed
    return replace(given.resolve(model.generation_config), seed=seed, max_tokens=given.max_tokens)


def requests_for(
    model: "Model", prompts: list[Any], options: SamplingParams, template_args: Any
) -> list[engine.Request]:
    """Creates one engine request per prompt.

    The PRNG key of a request depends only on the seed, so that its text does not depend on the other requests in the
    batch. Equal prompts get different keys.

    Raises:
        ValueError: A prompt or an option is invalid.
    """
    if options.stop and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.source} has none: use stop_token_ids")
    bias_of([options.logit_bias], model.config.V)  # raises for ids outside the vocabulary
    stops = stop_ids(model, options)
    repeats = Counter[tuple[int, ...]]()
    requests = []
    for number, prompt in enumerate(prompts):
        try:
            ids = to_ids(model, prompt, template_args)
            max_tokens = resolve_max_tokens(model, ids, options.max_tokens)
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}" if len(prompts) > 1 else str(error)) from None
        key = request_key(np.uint32(options.seed or 0), np.uint32(repeats[tuple(ids)]))
        repeats[tuple(ids)] += 1
        requests.append(engine.Request(ids, options, max_tokens, stops, key))
    return requests


def _stream(
    model: "Model", prompts: list[Any], options: SamplingParams, batch_size: int | None, template_args: Any
) -> Iterator[CompletionChunk]:
    requests = requests_for(model, prompts, options, template_args)
    if model.is_multiprocess:
        inputs = [(r.ids, r.max_tokens, sorted(r.stop_ids)) for r in requests]
        digest = hashlib.sha256(repr((inputs, options, batch_size)).encode()).hexdigest()[:8]
        summary = f"{len(requests)} prompts of {sum(len(r.ids) for r in requests)} tokens ({digest})"
        distributed.assert_equal("what to generate", digest, summary)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more (--batch-size)")
    slots = min(len(requests), batch_size or hardware.BATCH[model.device.platform])
    lengths = check_memory(model, requests, slots)
    steps = CompiledSteps(model)
    answers = [Detokenization(steps, i, request) for i, request in enumerate(requests)]
    try:
        for token in engine.run(steps, requests, slots, lengths):
            chunk = answers[token.index].add(token)
            if chunk is not None:
                yield chunk
    finally:
        steps.cancel()


class Detokenization:
    """Converts the tokens of one request to chunks of text."""

    def __init__(self, steps: CompiledSteps, index: int, request: engine.Request):
        self.steps: CompiledSteps = steps
        self.index: int = index
        self.request: engine.Request = request
        model = steps.model
        stop = request.options.stop or ()
        self.text: TextStream | None = (
            None if model.tokenizer is None else TextStream(model.tokenizer, stop, request.ids)
        )
        self.tokens: list[int] = []
        self.logprobs: list[engine.Logprobs] = []
        self.compiled: list[float] = [steps.seconds] * 2  # compile time at the start, and at the first token

    def add(self, token: engine.Token) -> CompletionChunk | None:
        """Adds a token. Returns the chunk of text that it completes, or None while its text may still change."""
        request = self.request
        if request.generated == 1:
            self.compiled[1] = self.steps.seconds
        self.tokens.append(token.id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        text = ""
        if self.text is not None:
            if request.finished != "stop":
                text = self.text.push(token.id)
            if self.text.stopped is not None:
                request.finished = "stop"
            elif request.finished:
                text += self.text.flush()
                if self.text.stopped is not None:
                    request.finished = "stop"
        if not (text or request.finished or self.text is None):
            return None
        return self._chunk(text)

    def _chunk(self, text: str) -> CompletionChunk:
        request, chunk = self.request, CompletionChunk(text)
        before, after = self.compiled[1] - self.compiled[0], self.steps.seconds - self.compiled[1]
        seconds = time.perf_counter() - request.first - after
        chunk.index = self.index
        chunk.tokens, self.tokens = self.tokens, []
        chunk.logprobs, self.logprobs = (None if request.options.logprobs is None else self.logprobs), []
        chunk.prompt_tokens, chunk.generation_tokens = len(request.ids), request.generated
        chunk.first_token_seconds = request.first - request.started - before
        chunk.compile_seconds = before + after
        chunk.seed = request.options.seed or 0
        chunk.tokens_per_second = (request.generated - 1) / seconds if request.generated > 1 else 0.0
        chunk.finish_reason = request.finished
        return chunk


def join_chunks(chunks: list[CompletionChunk]) -> Completion:
    """Joins the chunks of one completion."""
    whole, last = Completion("".join(chunks)), chunks[-1]
    whole.tokens = [token for chunk in chunks for token in chunk.tokens]
    whole.logprobs = None if last.logprobs is None else [x for chunk in chunks for x in chunk.logprobs or []]
    whole.finish_reason = last.finish_reason or "length"
    whole.prompt_tokens, whole.generation_tokens = last.prompt_tokens, last.generation_tokens
    whole.first_token_seconds, whole.tokens_per_second = last.first_token_seconds, last.tokens_per_second
    whole.compile_seconds, whole.seed = last.compile_seconds, last.seed
    return whole
