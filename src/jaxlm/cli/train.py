"""`jaxlm train` and `jaxlm finetune`: a model from scratch, or a checkpoint trained further, whole or by an adapter."""

import logging
import sys
import threading
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.cli.common import ProcessFlags, note
from jaxlm.training.config import Optimizer, Run, flags

RATES = {"lora": 2e-4, "full": 1e-5}  # of finetune, where none is given


@dataclass(frozen=True)
class Train(ProcessFlags, Run):
    """Train a model from random weights (--shape config.json) or from a checkpoint (--model).

    All flags may stand in a YAML file (-c); flags win. The same command goes on where the run's last checkpoint ends.
    """

    config: Annotated[Path | None, tyro.conf.arg(aliases=["-c"], metavar="FILE.yaml")] = None
    """A file with any of these, nested as the flags are (optimizer: {lr: 0.001})."""
    dry_run: bool = False
    """Show memory, steps, tokens and two examples (what is not learned is marked), and end."""

    def run(self) -> int:
        self.check()
        self.begin()
        run = Run(**{field.name: getattr(self, field.name) for field in fields(Run)})
        if isinstance(self, Finetune) and not run.optimizer.lr:
            run = replace(run, optimizer=replace(run.optimizer, lr=RATES[run.method]))
        with explain_missing_package("training", "jaxlm[train]"):
            from jaxlm.training.loop import train

        if self.dry_run:
            return dry_run(run)
        if not self.debug:
            silence_orbax()
        with Display() as display:
            done = train(run, display.log, display.prepared)
        if done.model.name == "adapter":
            note(f"the adapter is in {done.model}: jaxlm generate -m {self.model} --adapter {done.model} …")
        else:
            note(f"the model is in {done.model}: jaxlm generate -m {done.model} …")
        if (curve := done.folder / "loss.png").exists():
            note(f"the curve of the loss is {curve}")
        return 0


@dataclass(frozen=True)
class Finetune(Train):
    """Train a checkpoint further: an adapter beside its weights (--method lora), or all of them (--method full).

    What is learned are the answers, where the data have any. All flags may stand in a YAML file (-c); flags win. The
    same command goes on where the run's last checkpoint ends.
    """

    method: Literal["full", "lora"] = "lora"
    """Train an adapter, or all weights."""
    epochs: float = 3.0
    """How often all data are seen, where no steps are given."""
    batch: int = 8
    """Rows of a step, over all devices."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.0, weight_decay=0.0, warmup=0.05))
    """lr 0: 2e-4 for an adapter, 1e-5 for all weights."""


def dry_run(run: Run) -> int:
    """The plan, on stdout."""
    from jaxlm.training import dry_run as plan
    from jaxlm.training.loop import program
    from jaxlm.training.setup import set_up

    with Display() as display:
        setup = set_up(run, display.prepared)
    print("\n".join(plan.describe(setup, plan.plan_memory(setup, program(setup)))))
    for number, pieces in enumerate(plan.examples(setup, 2), 1):
        print(f"\nexample {number} (what is not learned stands {marked('like this', False)})")
        print("".join(marked(text, learned) for text, learned in pieces))
    return 0


class Display:
    """A bar on a terminal's stderr, and on stdout a line whenever there is something to say."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                   TextColumn("{task.fields[told]}"), TimeRemainingColumn(compact=True))  # fmt: skip
        # A line printed meanwhile goes above the bar; into a file it goes as it is.
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal,
                            redirect_stdout=sys.stdout.isatty())  # fmt: skip
        self.task = self.bar.add_task("preparing", total=None, told="")
        self.steps = 0

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def prepared(self, documents: int, tokens: int) -> None:
        self.bar.update(self.task, told=f"{documents:,} documents, {tokens:,} tokens")

    def log(self, line: dict[str, Any]) -> None:
        if "note" in line:
            note(line["note"])
        if "steps" in line:  # the beginning, or where an earlier run ended
            self.steps = line["steps"]
            self.bar.reset(self.task, total=self.steps, completed=line["step"], description="step", told="compiling …")
        elif line.keys() == {"step"}:
            self.bar.update(self.task, completed=line["step"])
        elif "note" not in line:
            if "loss" in line:
                self.bar.update(self.task, told=facts(line))
            print(told(line, self.steps), flush=True)


def silence_orbax() -> None:
    """What goes wrong in a thread of Orbax is raised again in ours, where it gets a message: the tracebacks that are
    printed and logged on its way are not shown."""
    before = threading.excepthook, sys.unraisablehook

    def of_thread(error: Any) -> None:
        if not type(error.thread).__module__.startswith("orbax."):
            before[0](error)

    def of_nobody(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":  # TensorStore's other writes end, and nobody waits for them
            before[1](error)

    threading.excepthook, sys.unraisablehook = of_thread, of_nobody
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def facts(line: dict[str, Any]) -> str:
    """The numbers of a step, for people and grep."""
    names = {"loss": ".4f", "rate": ".3g", "gradient": ".3g", "tokens_per_second": ",.0f", "mfu": ".1%"}
    return " ".join(f"{name} {line[name]:{form}}" for name, form in names.items())


def told(line: dict[str, Any], steps: int) -> str:
    """A line of metrics."""
    at = f"step {line['step']}/{steps}"
    if "text" in line:
        return f"{at} sample {line['prompt']}{line['text']}"
    return f"{at} valid_loss {line['valid_loss']:.4f}" if "valid_loss" in line else f"{at} {facts(line)}"


def marked(text: str, learned: bool) -> str:
    """A piece of an example: what is not learned is dim on a terminal, and in brackets elsewhere."""
    if learned:
        return text
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else f"⟦{text}⟧"


def with_file(argv: list[str]) -> list[str]:
    """The arguments, with those of the file that -c names before them; exits with 2 where there is no such file, or
    more than one."""
    paths = files(argv)
    if not paths:
        return argv
    if len(paths) > 1:
        refuse(f"-c takes one file, not {' and '.join(paths)}; flags may stand beside it")
    import yaml

    try:
        values = yaml.safe_load(Path(paths[0]).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        refuse(f"{paths[0]} cannot be read: {error}")
    if not isinstance(values, dict):
        refuse(f"{paths[0]} should hold fields and values (steps: 1000), not {values!r}")
    if values.get("config"):
        refuse(f"{paths[0]} names another file (config: {values['config']}), but one is read: put its lines here")
    return flags(values, [arg.partition("=")[0].replace("_", "-") for arg in argv]) + argv


def refuse(text: str) -> NoReturn:
    """Ends the process as wrong usage does."""
    print(f"jaxlm: {text}", file=sys.stderr)
    raise SystemExit(2)


def files(argv: list[str]) -> list[str]:
    """What -c names, in every form that tyro reads: -c F, -c=F, -cF, --config F, --config=F."""
    found, rest = [], iter(argv)
    for arg in rest:
        if arg in ("-c", "--config"):
            found += islice(rest, 1)
        elif arg.startswith(("-c", "--config=")):
            found.append(arg.removeprefix("--config").removeprefix("-c").removeprefix("="))
    return found
