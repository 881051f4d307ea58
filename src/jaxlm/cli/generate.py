"""`jaxlm generate`: text from one prompt, or from a file of prompts."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.cli.answer import print_answer, statistics
from jaxlm.cli.common import ModelFlags, note, print_json
from jaxlm.cli.errors import usage
from jaxlm.inference.sampling_params import SamplingParams, unsupported
from jaxlm.processing.chat_template import THINKING

if TYPE_CHECKING:
    from jaxlm.inference.generation import CompletionChunk
    from jaxlm.model import Model


@dataclass(frozen=True)
class SamplingFlags(SamplingParams):
    """Sampling parameters as flags. tyro cannot repeat a flag of type `... | None`, so an empty value means None."""

    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters on the command line, as arguments of jaxlm.generate."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingParams)}
        return {name: value for name, value in values.items() if value not in (None, (), {})}


@dataclass(frozen=True)
class Generate(SamplingFlags, ModelFlags):
    """Generate text from a prompt and stream it to stdout.

    With a chat template the prompt is a user message. With --raw, or for a model without a chat template, the model
    continues the prompt as plain text. Without -m, a small story model that ships with jaxlm continues the prompt.

    Sampling parameters that are not given come from the model's generation_config.json. Counts and speeds go to stderr.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[PROMPT]")]] = None
    """The prompt; - reads it from stdin. Without a prompt, piped input is the prompt."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """File with one prompt per line: a JSON string, {"prompt": …} or {"messages": […]}. Prints one JSON object per
    prompt."""
    batch_size: int | None = None
    """Number of --prompts to decode together. The default depends on the platform."""
    system: str | None = None
    """System message. Needs a chat template."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""
    no_think: bool = False
    """Turn off the reasoning of a reasoning model."""
    template_arg: tuple[str, ...] = ()
    """Variables of the chat template, KEY=VALUE. VALUE is JSON or text."""
    json: bool = False
    """Print one JSON object instead of streamed text. --logprobs implies it."""

    def run(self) -> int:
        self.validate()
        lines = self._lines()
        model = self.load()
        args = template_args(model, self.template_arg, self.no_think)
        warn_ignored(model)
        from jaxlm.inference.generation import stream

        prompts = [self._ids(model, where, line, args) for where, line in lines]
        chunks = stream(model, prompts, batch_size=self.batch_size, **self.sampling())
        if self.prompts or self.json or self.logprobs is not None:
            print_answers(chunks, len(prompts), model)
        else:
            print_text(chunks, prompts[0], model)
        return 0

    def _lines(self) -> list[tuple[str, Any]]:
        """The prompts (text or JSON values), each with its location in the file."""
        if self.prompt is not None and self.prompts is not None:
            usage("pass a prompt or --prompts FILE.jsonl, not both (jaxlm generate --help)")
        if self.prompts is not None:
            return read_prompts(self.prompts)
        text, is_terminal = self.prompt, sys.stdin is not None and sys.stdin.isatty()
        if text == "-" or (text is None and not is_terminal):
            text = self.stdin().removesuffix("\n")
        if not text and self.prompt is None:
            usage("pass a prompt, as an argument or on stdin, or --prompts FILE.jsonl (jaxlm generate --help)")
        if not text:
            raise ValueError("the prompt is empty: pass some text, or the BOS token (such as <s>) with --raw")
        return [("", text)]

    def _ids(self, model: "Model", where: str, line: Any, args: dict[str, Any]) -> list[int]:
        """The token ids of a prompt. Raises ValueError with the location in the file if it is invalid."""
        from jaxlm.inference.prompts import resolve_max_tokens, to_ids

        with explain_errors(where) if where else nullcontext():
            ids = to_ids(model, prompt_of(line, model, self.system, self.raw), args)
            resolve_max_tokens(model, ids, self.max_tokens)
            return ids


def read_prompts(path: Path) -> list[tuple[str, Any]]:
    """The prompts of a JSONL file, each with its location. Raises ValueError for the first invalid line."""
    hint = "--prompts takes a UTF-8 file with one JSON value per line"
    with explain_errors(f"{path} cannot be read", hint, (OSError, UnicodeDecodeError)):
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also split at U+2028
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
            raise ValueError(f'{where}: expected a string, {{"prompt": …}} or {{"messages": […]}}')
        prompts.append((where, value))
    if not prompts:
        raise ValueError(f"{path} has no prompts: write one JSON value per line")
    return prompts


def prompt_of(line: Any, model: "Model", system: str | None, raw: bool) -> Any:
    """The prompt for jaxlm.generate: messages if the model has a chat template, unless --raw."""
    chat = model.tokenizer is not None and model.tokenizer.has_template and not raw
    if system is not None and not chat:
        raise ValueError(
            f"--system needs a chat template; {'--raw does not apply it' if raw else model.source + ' has none'}"
        )
    if not isinstance(line, str):
        has_own = isinstance(line[0], dict) and line[0].get("role") == "system"
        return [{"role": "system", "content": system}, *line] if system and not has_own else line
    if not chat:
        return line
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": line}]


def template_args(model: "Model", pairs: tuple[str, ...], no_think: bool) -> dict[str, Any]:
    """The variables of the chat template that --template-arg and --no-think set. Raises ValueError for a variable that
    the template does not use."""
    args: dict[str, Any] = {}
    for pair in pairs:
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
    """Prints the fields of generation_config.json that would change the text but are not supported."""
    if ignored := unsupported(model.generation_config):
        note(f"not supported and ignored, from generation_config.json: {', '.join(ignored)}")


def print_text(chunks: "Iterator[CompletionChunk]", prompt: list[int], model: "Model") -> None:
    """Streams one answer to stdout, then the counts to stderr."""
    tokenizer = model.tokenizer
    end = "" if tokenizer is None else tokenizer.decode(prompt[-16:], skip_special=False)
    chunk = print_answer(chunks, tokenizer, opened=end.rstrip().endswith(THINKING[0]))
    if chunk is not None:
        full = len(prompt) + chunk.generation_tokens >= model.config.context
        limit = f" · stopped at {'the context length' if full else '--max-tokens'}"
        note(statistics(chunk) + (limit if chunk.finish_reason == "length" else ""))


def print_answers(chunks: "Iterator[CompletionChunk]", count: int, model: "Model") -> None:
    """Prints one JSON object per prompt on stdout, in the order of the prompts, and a progress count on stderr."""
    answers: list[list[CompletionChunk]] = [[] for _ in range(count)]
    printed = 0
    for chunk in chunks:
        answers[chunk.index].append(chunk)
        while printed < count and answers[printed] and answers[printed][-1].finish_reason:
            print_json(record(answers[printed], model))
            printed += 1
            if count > 1 and sys.stderr.isatty():
                print(f"\r{printed} of {count} done", end="", file=sys.stderr, flush=True)
    if count > 1 and sys.stderr.isatty():
        print(file=sys.stderr)


def record(chunks: "list[CompletionChunk]", model: "Model") -> dict[str, Any]:
    """An answer as a JSON object."""
    last = chunks[-1]
    out = {
        "index": last.index,
        "model": model.source,
        "text": "".join(chunks),
        "tokens": [token for chunk in chunks for token in chunk.tokens],
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
            for chunk in chunks
            for x in chunk.logprobs or []
        ]
    return out
