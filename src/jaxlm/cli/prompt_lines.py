"""The file of --prompts: one prompt per line. The fields beside it are read as in training rows (data/formats.py)."""

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.data.formats import BESIDE, history_of, system_of, template_args_of, tools_of
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.processing.messages import REASONING

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
        template_args: Variables of the chat template that the line sets.
    """

    where: str
    prompt: Any
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012  never changed
    template_args: dict[str, Any] = {}  # noqa: RUF012


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
    fields: dict[str, Any] = {}
    tools, args = None, {}
    if isinstance(value, dict):
        fields = dict(value)
        given = [name for name in PROMPT_FIELDS if name in fields]
        if len(given) != 1:
            found = f"both {given[0]!r} and {given[1]!r}" if given else ", ".join(map(repr, value)) or "no fields"
            raise ValueError(
                f"the line has {found}: expected one of {', '.join(map(repr, PROMPT_FIELDS))}{_near(value)}"
            )
        value = fields.pop(given[0])
        beside = {name: fields.pop(name) for name in BESIDE if name in fields}
        if taken := sorted(OUTPUT_FIELDS & fields.keys()):
            raise ValueError(f"the field {taken[0]!r} has the name of a field of the output: rename it")
        if options := [one.name for one in dataclasses.fields(SamplingParams) if one.name in fields]:
            flag = f"--{options[0].replace('_', '-')}"
            raise ValueError(f"the field {options[0]!r} is a sampling parameter, which all prompts share: pass {flag}")
        if reasoning := [name for name in REASONING if beside.get(name)]:
            raise ValueError(f"the field {reasoning[0]!r} must be a field of a message")
        tools, args = tools_of(beside), template_args_of(beside)
        if value and any(beside.get(name) for name in ("system", "system_prompt", "history")):
            messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise ValueError(f"messages must be a list of objects, not {reprlib.repr(messages)}")
            messages = [*history_of(beside), *messages]
            value = [*system_of(beside, messages), *messages]
    if not value or not isinstance(value, str | list):
        raise ValueError(f'expected a string, {{"prompt": …}} or {{"messages": […]}}, not {reprlib.repr(value)}')
    return PromptLine(where, value, tools, fields, args)


def _near(value: dict[str, Any]) -> str:
    near = [close[0] for name in value if (close := difflib.get_close_matches(name, PROMPT_FIELDS, 1))]
    return f"; did you mean {near[0]!r}?" if near else ""
