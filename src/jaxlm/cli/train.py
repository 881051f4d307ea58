"""`jaxlm train` and `jaxlm finetune`: pretraining, full fine-tuning and LoRA."""

import logging
import sys
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.cli.common import ProcessFlags
from jaxlm.cli.errors import usage
from jaxlm.cli.flags import flags_of
from jaxlm.cli.suggestions import unknown_key
from jaxlm.cli.terminal import columns, console, dim, is_styled, note, shows_progress
from jaxlm.cli.wrapping import hanging
from jaxlm.training.config import RENAMED_FIELDS, Optimizer, Run, field_names, flags

LEARNING_RATES = {"lora": 2e-4, "full": 1e-5}  # of finetune, by method


@dataclass(frozen=True)
class Train(ProcessFlags, Run):
    """Train a model from random weights (--shape config.json) or from a checkpoint (--model).

    Every flag can also be a key of a YAML file (-c); a flag overrides the file. Running the same command again resumes
    from the last checkpoint.
    """

    memory_hint: ClassVar[str] = (
        "a smaller --batch, more --accumulate, --remat full, --dtype bfloat16 or --weight-dtype bfloat16"
    )

    config: Annotated[Path | None, tyro.conf.arg(aliases=["-c"], metavar="FILE.yaml")] = None
    """YAML file of flags; dotted names are nested (optimizer: {lr: 0.001})."""
    dry_run: bool = False
    """Print memory, steps, tokens and two examples with their loss mask, and exit."""

    @property
    def stops_at_sigterm(self) -> bool:
        return not self.dry_run

    def run(self) -> int:
        try:
            self.check()
        except ValueError as error:
            usage(f"{error} (--help)")
        self.begin()
        run = Run(**{field.name: getattr(self, field.name) for field in fields(Run)})
        if isinstance(self, Finetune) and not run.optimizer.lr:
            run = replace(run, optimizer=replace(run.optimizer, lr=LEARNING_RATES[run.method]))
        with explain_missing_package("training", "jaxlm[train]"):
            from jaxlm.training.loop import train

        if self.dry_run:
            return dry_run(run)
        if not self.debug:
            silence_orbax()
        with Display() as display:
            trained = train(run, display.log, display.log_progress)
        if trained.model.name == "adapter":
            base = f"{self.model} --quantize {self.quantize}" if self.quantize else self.model
            note(f"adapter: {trained.model} (jaxlm generate -m {base} --adapter {trained.model} …)")
        else:
            note(f"model: {trained.model} (jaxlm generate -m {trained.model} …)")
        if (plot := trained.folder / "loss.png").exists():
            note(f"loss curve: {plot}")
        return 0


@dataclass(frozen=True)
class Finetune(Train):
    """Fine-tune a checkpoint: a LoRA adapter (--method lora), or all weights (--method full).

    If the data have prompts and answers, only the answers count in the loss. Every flag can also be a key of a YAML
    file (-c); a flag overrides the file. Running the same command again resumes from the last checkpoint.
    """

    method: Literal["full", "lora"] = "lora"
    """Train a LoRA adapter (lora) or all weights (full)."""
    epochs: float = 3.0
    """Number of passes over the data, if --steps is 0."""
    batch: int = 8
    """Batch size: rows per step, over all devices."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.0, weight_decay=0.0, warmup=0.05))
    """Optimizer settings. lr 0: 2e-4 for an adapter, 1e-5 for all weights."""


def dry_run(run: Run) -> int:
    """Prints the dry run."""
    from jaxlm.training import dry_run as plan
    from jaxlm.training.loop import jit_step
    from jaxlm.training.setup import set_up

    with Display() as display:
        setup = set_up(run, display.log_progress)
    for line in plan.describe(setup, plan.plan_memory(setup, jit_step(setup))):
        print(hanging(line, columns(), indent=12))  # below the text behind the names
    for number, pieces in enumerate(plan.examples(setup, 2), 1):
        print(f"\nexample {number} (outside the loss mask: {mark('like this', False)})")
        print("".join(mark(text, trained_on) for text, trained_on in pieces))
    return 0


class Display:
    """A progress bar on the terminal's stderr, and lines of metrics on stdout."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        on_stderr = console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                   TextColumn("{task.fields[status]}"), TimeRemainingColumn(compact=True))  # fmt: skip
        # On a terminal, printed lines appear above the bar.
        self.bar = Progress(*columns, console=on_stderr, transient=True, disable=not shows_progress(),
                            redirect_stdout=sys.stdout.isatty())  # fmt: skip
        self.task = self.bar.add_task("preparing", total=None, status="")
        self.steps, self.compiling = 0, True

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def log_progress(self, documents: int, tokens: int) -> None:
        self.bar.update(self.task, status=f"{documents:,} documents, {tokens:,} tokens")

    def log(self, line: dict[str, Any]) -> None:
        if "note" in line:
            note(line["note"])
        if "steps" in line:  # the run starts or resumes
            self.steps = line["steps"]
            self.bar.reset(
                self.task, total=self.steps, completed=line["step"], description="step", status="compiling …"
            )
        elif line.keys() == {"step"}:
            if self.compiling:
                self.bar.update(self.task, status="")
            self.compiling = False
            self.bar.update(self.task, completed=line["step"])
        elif "note" not in line:
            if "grad_norm" in line:
                self.bar.update(self.task, status=short_metrics(line))
            print(metrics_line(line, self.steps), flush=True)


def silence_orbax() -> None:
    """Hides the tracebacks that Orbax's threads print and log. Their errors are raised again in the main thread."""
    before = threading.excepthook, sys.unraisablehook

    def of_thread(error: Any) -> None:
        if not type(error.thread).__module__.startswith("orbax."):
            before[0](error)

    def unraisable(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":  # from TensorStore's pending writes
            before[1](error)

    threading.excepthook, sys.unraisablehook = of_thread, unraisable
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def step_metrics(line: dict[str, Any]) -> str:
    """Returns the metrics of a step as text: "loss 2.3456 learning_rate 0.0003 …"."""
    formats = {"loss": ".4f", "learning_rate": ".3g", "grad_norm": ".3g", "tokens_per_second": ",.0f", "mfu": ".1%"}
    if line.get("loss_tokens_per_second", 0) < 0.95 * line["tokens_per_second"]:
        formats["loss_tokens_per_second"] = ",.0f"
    text = " ".join(f"{name} {line[name]:{spec}}" for name, spec in formats.items() if name in line)
    return text if "loss" in line else f"no token in the loss mask {text}"


def short_metrics(line: dict[str, Any]) -> str:
    """Returns the metrics that fit beside a progress bar."""
    loss = f"loss {line['loss']:.4f} " if "loss" in line else ""
    return f"{loss}{line['tokens_per_second']:,.0f} tokens/s"


def metrics_line(line: dict[str, Any], steps: int) -> str:
    """Returns a line of metrics as text."""
    step = f"step {line['step']}/{steps}"
    if "answer" in line:
        return f"{step} sample {line['prompt']} -> {line['answer']}"
    if "text" in line:
        return f"{step} sample {line['prompt']}{line['text']}"
    from jaxlm.training.metrics import valid_losses

    if losses := valid_losses(line):
        return " ".join([step, *(f"{name} {value:.4f}" for name, value in losses.items())])
    return f"{step} {step_metrics(line)}"


def mark(text: str, trained_on: bool) -> str:
    """Formats a part of an example. Outside the loss mask, it is dim on a terminal and in brackets elsewhere."""
    if trained_on:
        return text
    return dim(text, sys.stdout) if is_styled(sys.stdout) else f"⟦{text}⟧"


def with_file(argv: list[str]) -> list[str]:
    """Returns the arguments, preceded by those of the YAML file of -c, so that flags override the file.

    Exits with status 2 for more than one file and for an invalid file.
    """
    paths = files(argv)
    if not paths:
        return argv
    if len(paths) > 1:
        usage(f"-c takes one file, not {' and '.join(paths)}: merge them, or pass the rest as flags")
    return flags(read_file(paths[0]), [arg.partition("=")[0].replace("_", "-") for arg in argv]) + argv


def read_file(path: str) -> dict[str, Any]:
    """Returns the fields of a YAML file. Exits with status 2 if it cannot be read or has unknown keys."""
    import yaml

    try:
        loader = yaml.SafeLoader(Path(path).read_text())
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except OSError as error:
        usage(f"{path} cannot be read: {error.strerror}")
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        usage(f"{place} is not valid YAML: {getattr(error, 'problem', None) or error}")
    if not isinstance(values, dict):
        usage(f"{path} must be a mapping of fields to values (steps: 1000), not {values!r}")
    if values.get("config"):
        usage(f"{path} names another file (config: {values['config']}), which is not read: copy its lines into {path}")
    if wrong := list(wrong_keys(node, {*field_names(Train), "dataset"})):  # --dataset is an alias
        usage("\n".join(f"{path}:{line}: {message}" for line, message in wrong))
    return values


def wrong_keys(node: Any, known: Collection[str], before: str = "") -> Iterator[tuple[int, str]]:
    """Yields the line number of each unknown key of a YAML mapping, and what to use instead."""
    for key, value in node.value:
        name = before + key.value.replace("-", "_")
        if value.id == "mapping" and name not in RENAMED_FIELDS:
            yield from wrong_keys(value, known, f"{name}.")
        elif fields := [field for field in known if field.startswith(f"{name}.")]:
            if value.tag != "tag:yaml.org,2002:null":
                yield key.start_mark.line + 1, f"{name} takes fields ({', '.join(sorted(fields))}), not one value"
        elif name not in known:
            yield key.start_mark.line + 1, unknown_key(name, "train", flags_of(Train))


def files(argv: list[str]) -> list[str]:
    """Returns the values of -c, in every form that tyro reads: -c F, -c=F, -cF, --config F, --config=F."""
    paths, rest = [], iter(argv)
    for arg in rest:
        if arg in ("-c", "--config"):
            paths += islice(rest, 1)
        elif arg.startswith(("-c", "--config=")) and not arg.startswith("-config"):  # an error, which Arguments reports
            paths.append(arg.removeprefix("--config").removeprefix("-c").removeprefix("="))
    return paths
