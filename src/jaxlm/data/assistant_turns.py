"""Assistant turns: the spans of a rendered conversation that the assistant wrote, for the loss mask.

A chat template may strip an answer, drop the reasoning of earlier turns, add an empty reasoning block before the last
answer, or convert tool calls to text. The text is therefore not searched for the answers. Instead, the conversation is
rendered again with a marker in place of an answer. The text before and after the marker comes from the template, and
the text in between is the answer.

A turn begins where the generation prompt ends, so what a template writes between the two (an empty reasoning block) is
part of the span, and ends with the stop token after the answer.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from jaxlm.processing.chat_template import template_errors
from jaxlm.processing.messages import ASSISTANT, REASONING, names_role, near_role, normalize
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.written import content_spans, dropped, marker

_ROLES = ("system", "user", ASSISTANT, "tool")  # that all templates can be expected to know
_TAGGED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Spans = list[tuple[int, int]]
Messages = Sequence[Mapping[str, Any]]


class Ends(NamedTuple):
    """What a chat template writes around an answer.

    Attributes:
        prompt: What add_generation_prompt appends; empty if it changes other text too.
        closing: The text after the last answer if no stop token ends it, else None. In training, EOS follows that text.
        reasoning: The fields (REASONING) whose text the template writes as the reasoning of the last answer.
    """

    prompt: str
    closing: str | None
    reasoning: frozenset[str]


class AssistantTurns:
    """Finds the assistant turns in conversations that the chat template renders.

    Attributes:
        stops: The texts of the tokens that end a turn, the longest first.
        ends: What each chat template in use writes around an answer, by its source: a tokenizer may have another
            template for conversations with tools.
    """

    def __init__(self, tokenizer: Tokenizer, template_args: Mapping[str, Any]):
        self.tokenizer, self.template_args = tokenizer, dict(template_args)
        names = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.stop_ids))
        self.stops = tuple(sorted(filter(None, names), key=len, reverse=True))
        self.specials = tuple(tokenizer.hf.get_added_vocab())
        self.takes_tools = tokenizer.template_accepts("tools")
        self.ends: dict[str, Ends] = {}

    def render(self, messages: Messages, tools: list | None, prompt: bool = False) -> str:
        return self.tokenizer.render(messages, tools, add_generation_prompt=prompt, **self.template_args)

    def _ends(self, template: str, tools: list | None) -> Ends:
        if template not in self.ends:
            tag, question = marker(""), {"role": "user", "content": "a"}
            without, with_prompt = (self.render([question], tools, prompt) for prompt in (False, True))
            prompt = with_prompt[len(without) :] if with_prompt.startswith(without) else ""
            answered = self.render([question, {"role": ASSISTANT, "content": tag}], tools)
            after = answered.partition(tag)[2]
            answer = {"role": ASSISTANT, "content": "b"}
            written = [name for name in REASONING if tag in self.render([question, {**answer, name: tag}], tools)]
            closing = None if self._stop_after(after) else after
            self.ends[template] = Ends(prompt, closing, frozenset(written))
        return self.ends[template]

    def find(self, messages: Messages, tools: list | None, turns: Collection[int] | None = None) -> tuple[str, Spans]:
        """Returns the text of a conversation, and the spans of its assistant turns, in order.

        Args:
            messages: The messages.
            tools: JSON schemas of tools.
            turns: The indices of the messages whose spans are wanted. Default: those of all assistant turns.

        Raises:
            ValueError: The template cannot render the messages or drops a part of them, or the span of a turn cannot be
                determined.
        """
        if tools and not self.takes_tools:
            raise ValueError("this chat template does not support tools")
        template = self.tokenizer.hf.get_chat_template(tools=tools)
        messages = normalize(messages, template)
        for number, message in enumerate(messages, 1):
            if (role := message["role"]) not in _ROLES and not names_role(template, role):
                why = f"which the chat template does not name{near_role(role)}"
                raise ValueError(f"message {number} has the role {role!r}, {why}")
            names = [name for name in REASONING if name in message]
            if len({message[name] for name in names}) > 1:
                raise ValueError(f"message {number} has {' and '.join(names)}, which differ: only one can be written")
        ends = self._ends(template, tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        wanted = [i for i in answers if turns is None or i in turns]
        text = self.render(messages, tools)
        contents = self._check_written(messages, tools, text, ends)
        if _TAGGED.search(template):
            tagged = self._tagged(messages, tools, template)
            if len(tagged) == len(answers):
                return text, [self._with_stop(text, span, ends) for i, span in zip(answers, tagged) if i in wanted]
        spans, before = [], 0
        for i in wanted:
            if contents is not None and contents[i] is not None and _is_plain(messages[i], template):
                start, end = contents[i]
                end += self._closing_after(text[end:], ends)
            else:
                start, end = self._one(messages, tools, text, i, ends)
            # What is said before the turn may have the text of a generation prompt.
            before = max(before, *(span[1] for span in (contents or [])[:i] if span), 0)
            spans.append((self._prompt_end(text, ends.prompt, before, start), end))
            before = end
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError("the chat template does not render the assistant turns in order")
        return text, spans

    def _check_written(self, messages: list[dict], tools: list | None, text: str, ends: Ends) -> list | None:
        """Returns the spans of all contents (written.content_spans). Raises ValueError for what the template drops."""
        render = partial(self.render, tools=tools)
        spans = content_spans(render, messages, text)
        if spans is None and (i := dropped(render, messages, text)) is not None:
            beside = " beside its tool calls" if messages[i].get("tool_calls") else ""
            raise ValueError(f"the chat template does not write message {i + 1} ({messages[i]['role']}){beside}")
        for number, message in enumerate(messages, 1):
            if lost := [value for value in _call_values(message) if value not in text and _quoted(value) not in text]:
                raise ValueError(f"the chat template does not render the tool calls of message {number} ({lost[0]})")
            names = [name for name in REASONING if message.get(name)]
            if names and ends.reasoning.isdisjoint(names):
                raise ValueError(f"the chat template does not write the reasoning of message {number}")
        return spans

    def _tagged(self, messages: list[dict], tools: list | None, template: str) -> Spans:
        """Returns the spans of the template's own {% generation %} tags."""
        from jaxlm.processing.template_rendering import write

        options = {"chat_template": template, **self.template_args}
        with template_errors():
            _, spans = write(self.tokenizer.hf, messages, tools, **options)
        return [span for span in spans if span[0] < span[1]]

    def _with_stop(self, text: str, span: tuple[int, int], ends: Ends) -> tuple[int, int]:
        """Extends a tagged span to include the token that ends the turn."""
        start, end = span
        turn = text[start:end].rstrip()
        if turn.endswith(self.stops):
            return start, start + len(turn)
        return start, end + self._closing_after(text[end:], ends)

    @staticmethod
    def _prompt_end(text: str, prompt: str, before: int, start: int) -> int:
        """Returns where the turn of the answer at `start` begins: where the generation prompt ends, which may come
        earlier, but not before `before`."""
        at = text.rfind(prompt, before, start) if prompt else -1
        return at + len(prompt) if at >= 0 else start

    def _one(self, messages: list[dict], tools: list | None, text: str, i: int, ends: Ends) -> tuple[int, int]:
        """Returns the span of one turn, from a marker in its place, or from the generation prompt before it."""
        tag = marker(text)
        marked = [*messages[:i], {"role": ASSISTANT, "content": tag}, *messages[i + 1 :]]
        before, found, after = self.render(marked, tools).partition(tag)
        if found and not text.startswith(before):  # the text before the answer depends on the answer
            before = self.render(messages[:i], tools, prompt=True)
        start, rest = len(before), after[self._closing_after(after, ends) :]
        end = len(text) - len(rest)
        # The token that ends this turn may differ from that after the marker: Llama's does after a tool call.
        fits = text.endswith(after) or (text.endswith(rest) and text[:end].endswith(self.specials))
        if not found or not text.startswith(before) or not fits or start > end:
            raise ValueError(
                f"the span of the assistant's message {i + 1} cannot be determined with this chat template: use "
                "--data.train-on all to train on the whole conversation"
            )
        return start, end

    def _closing_after(self, after: str, ends: Ends) -> int:
        """Returns the number of characters after an answer that belong to its turn: those up to the end of its stop
        token, or what the template writes in its place."""
        if stop := self._stop_after(after):
            return stop
        return len(ends.closing) if ends.closing and after.startswith(ends.closing) else 0

    def _stop_after(self, after: str) -> int:
        """Returns the number of characters up to the end of a stop token at the beginning of a text, else 0."""
        rest = after.lstrip()
        stop = next((stop for stop in self.stops if rest.startswith(stop)), "")
        return len(after) - len(rest) + len(stop) if stop else 0


def _is_plain(message: Mapping[str, Any], template: str) -> bool:
    """Whether the content of an answer is all that the template can write of it."""
    more = message.keys() - {"role", "content"}
    return not any(name in ("tool_calls", *REASONING) or name in template for name in more)


def _call_values(message: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of a message's tool calls and the texts in their arguments."""
    for call in message.get("tool_calls") or ():
        yield call["function"]["name"]
        yield from _texts(call["function"]["arguments"])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
