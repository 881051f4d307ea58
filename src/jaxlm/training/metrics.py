"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the plot of the loss."""

import importlib
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors, explain_missing_package

Line = dict[str, Any]
KEPT = 100  # intervals in interval.json
RENAMED_METRICS = {"rate": "learning_rate", "gradient": "grad_norm"}  # names in metrics.jsonl of earlier versions


class Interval:
    """Sums over the steps since the last line of metrics.

    They are saved in interval.json with each checkpoint, so that a resumed run has the lines of an uninterrupted one.

    Attributes:
        nats: Sum of the cross-entropy.
        tokens: Number of tokens that count in the loss.
    """

    def __init__(self, folder: Path, step: int = 0):
        """Opens the interval of a run that starts after a step."""
        self.path, self.nats, self.tokens = folder / "interval.json", 0.0, 0.0
        self.saved: dict[str, list[float]] = {}  # step of a checkpoint -> sums
        if step and self.path.exists():
            with explain_errors(f"{self.path} is damaged", "delete it", (ValueError, TypeError)):
                self.saved = {str(int(name)): [float(a), float(b)] for name, (a, b) in _object(self.path).items()}
        self.nats, self.tokens = self.saved.get(str(step), [0.0, 0.0])

    def add(self, loss: float, tokens: float) -> None:
        """Adds a step."""
        self.nats, self.tokens = self.nats + loss * tokens, self.tokens + tokens

    def end(self) -> float | None:
        """Returns the mean loss in nats per token, None without a token in the loss, and begins the next interval."""
        mean = self.nats / self.tokens if self.tokens else None
        self.nats = self.tokens = 0.0
        return mean

    def save(self, step: int) -> None:
        """Saves the sums at a step. Those of some earlier steps are kept, as their checkpoints may be."""
        self.saved[str(step)] = [self.nats, self.tokens]
        self.saved = dict(list(self.saved.items())[-KEPT:])
        write_atomically(self.path, json.dumps(self.saved) + "\n")


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON object")
    return value


class MetricsFile:
    """metrics.jsonl: one JSON object per line.

    A resumed run first removes the lines after the step it resumes from, and the evaluation at that step, which it
    repeats.

    Attributes:
        path: The file.
        kept: The lines of earlier steps, which are kept.
    """

    def __init__(self, path: Path, first: int):
        """Opens the file of a run that starts after step `first`. Raises ValueError for a line that is not a JSON
        object with a step."""
        self.path = path
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = _parse(path, [row for row in rows if row.endswith(b"\n")])  # a line without an end was cut off
        of_steps = [line["step"] < first or {"loss", "grad_norm"} & line.keys() for line in lines]
        self.kept = [line for line, kept in zip(lines, of_steps) if kept and line["step"] <= first]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.kept))

    def add(self, line: Line) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Line]:
    """Returns the lines of a metrics.jsonl. Raises ValueError for a line that is not a JSON object with a step."""
    return _parse(path, path.read_bytes().splitlines())


def _parse(path: Path, rows: list[bytes]) -> list[Line]:
    lines = []
    for number, row in enumerate(rows, 1):
        with explain_errors(f"{path}:{number} is damaged", "delete the line", (ValueError, TypeError, LookupError)):
            line = json.loads(row)
            line["step"]
        lines.append({RENAMED_METRICS.get(name, name): value for name, value in line.items()})
    return lines


class TensorBoard:
    """Writes each line as TensorBoard events in the run's folder. Events of an interrupted run after step `first` are
    hidden."""

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
    """Sends each line to Weights & Biases, under the name of the run's folder. The folder keeps the id of the run, so
    that a resumed run continues it."""

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
    """Raises ValueError if the package of a reporting service is not installed."""
    for name in names:
        with explain_missing_package(f"--report {name}", f"jaxlm[{name}]", PACKAGES[name]):
            importlib.import_module(PACKAGES[name])


def services(names: tuple[str, ...], folder: Path, config: dict[str, Any], first: int = 0) -> list[Any]:
    """Returns the reporting services of --report, for a run that starts after step `first`."""
    open_service = {"tensorboard": lambda: TensorBoard(folder, first), "wandb": lambda: Wandb(folder, config)}
    return [open_service[name]() for name in names]


def plot_loss(lines: list[Line], path: Path, title: str) -> bool:
    """Plots training loss, its moving average and validation loss as a PNG. Returns False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, losses = _column(lines, "loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if len(losses) > 20:
        average = moving_average(losses, max(2, len(losses) // 50))
        axes.plot(steps, losses, linewidth=0.6, alpha=0.4, color="C0")
        axes.plot(steps, average, color="C0", label="training (moving average)")
    else:
        axes.plot(steps, losses, color="C0", marker="o", markersize=3, label="training")
    valid: list[float] = []
    for i, name in enumerate(dict.fromkeys(name for line in lines for name in valid_losses(line)), 1):
        at, values = _column(lines, name)
        label = f"validation{name.removeprefix('valid_loss').replace('_', ' ', 1)}, {values[-1]:.3f} at the end"
        axes.plot(at, values, marker="o", markersize=3, color=f"C{i}", label=label)
        valid += values.tolist()
    shown = losses[len(losses) // 50 :]  # the first steps of random weights would set the scale
    if len(shown) > 1:
        low, high = min([*shown, *valid]), max(shown)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def valid_losses(line: Line) -> Line:
    """Returns the validation losses of a line of metrics: valid_loss, and valid_loss_NAME of a named set."""
    return {name: value for name, value in line.items() if name == "valid_loss" or name.startswith("valid_loss_")}


def _column(lines: list[Line], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the values of a metric."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps), np.array(values)


def moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the centered moving average: the mean of each value and up to `reach` values on each side."""
    sums, n = np.concatenate([[0.0], np.cumsum(values)]), len(values)
    at = np.arange(n)
    near = np.minimum(reach, np.minimum(at, n - 1 - at))
    return (sums[at + near + 1] - sums[at - near]) / (2 * near + 1)
