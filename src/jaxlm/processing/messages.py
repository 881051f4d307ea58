"""Normalizes chat messages: the forms of OpenAI, ShareGPT, trl and others become the one that chat templates read.

Prompts and training rows are normalized here, so a message is rendered in the same way in both. docs/data.md lists the
forms.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

ASSISTANT = "assistant"
# Names of the reasoning of an answer. Most templates read the first; the template of gpt-oss reads the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Whether an assistant turn is trained on, in the spelling of OpenAI, axolotl, FastChat and ms-swift.
TRAINED = ("weight", "train", "trainable", "loss")
_USER = ("user", "human", "prompter")
_ASSISTANT = (ASSISTANT, "gpt", "chatgpt", "ai", "bot", "model")
ROLES = {**dict.fromkeys(_USER, "user"), **dict.fromkeys(_ASSISTANT, ASSISTANT), "system": "system"}
# A template that names one of these roles gets it as it is.
OTHER_ROLES = {"developer": "system", "function": "tool", "function_response": "tool", "tool_response": "tool",
               "observation": "tool", "ipython": "tool", "tool": "tool"}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles whose content is a call, as JSON
_TEXT_PARTS = ("text", "input_text", "output_text")
_UNSUPPORTED = ("refusal", "images", "image", "audio", "videos", "video")


def normalize(messages: Iterable[Any], template: str = "") -> list[dict[str, Any]]:
    """Copies messages in the form that chat templates read.

    - "from" and "value" become "role" and "content". Roles have their usual names (human: user, gpt: assistant, …).
    - Text parts become one text. None becomes "" beside tool calls or reasoning.
    - A function_call, or a message whose role is function_call, becomes tool_calls. JSON arguments become objects,
      because templates would quote them again.
    - Fields that are None, empty reasoning, and fields that exclude a turn from training (TRAINED) are left out.

    Normalized messages do not change when they are normalized again.

    Args:
        messages: Dicts with "role" and "content" or "from" and "value", oldest first.
        template: The source of the chat template. A role of OTHER_ROLES that it names is kept.

    Raises:
        ValueError: An item is not a message, has no text, or has content that is not text ({"type": "image", …}).
    """
    return [_normalize(number, message, template) for number, message in enumerate(messages, 1)]


def names_role(template: str, role: str) -> bool:
    """Whether a chat template compares the role of a message with this one: `message.role == "tool"`."""
    name, operator = rf"""(?P<quote>['"]){re.escape(role)}(?P=quote)""", r"(?:==\s*|!=\s*|in\s*[\[(][^\])]*)"
    after = rf"""role['"]?\s*[\])]*\s*(?:\|\s*\w+\s*)?{operator}{name}"""
    before = rf"""{name}\s*[=!]=\s*\(?\s*\w+(?:\.|\[['"]|\.get\(['"])role"""
    return any(re.search(compared, template) for compared in (after, before))


def _normalize(number: int, message: Any, template: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "from"} & message.keys():
        raise ValueError(f"a message must be a dict with 'role' and 'content', got {short(message)}")
    fields = {
        name: value
        for name, value in message.items()
        if value is not None and name not in TRAINED and not (name in REASONING and value == "")
    }
    given = fields.pop("from", None) if "role" not in fields else fields.pop("role")
    content = fields.pop("value", None) if "content" not in fields else fields.pop("content")
    where = f"message {number} ({given})"
    if not isinstance(given, str):
        raise ValueError(f"message {number} has the role {short(given)}, which is not a string")
    if unsupported := [name for name in _UNSUPPORTED if fields.get(name)]:
        raise ValueError(f"{where} has {unsupported[0]!r}, which is not supported yet: only text and tool calls are")
    role = _role(given, template)
    calls = _calls(where, fields)
    if role in _CALLS:
        if calls:
            raise ValueError(f"{where} has a call as its content, and tool calls beside it: keep one of them")
        role, calls, content = ASSISTANT, _listed(where, _parsed(where, role, content)), None
    content = _text(where, content)
    if content is None:
        reasoning = any(fields.get(name) for name in REASONING)
        if role != ASSISTANT or not (calls or reasoning):
            names = ", ".join(map(repr, message))
            raise ValueError(f"{where} has no content: a message needs a text (this one has the fields {names})")
        content = ""
    if bad := [name for name in REASONING if not isinstance(fields.get(name, ""), str)]:
        raise ValueError(f"{where} has a {bad[0]!r} that is not a string: {short(fields[bad[0]])}")
    if calls and role != ASSISTANT:
        raise ValueError(f"{where} has tool calls, which only the assistant makes")
    fields |= {"role": role, "content": content}
    if calls:
        fields["tool_calls"] = [_call(where, call) for call in calls]
    names = {"from": "role", "value": "content", "function_call": "tool_calls"}
    given_order = dict.fromkeys([names.get(str(name), str(name)) for name in message] + list(fields))
    return {name: fields[name] for name in given_order if name in fields}


def near_role(role: str) -> str:
    """Returns what a role that a template does not know was probably meant to be, for the end of a message."""
    known = (*ROLES, *OTHER_ROLES, *_CALLS)
    near = [] if role.lower() in known else difflib.get_close_matches(role.lower(), known, 1, 0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _role(role: str, template: str) -> str:
    lower = role.lower()
    if lower in OTHER_ROLES and names_role(template, lower):
        return lower
    return ROLES.get(lower) or OTHER_ROLES.get(lower) or (lower if lower in _CALLS else role)


def _text(where: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple | Mapping):
        raise ValueError(f"{where} has the content {short(content)}: it must be a text or a list of text parts")
    return "".join(_part(where, part) for part in ([content] if isinstance(content, Mapping) else content))


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is not None and kind not in _TEXT_PARTS:
        raise ValueError(
            f"{where} has a content part of type {kind!r}: images and other media are not supported yet; pass only the "
            "text"
        )
    if kind is None or not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: a content part must be {{'type': 'text', 'text': …}}, got {short(part)}")
    return part["text"]


def _calls(where: str, fields: dict[str, Any]) -> list[Any]:
    """Removes tool_calls and OpenAI's earlier function_call from the fields, and returns them as a list."""
    calls, call = fields.pop("tool_calls", None), fields.pop("function_call", None)
    if calls and call:
        raise ValueError(f"{where} has both 'tool_calls' and 'function_call': keep one of them")
    found = calls or call or []
    if isinstance(found, str):
        found = _parsed(where, "a tool call", found) if found.strip() else []
    return _listed(where, found or [])


def _listed(where: str, calls: Any) -> list[Any]:
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where} must have a list of tool calls, not {short(calls)}")
    return list(calls)


def _call(where: str, call: Any) -> dict[str, Any]:
    """A tool call as {"type": "function", "function": {"name": …, "arguments": {…}}}, with the fields beside these."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where}: a tool call must have a name and arguments, not {short(call)}")
    arguments = inner.get("parameters") if inner.get("arguments") is None else inner["arguments"]
    if isinstance(arguments, str):
        arguments = _parsed(where, "the arguments of a tool call", arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"{where}: the arguments of a tool call must be an object, not {short(arguments)}")
    rest = {name: value for name, value in inner.items() if name not in ("arguments", "parameters", "type", "id")}
    outer = {name: call[name] for name in call if name != "function"} if "function" in call else {
        name: call[name] for name in ("id",) if name in call}  # fmt: skip
    return {**outer, "type": "function", "function": {**rest, "arguments": dict(arguments or {})}}


def _parsed(where: str, what: str, text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{where}: {what} must be JSON, not {short(text)}") from None


def json_arguments(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies normalized messages, with the arguments of tool calls as JSON."""

    def written(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def short(value: Any) -> str:
    """The value as Python writes it, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
