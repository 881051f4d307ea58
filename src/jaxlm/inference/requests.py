"""A request: one prompt with its sampling parameters, and the state of its answer."""

import os
import reprlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import distributed, mesh
from jaxlm.inference.prompts import TooLongError, resolve_max_tokens, stop_ids, to_ids
from jaxlm.inference.sampling import bias_of, request_key
from jaxlm.inference.sampling_params import SamplingOptions, SamplingParams, from_kwargs
from jaxlm.inference.structured import Constraint, compile_grammar
from jaxlm.nn import multi_lora

if TYPE_CHECKING:
    from jaxlm.model import Model
    from jaxlm.processing.tokenizer import Tokenizer

MAX_LOGPROBS = 20  # top log-probabilities that a program returns


class Logprobs(NamedTuple):
    """Log-probabilities (in nats) under the raw logits: of the token, and of the most likely tokens (id, value).

    `text` is the text of the token, and `top_texts` those of the most likely tokens; empty without a tokenizer.
    """

    chosen: float
    top: list[tuple[int, float]]
    text: str = ""
    top_texts: tuple[str, ...] = ()

    def with_texts(self, tokenizer: "Tokenizer | None", token: int) -> "Logprobs":
        """The same with texts."""
        if tokenizer is None:
            return self
        return self._replace(
            text=tokenizer.token_text(token), top_texts=tuple(tokenizer.token_text(i) for i, _ in self.top)
        )


class RequestOptions(SamplingOptions, total=False):
    """Options of one request: the fields of SamplingParams, and these.

    Attributes:
        system: System message, in front of messages that have none.
        template_args: Variables of the chat template, such as {"enable_thinking": False}.
        schema: JSON schema of the answer: a dict, or a pydantic model.
        regex: Regular expression that the whole answer matches.
        grammar: Lark grammar of the answer.
        constraint: A function that returns a new Constraint, in place of a schema, regex or grammar.
        prompt_logprobs: Compute the log-probabilities of the tokens of the prompt. It is prefilled as a whole.
        echo: Begin the text with the prompt, and the tokens and log-probabilities with those of the prompt.
        stop_when: A function of the token ids of the answer so far. The answer ends when it returns True.
        skip_special_tokens: Omit special tokens from the text (the default).
    """

    system: str | None
    template_args: Mapping[str, Any] | None
    schema: Any
    regex: str | None
    grammar: str | None
    constraint: Callable[[], Constraint] | None
    prompt_logprobs: bool
    echo: bool
    stop_when: Callable[[Sequence[int]], bool] | None
    skip_special_tokens: bool


@dataclass(eq=False, repr=False)
class Request:
    """One prompt with its sampling parameters. `request_of` makes one from a prompt in any format.

    Attributes:
        ids: Token ids of the prompt.
        options: Sampling parameters; every field has a value.
        max_tokens: Maximum number of tokens to generate. 0: the request ends when its prompt is prefilled.
        tokenizer: Converts its tokens to text; None if there is no text.
        stop_ids: Token ids that end the answer.
        key: Typed PRNG key.
        index: Index of the prompt in a batch.
        sample: Index among the samples of the prompt.
        constraint, prompt_logprobs, echo, stop_when, skip_special_tokens: See RequestOptions.
        adapter: Index of its adapter (nn.multi_lora); multi_lora.BASE for none.
        emit: Receives the chunks of the answer. None: `Engine.step` returns them.
        tokens: The tokens of the answer so far.
        cancelled: Whether the request is to end; set by `Engine.cancel`.
        finished: None, "stop", "length", "cancelled" or "error".
        error: The error that ended the request.
        cached: Number of prompt tokens that were in the prefix cache.
        prompt_scores: The log-probabilities of the prompt; None for the first token.
        started, first: Times of the request and of its first token.
    """

    ids: list[int]
    options: SamplingParams
    max_tokens: int
    tokenizer: "Tokenizer | None"
    stop_ids: frozenset[int] = frozenset()
    key: Any = None
    index: int = 0
    sample: int = 0
    constraint: Constraint | None = None
    prompt_logprobs: bool = False
    echo: bool = False
    stop_when: Callable[[Sequence[int]], bool] | None = None
    skip_special_tokens: bool = True
    adapter: int = multi_lora.BASE
    emit: Callable[[Any], None] | None = None
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: Exception | None = None
    cancelled: bool = False
    cached: int = 0
    prompt_scores: list[Logprobs | None] | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    @cached_property
    def array(self) -> np.ndarray:
        """The token ids of the prompt, [T] int32."""
        return np.asarray(self.ids, np.int32)

    @property
    def needs_full_state(self) -> bool:
        """Whether the request has penalties, a logit bias or log-probabilities."""
        options = self.options
        return options.penalized or bool(options.logit_bias) or options.logprobs is not None

    def __repr__(self) -> str:
        state = self.finished or ("running" if self.tokens else "waiting")
        return (
            f"Request({len(self.ids):,} prompt tokens, {len(self.tokens):,} of {self.max_tokens:,} new ones, {state})"
        )

    def fail(self, error: Exception) -> None:
        """Ends the request with an error."""
        self.finished, self.error = "error", error


def require_untraced(model: "Model", caller: str) -> None:
    """Raises TypeError within jax.jit, or if the weights are traced: sampling and scheduling run on the host."""
    leaf = jax.tree.leaves(model.weights["embed"])[0]
    if mesh.traced(leaf) or mesh.traced(jnp.zeros(())):
        raise TypeError(
            f"{caller} cannot be called within jax.jit, jax.grad or jax.vmap, because its loop runs on the host: call "
            "it outside, or use model.forward"
        )


def resolve(model: "Model", options: Mapping[str, Any], others: Sequence[str] = ()) -> SamplingParams:
    """Sampling parameters with all values set: the given value, else that of generation_config.json, else the neutral
    value. Without a given seed, a random one is drawn; all processes use that of the coordinator.
    `others` are names of other options of the caller, for the message about an unknown one."""
    given = from_kwargs(others, **options)
    seed = int.from_bytes(os.urandom(4), "little") if given.seed is None else given.seed
    seed = int(distributed.broadcast(str(seed))) if given.seed is None and model.is_multiprocess else seed
    return replace(given.resolve(model.generation_config), seed=seed, max_tokens=given.max_tokens)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


# The options beside those of SamplingParams: a test of a value, and what it must be. "schema" may be many things, which
# compile_grammar checks.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "system": (lambda value: isinstance(value, str), "a text"),
    "template_args": (lambda value: isinstance(value, Mapping), "a dict of variables of the chat template"),
    "schema": (lambda value: True, ""),
    "regex": (lambda value: isinstance(value, str), "a text"),
    "grammar": (lambda value: isinstance(value, str), "a text"),
    "constraint": (callable, "a function that returns a new Constraint"),
    "prompt_logprobs": (_is_bool, "True or False"),
    "echo": (_is_bool, "True or False"),
    "stop_when": (callable, "a function of the list of token ids"),
    "skip_special_tokens": (_is_bool, "True or False"),
}


def requests_for(model: "Model", prompts: Sequence[Any], options: Mapping[str, Any], n: int = 1) -> list[Request]:
    """Creates n requests for each prompt.

    The random numbers of a request depend on its seed, its prompt, and its number among equal prompts, and not on the
    other requests.

    Args:
        model: The model.
        prompts: Prompts in any format.
        options: See RequestOptions.
        n: Number of samples of each prompt.

    Raises:
        ValueError: A prompt or an option is invalid.
        TypeError: An option is unknown.
    """
    more: dict[str, Any] = {name: options[name] for name in _KINDS if options.get(name) is not None}
    for name, value in more.items():
        is_valid, text = _KINDS[name]
        if not is_valid(value):
            raise ValueError(f"{name}={reprlib.repr(value)}: must be {text}")
    params = resolve(model, {name: value for name, value in options.items() if name not in _KINDS}, tuple(_KINDS))
    stops = stop_ids(model, params)
    start, echo = _constraint(model, more, stops), bool(more.get("echo"))
    scored = bool(more.get("prompt_logprobs")) or (echo and params.logprobs is not None)
    if params.stop and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.source} has none: use stop_token_ids")
    bias_of([params.logit_bias], model.config.V)  # raises for ids outside the vocabulary
    repeats = Counter[tuple[int, ...]]()
    requests = []
    for number, prompt in enumerate(prompts):
        try:
            ids = to_ids(model, prompt, dict(more.get("template_args") or {}), more.get("system"))
            max_tokens = resolve_max_tokens(model, ids, params.max_tokens)
        except ValueError as error:
            text = f"prompts[{number}]: {error}" if len(prompts) > 1 else str(error)
            raise (TooLongError if isinstance(error, TooLongError) else ValueError)(text) from None
        for sample in range(n):
            key = request_key(params.seed or 0, ids, repeats[tuple(ids)])
            repeats[tuple(ids)] += 1
            constraint, rest = start and start(), (more.get("stop_when"), more.get("skip_special_tokens", True))
            fields = (ids, params, max_tokens, model.tokenizer, stops, key, number, sample, constraint, scored, echo)
            requests.append(Request(*fields, *rest))
    return requests


def _constraint(model: "Model", more: Mapping[str, Any], stops: frozenset[int]) -> Callable[[], Constraint] | None:
    """A function that starts the constraint of an answer; None if there is none."""
    given = {name: more[name] for name in ("schema", "regex", "grammar", "constraint") if more.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: an answer can have one of them")
    if not given or "constraint" in given:
        return given.get("constraint")
    if model.tokenizer is None:
        raise ValueError(f"{next(iter(given))} needs a tokenizer, and {model.source} has none")
    if not stops:
        raise ValueError(f"{next(iter(given))} needs a stop token at the end of the answer: omit ignore_eos")
    return compile_grammar(model.tokenizer, model.config.V, stop_ids=sorted(stops), **given).start
