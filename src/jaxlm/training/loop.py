"""The training loop: from a `Run` to a trained model, resumable at every checkpoint.

    set up     check the run, load the data, build the optimizer (setup.py)
    start      the first state (init_state.py), or that of the last checkpoint (resume.py)
    step       batch, step, metrics; log, evaluate and save at their intervals
    finish     the last checkpoint, the model or adapter in Hugging Face's format, the loss curve

The batch of a step is a function of (seed, step), so the state of the data loader is the step.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.adapters import with_stop_ids
from jaxlm.checkpoint import peft
from jaxlm.data.packing import DataLoader
from jaxlm.devices import distributed, hardware, mesh
from jaxlm.exporting import export
from jaxlm.nn import flops, params
from jaxlm.sidecars import tokenizer_files, write_sidecars
from jaxlm.training import loaders, metrics, optimizers, resume, samples, step
from jaxlm.training.config import Run, to_dict
from jaxlm.training.init_state import frozen_weights, init_state
from jaxlm.training.loss import loss
from jaxlm.training.resume import check_resume
from jaxlm.training.setup import Progress, Setup, set_up
from jaxlm.training.signals import stop_signals

Log = Callable[[dict[str, Any]], None]
CHANCE_STEPS = 200  # steps with a loss of chance after which a note is logged


class Diverged(ValueError):
    """The loss or the gradient norm became NaN or Inf."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved. signal: the number of the signal."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.signal = number


class Trained(NamedTuple):
    """The result of a run.

    Attributes:
        folder: The run's folder.
        model: The folder of the model, or of the adapter, in it.
        last: The last value of each metric.
    """

    folder: Path
    model: Path
    last: dict[str, Any]


def train(run: Run, log: Log = lambda line: None, progress: Progress | None = None) -> Trained:
    """Trains a model, or resumes from the last checkpoint in the run's folder.

    Args:
        run: The configuration of the run.
        log: Called with each line of metrics, with {"step": n} after each step, and with notes ({"step": n,
            "note": text}).
        progress: Called with the number of documents and tokens so far while data are tokenized.

    Raises:
        ValueError: The run is inconsistent, its data cannot be used, or its folder has another run.
        OSError: A file cannot be read or written.
        Diverged: The loss became NaN or Inf. Earlier checkpoints are kept.
    """
    setup = set_up(run, progress)
    run = setup.run
    for note in setup.notes:
        log({"step": 0, "note": note})
    for line in loaders.describe(run, setup.data):
        log({"step": 0, "note": line})
    for name, loader in setup.valid.items():
        log({"step": 0, "note": f"validation{name and f' {name}'}: {loader.describe()[0]}"})
    with resume.open_checkpoints(run.out, run.keep) as checkpoints:
        if checkpoints.latest is not None and run.resume == "never":
            raise ValueError(f"{run.out} already has a run: resume it (--resume auto), or choose another --out")
        for change in check_resume(setup, checkpoints.latest):
            log({"step": 0, "note": change})
        if checkpoints.latest is None:
            state = init_state(setup)
        else:
            state = checkpoints.restore(checkpoints.latest, setup.state)
        loop = Loop(setup, frozen_weights(setup), checkpoints, log)
        state = loop.run(state)
    return Trained(run.out, finish(setup, state), loop.last)


def finish(setup: Setup, state: step.State) -> Path:
    """Writes the model, or the adapter, and the loss curve. Returns the folder of the model or adapter."""
    run = setup.run
    if run.method == "lora":
        folder, table = run.out / "adapter", setup.family.PARAMS
        options = {
            "base": run.model,
            "rslora": run.lora.rslora,
            "dropout": run.lora.dropout,
            "writes": distributed.is_coordinator(),
        }
        has_vision = "text_config" in setup.raw
        weights = params.unstack(state.weights)
        model = setup.model()
        more = partial(write_sidecars, sidecars=tokenizer_files(model), model=model)
        peft.write(folder, weights, table, setup.config, has_vision=has_vision, force=True, more=more, **options)
        distributed.gather("written")
    else:
        kept = setup.checkpoint is not None and setup.checkpoint.config == setup.raw  # the file is copied
        config = None if kept else setup.raw
        dtype = None if setup.checkpoint else run.dtype
        model = with_stop_ids(setup.model(params.unstack(state.weights)))
        folder = export(model, run.out / "model", force=True, config=config, dtype=dtype).folder
    if distributed.is_coordinator():
        title = f"{run.out.resolve().name}: {run.steps:,} steps of {run.batch} x {run.length} tokens"
        metrics.plot_loss(metrics.read(run.out / "metrics.jsonl"), run.out / "loss.png", title)
    return folder


def jit_step(setup: Setup) -> Any:
    """Returns the jitted step of a run. Its argument `state` is donated."""
    run = setup.run
    options = {"dtype": jnp.dtype(run.dtype), "remat": run.remat, "z_loss": run.z_loss, "accumulate": run.accumulate}
    options |= {"grad_dtype": jnp.dtype(run.grad_dtype)}
    options |= {"dropout": run.lora.dropout if run.method == "lora" else 0.0, "seed": run.seed}
    return jax.jit(step.make_step(setup.family, setup.config, setup.tx, **options), donate_argnums=0)


class Loop:
    """The steps of a run with their logs, evaluations and checkpoints.

    Attributes:
        last: The last value of each metric.
    """

    def __init__(self, setup: Setup, frozen: Any, checkpoints: resume.Checkpoints, log: Log):
        run, family, cfg = setup.run, setup.family, setup.config
        self.setup, self.frozen, self.checkpoints, self.log = setup, frozen, checkpoints, log
        dtype = jnp.dtype(run.dtype)
        self.step = jit_step(setup)
        self.unstack = jax.jit(lambda trained, frozen: params.unstack(step.full_weights(trained, frozen, dtype)))
        self.loss = jax.jit(
            lambda trained, frozen, batch: loss(family, cfg, step.full_weights(trained, frozen, dtype), batch)
        )
        self.learning_rate = optimizers.schedule(run.optimizer, run.steps)
        self.last: dict[str, Any] = {}
        self.flops_per_token = flops_per_token(setup)

    def run(self, state: step.State) -> step.State:
        """Runs the steps from the state's step to the last. Metrics of a step are fetched while the next one runs."""
        run, first = self.setup.run, int(state.step)
        steps = run.steps
        self.start(first)
        previous: tuple[int, step.Metrics] | None = None
        number = first
        try:
            with stop_signals() as received, mesh.use_mesh_of(state.weights):
                if self.evaluation_due(first):  # the interrupted run may have ended before its evaluation
                    self.evaluate_and_sample(first, state)
                for number, batch in zip(range(first + 1, steps + 1), self.setup.data.iterate(first)):
                    state, values = self.step(state, self.shard(batch), self.frozen)
                    if number == first + 1:  # the first call compiles; its time does not count as training
                        self.log_compilation(number)
                    self.settle(previous)
                    previous = number, values
                    self.count(number)
                    if number % run.log_every == 0 or number == steps:
                        self.settle(previous)
                        self.log_step(number, values)
                    if number % run.save_every == 0 or number == steps:
                        self.settle(previous)
                        self.save(number, state)
                    if self.evaluation_due(number):
                        self.settle(previous)
                        self.evaluate_and_sample(number, state)
                    if signal := received(number):
                        self.settle(previous)
                        self.stop(number, state, signal)
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            latest = self.checkpoints.latest
            kept = "there is no checkpoint yet" if latest is None else f"the last checkpoint is that of step {latest}"
            text = f"stopped during step {number}; {kept}: run the same command again to resume"
            raise Interrupted(text, SIGINT) from error
        except Exception as error:
            self.save_before(error, number, state, previous)
            raise
        finally:
            for service in self.services:
                service.close()
        return state

    def start(self, first: int) -> None:
        """Opens metrics.jsonl and the reporting services, and logs where the run starts."""
        run = self.setup.run
        coordinator = distributed.is_coordinator()
        self.lines: list[metrics.MetricsFile] = []
        distributed.run_on_coordinator(lambda: self.lines.append(metrics.MetricsFile(run.out / "metrics.jsonl", first)))
        for line in self.lines[0].kept if coordinator else ():
            self.last |= line
        self.services = metrics.services(run.report, run.out, to_dict(run), first) if coordinator else []
        self.interval, self.settled = metrics.Interval(run.out, first), first
        self.chance_steps, self.warned = 0, False
        if first == run.steps:
            self.log({"step": first, "steps": run.steps, "note": "all steps are done"})
        else:
            devices = 1 if self.setup.mesh is None else self.setup.mesh.size
            peak, source = hardware.peak(jax.local_devices()[0], run.dtype)
            self.peak = peak * (1 if jax.default_backend() == "cpu" else devices)  # CPU devices share one CPU
            plural = "s" * (run.steps != 1)
            note = f"resuming after step {first:,} of {run.steps:,}"
            if not first:
                epochs = self.setup.data.describe_epochs(run.steps)
                note = f"{run.steps:,} step{plural} of {run.batch} x {run.length} tokens, {epochs}"
            self.log({"step": first, "steps": run.steps, "note": f"{note}; MFU relative to {devices} x {source}"})
        self.clock, self.counted, self.counted_loss = time.perf_counter(), 0, 0.0

    def log_compilation(self, number: int) -> None:
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.log({"step": number, "note": f"compiled in {seconds:.0f} s"})

    def stop(self, number: int, state: step.State, signal: int) -> None:
        """Saves the state and raises Interrupted, unless this is the last step anyway."""
        if number == self.setup.run.steps:
            return
        self.save(number, state)
        self.checkpoints.wait()
        raise Interrupted(f"stopped after step {number} and saved it: run the same command again to resume", signal)

    def save(self, number: int, state: step.State) -> None:
        """Saves the state, the sums that belong to it, and the positions of streamed data."""

        def save_sums_and_positions() -> None:
            self.interval.save(number)
            loaders.save_positions(self.setup.data, self.setup.run.out)

        distributed.run_on_coordinator(save_sums_and_positions)
        self.checkpoints.save(number, state)

    def save_before(
        self, error: Exception, number: int, state: step.State, previous: tuple[int, step.Metrics] | None
    ) -> None:
        """Saves the state of step `number` before an error of a callback or a service ends the run. Not after an error
        of the step itself, whose state is gone, nor of the disk, nor in several processes, which save together."""
        if isinstance(error, Diverged | OSError) or previous is None or previous[0] != number:
            return
        if distributed.is_multiprocess() or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return
        try:
            self.settle(previous)
            self.save(number, state)
            self.checkpoints.wait()
            error.add_note(f"step {number} was saved: run the same command again to resume")
        except (Diverged, OSError) as other:
            error.add_note(str(other))

    def evaluation_due(self, number: int) -> bool:
        """Whether an evaluation follows this step."""
        run = self.setup.run
        return number > 0 and (number == run.steps or (run.eval_every > 0 and number % run.eval_every == 0))

    def count(self, number: int) -> None:
        self.counted += self.setup.run.batch * self.setup.run.length
        self.log({"step": number})

    def log_step(self, number: int, values: step.Metrics) -> None:
        """Logs the metrics of the steps since the last line: the mean loss, and that of the last batch beside it. A
        loss is left out if no token counts in it."""
        line: dict[str, Any] = {"step": number}
        if (mean := self.interval.end()) is not None:
            line["loss"] = mean
        if float(values.tokens):
            line["batch_loss"] = float(values.loss)
        line |= {"grad_norm": float(values.grad_norm), "tokens": float(values.tokens)}
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        speed, in_loss = self.counted / seconds, self.counted_loss / seconds
        self.counted, self.counted_loss = 0, 0.0
        line["learning_rate"] = float(np.asarray(self.learning_rate(number - 1)))
        line["epoch"] = round(self.setup.data.epoch(number), 4)
        achieved = speed * self.flops_per_token
        self.peak = max(self.peak, achieved)  # a measured peak may be that of a busy machine
        line |= {"tokens_per_second": speed, "loss_tokens_per_second": in_loss, "mfu": achieved / self.peak}
        self.write(line)
        for note in (note for stream in loaders.streams_of(self.setup.data) for note in stream.new_notes()):
            self.log({"step": number, "note": note})
        self.warn_of_chance(number, line)

    def warn_of_chance(self, number: int, line: dict[str, Any]) -> None:
        """Logs a note once if the run learns nothing, although nothing is NaN or Inf."""
        chance = math.log(self.setup.config.V)
        at_chance = line.get("loss", 0.0) >= chance or (line["grad_norm"] == 0 and "batch_loss" in line)
        self.chance_steps = self.chance_steps + self.setup.run.log_every if at_chance else 0
        if self.chance_steps >= CHANCE_STEPS and not self.warned:
            self.warned = True
            what = f"the loss has been at least {chance:.2f}, that of a uniform guess," if line["grad_norm"] else (
                "the gradient has been 0"
            )  # fmt: skip
            hint = "the run has diverged or learns nothing; lower the learning rate (--optimizer.lr)"
            self.log({"step": number, "note": f"{what} for {self.chance_steps} steps: {hint}"})

    def write(self, line: dict[str, Any]) -> None:
        for sink in [*self.lines, *self.services]:
            sink.add(line)
        self.last = self.last | line
        self.log(line)

    def shard(self, batch: Any) -> Any:
        """Returns a batch on the devices: this process's rows become its shards of the global batch [B,T]."""
        shape = (self.setup.run.batch, self.setup.run.length)
        if self.setup.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        sharding, before = mesh.sharding("BT", shape, self.setup.mesh), self.setup.data.share.start

        def rows(a: np.ndarray, index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(shape[0])
            return a[begin - before : end - before]

        return jax.tree.map(lambda a: jax.make_array_from_callback(shape, sharding, partial(rows, a)), batch)

    def settle(self, previous: tuple[int, step.Metrics] | None) -> None:
        """Fetches the metrics of a step and adds them to the interval, once.

        Raises:
            Diverged: The step was skipped, because its loss or its gradient norm is NaN or Inf.
        """
        if previous is None or previous[0] == self.settled:
            return
        number, values = previous
        if np.isfinite([values.loss, values.grad_norm]).all():
            self.settled, tokens = number, float(values.tokens)
            self.interval.add(float(values.loss), tokens)
            self.counted_loss += tokens
            return
        self.checkpoints.wait()
        # The weights of this checkpoint produced the loss, and would produce it again with any learning rate.
        self.checkpoints.delete_diverged(number - 1)
        latest = self.checkpoints.latest
        what = f"step {number} has the loss {float(values.loss)} and the gradient norm {float(values.grad_norm)}"
        hint = "there is no checkpoint yet; lower the learning rate (--optimizer.lr)"
        if latest == number - 1:
            hint = f"{self.checkpoints.folder / str(latest)} has the weights that produced it, and there is no older "
            hint += "checkpoint: start again with a lower --optimizer.lr and another --out"
        elif latest is not None:
            hint = f"the last checkpoint is {self.checkpoints.folder / str(latest)}; run the same command with a lower "
            hint += "--optimizer.lr to resume from it"
        raise Diverged(f"{what}: {hint}")

    def evaluate_and_sample(self, number: int, state: step.State) -> None:
        """Logs the validation loss and sample texts of the current weights."""
        run, started = self.setup.run, time.perf_counter()
        limit = None if number == run.steps else run.eval_batches
        losses = {name: self.evaluate(state.weights, loader, limit) for name, loader in self.setup.valid.items()}
        found = {
            f"valid_loss_{name}" if name else "valid_loss": loss for name, loss in losses.items() if loss is not None
        }
        if found:
            self.write({"step": number, **found})
        if run.samples:
            for line in samples.generate_all(self.setup, self.unstack(state.weights, self.frozen)):
                self.write({"step": number, **line})
        self.clock += time.perf_counter() - started  # does not count as training time

    def evaluate(self, trained: Any, loader: DataLoader, limit: int | None) -> float | None:
        """Returns the validation loss in nats per token, over `limit` batches at most; None if the loss mask of these
        has no token."""
        nats = tokens = 0.0
        for batch in itertools.islice(loader.once(), limit):
            sums = self.loss(trained, self.frozen, self.shard(batch))
            nats, tokens = nats + float(sums.nats), tokens + float(sums.tokens)
        return nats / tokens if tokens else None


def flops_per_token(setup: Setup) -> float:
    """Returns the FLOPs of training one token, analytic."""
    adapter = params.num_elements(setup.state.weights) if setup.run.method == "lora" else None
    return flops.training(setup.family.PARAMS, setup.config, setup.run.length, adapter)
