"""Formats of training rows, detected from their fields, and the conversation in a row."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxlm.data.field_types import Checked
from jaxlm.processing.messages import ASSISTANT, REASONING, ROLES, TRAINED, normalize, short

# Format -> its fields, and the default of `train_on`. The first match is the format of a row.
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "messages": (("messages",), "assistant"),
    "conversations": (("conversations",), "assistant"),
    "prompt": (("prompt", "completion"), "completion"),
    "instruction": (("instruction", "output"), "completion"),
    "question": (("question", "answer"), "completion"),
    "text": (("text",), "all"),
}
Format = Literal["text", "messages", "conversations", "prompt", "instruction", "question"]
# Fields beside those of a format, which conversation() reads.
BESIDE = ("system", "system_prompt", "history", "tools", "functions", "chat_template_kwargs", *REASONING)
# Fields beside a text that the model would not see, of training rows and prompts.
MEDIA = {
    "documents": "documents are not supported: write them into a message",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text is supported"),
}
# Fields of training rows whose meaning would be lost.
REFUSED = {
    "chosen": "preference data are not supported: name the answer to train on (--data.completion-field chosen)",
    "rejected": "preference data are not supported: name the answer to train on (--data.completion-field chosen)",
    "label": "a row that is labeled as good or bad is preference data, which are not supported",
    **MEDIA,
}
# Fields that hold text. If a format does not read one of these, its text must be in the conversation nevertheless.
TEXTS = (
    "text", "prompt", "completion", "instruction", "input", "output", "question", "answer", "response", "context",
    "query",
)  # fmt: skip
# Variables of a chat template that a row has in other fields, or that follow from the use of the template.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "continue_final_message")


@dataclass(frozen=True)
class TextOptions(Checked):
    """How rows are read."""

    format: Format | None = None
    """Row format. Default: detected from the first row."""
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
        """Returns the format of a row, None without a match. Formats with fields named by the user come first, and
        those whose fields are not null (a table has every field in each row)."""
        if isinstance(value, str):
            return "text" if self.format in (None, "text") else None
        if self.format is not None:
            return self.format if all(name in value for name in self.fields(self.format)) else None
        named = [format for format in FORMATS if self.fields(format) != FORMATS[format][0]]
        found = [format for format in [*named, *FORMATS] if all(name in value for name in self.fields(format))]
        filled = [format for format in found if all(value[name] is not None for name in self.fields(format))]
        return next(iter([*filled, *found]), None)


class InvalidRowError(ValueError):
    """Raised for a row that cannot be used. `why` is the kind of error, by which such rows are counted."""

    def __init__(self, why: str, detail: str):
        super().__init__(detail)
        self.why = why


class Chat(NamedTuple):
    """Messages for a chat template.

    Attributes:
        messages: Normalized messages (jaxlm.processing.messages).
        tools: JSON schemas of tools.
        turns: The indices of the assistant turns in the loss mask.
        template_args: Variables of the chat template that the row sets.
    """

    messages: list[dict[str, Any]]
    tools: list | None
    turns: list[int]
    template_args: Mapping[str, Any] = {}


class Pair(NamedTuple):
    """A prompt and its completion, to be concatenated."""

    prompt: str
    completion: str


def text_of(value: Any, options: TextOptions) -> str:
    """Returns the text of a row of format text."""
    return value if isinstance(value, str) else _string(value, options.text_field)


def conversation(
    value: Mapping[str, Any], format: str, options: TextOptions, train_on: str, template: bool, source: str = ""
) -> Chat | Pair:
    """Returns the conversation of a row whose format is not text.

    Args:
        value: The fields of the row.
        format: Its format.
        options: The names of its fields.
        train_on: What is trained on.
        template: Whether there is a chat template. Prompts are then user turns.
        source: The source of the chat template, which names roles (messages.normalize).

    Raises:
        InvalidRowError: The row does not have the types of its format.
    """
    read = options.fields(format)
    check_fields(value, read)
    if format in ("messages", "conversations"):
        question, answer = [], _listed(value[format], format)
    else:
        if format == "instruction":
            prompt, completion = _instruction(value, template), _string(value, "output")
        else:
            prompt, completion = (value[name] for name in read)
        if isinstance(prompt, str) and isinstance(completion, str) and not template:
            if beside := [name for name in BESIDE if value.get(name)]:
                raise InvalidRowError("unsupported field", f"the field {beside[0]} needs a chat template")
            return _separated(prompt, completion)
        either, question = "a text or a list of messages", [{"role": "user", "content": prompt}]
        question = question if isinstance(prompt, str) else _listed(prompt, read[0], either)
        if isinstance(completion, str):
            answer = _answer(value, completion)
        else:
            earlier = [*history_of(value), *question]
            contexts = [[*system_of(value, earlier), *earlier], earlier, question]
            answer = _after(contexts, _listed(completion, read[1], either), read[1])
    if (beside := [name for name in REASONING if value.get(name)]) and not isinstance(value.get(read[-1]), str):
        raise InvalidRowError("unsupported field", f"the field {beside[0]} must be a field of the assistant's message")
    before = [*history_of(value), *question]
    given = [*system_of(value, [*before, *answer]), *before, *answer]
    try:
        messages = normalize(given, source)
    except ValueError as error:
        raise InvalidRowError("invalid messages", str(error)) from None
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    first = 0
    if train_on == "completion":
        first = answers[-1] if answers and not question else len(given) - len(answer)
    turns = [i for i in answers if i >= first and _trained(i + 1, given[i]) is not False]
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT and _trained(i + 1, given[i]):
            why = f"message {i + 1} ({message['role']}) is to be trained on, but only assistant turns are"
            raise InvalidRowError("unsupported field", why)
    return Chat(messages, tools_of(value), turns, template_args_of(value))


def check_fields(value: Mapping[str, Any], read: Collection[str] = (), refused: Mapping[str, str] = REFUSED) -> None:
    """Raises InvalidRowError for a field that is not empty and not among those that are read.

    Args:
        value: The fields of a row.
        read: The names of fields that are read.
        refused: Names of fields, and why each is refused.
    """
    for name, why in refused.items():
        found = value.get(name)
        if name in read or (name == "rejected" and "chosen" in read):
            continue
        if not (isinstance(found, bool) if name == "label" else found):
            continue
        raise InvalidRowError("unsupported field", f"the field {name}: {why}")


def unused_fields(value: Mapping[str, Any], format: str, options: TextOptions, text: str) -> list[str]:
    """Returns the fields of a row that are not read.

    Raises:
        InvalidRowError: A field holds text (TEXTS) that is not in the text of the document, and does not repeat it.
    """
    read = {*options.fields(format), *(BESIDE if format != "text" else ())}
    read |= {"input"} if format == "instruction" else set()
    unused = [name for name, found in value.items() if name not in read and found not in (None, "", [], {})]
    chosen = options.format is not None or options.fields(format) != FORMATS[format][0]
    if not chosen:
        parts = [part.strip() for name in read for part in _contents(value.get(name))]
        for name in unused:
            found = value[name]
            if name == "text" and isinstance(found, str) and all(part in found for part in parts):
                continue  # the row as a text, as in Alpaca
            if name in TEXTS and isinstance(found, str) and found.strip() not in text:
                raise InvalidRowError(
                    "unused text",
                    f"the field {name} has a text that is not read: choose how rows are read (--data.format {format}), "
                    "or name the fields (--data.prompt-field, --data.completion-field)",
                )
    return unused


def _contents(value: Any) -> Iterator[str]:
    """Yields the texts of a field that holds a text or messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name in ("content", "value", "text"):
            yield from _contents(value.get(name))
    elif isinstance(value, list):
        for item in value:
            yield from _contents(item)


def _trained(number: int, message: Any) -> bool | None:
    """Whether a message is to be trained on; None if it does not say."""
    flags = {name: message[name] for name in TRAINED if message.get(name) is not None}
    for name, flag in flags.items():
        if flag not in (0, 1) or isinstance(flag, str):
            raise InvalidRowError(
                "invalid messages", f"message {number} has {name}={short(flag)}: only 0 and 1 are supported"
            )
    if len({bool(flag) for flag in flags.values()}) > 1:
        raise InvalidRowError("invalid messages", f"message {number} has {' and '.join(flags)}, which disagree")
    if set(flags) == {"weight"} and flags["weight"] and str(message.get("role")) != ASSISTANT:
        return None  # the weight of a message that is never trained on
    return next((bool(flag) for flag in flags.values()), None)


def system_of(value: Mapping[str, Any], messages: list[Any]) -> list[dict[str, Any]]:
    """Returns the system message in a field of the row, if it has one that the messages do not begin with."""
    systems = [_string(value, name) for name in ("system", "system_prompt") if value.get(name)]
    if not systems:
        return []
    if len({system.strip() for system in systems}) > 1:
        raise InvalidRowError("invalid messages", "the fields system and system_prompt are two system messages")
    own = messages[0] if is_system(messages[0]) else {}
    if own and systems[0].strip() not in (str(text).strip() for text in own.values()):
        raise InvalidRowError("invalid messages", "the field system and the first message are two system messages")
    return [] if own else [{"role": "system", "content": systems[0]}]


def is_system(message: Any) -> bool:
    """Whether a message, in any form, is one of the system."""
    if not isinstance(message, Mapping):
        return False
    role = str(message.get("role") or message.get("from")).lower()
    return role == "developer" or ROLES.get(role) == "system"


def history_of(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the earlier turns in the field history: pairs of a question and its answer, or messages."""
    history = value.get("history") or []
    if not isinstance(history, list):
        raise InvalidRowError("invalid messages", f"the field history must be a list, not {short(history)}")
    if all(isinstance(turn, Mapping) for turn in history):
        return history
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise InvalidRowError(
            "invalid messages", f"the field history must have pairs of a question and an answer, not {short(history)}"
        )
    roles = ("user", ASSISTANT)
    return [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn)]


def _after(contexts: list[list[Any]], answer: list[Any], name: str) -> list[Any]:
    """Returns the messages of an answer without those before it, which some rows repeat (chosen). contexts: the
    messages that may be repeated, the longest first."""

    def said(messages: list[Any]) -> list[tuple[str, str]]:
        try:
            return [(message["role"], message["content"].strip()) for message in normalize(messages)]
        except ValueError:  # named where the whole conversation is normalized
            return []

    spoken = said(answer)
    for before in map(said, contexts):
        if before and spoken[: len(before)] == before:
            answer, spoken = answer[len(before) :], spoken[len(before) :]
            break
    if spoken and spoken[0][0] in ("user", "system"):
        raise InvalidRowError("invalid messages", f"the field {name} must begin with an answer to the prompt")
    if not answer:
        raise InvalidRowError("invalid messages", f"the field {name} has no answer to the prompt")
    return answer


def _answer(value: Mapping[str, Any], completion: str) -> list[dict[str, Any]]:
    """Returns the answer of a row with the reasoning in a field of the row."""
    return [{"role": ASSISTANT, "content": completion, **{name: value[name] for name in REASONING if value.get(name)}}]


def template_args_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of the chat template that a row sets, in trl's form."""
    args = value.get("chat_template_kwargs") or {}
    args = _json(args, "chat_template_kwargs") if isinstance(args, str) else args
    if not isinstance(args, Mapping):
        raise InvalidRowError("invalid messages", f"chat_template_kwargs must be an object, not {short(args)}")
    if reserved := [name for name in RESERVED if name in args]:
        raise InvalidRowError("unsupported field", f"chat_template_kwargs cannot set {reserved[0]}")
    return {name: item for name, item in args.items() if item is not None}


def _separated(prompt: str, completion: str) -> Pair:
    """Appends a newline to the prompt, unless whitespace already separates it from the completion."""
    separated = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return Pair(prompt if separated else prompt + "\n", completion)


def _instruction(value: Mapping[str, Any], template: bool) -> str:
    """Returns the prompt of an instruction; without a chat template, in Alpaca's format."""
    instruction = _string(value, "instruction")
    context = _string(value, "input") if value.get("input") else ""
    if template:
        return "\n\n".join(filter(None, (instruction, context)))
    more = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{more}### Response:\n"


def _string(value: Mapping[str, Any], name: str) -> str:
    if value.get(name) is None:
        raise InvalidRowError("not a string", f"the field {name} is null: it must be a string")
    if not isinstance(value[name], str):
        raise InvalidRowError("not a string", f"the field {name} must be a string, not {short(value[name])}")
    return value[name]


def _listed(value: Any, name: str, what: str = "a list of messages") -> list[Any]:
    """Returns the messages of a field as a list."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise InvalidRowError("invalid messages", f"the field {name} must be {what}, not {short(value)}")
    return value


def tools_of(value: Mapping[str, Any]) -> list | None:
    """Returns the tools of a row, or OpenAI's earlier functions as tools."""
    tools = value.get("tools")
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if functions := value.get("functions"):
        functions = _json(functions, "functions") if isinstance(functions, str) else functions
        if tools or not (isinstance(functions, list) and all(isinstance(one, Mapping) for one in functions)):
            raise InvalidRowError("invalid messages", "functions must be a list of objects, without tools beside it")
        tools = [{"type": "function", "function": function} for function in functions]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidRowError("invalid messages", f"tools must be a list of JSON schemas, not {short(tools)}")
    return tools or None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRowError("invalid messages", f"{what} must be JSON, not {short(text)}") from None
