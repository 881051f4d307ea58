"""`jaxlm generate`: text from one prompt, or from a file of prompts."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.cli.answer import print_answer, statistics
from jaxlm.cli.common import GenerationFlags
from jaxlm.cli.errors import usage
from jaxlm.cli.line_input import check_text
from jaxlm.cli.prompt_lines import PromptLine, has_messages, read_prompts
from jaxlm.cli.terminal import erase_line, note, print_json, progress_line
from jaxlm.data.formats import is_system
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.processing.chat_template import THINKING, parse_value, split_thinking

if TYPE_CHECKING:
    from jaxlm.inference.completion import CompletionChunk
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
class Generate(SamplingFlags, GenerationFlags):
    """Generate text from a prompt and stream it to stdout.

    With a chat template the prompt is a user message. With --raw, or for a model without a chat template, the model
    continues the prompt as plain text. Without -m, a small story model that ships with jaxlm continues the prompt.

    Sampling parameters that are not given come from the model's generation_config.json. Counts and speeds go to stderr.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[PROMPT]")]] = None
    """The prompt; - reads it from stdin. Without a prompt, piped input is the prompt."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """File with one prompt per line (.jsonl, .jsonl.gz or .jsonl.zst), or - for stdin: a JSON string, {"prompt": …},
    {"messages": […], "tools": […]} or {"conversations": […]}. Prints one JSON object per prompt, with the other fields
    of its line."""
    batch_size: int | None = None
    """Number of --prompts to decode together. The default depends on the platform."""
    n: int = 1
    """Number of answers to each prompt, printed as JSON objects."""
    json_schema: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File with the JSON schema of the answer."""
    regex: str | None = None
    """Regular expression that the whole answer matches."""
    grammar: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File with the grammar of the answer, in Lark syntax."""
    system: str | None = None
    """System message. Needs a chat template."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""
    no_think: bool = False
    """Turn off the reasoning of a reasoning model."""
    template_arg: tuple[str, ...] = ()
    """Variables of the chat template, KEY=VALUE. VALUE is true, false or none (in any case), JSON or text."""
    json: bool = False
    """Print one JSON object instead of streamed text. --logprobs implies it."""

    def run(self) -> int:
        self.validate()
        if self.raw and (self.no_think or self.template_arg):
            flag = "--no-think" if self.no_think else "--template-arg"
            raise ValueError(f"{flag} is for the chat template, which --raw does not apply: omit one of the two flags")
        lines = self._lines()
        model = self.load()
        args = template_args(model, self.template_arg, self.no_think)
        from jaxlm.inference.generation import stream

        prompts = [self._ids(model, line, args) for line in lines]
        note_continued(lines, args)
        options: Any = {**self.sampling(), **self._structure()}
        chunks = stream(model, prompts, n=self.n, batch_size=self.batch_size, **options)
        if self.prompts or self.json or self.n > 1 or self.logprobs is not None:
            opened = [not self.raw and inside_reasoning(model, ids) for ids in prompts]
            print_answers(chunks, model, [line.fields for line in lines], opened, self.n)
        else:
            prompt = prompt_of(lines[0].prompt, model, self.system, self.raw)
            print_text(chunks, prompts[0], model, prompt if isinstance(prompt, str) else "")
        return 0

    def _structure(self) -> dict[str, Any]:
        """What the answer must match, as arguments of jaxlm.generate."""
        found: dict[str, Any] = {"regex": self.regex}
        for name, flag, path in (("schema", "--json-schema", self.json_schema), ("grammar", "--grammar", self.grammar)):
            if path is not None:
                with explain_errors(
                    f"{flag} {path} cannot be read", "pass a UTF-8 file", (OSError, UnicodeDecodeError)
                ):
                    found[name] = path.read_text(encoding="utf-8")
        return found

    def _lines(self) -> list[PromptLine]:
        """The prompts."""
        if self.prompt is not None and self.prompts is not None:
            usage("pass a prompt or --prompts FILE.jsonl, not both (jaxlm generate --help)")
        if self.prompts is not None:
            return read_prompts(self.prompts, self.stdin if self.prompts == Path("-") else None, self.raw)
        text, is_terminal = self.prompt, sys.stdin is not None and sys.stdin.isatty()
        if text == "-" or (text is None and not is_terminal):
            text = self.stdin().removesuffix("\n")
        if not text and self.prompt is None:
            usage("pass a prompt, as an argument or on stdin, or --prompts FILE.jsonl (jaxlm generate --help)")
        if not text:
            usage("the prompt is empty: pass some text, or the BOS token (such as <s>) with --raw")
        return [PromptLine("", check_text(text, "the prompt"))]

    def _ids(self, model: "Model", line: PromptLine, args: dict[str, Any]) -> list[int]:
        """The token ids of a prompt. Raises ValueError with the location in the file if it is invalid."""
        from jaxlm.inference.prompts import resolve_max_tokens, to_ids

        with explain_errors(line.where) if line.where else nullcontext():
            if line.tools and not (model.tokenizer is not None and model.tokenizer.template_accepts("tools")):
                raise ValueError(f"tools need a chat template that writes them; that of {model.source} does not")
            for name in line.template_args:
                if model.tokenizer is None or not model.tokenizer.has_template:
                    raise ValueError(f"chat_template_kwargs needs a chat template, and {model.source} has none")
                if not model.tokenizer.template_accepts(name):
                    raise ValueError(f"chat_template_kwargs: the chat template of {model.source} does not use {name!r}")
            if args and not isinstance(line.prompt, str) and not has_messages(line.prompt):
                raise ValueError("--no-think and --template-arg are for the chat template, which token ids do not use")
            more = {"tools": line.tools} if line.tools else {}
            ids = to_ids(
                model, prompt_of(line.prompt, model, self.system, self.raw), {**args, **line.template_args, **more}
            )
            resolve_max_tokens(model, ids, self.max_tokens)
            return ids


def prompt_of(line: Any, model: "Model", system: str | None, raw: bool) -> Any:
    """The prompt for jaxlm.generate: messages if the model has a chat template, unless --raw."""
    chat = model.tokenizer is not None and model.tokenizer.has_template and not raw
    if system is not None and not chat:
        raise ValueError(
            f"--system needs a chat template; {'--raw does not apply it' if raw else model.source + ' has none'}"
        )
    if not isinstance(line, str):
        if system is not None and not has_messages(line):
            raise ValueError("--system needs a text or messages, and token ids are not rendered by the chat template")
        return [{"role": "system", "content": system}, *line] if system and not is_system(line[0]) else line
    if not chat:
        return line
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": line}]


def template_args(model: "Model", pairs: tuple[str, ...], no_think: bool) -> dict[str, Any]:
    """The variables of the chat template that --template-arg and --no-think set. Raises ValueError for a variable that
    the template does not use."""
    args: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not (separator and key):
            raise ValueError(f"--template-arg {pair}: expected KEY=VALUE, for example enable_thinking=False")
        args[key] = parse_value(value)
    if no_think:
        args["enable_thinking"] = False
    for key in args:
        if model.tokenizer is None or not model.tokenizer.template_accepts(key):
            flag = "--no-think" if no_think and key == "enable_thinking" else f"--template-arg {key}"
            raise ValueError(f"{flag}: the chat template of {model.source} does not use {key!r}")
    return args


def note_continued(lines: list[PromptLine], args: dict[str, Any]) -> None:
    """Prints how many prompts end with a message of the assistant."""
    from jaxlm.inference.prompts import is_continued

    if count := sum(is_continued(line.prompt, {**args, **line.template_args}) for line in lines):
        end = "prompt ends" if count == 1 else "prompts end"
        note(
            f"{count} {end} with an assistant message, which is continued (continue_final_message): remove the message "
            "for a new answer"
        )


def print_text(chunks: "Iterator[CompletionChunk]", prompt: list[int], model: "Model", before: str) -> None:
    """Streams one answer to stdout, then the counts to stderr. A terminal also shows `before`, which it continues."""
    chunk = print_answer(chunks, model.tokenizer, inside_reasoning(model, prompt), before)
    if chunk is not None:
        full = len(prompt) + chunk.generation_tokens >= model.config.context
        limit = f" · stopped at {'the context length' if full else '--max-tokens'}"
        note(statistics(chunk) + (limit if chunk.finish_reason == "length" else ""))


def inside_reasoning(model: "Model", prompt: list[int]) -> bool:
    """Whether a prompt ends inside a reasoning block, as some templates render it."""
    end = "" if model.tokenizer is None else model.tokenizer.decode(prompt[-16:], skip_special=False)
    return end.rstrip().endswith(THINKING[0])


def print_answers(
    chunks: "Iterator[CompletionChunk]", model: "Model", fields: list[dict[str, Any]], opened: list[bool], n: int = 1
) -> None:
    """Prints one JSON object per prompt on stdout, in the order of the prompts, and a progress count on stderr.

    Args:
        chunks: The chunks of all answers.
        model: The model.
        fields: Further fields of each prompt, which are printed with its answer.
        opened: Whether each prompt ends inside a reasoning block.
        n: Number of answers to each prompt.
    """
    count, printed = len(fields) * n, 0
    answers: list[list[CompletionChunk]] = [[] for _ in range(count)]
    for chunk in chunks:
        answers[chunk.index * n + chunk.sample].append(chunk)
        while printed < count and answers[printed] and answers[printed][-1].finish_reason:
            erase_line()
            sample = {"sample": printed % n} if n > 1 else {}
            print_json(fields[printed // n] | record(answers[printed], model, opened[printed // n]) | sample)
            printed += 1
            if count > 1:
                progress_line(f"{printed} of {count} done")
    erase_line()


def record(chunks: "list[CompletionChunk]", model: "Model", opened: bool = False) -> dict[str, Any]:
    """An answer as a JSON object. The reasoning of a reasoning model is a field of its own."""
    text, reasoning = "".join(chunks), None
    if model.tokenizer is not None and model.tokenizer.thinking is not None:
        reasoning, text = split_thinking(text, opened)
    last = chunks[-1]
    out = {
        "index": last.index,
        "model": model.source,
        "text": text,
        **({} if reasoning is None else {"reasoning": reasoning}),
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
            x
            and {
                "token": x.text,
                "logprob": x.chosen,
                "top": [
                    {"id": i, "token": text, "logprob": v}
                    for (i, v), text in zip(x.top, x.top_texts or [""] * len(x.top))
                ],
            }
            for chunk in chunks
            for x in chunk.logprobs or []
        ]
    return out
