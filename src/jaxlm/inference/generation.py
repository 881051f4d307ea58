"""generate and stream: from prompts in any form to text, with the counts and speeds that belong to it."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm.devices import distributed, hardware
from jaxlm.inference import engine
from jaxlm.inference.decoding import CompiledSteps
from jaxlm.inference.memory import check_memory
from jaxlm.inference.prompts import resolve_max_tokens, split_prompts, stop_ids, to_ids
from jaxlm.inference.sampling import bias_of
from jaxlm.inference.sampling_params import SamplingParams, from_kwargs
from jaxlm.processing.detokenizer import TextStream

if TYPE_CHECKING:
    from jaxlm.model import Model

# A text, a chat, token ids; or a list of them.
Prompt = str | Sequence[Any]


class CompletionChunk(str):
    """New text of one answer, as `stream` yields it: a str with what is known so far.

    index: which prompt; tokens: the ids behind the text; logprobs: one engine.Logprobs a token when asked for;
    prompt_tokens, generation_tokens: counts up to here; first_token_seconds and tokens_per_second (of generation, after
    the first token), both without compile_seconds; finish_reason: None, or on the last piece "stop" (a stop token or
    string) or "length"; seed: gives the same text again.
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
    """The whole text of an answer: a str with what a Piece has, of the whole."""

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


def generate(
    model: "Model", prompt: Prompt, *, batch_size: int | None = None, template_args: Any = None, **options: Any
) -> Any:
    """The model's continuation of a prompt, or its answer to a chat.

    prompt: a str (continued as it stands), a list of messages {"role", "content"} (put through the chat template), a
    list of token ids; or a list of any of these, decoded `batch_size` at a time, which gives a list. Options are those
    of `sampling_params.Options`: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
    frequency_penalty, logit_bias, stop, stop_token_ids, seed, ignore_eos, logprobs; what is left out comes from the
    checkpoint's generation_config.json. Returns a Completion (a str), or a list of them. Raises ValueError for what a
    prompt or an option cannot be.
    """
    if isinstance(model, str | Path):
        raise ValueError(f"generate takes a model, not a name: jaxlm.generate(jaxlm.load({str(model)!r}), …)")
    prompts, single = split_prompts(prompt)
    answers: list[list[CompletionChunk]] = [[] for _ in prompts]
    resolved = resolve(model, options)
    for piece in _stream(model, prompts, resolved, batch_size, template_args or {}):
        answers[piece.index].append(piece)
    whole = [join_chunks(pieces) for pieces in answers]
    return whole[0] if single else whole


def stream(
    model: "Model", prompt: Prompt, *, batch_size: int | None = None, template_args: Any = None, **options: Any
) -> Iterator[CompletionChunk]:
    """As `generate`, but yields each Piece of text as soon as it is there; pieces of several prompts are told apart
    by their `index`. Never shows half a character, nor the beginning of what may be a stop string."""
    prompts, _ = split_prompts(prompt)
    return _stream(model, prompts, resolve(model, options), batch_size, template_args or {})


def resolve(model: "Model", options: dict[str, Any]) -> SamplingParams:
    """Options with every number filled in: as given, else from generation_config.json, else neutral; a seed is drawn
    where none is given."""
    asked = from_kwargs(**options)
    seed = int.from_bytes(os.urandom(4), "little") if asked.seed is None else asked.seed
    seed = int(distributed.broadcast(str(seed))) if asked.seed is None and model.is_multiprocess else seed
    return replace(asked.resolve(model.generation_config), seed=seed, max_tokens=asked.max_tokens)


def requests_for(
    model: "Model", prompts: list[Any], options: SamplingParams, template_args: Any
) -> list[engine.Request]:
    """One request a prompt. Equal prompts draw from different keys; otherwise a key depends on the seed alone, so
    that a sequence's text does not depend on what shares its batch."""
    if options.stop and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.source} has none")
    bias_of([options.logit_bias], model.config.V)  # refuses ids outside the vocabulary
    stops = stop_ids(model, options)
    seed, repeats = jax.random.key(options.seed or 0), Counter[tuple[int, ...]]()
    requests = []
    for number, prompt in enumerate(prompts):
        try:
            ids = to_ids(model, prompt, template_args)
            most = resolve_max_tokens(model, ids, options.max_tokens)
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}" if len(prompts) > 1 else str(error)) from None
        key = jax.random.fold_in(seed, repeats[tuple(ids)])
        repeats[tuple(ids)] += 1
        requests.append(engine.Request(ids, options, most, stops, key))
    return requests


def _stream(
    model: "Model", prompts: list[Any], options: SamplingParams, batch_size: int | None, template_args: Any
) -> Iterator[CompletionChunk]:
    requests = requests_for(model, prompts, options, template_args)
    if model.is_multiprocess:
        asked = [(r.ids, r.max_tokens, sorted(r.stop_ids)) for r in requests]
        digest = hashlib.sha256(repr((asked, options, batch_size)).encode()).hexdigest()[:8]
        told = f"{len(requests)} prompts of {sum(len(r.ids) for r in requests)} tokens ({digest})"
        distributed.assert_equal("what is to be generated", digest, told)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more (--batch-size)")
    slots = min(len(requests), batch_size or hardware.BATCH[model.device.platform])
    check_memory(model, requests, slots)
    steps = CompiledSteps(model)
    answers = [Answer(steps, i, request) for i, request in enumerate(requests)]
    for token in engine.run(steps, requests, slots):
        piece = answers[token.index].add(token)
        if piece is not None:
            yield piece


class Answer:
    """Turns the tokens of one request into pieces of text."""

    def __init__(self, steps: CompiledSteps, index: int, request: engine.Request):
        self.steps, model = steps, steps.model
        self.index, self.request = index, request
        stop = request.options.stop or ()
        self.text = None if model.tokenizer is None else TextStream(model.tokenizer, stop, request.ids)
        self.tokens: list[int] = []
        self.logprobs: list[engine.Logprobs] = []
        self.compiled = [steps.seconds] * 2  # when the request began, and when its first token was there

    def add(self, token: engine.Token) -> CompletionChunk | None:
        """The text that this token sets free; None while there is none to show."""
        request = self.request
        if request.made == 1:
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
        return self._piece(text)

    def _piece(self, text: str) -> CompletionChunk:
        request, piece = self.request, CompletionChunk(text)
        before, after = self.compiled[1] - self.compiled[0], self.steps.seconds - self.compiled[1]
        seconds = time.perf_counter() - request.first - after
        piece.index = self.index
        piece.tokens, self.tokens = self.tokens, []
        piece.logprobs, self.logprobs = (None if request.options.logprobs is None else self.logprobs), []
        piece.prompt_tokens, piece.generation_tokens = len(request.ids), request.made
        piece.first_token_seconds = request.first - request.started - before
        piece.compile_seconds = before + after
        piece.seed = request.options.seed or 0
        piece.tokens_per_second = (request.made - 1) / seconds if request.made > 1 else 0.0
        piece.finish_reason = request.finished
        return piece


def join_chunks(pieces: list[CompletionChunk]) -> Completion:
    """The pieces of one answer as one."""
    whole, last = Completion("".join(pieces)), pieces[-1]
    whole.tokens = [token for piece in pieces for token in piece.tokens]
    whole.logprobs = None if last.logprobs is None else [x for piece in pieces for x in piece.logprobs or []]
    whole.finish_reason = last.finish_reason or "length"
    whole.prompt_tokens, whole.generation_tokens = last.prompt_tokens, last.generation_tokens
    whole.first_token_seconds, whole.tokens_per_second = last.first_token_seconds, last.tokens_per_second
    whole.compile_seconds, whole.seed = last.compile_seconds, last.seed
    return whole
