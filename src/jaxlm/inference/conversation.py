"""Conversation: several turns over one growing cache, of which each turn computes only what is new."""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.devices import hardware
from jaxlm.inference import decoding, engine, generation, memory, prompts
from jaxlm.inference.generation import CompletionChunk
from jaxlm.inference.sampling_params import SamplingParams, from_kwargs
from jaxlm.nn import kv_cache as caches
from jaxlm.nn import params
from jaxlm.processing.chat_template import THINKING, split_thinking

if TYPE_CHECKING:
    from jaxlm.model import Model

START = 1024  # positions of a new cache, if the context has as many; it doubles when they are used up
Messages = list[dict[str, str]]


class CachedPrefix(NamedTuple):
    """A beginning of the conversation as text, and the ids that stood for it when the model read or wrote it."""

    text: str
    ids: list[int]


class Conversation:
    """A chat with a model, one turn after the other; a model without chat template continues the text instead.

        talk = jaxlm.Conversation(model, system="Be brief.", temperature=0.7)
        for piece in talk.send("Why is the sky blue?"):
            print(piece, end="")

    The cache of keys and values stays from turn to turn, so that a turn prefills only its new tokens, `prefilled` of
    them. Options are those of jaxlm.generate, with one difference: without max_tokens an answer may fill the context.

    Attributes:
        messages: {"role": "user" or "assistant", "content": text}, oldest first, without the system message and
            without what a thinking model thought. It changes when an answer ends, or is stopped.
        system: the system message or None; template_args: variables of the chat template. Both count from the next
            turn on.
        options: jaxlm.inference.sampling_params.SamplingParams, as given.
        prefilled: how many tokens of its prompt the last turn had to compute.
        opened: whether the prompt of the last turn ended inside a block of thinking, as some templates write it.
    """

    def __init__(
        self,
        model: "Model",
        *,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer: a conversation needs one (jaxlm.generate takes ids)")
        self.model, self.tokenizer = model, model.tokenizer
        self.system = system
        self.template_args = dict(template_args or {})
        self.options = from_kwargs(**options)
        self._running: Any = None
        self.reset()

    def reset(self) -> None:
        """Forgets all messages; the system message and the options stay."""
        self.stop()
        self.messages: Messages = []
        self.prefilled = 0
        self.opened = False
        self._turns = 0  # moves the seed on, so that no two answers use the same draws
        self._seen: list[CachedPrefix] = []  # of the last turn: with its answer, and its prompt alone
        self._kv: caches.KVCache | None = None
        self._written: list[int] = []  # the tokens whose keys and values the cache holds

    def set(self, name: str, value: Any) -> None:
        """Changes an option from the next turn on; None gives it back to the model. TypeError for a name that is no
        option, ValueError for a value out of range."""
        default = next((field.default for field in fields(SamplingParams) if field.name == name), None)
        self.options = from_kwargs(**{**_given(self.options), name: default if value is None else value})

    def send(self, text: str) -> Iterator[CompletionChunk]:
        """The model's answer to a message, in pieces of text as they are made
        (jaxlm.inference.generation.CompletionChunk).

        Nothing is kept of a turn that fails or is stopped before its first token; a later stop (the iterator closed,
        Ctrl-C, the next call) keeps what there is of the answer. Raises ValueError when the context is full or the
        chat template refuses.
        """
        self.stop()
        return self._turn([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Iterator[CompletionChunk]:
        """Another answer to the last message, in the place of the one it had; drawn anew."""
        self.stop()
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("there is no message yet that could be answered again")
        return self._turn(self.messages[: asked[-1] + 1])

    def stop(self) -> None:
        """Ends the answer that is being made, if any; what there is of it is kept."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def save(self, path: str | Path) -> None:
        """Writes messages, system message, options and template arguments as JSON. OSError says why it cannot."""
        self.stop()
        state = {
            "model": self.model.source,
            "system": self.system,
            "messages": self.messages,
            "options": _given(self.options),
            "template_args": self.template_args,
        }
        with explain_errors(f"{path} cannot be written", "choose a file in a folder that can be written to", OSError):
            write_atomically(Path(path), json.dumps(state, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: str | Path) -> None:
        """Goes on with a conversation written by `save`, of this model or another. ValueError or OSError names a bad
        file."""
        hint = "choose a file that /save (Conversation.save) wrote"
        invalid = (ValueError, TypeError, KeyError, AttributeError)
        with explain_errors(f"{path} cannot be read", hint, OSError):
            text = Path(path).read_bytes()
        with explain_errors(f"{path} is no conversation", hint, invalid):
            state = json.loads(text.decode("utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in state["messages"]]
            options = {"logit_bias": None, **state.get("options", {})}
            if options["logit_bias"]:  # the keys of JSON objects are texts
                options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
            options = from_kwargs(**options)
            template_args = dict(state.get("template_args") or {})
        self.reset()
        self.messages, self.options, self.template_args = messages, options, template_args
        self.system = state.get("system")

    def _turn(self, messages: Messages) -> Iterator[CompletionChunk]:
        """Prepares the answer to `messages`; the work begins with the first piece that is asked for."""
        model = self.model
        text = self._render(messages)
        ids = prompts.to_ids(model, self._ids(text), {})
        left = model.config.context - len(ids)
        if left < 1:
            raise ValueError(
                f"the context is full: the conversation has {len(ids):,} tokens, {model.source} takes "
                f"{model.config.context:,}. Begin anew with /reset (Conversation.reset)"
            )
        options = generation.resolve(model, _given(self.options))
        seed = ((options.seed or 0) + self._turns) % 2**32
        options = replace(options, seed=seed)
        self._turns += 1
        self.opened = self._thinks and text.rstrip().endswith(THINKING[0])
        most = options.max_tokens or (
            left if self.tokenizer.has_template else prompts.resolve_max_tokens(model, ids, None)
        )
        stops = prompts.stop_ids(model, options)
        key = jax.random.fold_in(jax.random.key(seed), 0)  # as jaxlm.generate: piece.seed serves there too
        self._running = self._answer(messages, text, engine.Request(ids, options, min(most, left), stops, key))
        return self._running

    def _answer(self, messages: Messages, text: str, request: engine.Request) -> Iterator[CompletionChunk]:
        answer, made, shown = generation.Answer(self.model, 0, request), [], ""
        last = self._prefill(request.ids)
        try:
            for token in self._decode(request, last):
                made.append(token.id)
                piece = answer.add(token)
                if piece is not None:
                    shown += piece
                    yield piece
        finally:
            if made:
                self._keep(messages, text, request, made, shown)

    def _keep(self, messages: Messages, text: str, request: engine.Request, made: list[int], shown: str) -> None:
        """Notes a turn that has ended, or was stopped."""
        ids, tail = request.ids, made
        self._written = [*ids, *made][:-1]  # the last token was read, but never given to the model
        if not self.tokenizer.has_template and made[-1] in request.stop_ids:
            tail = made[:-1]  # the text goes on, so this was not its end
        after = self._decoded([*ids, *tail])[len(self._decoded(ids)) :]
        self._seen = [CachedPrefix(text + after, [*ids, *tail]), CachedPrefix(text, ids)]
        content = split_thinking(shown, self.opened)[1] if self._thinks else shown
        self.messages = [*messages, {"role": "assistant", "content": content}]

    @property
    def _thinks(self) -> bool:
        return self.tokenizer.thinking is not None and self.tokenizer.has_template

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def _render(self, messages: Messages) -> str:
        """The whole conversation as the model reads it, up to where its answer begins."""
        if self.tokenizer.has_template:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return self.tokenizer.render(system + messages, **self.template_args)
        if self.system:
            raise ValueError(f"{self.model.source} has no chat template, so it takes no system message")
        return "".join(message["content"] for message in messages)

    def _ids(self, text: str) -> list[int]:
        """Token ids of the conversation. What the model has seen keeps its ids: it may have spelled its own words with
        other tokens than the tokenizer would, and with those its keys and values were computed."""
        for seen in self._seen:
            if text.startswith(seen.text):
                rest = text[len(seen.text) :]
                ids = [*seen.ids, *(self.tokenizer.encode(rest, add_special_tokens=False) if rest else [])]
                # Some tokenizers put a space before every text that they are given.
                if self._decoded(ids) == self._decoded(seen.ids) + rest:
                    return ids
        return self.tokenizer.encode(text, add_special_tokens=not self.tokenizer.has_template)

    def _prefill(self, ids: list[int]) -> jax.Array:
        """Brings the cache to `ids` -> the last hidden state [1,D]. What the cache holds of them is not computed again,
        but for the last token, whose hidden state is wanted."""
        kv, self._kv = self._kv, None  # an interrupt in what follows leaves no cache, rather than half of one
        same = (i for i, pair in enumerate(zip(ids, self._written)) if pair[0] != pair[1])
        m = next(same, min(len(self._written), len(ids) - 1))
        if kv is None or not m or not can_reuse(kv, self.model.config.windows, m):
            kv, m = None, 0
        self.prefilled = len(ids) - m
        kv, last = engine.extend(self.model, self._fit(kv, len(ids)), [ids[m:]], m)
        self._written = ids
        self._kv = kv
        return last

    def _decode(self, request: engine.Request, last: jax.Array) -> Iterator[engine.Token]:
        """The tokens of an answer. One program is ahead of what is read, so that the device does not wait."""
        model, k = self.model, request.options.logprobs
        steps = hardware.STEPS[model.device.platform]
        # Without the cache in it the first program does not depend on the cache's length.
        state = engine.new_rows(model, [request], None, engine.optional([request]))
        state, made = model.programs.pick(k, model.weights, state, last)(model.weights, state, last)
        yield from engine.fetch_tokens([request], made, [(0, 0)])
        in_flight: deque[decoding.StepOutput] = deque()
        pos, left = len(request.ids), request.max_tokens - 1  # of the newest token; tokens still to be asked for
        while not request.finished:
            if left > 0:
                self._kv = self._fit(self._kv, pos + steps)
                state = state._replace(kv=self._kv)
                program = model.programs.step(k, steps, model.weights, state)
                self._kv = None  # donated
                state, made = program(model.weights, state)
                self._kv = state.kv
                in_flight.append(made)
                pos, left = pos + steps, left - steps
            if len(in_flight) > 1 or left <= 0:
                yield from engine.fetch_tokens([request], in_flight.popleft(), [(0, 0)])

    def _fit(self, kv: caches.KVCache | None, need: int) -> caches.KVCache:
        """A cache for `need` positions: this one if they fit, else a larger one with the same contents."""
        model = self.model
        context = model.config.context
        if kv is not None and (need <= kv.length or kv.length == context):
            return kv
        length = START
        while length < need:
            length *= 2
        length = min(length, context)
        chunk = hardware.CHUNK[model.device.platform]
        make = partial(model.init_kv, 1, length, chunk=chunk)
        hint = "begin anew with /reset (Conversation.reset), or use a smaller model"
        needed = params.nbytes(jax.eval_shape(make)) // memory.memories(model)[1]
        hardware.require(needed, model.device, f"{length:,} tokens of conversation", hint)
        if kv is None:
            return make()
        return engine.resize_cache(model, kv, length, chunk)


def _given(options: SamplingParams) -> dict[str, Any]:
    """The options that are not at their default."""
    return {f.name: v for f in fields(options) if (v := getattr(options, f.name)) != f.default}


def can_reuse(kv: caches.KVCache, windows: tuple[int | None, ...], m: int) -> bool:
    """Whether the cache of one row has all that tokens from position m on look back to.

    A layer with window W needs positions m - W + 1 to m - 1. Once its ring of W + C - 1 slots (C: chunk) has been
    written up to position n - 1, it holds n - W - C + 1 to n - 1: it can go back by C tokens and no more, and n counts
    also what the device wrote behind the end of an answer that was cut off. Slots that hold positions from m on (of
    what was said before and is now dropped) do no harm: no query before such a position sees it, and when a query has
    come that far, its slot has been written anew.
    """
    at = {int(S): np.asarray(positions)[0] for S, positions in kv.positions.items()}
    for window, S in {(window, w["k"].shape[2]) for window, w in zip(windows, kv.layers, strict=True)}:
        needed = np.arange(0 if window is None else max(0, m - window + 1), m)
        if (at[S][needed % S] != needed).any():
            return False
    return True
