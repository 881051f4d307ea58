"""The file of --prompts: one prompt per line, with what is said beside it."""

import difflib
import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.errors import explain_errors

PROMPT_FIELDS = ("prompt", "messages", "conversations")  # of a line of --prompts
OUTPUT_FIELDS = {"index", "model", "text", "reasoning", "tokens", "finish_reason", "prompt_tokens", "generation_tokens",
                 "tokens_per_second", "first_token_seconds", "compile_seconds", "seed", "logprobs"}  # fmt: skip


class PromptLine(NamedTuple):
    """A prompt and what is said beside it.

    Attributes:
        where: Its file and line; empty for the command line.
        prompt: A text, messages or token ids.
        tools: JSON schemas of tools.
        fields: Further fields, which are printed with the answer.
    """

    where: str
    prompt: Any
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012  never changed


def read_prompts(path: Path, stdin: Callable[[], str] | None = None) -> list[PromptLine]:
    """The prompts of a JSONL file. Raises ValueError for the first invalid line.

    Args:
        path: The file.
        stdin: Reads stdin, in place of the file.
    """
    hint = "--prompts takes a UTF-8 file with one JSON value per line"
    with explain_errors(f"{path} cannot be read", hint, (OSError, UnicodeDecodeError)):
        lines = (stdin() if stdin else path.read_text("utf-8-sig")).split("\n")  # splitlines would also split at U+2028
    name = "stdin" if stdin else str(path)
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        with explain_errors(f"{where} is not JSON"):
            value = json.loads(line)
        with explain_errors(where):
            prompts.append(_prompt_line(where, value))
    if not prompts:
        raise ValueError(f"{name} has no prompts: write one JSON value per line")
    return prompts


def _prompt_line(where: str, value: Any) -> PromptLine:
    fields, tools = {}, None
    if isinstance(value, dict):
        fields = dict(value)
        given = [name for name in PROMPT_FIELDS if name in fields]
        if len(given) != 1:
            found = f"both {given[0]!r} and {given[1]!r}" if given else ", ".join(map(repr, value)) or "no fields"
            raise ValueError(
                f"the line has {found}: expected one of {', '.join(map(repr, PROMPT_FIELDS))}{_near(value)}"
            )
        value, tools, system = fields.pop(given[0]), fields.pop("tools", None), fields.pop("system", None)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError(f"the field 'tools' must be a list of JSON schemas, not {reprlib.repr(tools)}")
        if taken := sorted(OUTPUT_FIELDS & fields.keys()):
            raise ValueError(f"the field {taken[0]!r} has the name of a field of the output: rename it")
        if system is not None:
            value = [{"role": "user", "content": value}] if isinstance(value, str) else value
            if not isinstance(system, str) or not isinstance(value, list):
                raise ValueError(f"the field 'system' must be a string beside messages, not {reprlib.repr(system)}")
            value = [{"role": "system", "content": system}, *value]
    if not value or not isinstance(value, str | list):
        raise ValueError(f'expected a string, {{"prompt": …}} or {{"messages": […]}}, not {reprlib.repr(value)}')
    return PromptLine(where, value, tools, fields)


def _near(value: dict[str, Any]) -> str:
    near = [close[0] for name in value if (close := difflib.get_close_matches(name, PROMPT_FIELDS, 1))]
    return f"; did you mean {near[0]!r}?" if near else ""
