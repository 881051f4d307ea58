"""Which part of a conversation's text is the assistant's, whatever its chat template does to it.

A template may strip an answer, drop the thinking of earlier turns, write an empty thinking block before the last one,
or turn calls of tools into text. So answers are not looked for in the text. The conversation is written once more with
a marker in the place of an answer: what is the same before and after the marker is the template's, and what lies
between is the assistant's. What follows at once and ends the turn, a stop token, is the assistant's too.
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
    """Finds the assistant's turns in what the chat template of `tokenizer` writes.

    stops: the texts of the tokens that end a turn, the longest first.
    """

    def __init__(self, tokenizer: Tokenizer, template_args: Mapping[str, Any]):
        self.tokenizer, self.template_args = tokenizer, dict(template_args)
        names = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.stop_ids))
        self.stops = tuple(sorted(filter(None, names), key=len, reverse=True))
        self.specials = tuple(tokenizer.hf.get_added_vocab())
        self.takes_tools = tokenizer.template_accepts("tools")

    def write(self, messages: Sequence[Mapping[str, Any]], tools: list | None, prompt: bool = False) -> str:
        return self.tokenizer.render(messages, tools, add_generation_prompt=prompt, **self.template_args)

    def find(self, messages: Sequence[Mapping[str, Any]], tools: list | None, first: int = 0) -> tuple[str, Spans]:
        """The text of a conversation, and the spans of its assistant's turns from message `first` on, in order.

        Raises ValueError where the template refuses the messages, or where it writes them in a way that leaves a turn's
        place open.
        """
        if tools and not self.takes_tools:
            raise ValueError("there are tools, which this chat template does not write")
        messages = plain(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        wanted = [i for i in answers if i >= first]
        template = self.tokenizer.hf.get_chat_template(tools=tools)
        if _TAGGED.search(template):
            text, tagged = self._tagged(messages, tools, template)
            if len(tagged) == len(answers):
                return text, [self._closed(text, span) for span in tagged[len(answers) - len(wanted) :]]
        text = self.write(messages, tools)
        spans = self._all(messages, tools, text, answers)
        if spans is not None:
            return text, spans[len(answers) - len(wanted) :]
        spans = [self._one(messages, tools, text, i) for i in wanted]
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError("the chat template does not write the assistant's turns one after the other")
        return text, spans

    def _tagged(self, messages: list[dict], tools: list | None, template: str) -> tuple[str, Spans]:
        """By the template's own {% generation %} tags."""
        from jaxlm.processing.template_rendering import write

        options = {"chat_template": template, **self.template_args}
        with template_errors():
            text, spans = write(self.tokenizer.hf, messages, tools, **options)
        return text, [span for span in spans if span[0] < span[1]]

    def _closed(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """A tagged span, to the end of the token that ends its turn: not beyond, and not less."""
        start, end = span
        kept = text[start:end].rstrip()
        if kept.endswith(self.stops):
            return start, start + len(kept)
        return start, end + self._closing(text[end:])

    def _all(self, messages: list[dict], tools: list | None, text: str, answers: list[int]) -> Spans | None:
        """The usual case, in one more writing: every answer is text, and stands as it is between what the template
        writes around markers. None where that is not so."""
        if not all(messages[i].keys() == {"role", "content"} and messages[i]["content"] for i in answers):
            return None
        marker = self._marker(text)
        marked = list(messages)
        for i in answers:
            marked[i] = {"role": ASSISTANT, "content": marker}
        before, *after = self.write(marked, tools).split(marker)
        if len(after) != len(answers) or not text.startswith(before):
            return None
        spans, at = [], len(before)
        for i, literal in zip(answers, after):
            content = messages[i]["content"]
            said = next((x for x in (content, content.strip()) if text.startswith(x + literal, at)), None)
            if said is None:
                return None
            end = at + len(said)
            spans.append((at, end + self._closing(literal)))
            at = end + len(literal)
        return spans if at == len(text) else None

    def _one(self, messages: list[dict], tools: list | None, text: str, i: int) -> tuple[int, int]:
        """The span of one turn, by a marker in its place, or by the prompt that would ask for it."""
        marker = self._marker(text)
        marked = [*messages[:i], {"role": ASSISTANT, "content": marker}, *messages[i + 1 :]]
        before, found, after = self.write(marked, tools).partition(marker)
        if found and not text.startswith(before):  # it writes something else before this answer
            before = self.write(messages[:i], tools, prompt=True)
        start, rest = len(before), after[self._closing(after) :]
        end = len(text) - len(rest)
        # The token that ends this turn may be another one than after the marker: Llama's, where a tool is called.
        ends = text.endswith(after) or (text.endswith(rest) and text[:end].endswith(self.specials))
        if not found or not text.startswith(before) or not ends or start > end:
            raise ValueError(
                f"the chat template writes message {i + 1}, of the assistant, in a way that does not show where it "
                "begins and ends: train_on=all trains on the whole conversation"
            )
        calls = [call.get("function") or call for call in messages[i].get("tool_calls") or ()]
        if lost := [call.get("name") for call in calls if str(call.get("name")) not in text[start:end]]:
            raise ValueError(f"the chat template does not write the tool calls of message {i + 1} ({lost[0]})")
        return start, end

    def _closing(self, after: str) -> int:
        """How many characters of what follows an answer belong to it: as far as a token that ends a turn."""
        rest = after.lstrip()
        stop = next((stop for stop in self.stops if rest.startswith(stop)), "")
        return len(after) - len(rest) + len(stop) if stop else 0

    def _marker(self, text: str) -> str:
        marker = MARKER
        while marker in text:
            marker += "0"
        return marker
