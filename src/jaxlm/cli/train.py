"""`jaxlm train`: a model from scratch, or a checkpoint trained further."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.cli.common import note, set_up_process
from jaxlm.training.config import Run, flags


@dataclass(frozen=True)
class Train(Run):
    """Train a model from random weights (--shape config.json) or from a checkpoint (--model).

    All flags may stand in a YAML file (-c); flags win. The same command goes on where the run's last checkpoint ends.
    """

    config: Annotated[Path | None, tyro.conf.arg(aliases=["-c"], metavar="FILE.yaml")] = None
    """A file with any of these, nested as the flags are (optimiser: {lr: 0.001})."""
    debug: bool = False
    """Show the traceback of an error."""

    alone = True  # one process; see cli.end

    def run(self) -> int:
        self.check()
        set_up_process()
        try:
            from jaxlm.training.loop import train
        except ImportError as error:
            raise ValueError(f"training needs {error.name}: pip install 'jaxlm[train]'") from None

        done = train(self, lambda line: print(told(line, self.steps), flush=True) if len(line)>1 else None)
        note(f"the model is in {done.model}: jaxlm generate -m {done.model} …")
        return 0


def told(line: dict[str, Any], steps: int) -> str:
    """A line of metrics for people and grep."""
    if "valid_loss" in line:
        return f"step {line['step']}/{steps} valid_loss {line['valid_loss']:.4f}"
    steps = steps or 12
    names = {"loss": ".4f", "rate": ".3g", "gradient": ".3g", "tokens_per_second": ".0f"}
    return f"step {line['step']}/{steps} " + " ".join(f"{name} {line[name]:{form}}" for name, form in names.items())


def with_file(argv: list[str]) -> list[str]:
    """The arguments, with those of the file that -c names before them."""
    path = next((argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg in ("-c", "--config")), None)
    if path is None:
        return argv
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        print(f"jaxlm: {path} cannot be read: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not isinstance(values, dict):
        print(f"jaxlm: {path} should hold fields and values (steps: 1000), not {values!r}", file=sys.stderr)
        raise SystemExit(2)
    return flags(values, [arg.partition("=")[0] for arg in argv]) + argv
