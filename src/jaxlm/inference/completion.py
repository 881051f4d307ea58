"""The text of an answer with its token counts and speeds: in chunks while it is generated, and as a whole."""

import time
from typing import Any

from jaxlm.inference.compilation import CompiledSteps
from jaxlm.inference.requests import Logprobs, Request
from jaxlm.processing import html_views
from jaxlm.processing.detokenizer import TextStream


class CompletionChunk(str):
    """A str with the new text of one completion and the state of the completion so far; yielded by `stream`.

    Attributes:
        index: Index of the prompt.
        sample: Index among the samples of the prompt (`n`).
        request: The request, for `Engine.cancel`. None in a copy that pickle made.
        tokens: Token ids of the text.
        logprobs: One Logprobs per token if `logprobs` was set, else None. With `echo`, None for the first token.
        prompt_logprobs: On the first chunk, if `prompt_logprobs` was set, one Logprobs per token of the prompt, None
            for the first token.
        prompt_tokens, generation_tokens: Token counts so far.
        cached_tokens: Number of prompt tokens that were in the prefix cache.
        first_token_seconds: Time to the first token in seconds, without compilation.
        tokens_per_second: Decoding speed after the first token, without compilation.
        compile_seconds: Time spent compiling, in seconds.
        finish_reason: On the last chunk "stop" (a stop token, a stop string, or the end of a grammar), "length",
            "cancelled" or "error", else None.
        error: The error if finish_reason is "error", else None.
        seed: The seed that reproduces the text.
    """

    index: int
    sample: int
    request: Request
    tokens: list[int]
    logprobs: list[Logprobs | None] | None
    prompt_logprobs: list[Logprobs | None] | None
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    compile_seconds: float
    finish_reason: str | None
    error: Exception | None
    seed: int

    @property
    def text(self) -> str:
        return str(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "request": None}  # it may have functions and locks of the engine


class Completion(str):
    """A str with the text of one completion. The attributes are those of CompletionChunk, for the whole text."""

    tokens: list[int]
    logprobs: list[Logprobs | None] | None
    prompt_logprobs: list[Logprobs | None] | None
    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    compile_seconds: float
    seed: int

    @property
    def text(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The text and its counts, for notebooks."""
        tokens = "1 token" if self.generation_tokens == 1 else f"{self.generation_tokens:,} tokens"
        return html_views.text(self, f"{tokens}, {self.tokens_per_second:.1f} tokens/s, ended by {self.finish_reason}")


class Detokenization:
    """Converts the tokens of one request to chunks of text."""

    def __init__(self, steps: CompiledSteps, request: Request):
        self.steps: CompiledSteps = steps
        self.request: Request = request
        tokenizer = request.tokenizer
        given = (request.options.stop or (), request.ids, request.skip_special_tokens)
        self.text: TextStream | None = None if tokenizer is None else TextStream(tokenizer, *given)
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs | None] = []
        self.compiled: list[float] = [steps.seconds] * 2  # compile time at the start, and at the first token
        self.is_first: bool = True

    def add(self, token: int, logprobs: Logprobs | None) -> CompletionChunk | None:
        """Adds a token. Returns the chunk of text that it completes, or None while its text may still change."""
        request = self.request
        if len(request.tokens) == 1:
            self.compiled[1] = self.steps.seconds
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs.with_texts(request.tokenizer, token))
        text = ""
        if self.text is not None:
            if token not in request.stop_ids:
                text = self.text.push(token)
            if self.text.stopped is not None:
                request.finished = "stop"
            elif request.finished:
                text += self.text.flush()
                if self.text.stopped is not None:
                    request.finished = "stop"
        if not (text or request.finished or self.text is None):
            return None
        return self.chunk(text)

    def end(self) -> CompletionChunk:
        """The last chunk of a request that ends without another token."""
        return self.chunk("" if self.text is None or self.request.finished == "error" else self.text.flush())

    def chunk(self, text: str) -> CompletionChunk:
        """A chunk with this text and the tokens since the last one."""
        request, tokens, scores = self.request, self.tokens, self.logprobs
        self.tokens, self.logprobs = [], []
        tokenizer = request.tokenizer
        if self.is_first and request.prompt_scores:
            pairs = zip(request.ids, request.prompt_scores)
            request.prompt_scores = [each and each.with_texts(tokenizer, token) for token, each in pairs]
        if self.is_first and request.echo:
            text = ("" if tokenizer is None else tokenizer.decode(request.ids, skip_special=True)) + text
            tokens, scores = [*request.ids, *tokens], [*(request.prompt_scores or []), *scores]
        chunk = CompletionChunk(text)
        before, after = self.compiled[1] - self.compiled[0], self.steps.seconds - self.compiled[1]
        generated, seconds = len(request.tokens), time.perf_counter() - request.first - after
        chunk.request, chunk.index, chunk.sample = request, request.index, request.sample
        chunk.tokens = tokens
        chunk.logprobs = None if request.options.logprobs is None else scores
        chunk.prompt_logprobs = request.prompt_scores if self.is_first else None
        chunk.prompt_tokens, chunk.generation_tokens = len(request.ids), generated
        chunk.cached_tokens = request.cached
        chunk.first_token_seconds = request.first - request.started - before if request.first else 0.0
        chunk.compile_seconds = before + after
        chunk.seed = request.options.seed or 0
        chunk.tokens_per_second = (generated - 1) / seconds if generated > 1 else 0.0
        chunk.finish_reason, chunk.error = request.finished, request.error
        self.is_first = False
        return chunk


def join_chunks(chunks: list[CompletionChunk]) -> Completion:
    """Joins the chunks of one completion."""
    whole, last = Completion("".join(chunks)), chunks[-1]
    whole.tokens = [token for chunk in chunks for token in chunk.tokens]
    whole.logprobs = None if last.logprobs is None else [x for chunk in chunks for x in chunk.logprobs or []]
    whole.prompt_logprobs = chunks[0].prompt_logprobs
    whole.finish_reason = last.finish_reason or "length"
    whole.prompt_tokens, whole.generation_tokens = last.prompt_tokens, last.generation_tokens
    whole.first_token_seconds, whole.tokens_per_second = last.first_token_seconds, last.tokens_per_second
    whole.compile_seconds, whole.seed, whole.cached_tokens = last.compile_seconds, last.seed, last.cached_tokens
    return whole
