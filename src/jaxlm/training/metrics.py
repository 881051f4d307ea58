"""What a run tells while it goes on, in its folder and elsewhere: lines, a curve, and the services that take them."""

import importlib
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors, explain_missing_package

Line = dict[str, Any]


class Lines:
    """metrics.jsonl: one JSON object a line. What a run wrote past the step it goes on from is taken away first, and
    what it found when it looked at that step's weights: it looks again. ValueError for a line that is none."""

    def __init__(self, path: Path, begin: int):
        self.path = path
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found = _parsed(path, [row for row in rows if row.endswith(b"\n")])  # that were written to their end
        self.kept = [line for line in found if line["step"] < begin or (line["step"] == begin and "loss" in line)]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.kept))

    def add(self, line: Line) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl. ValueError with the first that is none."""
    return _parsed(path, path.read_bytes().splitlines())


def _parsed(path: Path, rows: list[bytes]) -> list[Line]:
    found = []
    for number, row in enumerate(rows, 1):
        with explain_errors(f"{path}:{number} is damaged", "delete the line", (ValueError, TypeError, LookupError)):
            found.append(json.loads(row))
            found[-1]["step"]
    return found


class TensorBoard:
    """The numbers of each line as events, in the run's folder; what an earlier run told of later steps is not shown."""

    def __init__(self, folder: Path, first: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first + 1)

    def add(self, line: Line) -> None:
        for name, value in line.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, line["step"])
            elif name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The same for Weights & Biases, under the folder's name; goes on with a run that was resumed, whose id the folder
    holds."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        path, name = folder / "wandb_id", folder.resolve().name
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project="jaxlm", name=name, id=path.read_text(), dir=str(folder), config=config, resume="allow"
        )

    def add(self, line: Line) -> None:
        self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def require(names: tuple[str, ...]) -> None:
    """ValueError where the package of a service is missing."""
    for name in names:
        with explain_missing_package(f"--report {name}", f"jaxlm[{name}]", PACKAGES[name]):
            importlib.import_module(PACKAGES[name])


def services(names: tuple[str, ...], folder: Path, config: dict[str, Any], first: int = 0) -> list[Any]:
    """What --report names, from step `first` on."""
    made = {"tensorboard": lambda: TensorBoard(folder, first), "wandb": lambda: Wandb(folder, config)}
    return [made[name]() for name in names]


def draw(lines: list[Line], path: Path, title: str) -> bool:
    """The curve of the loss as a PNG: each step that was told, the mean of its neighbors, and the validation loss.
    False where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, losses = _column(lines, "loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if len(losses) > 20:
        axes.plot(steps, losses, linewidth=0.6, alpha=0.4, color="C0")
        axes.plot(steps, smoothed(losses, max(2, len(losses) // 50)), color="C0", label="training (mean of neighbors)")
    else:
        axes.plot(steps, losses, color="C0", marker="o", markersize=3, label="training")
    at, valid = _column(lines, "valid_loss")
    if len(valid):
        axes.plot(at, valid, marker="o", markersize=3, color="C1", label=f"validation, {valid[-1]:.3f} at the end")
    shown = losses[len(losses) // 50 :]  # the first steps, from a random start, would set the scale
    if len(shown) > 1:
        low, high = min([*shown, *valid]), max(shown)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _column(lines: list[Line], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps), np.array(values)


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and up to `reach` on either side of it, as many on both: it does not lag behind."""
    sums, n = np.concatenate([[0.0], np.cumsum(values)]), len(values)
    at = np.arange(n)
    near = np.minimum(reach, np.minimum(at, n - 1 - at))
    return (sums[at + near + 1] - sums[at - near]) / (2 * near + 1)
