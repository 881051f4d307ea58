"""Formats of training rows, detected from their fields, and the conversation in a row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxlm.processing.chat_template import plain

# Format -> its fields, and the default of `train_on`. The first match is the format of a row.
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "messages": (("messages",), "assistant"),
    "conversations": (("conversations",), "assistant"),
    "prompt": (("prompt", "completion"), "completion"),
    "instruction": (("instruction", "output"), "completion"),
    "question": (("question", "answer"), "completion"),
    "text": (("text",), "all"),
}
ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
         "function_response": "tool", "observation": "tool"}  # fmt: skip


@dataclass(frozen=True)
class TextOptions:
    """How rows are read."""

    format: str | None = None
    """text, messages, conversations, prompt, instruction or question. Default: detected from the first row."""
    train_on: Literal["assistant", "completion", "all"] | None = None
    """Loss mask: all assistant turns, the completion (of messages the last turn), or all tokens. Default: that of the
    format (FORMATS)."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    prompt_field: str = "prompt"
    """Field of a row that holds the prompt."""
    completion_field: str = "completion"
    """Field of a row that holds the completion."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template (enable_thinking, date_string, …)."""

    def fields(self, format: str) -> tuple[str, ...]:
        """Returns the names of a format's fields under these options."""
        names: dict[str, str] = {
            "text": self.text_field,
            "prompt": self.prompt_field,
            "completion": self.completion_field,
        }
        return tuple(names.get(name, name) for name in FORMATS[format][0])

    def format_of(self, value: Any) -> str | None:
        """Returns the format of a row, None without a match. Formats with fields named by the user come first."""
        if isinstance(value, str):
            return "text" if self.format in (None, "text") else None
        if self.format is not None:
            return self.format if all(name in value for name in self.fields(self.format)) else None
        usual = TextOptions()
        named = [format for format in FORMATS if self.fields(format) != usual.fields(format)]
        return next(
            (format for format in [*named, *FORMATS] if all(name in value for name in self.fields(format))), None
        )


class InvalidRowError(ValueError):
    """Raised for a row that cannot be used. `why` is the kind of error, by which such rows are counted."""

    def __init__(self, why: str, detail: str):
        super().__init__(detail)
        self.why = why


class Chat(NamedTuple):
    """Messages for a chat template. The assistant's turns from message `first` on are in the loss mask."""

    messages: list[dict[str, Any]]
    tools: list | None
    first: int


class Pair(NamedTuple):
    """A prompt and its completion, to be concatenated."""

    prompt: str
    completion: str


def text_of(value: Any, options: TextOptions) -> str:
    """Returns the text of a row of format text."""
    return value if isinstance(value, str) else _string(value, options.text_field)


def conversation(
    value: Mapping[str, Any], format: str, options: TextOptions, train_on: str, template: bool
) -> Chat | Pair:
    """Returns the conversation of a row whose format is not text.

    Args:
        value: The fields of the row.
        format: Its format.
        options: The names of its fields.
        train_on: What is trained on.
        template: Whether there is a chat template. Prompts are then user turns.

    Raises:
        InvalidRowError: The row does not have the types of its format.
    """
    if format in ("messages", "conversations"):
        messages = _messages(value[format], format)
        last = max((i for i, message in enumerate(messages) if message["role"] == ASSISTANT), default=0)
        return Chat(messages, _tools(value), last if train_on == "completion" else 0)
    if format in ("prompt", "question"):
        prompt, completion = (value[name] for name in options.fields(format))
    else:
        prompt, completion = _instruction(value, template), _string(value, "output")
    if isinstance(prompt, str) and isinstance(completion, str) and not template:
        return _separated(prompt, completion)
    fields = options.fields("question" if format == "question" else "prompt")
    question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, fields[0])
    answer = [{"role": ASSISTANT, "content": completion}]
    answer = answer if isinstance(completion, str) else _messages(completion, fields[1])
    return Chat([*question, *answer], _tools(value), len(question) if train_on == "completion" else 0)


def _separated(prompt: str, completion: str) -> Pair:
    """Appends a newline to the prompt, unless whitespace already separates it from the completion."""
    separated = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return Pair(prompt if separated else prompt + "\n", completion)


def _instruction(value: Mapping[str, Any], template: bool) -> str:
    """Returns the prompt of an instruction; without a chat template, in Alpaca's format."""
    instruction = _string(value, "instruction")
    context = _string(value, "input") if value.get("input") else ""
    if template:
        return f"{instruction}\n\n{context}" if context else instruction
    more = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{more}### Response:\n"


def _string(value: Mapping[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise InvalidRowError("not a string", f"the field {name} must be a string, not {_short(value.get(name))}")
    return value[name]


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns the messages of a field, as chat templates read them."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise InvalidRowError("invalid messages", f"the field {name} must be a list of messages, not {_short(value)}")
    try:
        return [_message(message) for message in plain([_renamed(message) for message in value])]
    except ValueError as error:
        raise InvalidRowError("invalid messages", str(error)) from None


def _renamed(message: Any) -> Any:
    """Returns {"role": "user", "content": …} for {"from": "human", "value": …}."""
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    role = str(message["from"])
    return {"role": ROLES.get(role, role), "content": message.get("value")}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Drops null fields, which templates would treat as present, and parses the arguments of tool calls."""
    if not isinstance(message["role"], str) or not isinstance(message.get("content"), str | None):
        raise ValueError(f"a message must be an object with the strings role and content, not {_short(message)}")
    kept = {key: value for key, value in message.items() if value is not None}
    kept["content"] = message.get("content") or ""
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in calls]
    return kept


def _call(call: Any) -> Any:
    """Parses the arguments of a tool call. OpenAI's format has a JSON string, which templates would quote again."""
    if not isinstance(call, Mapping):
        raise ValueError(f"a tool call must be an object, not {_short(call)}")
    inner = call.get("function", call)
    if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
        inner = {**inner, "arguments": _json(inner["arguments"], "the arguments of a tool call")}
    return {**call, "function": inner} if "function" in call else inner


def _tools(value: Mapping[str, Any]) -> list | None:
    tools = value.get("tools")
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidRowError("invalid messages", f"tools must be a list of JSON schemas, not {_short(tools)}")
    return tools or None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRowError("invalid messages", f"{what} must be JSON, not {_short(text)}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
