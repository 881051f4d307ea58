"""`jaxlm eval`: perplexity and bits per byte on texts, or tasks of the lm-eval harness."""

# pyright: reportMissingImports=false
# lm_eval is optional: types are checked with and without it.

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.cli import terminal
from jaxlm.cli.common import GenerationFlags
from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import note, print_json
from jaxlm.data.formats import Format

if TYPE_CHECKING:
    from jaxlm.evaluation.perplexity import Evaluation

TEXT_FLAGS = ("stride", "data_format", "train_on", "text_field", "prompt_field", "completion_field", "on_bad", "split")
TASK_FLAGS = ("tasks_folder", "shots", "limit", "chat")


@dataclass(frozen=True)
class Eval(GenerationFlags):
    """Evaluate a model: perplexity and bits per byte on texts, or --tasks of EleutherAI's lm-eval.

    Bits per byte are comparable across tokenizers; perplexity is per token. All tokens of a text are scored, and the
    assistant turns of a chat, but not EOS and other special tokens.
    """

    files: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[FILE...]")]] = ()
    """Files (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow, also .gz and .zst of texts), folders, globs or hub
    datasets."""
    length: int | None = None
    """Window length in tokens. Default: the context length of the model; for texts, at most 2048."""
    stride: int | None = None
    """Sliding window stride for longer texts, in tokens. Default: half of the length."""
    batch: int | None = None
    """Batch size in rows. The default depends on the platform."""
    data_format: Format | None = None
    """Row format. Default: detected from the first row."""
    train_on: Literal["assistant", "completion", "all"] | None = None
    """Tokens to score: assistant turns, the completion, or all. Default: assistant turns or completions if the format
    has them, else all."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    prompt_field: str = "prompt"
    """Field of a row that holds the prompt."""
    completion_field: str = "completion"
    """Field of a row that holds the completion."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Invalid rows: stop with an error, or skip and count them."""
    split: str = "test"
    """Split of a hub dataset, or of a folder whose files are named after splits."""
    tasks: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Tasks of lm-eval, instead of files; * and ? are wildcards."""
    tasks_folder: Path | None = None
    """Folder with YAML files of more tasks."""
    shots: int | None = None
    """Few-shot examples per question. Default: defined by the task."""
    limit: int | None = None
    """Maximum number of questions per task."""
    chat: bool = False
    """Apply the chat template to the questions."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        self._check()
        if self.tasks is not None:
            return self._run_tasks()
        from jaxlm.evaluation.perplexity import evaluate, window_sizes

        model = self.load()
        length, stride = window_sizes(model, self.length, self.stride, self.batch)
        options: dict[str, Any] = {name: getattr(self, name) for name in ("batch", *TEXT_FLAGS)}
        options["format"] = options.pop("data_format")  # --format is the checkpoint format
        options |= {"length": length, "stride": stride, "offline": self.offline}
        start = time.perf_counter()
        with own_flags(), progress_line() as progress, explain_missing_package("this command", "jaxlm[train]"):
            result = evaluate(model, self.files, progress=progress, **options)
        for why, count in result.dropped.items():
            note(f"dropped: {count:,} {why}")
        for text in result.notes:
            note(text)
        if self.json:
            line = {"model": model.source, "files": self.files, "length": length, "stride": stride, **record(result)}
            print_json({**line, "seconds": round(time.perf_counter() - start, 4)})
        else:
            print(table(result))
        return 0

    def _check(self) -> None:
        """Exits with status 2 unless there are either files or tasks, without flags of the other mode."""
        if bool(self.files) == (self.tasks is not None):
            usage("pass either files or --tasks (jaxlm eval --help)")
        wrong_flags = TASK_FLAGS if self.tasks is None else TEXT_FLAGS
        for name in wrong_flags:
            if getattr(self, name) != getattr(Eval, name):
                flag = f"--{name.replace('_', '-')}"
                usage(f"{flag} applies to {'--tasks' if self.tasks is None else 'files'} only (jaxlm eval --help)")
        for name in ("shots", "limit", "length", "batch"):
            if (value := getattr(self, name)) is not None and value < (name != "shots"):
                usage(f"--{name} is {value}, but must be at least {int(name != 'shots')} (jaxlm eval --help)")

    def _run_tasks(self) -> int:
        with explain_missing_package("this command", "jaxlm[eval]"):
            import lm_eval  # noqa: F401  (fails before the model is loaded)
        # To estimate standard errors, the harness would fork this multithreaded process.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        model = self.load()
        from lm_eval.utils import make_table

        from jaxlm.evaluation.lm_eval import run

        names = [name.strip() for name in str(self.tasks).split(",") if name.strip()]
        options: dict[str, Any] = {
            "folder": self.tasks_folder,
            "shots": self.shots,
            "limit": self.limit,
            "chat": self.chat,
        }
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints its progress
            results = run(model, names, length=self.length, batch=self.batch, **options)
            tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
        if self.json:
            fields = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
            line = {"model": model.source, **{name: results[name] for name in fields if name in results}}
            print_json(line, default=str)
        else:
            print("\n".join(tables).rstrip())
        return 0


@contextlib.contextmanager
def own_flags() -> Iterator[None]:
    """Names the flags of this command in messages of the data, which name those of training."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("--data.format", "--data-format").replace("--data.", "--")
        raise ValueError(text) from error


@contextlib.contextmanager
def progress_line() -> Any:
    """Yields a function that prints the number of documents and tokens so far, in one line of a terminal."""
    last = 0.0

    def show(documents: int, tokens: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 0.2:
            last = time.perf_counter()
            terminal.progress_line(f"{documents:,} documents, {tokens:,} tokens")

    try:
        yield show
    finally:
        terminal.erase_line()


def record(result: "Evaluation") -> dict[str, Any]:
    """Returns the result for JSON. An infinite perplexity is null."""
    perplexity = result.perplexity if math.isfinite(result.perplexity) else None
    fields = {name: value for name, value in result._asdict().items() if name != "notes"}
    return {**fields, "perplexity": perplexity, "bits_per_byte": result.bits_per_byte}


def table(result: "Evaluation") -> str:
    """Returns the result as text."""
    lines = {"documents": f"{result.documents:,}", "tokens": f"{result.tokens:,}", "bytes": f"{result.bytes:,}"}
    lines |= {"perplexity": f"{result.perplexity:.4g} per token", "bits per byte": f"{result.bits_per_byte:.4f}"}
    return "\n".join(f"{name:<15}{value}" for name, value in lines.items())
