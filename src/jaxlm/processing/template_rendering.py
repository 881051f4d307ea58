"""A conversation as text, by a checkpoint's chat template: what transformers' apply_chat_template gives, bit by bit.

What a template is handed, and what becomes of what it writes, follows transformers 5.24. The template itself runs
within the bounds of jaxlm.processing.template_sandbox.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.processing.chat_template import plain_data
from jaxlm.processing.template_language import Spans
from jaxlm.processing.template_sandbox import run

# Names under which a message brings its reasoning. Templates read the first, and gpt-oss the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
MARKER = "CONTINUE_FINAL_MESSAGE_TAG "  # its blank tells whether a template strips what it is given
# Arguments of apply_chat_template that no template sees: they are about token ids.
ABOUT_IDS = {
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
    """The text of a conversation.

    Args:
        hf: the tokenizer of transformers, for its templates and special tokens.
        messages: dicts, oldest first.
        tools: JSON schemas, or functions with type hints and a docstring.
        add_generation_prompt: open the assistant's turn at the end.
        continue_final_message: leave the last message open at its end; a text names the field of it that is continued.
        options: those of `write`.

    Raises:
        ValueError: a message, a tool or an option cannot be given to a template.
        Exception: whatever the template raises.
    """
    if not continue_final_message:
        return write(hf, messages, tools, add_generation_prompt=add_generation_prompt, **options)[0]
    if add_generation_prompt:
        raise ValueError("continue_final_message leaves no place for add_generation_prompt: give one of them")
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    marked = [_message(message) for message in messages]
    if not marked or not isinstance(said := marked[-1].get(field), str):
        raise ValueError(f"continue_final_message: the last message has no text {field!r} to continue")
    fields = [name for name in REASONING if marked[-1].get(name) == said] if field in REASONING else [field]
    template = _template(hf, tools, options.get("chat_template"))
    if not any(name in template for name in fields):
        raise ValueError(f"continue_final_message: the chat template does not read {field!r}")
    marked[-1] |= dict.fromkeys(fields, said + MARKER)
    text, _ = write(hf, marked, tools, **options)
    return _cut(text, said)


def _cut(text: str, said: str) -> str:
    """The text up to where the marker stands behind what was said."""
    if said.strip() not in text or MARKER.strip() not in text:
        raise ValueError("continue_final_message: the chat template does not write the last message as it is")
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
    """The text of a conversation, and the spans in it that the template's {% generation %} tags mark.

    Args:
        hf, messages, tools, add_generation_prompt: those of `render`.
        documents: dicts with "title" and "text", for templates that quote them.
        chat_template: a template, or the name of one of the tokenizer's. By default it is the tokenizer's own: of
            several the one for tools where there are any.
        variables: what else the template reads.
    """
    if not messages:
        raise ValueError("the conversation is empty")
    if wrong := sorted(ABOUT_IDS & variables.keys()):
        raise ValueError(f"{', '.join(wrong)}: a chat template writes text and knows of no token ids")
    if documents is not None and not all(isinstance(document, Mapping) for document in documents):
        raise ValueError("documents are dicts with 'title' and 'text'")
    given = {
        **plain_data({**hf.special_tokens_map, **variables}),
        "messages": [_message(message) for message in messages],
        "tools": None if tools is None else [_schema(tool) for tool in tools],
        "documents": plain_data(documents),
        "add_generation_prompt": add_generation_prompt,
    }
    return run(_template(hf, tools, chat_template), given)


def _template(hf: Any, tools: Tools | None, chat_template: str | None) -> str:
    return hf.get_chat_template(chat_template=chat_template, tools=tools)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with what it has: a template would write the None of others. Its reasoning has all names."""
    found = {name: value for name, value in plain_data(message).items() if value is not None}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _schema(tool: Any) -> Any:
    from transformers.utils import get_json_schema  # pyright: ignore[reportPrivateImportUsage]

    if isinstance(tool, Mapping):
        return plain_data(tool)
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return plain_data(get_json_schema(tool))
    raise ValueError("a tool is a JSON schema, or a function with type hints and a docstring")
