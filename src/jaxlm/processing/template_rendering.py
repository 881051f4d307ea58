"""Renders a conversation with a chat template. The result equals that of transformers' apply_chat_template.

The variables of a template and the treatment of its output follow transformers 5.24. The template runs in the sandbox
of jaxlm.processing.template_sandbox.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.processing.chat_template import plain_data
from jaxlm.processing.messages import REASONING
from jaxlm.processing.template_language import Spans
from jaxlm.processing.template_sandbox import run

MARKER = "CONTINUE_FINAL_MESSAGE_TAG "  # the trailing space shows whether a template strips content
# Arguments of apply_chat_template that concern token ids. They are not template variables.
ID_OPTIONS = {
    "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
Messages = Sequence[Mapping[str, Any]]


def render(
    hf: Any,
    messages: Messages,
    tools: Tools | None = None,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **options: Any,
) -> str:
    """Renders a conversation as text.

    Args:
        hf: A transformers tokenizer, which has the templates and special tokens.
        messages: Dicts with "role" and "content", oldest first.
        tools: JSON schemas, or functions with type hints and a docstring.
        add_generation_prompt: Append the beginning of an assistant turn.
        continue_final_message: Do not close the last message, so that the model continues it. A string is the name of
            the field to continue.
        options: Options of `write`.

    Raises:
        ValueError: A message, tool or option is invalid.
        Exception: Any exception that the template raises.
    """
    if not continue_final_message:
        return write(hf, messages, tools, add_generation_prompt=add_generation_prompt, **options)[0]
    if add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other: pass one of them")
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    marked = [_message(message) for message in messages]
    if not marked or not isinstance(content := marked[-1].get(field), str):
        raise ValueError(f"continue_final_message: the last message has no text {field!r} to continue")
    if field == "content" and not content and marked[-1].get("tool_calls"):
        raise ValueError("continue_final_message: the last message is a tool call, which has no text to continue")
    fields = [name for name in REASONING if marked[-1].get(name) == content] if field in REASONING else [field]
    template = _template(hf, tools, options.get("chat_template"))
    if not any(name in template for name in fields):
        raise ValueError(f"continue_final_message: the chat template does not read {field!r}")
    marked[-1] |= dict.fromkeys(fields, content + MARKER)
    text, _ = write(hf, marked, tools, **options)
    return _before_marker(text, content)


def _before_marker(text: str, content: str) -> str:
    """The rendered text up to the marker, which follows the content of the last message."""
    if content.strip() not in text or MARKER.strip() not in text:
        raise ValueError("continue_final_message: the chat template changes the text of the last message")
    at = text.rindex(MARKER.strip())
    return text[:at] if text.startswith(MARKER, at) else text[:at].rstrip()


def write(
    hf: Any,
    messages: Messages,
    tools: Tools | None = None,
    *,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, Spans]:
    """Renders a conversation, and returns the spans of the template's {% generation %} blocks.

    Args:
        hf, messages, tools, add_generation_prompt: As in `render`.
        documents: Dicts with "title" and "text", for retrieval-augmented generation.
        chat_template: A template, or the name of one of the tokenizer's templates. Default: the tokenizer's template;
            of several, the one for tools if there are tools.
        variables: Other variables of the template.

    Returns:
        The text, and the spans (begin, end) of characters.

    Raises:
        ValueError: A message, tool or option is invalid.
        Exception: Any exception that the template raises.
    """
    if not messages:
        raise ValueError("the conversation is empty: pass at least one message")
    if wrong := sorted(ID_OPTIONS & variables.keys()):
        raise ValueError(f"{', '.join(wrong)}: not supported here; a chat template renders text, not token ids")
    if documents is not None and not all(isinstance(document, Mapping) for document in documents):
        raise ValueError("documents must be dicts with 'title' and 'text'")
    template_variables = {
        **plain_data({**hf.special_tokens_map, **variables}),
        "messages": [_message(message) for message in messages],
        "tools": None if tools is None else [_schema(tool) for tool in tools],
        "documents": plain_data(documents),
        "add_generation_prompt": add_generation_prompt,
    }
    return run(_template(hf, tools, chat_template), template_variables)


def _template(hf: Any, tools: Tools | None, chat_template: str | None) -> str:
    return hf.get_chat_template(chat_template=chat_template, tools=tools)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a message without fields that are None, which templates render as "None". Reasoning is stored under
    both names that templates read."""
    fields = {name: value for name, value in plain_data(message).items() if value is not None}
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _schema(tool: Any) -> Any:
    from transformers.utils import get_json_schema  # pyright: ignore[reportPrivateImportUsage]

    if isinstance(tool, Mapping):
        return plain_data(tool)
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return plain_data(get_json_schema(tool))
    raise ValueError("a tool must be a JSON schema, or a function with type hints and a docstring")
