"""`jaxlm generate`: text from a prompt, or from a file of them."""

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.cli.answer import print_answer, statistics
from jaxlm.cli.common import ModelFlags, note
from jaxlm.inference.sampling_params import SamplingParams, unsupported
from jaxlm.processing.chat_template import THINKING

if TYPE_CHECKING:
    from jaxlm.inference.generation import CompletionChunk
    from jaxlm.model import Model


@dataclass(frozen=True)
class SamplingFlags(SamplingParams):
    """Options as flags. tyro repeats no flag whose type is `… | None`: here what is empty was not given."""

    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)

    def sampling(self) -> dict[str, Any]:
        """The options that were given, as arguments of jaxlm.generate."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingParams)}
        return {name: value for name, value in given.items() if value not in (None, (), {})}


@dataclass(frozen=True)
class Generate(SamplingFlags, ModelFlags):
    """Continue or answer a prompt, streamed to stdout.

    With a chat template the prompt becomes a user's message; --raw (or a model without template) continues it as text.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[PROMPT]")]] = None
    """The prompt; - reads it from stdin, and so does a pipe without it."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Many prompts, one a line: a JSON string, {"prompt": …} or {"messages": […]}. Answers come as JSON lines."""
    batch_size: int | None = None
    """How many of --prompts are decoded together."""
    system: str | None = None
    """System message, for models with a chat template."""
    raw: bool = False
    """Continue the prompt as text, without the chat template."""
    no_think: bool = False
    """Ask a thinking model to answer at once."""
    template_arg: tuple[str, ...] = ()
    """KEY=VALUE for the chat template (VALUE is JSON, or a text)."""
    json: bool = False
    """One JSON object instead of streamed text (also with --logprobs)."""

    def run(self) -> int:
        self.validate()
        lines = self._lines()
        model = self.load()
        args = template_args(model, self.template_arg, self.no_think)
        warn_ignored(model)
        from jaxlm.inference.generation import stream

        prompts = [self._ids(model, where, line, args) for where, line in lines]
        pieces = stream(model, prompts, batch_size=self.batch_size, **self.sampling())
        if self.prompts or self.json or self.logprobs is not None:
            print_json(pieces, len(prompts), model)
        else:
            print_text(pieces, prompts[0], model)
        return 0

    def _lines(self) -> list[tuple[str, Any]]:
        """The prompts as given, texts or JSON values, each with where it stands."""
        if self.prompt is not None and self.prompts is not None:
            usage("give a prompt or --prompts FILE.jsonl, not both")
        if self.prompts is not None:
            return read_prompts(self.prompts)
        text, stdin = self.prompt, sys.stdin or io.StringIO()  # a process may have none
        if text == "-" or (text is None and not stdin.isatty()):
            text = self.stdin().removesuffix("\n") if sys.stdin else ""
        if not text and self.prompt is None:
            usage("give a prompt, as an argument or on stdin, or --prompts FILE.jsonl")
        if not text:
            raise ValueError("the prompt is empty: give some text, or the model's begin token (such as <s>) with --raw")
        return [("", text)]

    def _ids(self, model: "Model", where: str, line: Any, args: dict[str, Any]) -> list[int]:
        """The token ids of a prompt; ValueError for what cannot be one, with the place in the file."""
        from jaxlm.inference.prompts import resolve_max_tokens, to_ids

        with explain_errors(where) if where else nullcontext():
            ids = to_ids(model, prompt_of(line, model, self.system, self.raw), args)
            resolve_max_tokens(model, ids, self.max_tokens)
            return ids


def usage(text: str) -> NoReturn:
    """Ends the program for arguments that make no sense."""
    print(f"jaxlm: {text} (jaxlm generate --help)", file=sys.stderr)
    raise SystemExit(2)


def read_prompts(path: Path) -> list[tuple[str, Any]]:
    """The lines of a JSONL file, each with its place; ValueError names the first bad one."""
    hint = "--prompts takes a UTF-8 file of JSON values, one per line"
    with explain_errors(f"{path} cannot be read", hint, (OSError, UnicodeDecodeError)):
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would cut a text at U+2028 too
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        with explain_errors(f"{where} is not JSON"):
            value = json.loads(line)
        if isinstance(value, dict) and set(value) in ({"prompt"}, {"messages"}):
            (value,) = value.values()
        if not value or not isinstance(value, str | list):
            raise ValueError(f'{where}: expected a text, {{"prompt": …}} or {{"messages": […]}}')
        prompts.append((where, value))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def prompt_of(line: Any, model: "Model", system: str | None, raw: bool) -> Any:
    """A text as the model wants it: a chat where there is a template, unless --raw."""
    chat = model.tokenizer is not None and model.tokenizer.has_template and not raw
    if system is not None and not chat:
        raise ValueError(
            f"--system needs a chat template; {'--raw leaves it out' if raw else model.source + ' has none'}"
        )
    if not isinstance(line, str):
        has_own = isinstance(line[0], dict) and line[0].get("role") == "system"
        return [{"role": "system", "content": system}, *line] if system and not has_own else line
    if not chat:
        return line
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": line}]


def template_args(model: "Model", given: tuple[str, ...], no_think: bool) -> dict[str, Any]:
    """--template-arg and --no-think as variables of the template; one that it does not use is refused."""
    args: dict[str, Any] = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--template-arg {pair}: expected KEY=VALUE")
        try:
            args[key] = json.loads(value)
        except json.JSONDecodeError:
            args[key] = value
    if no_think:
        args["enable_thinking"] = False
    for key in args:
        if model.tokenizer is None or not model.tokenizer.template_accepts(key):
            flag = "--no-think" if no_think and key == "enable_thinking" else f"--template-arg {key}"
            raise ValueError(f"{flag}: the chat template of {model.source} does not use {key!r}")
    return args


def warn_ignored(model: "Model") -> None:
    """Names fields of generation_config.json that change the text and that jaxlm does not have."""
    if ignored := unsupported(model.generation_config):
        note(f"generation_config.json asks for what jaxlm does not do: {', '.join(ignored)}")


def print_text(pieces: "Iterator[CompletionChunk]", prompt: list[int], model: "Model") -> None:
    """Streams one answer to stdout, then the counts to stderr."""
    tokenizer = model.tokenizer
    end = "" if tokenizer is None else tokenizer.decode(prompt[-16:], skip_special=False)
    piece = print_answer(pieces, tokenizer, opened=end.rstrip().endswith(THINKING[0]))
    if piece is not None:
        full = len(prompt) + piece.generation_tokens >= model.config.context
        ended = f" · ended by {'the context' if full else '--max-tokens'}" if piece.finish_reason == "length" else ""
        note(statistics(piece) + ended)


def print_json(pieces: "Iterator[CompletionChunk]", count: int, model: "Model") -> None:
    """One JSON object a prompt on stdout, in the order of the prompts; a count on stderr while it lasts."""
    parts: list[list[CompletionChunk]] = [[] for _ in range(count)]
    printed = 0
    for piece in pieces:
        parts[piece.index].append(piece)
        while printed < count and parts[printed] and parts[printed][-1].finish_reason:
            print(json.dumps(record(parts[printed], model), ensure_ascii=False), flush=True)
            printed += 1
            if count > 1 and sys.stderr.isatty():
                print(f"\r{printed} of {count} done", end="", file=sys.stderr, flush=True)
    if count > 1 and sys.stderr.isatty():
        print(file=sys.stderr)


def record(pieces: "list[CompletionChunk]", model: "Model") -> dict[str, Any]:
    """An answer as a JSON object."""
    last = pieces[-1]
    out = {
        "index": last.index,
        "model": model.source,
        "text": "".join(pieces),
        "tokens": [token for piece in pieces for token in piece.tokens],
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "generation_tokens": last.generation_tokens,
        "tokens_per_second": round(last.tokens_per_second, 2),
        "first_token_seconds": round(last.first_token_seconds, 4),
        "compile_seconds": round(last.compile_seconds, 3),
        "seed": last.seed,
    }
    if last.logprobs is not None:
        out["logprobs"] = [
            {"logprob": x.chosen, "top": [{"id": i, "logprob": v} for i, v in x.top]}
            for piece in pieces
            for x in piece.logprobs or []
        ]
    return out
