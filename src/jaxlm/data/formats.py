"""The forms that rows of training data have, told by their fields, and the conversation that a row holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxlm.processing.chat_template import plain

# format -> the fields that tell it, and what is learned by default. The first that fits is taken.
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
    """text, messages, conversations, prompt, instruction or question. Default: what the first row looks like."""
    train_on: Literal["assistant", "completion", "all"] | None = None
    """What counts in the loss: every turn of the assistant, the completion (of messages: the last turn), or all.
    Default: all of a text, the assistant's turns of messages, the completion of a prompt."""
    text_field: str = "text"
    """Field of a row that is a text."""
    prompt_field: str = "prompt"
    """Field of a prompt."""
    completion_field: str = "completion"
    """Field of its completion."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template (enable_thinking, date_string, …)."""

    def fields(self, format: str) -> tuple[str, ...]:
        """The names that the fields of a format have here."""
        names: dict[str, str] = {
            "text": self.text_field,
            "prompt": self.prompt_field,
            "completion": self.completion_field,
        }
        return tuple(names.get(name, name) for name in FORMATS[format][0])

    def format_of(self, value: Any) -> str | None:
        """The format of a row, None for none. Fields that the user has named come before all others."""
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
    """What is wrong with a row. why: the kind of fault, under which such rows are counted."""

    def __init__(self, why: str, detail: str):
        super().__init__(detail)
        self.why = why


class Chat(NamedTuple):
    """Messages for a template; what is learned are the assistant's from message `first` on."""

    messages: list[dict[str, Any]]
    tools: list | None
    first: int


class Pair(NamedTuple):
    """A prompt and its completion, to be written one after the other."""

    prompt: str
    completion: str


def text_of(value: Any, options: TextOptions) -> str:
    """The text of a row of format text."""
    return value if isinstance(value, str) else _string(value, options.text_field)


def conversation(
    value: Mapping[str, Any], format: str, options: TextOptions, train_on: str, template: bool
) -> Chat | Pair:
    """What a row of another format holds. template: there is a chat template, and prompts are turns of the user.

    Raises Fault for a row that is not of its form.
    """
    if format in ("messages", "conversations"):
        messages = _messages(value[format], format)
        last = max((i for i, message in enumerate(messages) if message["role"] == ASSISTANT), default=0)
        return Chat(messages, _tools(value), last if train_on == "completion" else 0)
    if format in ("prompt", "question"):
        given, said = (value[name] for name in options.fields(format))
    else:
        given, said = _instruction(value, template), _string(value, "output")
    if isinstance(given, str) and isinstance(said, str) and not template:
        return _apart(given, said)
    fields = options.fields("question" if format == "question" else "prompt")
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given, fields[0])
    answer = [{"role": ASSISTANT, "content": said}] if isinstance(said, str) else _messages(said, fields[1])
    return Chat([*asked, *answer], _tools(value), len(asked) if train_on == "completion" else 0)


def _apart(prompt: str, completion: str) -> Pair:
    """As they are where a blank parts them, else on two lines."""
    parted = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return Pair(prompt if parted else prompt + "\n", completion)


def _instruction(value: Mapping[str, Any], template: bool) -> str:
    """The prompt of an instruction; under the usual headings where no chat template writes any."""
    asked = _string(value, "instruction")
    more = _string(value, "input") if value.get("input") else ""
    if template:
        return f"{asked}\n\n{more}" if more else asked
    return f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{more}\n\n" if more else "") + "### Response:\n"


def _string(value: Mapping[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise InvalidRowError("not a text", f"the field {name} should be a text, it is {_short(value.get(name))}")
    return value[name]


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a field, in the form that templates read."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise InvalidRowError("no messages", f"the field {name} should be a list of messages, it is {_short(value)}")
    try:
        return [_message(message) for message in plain([_renamed(message) for message in value])]
    except ValueError as error:
        raise InvalidRowError("no messages", str(error)) from None


def _renamed(message: Any) -> Any:
    """{"from": "human", "value": …} as {"role": "user", "content": …}."""
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    role = str(message["from"])
    return {"role": ROLES.get(role, role), "content": message.get("value")}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Without fields that are null, which templates take for present; a call's arguments as an object."""
    if not isinstance(message["role"], str) or not isinstance(message.get("content"), str | None):
        raise ValueError(f"a message is a dict with 'role' and 'content', texts both, got {_short(message)}")
    kept = {key: value for key, value in message.items() if value is not None}
    kept["content"] = message.get("content") or ""
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in calls]
    return kept


def _call(call: Any) -> Any:
    """OpenAI writes the arguments of a call as JSON in a string; templates would quote it again."""
    if not isinstance(call, Mapping):
        raise ValueError(f"a tool call is a dict, got {_short(call)}")
    inner = call.get("function", call)
    if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
        inner = {**inner, "arguments": _json(inner["arguments"], "the arguments of a tool call")}
    return {**call, "function": inner} if "function" in call else inner


def _tools(value: Mapping[str, Any]) -> list | None:
    tools = value.get("tools")
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidRowError("no messages", f"tools should be a list of JSON schemas, it is {_short(tools)}")
    return tools or None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRowError("no messages", f"{what} should be JSON, it is {_short(text)}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
