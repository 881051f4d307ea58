"""The file of --prompts: one prompt per line. The fields beside it are read as in training rows (data/formats.py)."""

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.cli.suggestions import sampling_advice
from jaxlm.data.formats import BESIDE, MEDIA, check_fields, history_of, system_of, template_args_of, tools_of
from jaxlm.data.readers import location, read_lines
from jaxlm.processing.messages import REASONING, short

# Fields of a line of --prompts that hold the prompt, and what each takes.
PROMPT_FIELDS = {
    "prompt": "a text, a list of messages or a list of token ids",
    "messages": "a list of messages",
    "conversations": "a list of messages",
}
OUTPUT_FIELDS = {"index", "model", "text", "reasoning", "tokens", "finish_reason", "prompt_tokens", "generation_tokens",
                 "tokens_per_second", "first_token_seconds", "compile_seconds", "seed", "logprobs"}  # fmt: skip

# Fields that would change how a prompt is rendered, and what to do instead.
TEMPLATE_FIELDS = {
    **dict.fromkeys(("enable_thinking", "reasoning_effort"), "write it into chat_template_kwargs"),
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message"), "a last message of the assistant is continued"
    ),
}


class PromptLine(NamedTuple):
    """A prompt and what is said beside it.

    Attributes:
        where: Its file and line; empty for the command line.
        prompt: A text, messages or token ids.
        tools: JSON schemas of tools.
        fields: Further fields, which are printed with the answer.
        template_args: Variables of the chat template that the line sets.
    """

    where: str
    prompt: Any
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012  never changed
    template_args: dict[str, Any] = {}  # noqa: RUF012


def read_prompts(path: Path, stdin: Callable[[], str] | None = None, raw: bool = False) -> list[PromptLine]:
    """The prompts of a JSONL file. Raises ValueError for the first invalid line.

    Args:
        path: The file, which may be compressed (.gz, .zst).
        stdin: Reads stdin, in place of the file.
        raw: Whether the prompts are continued as text, without the chat template.
    """
    name = "stdin" if stdin else str(path)
    hint = "--prompts takes a UTF-8 file with one JSON value per line"
    with explain_errors(f"{name} cannot be read", hint, (OSError, UnicodeDecodeError)):
        lines = list(_lines(path, stdin))
    prompts = []
    for number, line in lines:
        if not line.strip():
            continue
        where = location(name, number, by_lines=True)
        hint = 'write {"prompt": "…"} or "…"'
        with explain_errors(f"{where}: the line is not valid JSON", hint, (ValueError, RecursionError)):
            value = json.loads(line)
        with explain_errors(where):
            prompts.append(_prompt_line(where, value, raw))
    if not prompts:
        raise ValueError(f"{name} has no prompts: write one JSON value per line")
    return prompts


def has_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, not a text or token ids."""
    return isinstance(prompt, list) and any(isinstance(part, dict) for part in prompt)


def _lines(path: Path, stdin: Callable[[], str] | None) -> Iterator[tuple[int, str]]:
    """Yields line numbers and lines. Only "\\n" ends a line, as in training data."""
    if stdin:
        yield from enumerate(stdin().removeprefix("\ufeff").split("\n"), 1)
        return
    for number, line, bad in read_lines(path):
        if bad is not None:
            raise ValueError(f"{location(str(path), number, by_lines=True)}: {bad.detail}")
        yield number, line


def _prompt_line(where: str, value: Any, raw: bool) -> PromptLine:
    if isinstance(value, dict):
        line = _with_fields(where, value, raw)
    elif value and isinstance(value, str | list):
        line = PromptLine(where, value)
    else:
        raise ValueError(f'expected a string, {{"prompt": …}} or {{"messages": […]}}, not {short(value)}')
    if raw and has_messages(line.prompt):
        raise ValueError('--raw continues text; messages need the chat template: omit --raw, or write {"prompt": …}')
    return line


def _with_fields(where: str, value: dict[str, Any], raw: bool) -> PromptLine:
    fields = dict(value)
    prompt = _pop_prompt(fields)
    beside = {name: fields.pop(name) for name in BESIDE if name in fields}
    beside = {name: item for name, item in beside.items() if item}
    if reasoning := [name for name in REASONING if name in beside]:
        raise ValueError(f"the field {reasoning[0]!r} must be a field of a message")
    _check_further(fields)
    ids = isinstance(prompt, list) and not has_messages(prompt)
    if beside and (raw or ids):
        why = "--raw does not apply: omit --raw" if raw else "token ids do not use: write a text or messages"
        raise ValueError(f"the field {next(iter(beside))!r} needs the chat template, which {why}, or omit the field")
    tools, args = tools_of(beside), template_args_of(beside)
    if any(name in beside for name in ("system", "system_prompt", "history")):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*history_of(beside), *messages]
        prompt = [*system_of(beside, messages), *messages]
    return PromptLine(where, prompt, tools, fields, args)


def _pop_prompt(fields: dict[str, Any]) -> Any:
    """Removes the prompt from the fields of a line, and returns it."""
    given = [name for name in PROMPT_FIELDS if fields.get(name) is not None] or [*PROMPT_FIELDS.keys() & fields.keys()]
    if len(given) > 1:
        raise ValueError(f"the line has both {given[0]!r} and {given[1]!r}: remove one of them")
    if not given:
        found, expected = ", ".join(map(repr, fields)) or "no fields", ", ".join(map(repr, PROMPT_FIELDS))
        raise ValueError(f"the line has {found}: expected one of {expected}{_near(fields)}")
    [name] = given
    prompt = fields.pop(name)
    for other in PROMPT_FIELDS:  # null
        fields.pop(other, None)
    prompt = [prompt] if name != "prompt" and isinstance(prompt, dict) else prompt
    if prompt in (None, "", [], {}):
        raise ValueError(f"the field {name!r} is empty: expected {PROMPT_FIELDS[name]}")
    if not (isinstance(prompt, str | list) if name == "prompt" else has_messages(prompt)):
        raise ValueError(f"the field {name!r} must be {PROMPT_FIELDS[name]}, not {short(prompt)}")
    return prompt


def _check_further(fields: dict[str, Any]) -> None:
    """Raises ValueError for a field beside the prompt that would have no effect, or would be overwritten."""
    check_fields(fields, refused=MEDIA)
    for name, value in fields.items():
        if value is not None and (advice := sampling_advice(name)):
            raise ValueError(f"the field {name!r} is a sampling parameter, which all prompts share: {advice}")
        if value is not None and name in TEMPLATE_FIELDS:
            raise ValueError(f"the field {name!r} is not read: {TEMPLATE_FIELDS[name]}")
        if near := difflib.get_close_matches(name, BESIDE, 1, 0.85):
            raise ValueError(f"the field {name!r} is not read: did you mean {near[0]!r}?")
        if value is not None and name in OUTPUT_FIELDS:
            raise ValueError(f"the field {name!r} has the name of a field of the output: rename it")


def _near(fields: dict[str, Any]) -> str:
    near = [close[0] for name in fields if (close := difflib.get_close_matches(name, PROMPT_FIELDS, 1))]
    return f"; did you mean {near[0]!r}?" if near else ""
