"""Conversation: a multi-turn chat that keeps the KV cache. Each turn prefills only its new tokens."""

import copy
import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.inference import prompts
from jaxlm.inference.completion import CompletionChunk
from jaxlm.inference.engine import Engine
from jaxlm.inference.requests import Request, resolve
from jaxlm.inference.sampling import request_key
from jaxlm.inference.sampling_params import SamplingOptions, SamplingParams, from_kwargs
from jaxlm.model import Model, require_model
from jaxlm.processing import html_views
from jaxlm.processing.chat_template import THINKING, split_thinking

if TYPE_CHECKING:
    from jaxlm.processing.tokenizer import Tokenizer

Messages = list[dict[str, str]]


class CachedPrefix(NamedTuple):
    """A prefix of the conversation as text, and its token ids in the KV cache."""

    text: str
    ids: list[int]


class Answer:
    """An iterator over the chunks of an answer. The turn ends with the last chunk, with an error or with `close`.

    It is no generator, whose `finally` would end the turn also when the garbage collector closes it. A finalizer must
    not call JAX: on Python 3.11 that frees code that is still running, and the process crashes.
    """

    def __init__(self, chunks: Iterator[CompletionChunk], end: Callable[[], None]):
        self._chunks, self._end, self._ended = chunks, end, False

    def __iter__(self) -> "Answer":
        return self

    def __next__(self) -> CompletionChunk:
        if self._ended:
            raise StopIteration
        try:
            return next(self._chunks)
        except BaseException:  # StopIteration and KeyboardInterrupt too
            self.close()
            raise

    def close(self) -> None:
        """Ends the turn. The text so far is kept."""
        if not self._ended:
            self._ended = True
            self._end()


class Conversation:
    """A multi-turn chat with a model. A model without a chat template continues the text instead.

        conversation = jaxlm.Conversation(model, system="Be brief.", temperature=0.7)
        for chunk in conversation.send("Why is the sky blue?"):
            print(chunk, end="")

    The KV cache is kept between turns, so that a turn prefills only its new tokens. Options are those of
    jaxlm.generate, without batch_size. With a chat template and without max_tokens, an answer may fill the context.

    Attributes:
        messages: {"role": "user" or "assistant", "content": text}, oldest first, without the system message and
            without reasoning. Updated when an answer ends or is stopped.
        system: The system message or None.
        template_args: Variables of the chat template. A change of these or of `system` takes effect in the next turn.
        options: The given sampling parameters (jaxlm.inference.sampling_params.SamplingParams).
        prefilled: Number of prompt tokens that the last turn prefilled.
        opened: Whether the prompt of the last turn ended inside a reasoning block, as some templates render it.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ):
        require_model(model, "Conversation")
        if model.tokenizer is None:
            raise ValueError(
                f"a conversation needs a tokenizer, and {model.source} has no tokenizer: load it with tokenizer=, or "
                "pass token ids to jaxlm.generate"
            )
        self.model: Model = model
        self.tokenizer: Tokenizer = model.tokenizer
        self._engine = Engine(model, 1)
        if system is not None and not isinstance(system, str):
            raise ValueError(f"system={reprlib.repr(system)}: must be a text")
        self.system: str | None = system
        self.template_args: dict[str, Any] = dict(template_args or {})
        self.options: SamplingParams = from_kwargs(**options)
        self._running: Answer | None = None
        self.reset()

    def __repr__(self) -> str:
        options = "".join(f", {name}={reprlib.repr(value)}" for name, value in self._given().items())
        return f"Conversation({self.model.source}, {len(self.messages)} messages{options})"

    def _repr_html_(self) -> str:
        """The messages, for notebooks."""
        system = [("system", self.system)] if self.system else []
        turns = [(message["role"], message["content"]) for message in self.messages]
        return html_views.messages(self.model.source, system + turns)

    def _given(self) -> dict[str, Any]:
        """The arguments that differ from their defaults."""
        more = {"system": self.system, "template_args": self.template_args}
        return {name: value for name, value in more.items() if value} | _non_default(self.options)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle stores: all but the KV cache, which the next turn computes again. It stops a running answer."""
        self.stop()
        return {"model": self.model, "given": self._given(), "messages": self.messages, "turns": self._turns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Conversation.__init__(self, state["model"], **state["given"])
        self.messages, self._turns = state["messages"], state["turns"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Conversation":
        """A conversation with the same messages, which can be continued in another way. Both share the model."""
        other = object.__new__(Conversation)
        other.__setstate__({**copy.deepcopy({**self.__getstate__(), "model": None}, memo), "model": self.model})
        return other

    def __copy__(self) -> "Conversation":
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Deletes all messages. The system message and the options are kept."""
        self.stop()
        self.messages: Messages = []
        self.prefilled: int = 0
        self.opened: bool = False
        self._turns = 0  # added to the seed, so that answers use different random numbers
        self._prefixes: list[CachedPrefix] = []  # of the last turn: prompt and answer, and prompt only
        self._engine.scheduler.reset()

    def set(self, name: str, value: Any) -> None:
        """Changes an option. It takes effect in the next turn. None restores the default of the model.

        Raises:
            TypeError: The option is unknown.
            ValueError: The value is out of range.
        """
        default = next((field.default for field in fields(SamplingParams) if field.name == name), None)
        self.options = from_kwargs(**{**_non_default(self.options), name: default if value is None else value})

    def send(self, text: str) -> Answer:
        """Sends a message and streams the answer as chunks (jaxlm.inference.generation.CompletionChunk).

        If the turn fails or is stopped before its first token, the conversation does not change. If it is stopped
        later (the iterator is closed, Ctrl-C, the next call), the answer so far is kept.

        Raises:
            ValueError: `text` is no str, the context is full, or the chat template cannot render the messages.
        """
        if not isinstance(text, str):
            raise ValueError(f"send takes a text, not {reprlib.repr(text)}: jaxlm.generate takes messages")
        self.stop()
        return self._turn([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Answer:
        """Samples another answer to the last message, which replaces the previous one.

        Raises:
            ValueError: There is no message.
        """
        self.stop()
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise ValueError("there is no message yet: send one before retry")
        return self._turn(self.messages[: questions[-1] + 1])

    def stop(self) -> None:
        """Stops the current answer, if any. The text so far is kept."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def save(self, path: str | Path) -> None:
        """Saves messages, system message, options and template arguments as JSON.

        Raises:
            OSError: The file cannot be written.
        """
        self.stop()
        state = {
            "model": self.model.source,
            "system": self.system,
            "messages": self.messages,
            "options": _non_default(self.options),
            "template_args": self.template_args,
        }
        with explain_errors(f"{path} cannot be written", "pass a file in an existing, writable folder", OSError):
            write_atomically(Path(path), json.dumps(state, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: str | Path) -> None:
        """Loads a conversation that `save` wrote. It may have been saved with another model.

        Raises:
            ValueError: The file is not a saved conversation.
            OSError: The file cannot be read.
        """
        hint = "pass a file written by /save (Conversation.save)"
        invalid = (ValueError, TypeError, KeyError, AttributeError)
        with explain_errors(f"{path} cannot be read", hint, OSError):
            text = Path(path).read_bytes()
        with explain_errors(f"{path} is not a conversation saved by jaxlm", hint, invalid):
            state = json.loads(text.decode("utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in state["messages"]]
            options = {"logit_bias": None, **state.get("options", {})}
            if options["logit_bias"]:  # the keys of JSON objects are strings
                options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
            options = from_kwargs(**options)
            template_args = dict(state.get("template_args") or {})
        self.reset()
        self.messages, self.options, self.template_args = messages, options, template_args
        self.system = state.get("system")

    def _turn(self, messages: Messages) -> Answer:
        """Prepares the answer to `messages`. Computation starts when the first chunk is requested."""
        model = self.model
        text = self._render(messages)
        ids = prompts.to_ids(model, self._ids(text), {})
        left = self._engine.length - len(ids)
        if left < 1:
            raise ValueError(
                f"the context is full: the conversation has {len(ids):,} tokens, {model.source} takes "
                f"{self._engine.length:,}. Start over with /reset (Conversation.reset)"
            )
        options = resolve(model, _non_default(self.options))
        seed = ((options.seed or 0) + self._turns) % 2**32
        options = replace(options, seed=seed)
        self._turns += 1
        self.opened = self._has_reasoning and text.rstrip().endswith(THINKING[0])
        limit = options.max_tokens or (
            left if self.tokenizer.has_template else prompts.resolve_max_tokens(model, ids, None)
        )
        stops = prompts.stop_ids(model, options)
        key = request_key(seed, ids)  # as in jaxlm.generate: chunk.seed reproduces the text there
        request = Request(ids, options, min(limit, left), self.tokenizer, stops, key)
        answer: list[str] = []
        self._running = Answer(self._chunks(request, answer), partial(self._end_turn, messages, text, request, answer))
        return self._running

    def _chunks(self, request: Request, answer: list[str]) -> Iterator[CompletionChunk]:
        """Yields the chunks of an answer, and appends their text to `answer`."""
        self._engine.add(request)
        while self._engine.is_busy:
            for chunk in self._engine.step():
                if chunk.error is not None:
                    raise chunk.error
                self.prefilled = len(request.ids) - request.cached
                answer.append(chunk)
                yield chunk

    def _end_turn(self, messages: Messages, text: str, request: Request, answer: list[str]) -> None:
        """Ends the request. Updates the messages and the cached prefixes if there is a token."""
        self._engine.cancel(request)
        self._engine.step()
        if not request.tokens:
            return
        ids, tail = request.ids, request.tokens
        if not self.tokenizer.has_template and tail[-1] in request.stop_ids:
            tail = tail[:-1]  # the next turn continues the text, without the stop token
        after = self._decoded([*ids, *tail])[len(self._decoded(ids)) :]
        self._prefixes = [CachedPrefix(text + after, [*ids, *tail]), CachedPrefix(text, ids)]
        said = "".join(answer)
        content = split_thinking(said, self.opened)[1] if self._has_reasoning else said
        self.messages = [*messages, {"role": "assistant", "content": content}]

    @property
    def _has_reasoning(self) -> bool:
        """Whether the model is a reasoning model."""
        return self.tokenizer.thinking is not None and self.tokenizer.has_template

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def _render(self, messages: Messages) -> str:
        """Renders the prompt: the conversation up to the beginning of the answer."""
        if self.tokenizer.has_template:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return self.tokenizer.render(system + messages, **self.template_args)
        if self.system:
            raise ValueError(f"a system message needs a template, and {self.model.source} has no chat template")
        return "".join(message["content"] for message in messages)

    def _ids(self, text: str) -> list[int]:
        """Token ids of the conversation. The ids of a cached prefix are kept, because the model may have generated
        other tokens for a text than the tokenizer encodes it to."""
        for prefix in self._prefixes:
            if text.startswith(prefix.text):
                rest = text[len(prefix.text) :]
                ids = [*prefix.ids, *(self.tokenizer.encode(rest, add_special_tokens=False) if rest else [])]
                # Some tokenizers add a space before every text, so the decoded ids may differ.
                if self._decoded(ids) == self._decoded(prefix.ids) + rest:
                    return ids
        return self.tokenizer.encode(text, add_special_tokens=not self.tokenizer.has_template)


def _non_default(options: SamplingParams) -> dict[str, Any]:
    """The options that differ from their defaults."""
    return {f.name: v for f in fields(options) if (v := getattr(options, f.name)) != f.default}
