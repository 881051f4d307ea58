"""`jaxlm eval`: how well a model predicts texts, or its scores on tasks of the lm-eval harness."""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.cli.common import ModelFlags, note

if TYPE_CHECKING:
    from jaxlm.evaluation.perplexity import Evaluation

OF_TEXTS = ("stride", "data_format", "train_on", "text_field", "prompt_field", "completion_field", "on_bad", "split")
OF_TASKS = ("tasks_folder", "shots", "limit", "chat")


@dataclass(frozen=True)
class Eval(ModelFlags):
    """Measure a model: perplexity and bits per byte on texts, or --tasks of EleutherAI's lm-eval.

    Bits per byte compare models with any two tokenizers. What counts is the text, of chats the assistant's turns; EOS
    and other special tokens do not.
    """

    files: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[FILE...]")]] = ()
    """Files (.txt, .jsonl, .json, .parquet), folders, globs or hub datasets."""
    length: int | None = None
    """Tokens that are read at once. Default: the context, and of texts at most 2048."""
    stride: int | None = None
    """Tokens from one window of a longer text to the next; default: half of the length."""
    batch: int | None = None
    """Rows that are computed together; default: as the device likes it."""
    data_format: str | None = None
    """text, messages, prompt, instruction, question or conversations; default: what the first rows look like."""
    train_on: Literal["assistant", "completion", "all"] | None = None
    """Which tokens count; default: answers where there are any, else all."""
    text_field: str = "text"
    """Field of a row that is a text."""
    prompt_field: str = "prompt"
    """Field of a prompt."""
    completion_field: str = "completion"
    """Field of its completion."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What happens at a row that cannot be used."""
    split: str = "test"
    """Of a folder whose files are named by splits, or a hub dataset."""
    tasks: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Tasks of lm-eval instead of files; * and ? stand for any letters."""
    tasks_folder: Path | None = None
    """Where YAML files of more tasks are."""
    shots: int | None = None
    """Examples before each question; default: as the task says."""
    limit: int | None = None
    """Questions of each task at most."""
    chat: bool = False
    """Put the questions through the chat template."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        self._check()
        if self.tasks is not None:
            return self._run_tasks()
        from jaxlm.evaluation.perplexity import evaluate, sizes

        model = self.load()
        length, stride = sizes(model, self.length, self.stride, self.batch)
        how: dict[str, Any] = {name: getattr(self, name) for name in ("batch", *OF_TEXTS)}
        how["format"] = how.pop("data_format")  # --format is the checkpoint's
        how |= {"length": length, "stride": stride, "offline": self.offline}
        start = time.perf_counter()
        with progress_line() as tell, explain_missing_package("this command", "jaxlm[train]"):
            found = evaluate(model, self.files, progress=tell, **how)
        for why, count in found.dropped.items():
            note(f"dropped: {count:,} {why}")
        if self.json:
            told = {"model": model.source, "files": self.files, "length": length, "stride": stride, **record(found)}
            print(json.dumps({**told, "seconds": round(time.perf_counter() - start, 4)}, ensure_ascii=False))
        else:
            print(table(found))
        return 0

    def _check(self) -> None:
        """Usage: texts or tasks, and no flag of the other."""
        if bool(self.files) == (self.tasks is not None):
            usage("name files to predict, or --tasks, one of them")
        wrong = OF_TASKS if self.tasks is None else OF_TEXTS
        for name in wrong:
            if getattr(self, name) != getattr(Eval, name):
                flag = f"--{name.replace('_', '-')}"
                usage(f"{flag} is for {'--tasks' if self.tasks is None else 'files'}")
        for name in ("shots", "limit", "length", "batch"):
            if (value := getattr(self, name)) is not None and value < (name != "shots"):
                usage(f"--{name} is {value}, but must be at least {int(name != 'shots')}")

    def _run_tasks(self) -> int:
        with explain_missing_package("this command", "jaxlm[eval]"):
            import lm_eval  # noqa: F401  (before a model is loaded for nothing)
        # The harness would fork beneath jax's threads to estimate errors.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        model = self.load()
        from lm_eval.utils import make_table

        from jaxlm.evaluation.lm_eval import run

        names = [name.strip() for name in str(self.tasks).split(",") if name.strip()]
        how: dict[str, Any] = {"folder": self.tasks_folder, "shots": self.shots, "limit": self.limit, "chat": self.chat}
        with contextlib.redirect_stdout(sys.stderr):  # it tells of its work there
            results = run(model, names, length=self.length, batch=self.batch, **how)
            tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
        if self.json:
            kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
            told = {"model": model.source, **{name: results[name] for name in kept if name in results}}
            print(json.dumps(told, ensure_ascii=False, default=str))
        else:
            print("\n".join(tables).rstrip())
        return 0


@contextlib.contextmanager
def progress_line() -> Any:
    """What tells documents and tokens so far, in one line of a terminal, now and then."""
    shown = sys.stderr.isatty()
    last = 0.0

    def tell(documents: int, tokens: int) -> None:
        nonlocal last
        if shown and time.perf_counter() - last > 0.2:
            last = time.perf_counter()
            print(f"\r\033[2m{documents:,} documents, {tokens:,} tokens\033[0m", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def usage(text: str) -> NoReturn:
    """Ends the program for arguments that make no sense."""
    print(f"jaxlm: {text} (jaxlm eval --help)", file=sys.stderr)
    raise SystemExit(2)


def record(found: "Evaluation") -> dict[str, Any]:
    """For JSON, which knows no infinity."""
    perplexity = found.perplexity if math.isfinite(found.perplexity) else None
    return {**found._asdict(), "perplexity": perplexity, "bits_per_byte": found.bits_per_byte}


def table(found: "Evaluation") -> str:
    """For people."""
    lines = {"documents": f"{found.documents:,}", "tokens": f"{found.tokens:,}", "bytes": f"{found.bytes:,}"}
    lines |= {"perplexity": f"{found.perplexity:.4g} a token", "bits per byte": f"{found.bits_per_byte:.4f}"}
    return "\n".join(f"{name:<15}{value}" for name, value in lines.items())
