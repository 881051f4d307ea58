"""Assistant turns: the spans of a rendered conversation that the assistant wrote, for the loss mask.

A chat template may strip an answer, drop the reasoning of earlier turns, add an empty reasoning block before the last
answer, or convert tool calls to text. The text is therefore not searched for the answers. Instead, the conversation is
rendered again with a marker in place of an answer. The text before and after the marker comes from the template, and
the text in between is the answer. A stop token that ends the turn is part of the span.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from jaxlm.data.formats import ASSISTANT
from jaxlm.processing.chat_template import plain, template_errors
from jaxlm.processing.tokenizer import Tokenizer

MARKER = "answer-5b3f19"
_TAGGED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Spans = list[tuple[int, int]]


class AssistantTurns:
    """Finds the assistant turns in conversations that the chat template renders.

    Attributes:
        stops: The texts of the tokens that end a turn, the longest first.
    """

    def __init__(self, tokenizer: Tokenizer, template_args: Mapping[str, Any]):
        self.tokenizer, self.template_args = tokenizer, dict(template_args)
        names = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.stop_ids))
        self.stops = tuple(sorted(filter(None, names), key=len, reverse=True))
        self.specials = tuple(tokenizer.hf.get_added_vocab())
        self.takes_tools = tokenizer.template_accepts("tools")

    def render(self, messages: Sequence[Mapping[str, Any]], tools: list | None, prompt: bool = False) -> str:
        return self.tokenizer.render(messages, tools, add_generation_prompt=prompt, **self.template_args)

    def find(self, messages: Sequence[Mapping[str, Any]], tools: list | None, first: int = 0) -> tuple[str, Spans]:
        """Returns the text of a conversation, and the spans of its assistant turns from message `first` on, in order.

        Raises ValueError if the template cannot render the messages, or the span of a turn cannot be determined.
        """
        if tools and not self.takes_tools:
            raise ValueError("this chat template does not support tools")
        messages = plain(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        wanted = [i for i in answers if i >= first]
        template = self.tokenizer.hf.get_chat_template(tools=tools)
        if _TAGGED.search(template):
            text, tagged = self._tagged(messages, tools, template)
            if len(tagged) == len(answers):
                return text, [self._with_stop(text, span) for span in tagged[len(answers) - len(wanted) :]]
        text = self.render(messages, tools)
        spans = self._all(messages, tools, text, answers)
        if spans is not None:
            return text, spans[len(answers) - len(wanted) :]
        spans = [self._one(messages, tools, text, i) for i in wanted]
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError("the chat template does not render the assistant turns in order")
        return text, spans

    def _tagged(self, messages: list[dict], tools: list | None, template: str) -> tuple[str, Spans]:
        """Returns the text and the spans of the template's own {% generation %} tags."""
        from jaxlm.processing.template_rendering import write

        options = {"chat_template": template, **self.template_args}
        with template_errors():
            text, spans = write(self.tokenizer.hf, messages, tools, **options)
        return text, [span for span in spans if span[0] < span[1]]

    def _with_stop(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Extends a tagged span to include the token that ends the turn."""
        start, end = span
        turn = text[start:end].rstrip()
        if turn.endswith(self.stops):
            return start, start + len(turn)
        return start, end + self._closing(text[end:])

    def _all(self, messages: list[dict], tools: list | None, text: str, answers: list[int]) -> Spans | None:
        """The usual case, in one more rendering: every answer is text, and appears unchanged between what the template
        renders around markers. Returns None if that is not so."""
        if not all(messages[i].keys() == {"role", "content"} and messages[i]["content"] for i in answers):
            return None
        marker = self._marker(text)
        marked = list(messages)
        for i in answers:
            marked[i] = {"role": ASSISTANT, "content": marker}
        before, *after = self.render(marked, tools).split(marker)
        if len(after) != len(answers) or not text.startswith(before):
            return None
        spans, at = [], len(before)
        for i, literal in zip(answers, after):
            content = messages[i]["content"]
            answer = next((x for x in (content, content.strip()) if text.startswith(x + literal, at)), None)
            if answer is None:
                return None
            end = at + len(answer)
            spans.append((at, end + self._closing(literal)))
            at = end + len(literal)
        return spans if at == len(text) else None

    def _one(self, messages: list[dict], tools: list | None, text: str, i: int) -> tuple[int, int]:
        """Returns the span of one turn, from a marker in its place, or from the generation prompt before it."""
        marker = self._marker(text)
        marked = [*messages[:i], {"role": ASSISTANT, "content": marker}, *messages[i + 1 :]]
        before, found, after = self.render(marked, tools).partition(marker)
        if found and not text.startswith(before):  # the text before the answer depends on the answer
            before = self.render(messages[:i], tools, prompt=True)
        start, rest = len(before), after[self._closing(after) :]
        end = len(text) - len(rest)
        # The token that ends this turn may differ from that after the marker: Llama's does after a tool call.
        ends = text.endswith(after) or (text.endswith(rest) and text[:end].endswith(self.specials))
        if not found or not text.startswith(before) or not ends or start > end:
            raise ValueError(
                f"the span of the assistant's message {i + 1} cannot be determined with this chat template: use "
                "train_on=all to train on the whole conversation"
            )
        calls = [call.get("function") or call for call in messages[i].get("tool_calls") or ()]
        if lost := [call.get("name") for call in calls if str(call.get("name")) not in text[start:end]]:
            raise ValueError(f"the chat template does not render the tool calls of message {i + 1} ({lost[0]})")
        return start, end

    def _closing(self, after: str) -> int:
        """Returns the number of characters after an answer that belong to its turn: those up to the stop token."""
        rest = after.lstrip()
        stop = next((stop for stop in self.stops if rest.startswith(stop)), "")
        return len(after) - len(rest) + len(stop) if stop else 0

    def _marker(self, text: str) -> str:
        marker = MARKER
        while marker in text:
            marker += "0"
        return marker
