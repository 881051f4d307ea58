"""The training loop: from a `Run` to a trained model, resumable at every checkpoint.

    set up   what the run describes, checked (setup.py)
    begin    the first state, or that of the last checkpoint
    go on    batch of this step -> step -> metrics; lines, evaluations and checkpoints at their intervals
    end      the last checkpoint, the model (or adapter) in the form that others read, the curve of the loss

The batch of a step is a function of (seed, step), so the state of the data is the step.
"""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint import peft
from jaxlm.devices import distributed, hardware, mesh
from jaxlm.exporting import export
from jaxlm.nn import flops, params
from jaxlm.training import metrics, optimizers, resume, step
from jaxlm.training.config import Run, to_dict
from jaxlm.training.init_state import frozen_weights, init_state
from jaxlm.training.loss import loss
from jaxlm.training.resume import check_resume
from jaxlm.training.setup import Progress, Setup, set_up

Log = Callable[[dict[str, Any]], None]


class Diverged(ValueError):
    """The loss is no number any more."""


class Trained(NamedTuple):
    """What a run made: its folder, the model (or adapter) in it, and the last line of its metrics."""

    folder: Path
    model: Path
    last: dict[str, Any]


def train(run: Run, log: Log = lambda line: None, progress: Progress | None = None) -> Trained:
    """Trains, or goes on. `log` hears of every line of metrics, between them of {"step": n}, and before them of notes
    (what was read, what was dropped); `progress` of documents and tokens while they are prepared. Raises ValueError,
    OSError or Diverged; what the folder held before stays good."""
    setup = set_up(run, progress)
    run = setup.run
    for batches in filter(None, (setup.data, setup.valid)):
        log({"step": 0, "note": ". ".join(filter(None, (str(batches.corpus), batches.note)))})
    with resume.open_checkpoints(run.out, run.keep) as saved:
        if saved.latest is not None and run.resume == "never":
            raise ValueError(f"{run.out} holds a run already: --resume auto goes on with it, or choose another --out")
        for change in check_resume(setup, saved.latest is not None):
            log({"step": 0, "note": change})
        state = init_state(setup) if saved.latest is None else saved.restore(saved.latest, setup.state_like())
        loop = Loop(setup, frozen_weights(setup), saved, log)
        state = loop.run(state)
    return Trained(run.out, finish(setup, state), loop.last)


def finish(setup: Setup, state: step.State) -> Path:
    """Writes the model, or the adapter, and the curve."""
    run = setup.run
    if run.method == "lora":
        made, table = run.out / "adapter", setup.family.PARAMS
        how = {
            "base": run.model,
            "rslora": run.lora.rslora,
            "dropout": run.lora.dropout,
            "writes": distributed.is_coordinator(),
        }
        has_vision = "text_config" in setup.raw
        peft.write(made, params.unstack(state.weights), table, setup.config, has_vision=has_vision, force=True, **how)
        distributed.gather("written")
    else:
        config = None if setup.checkpoint else setup.raw
        dtype = None if setup.checkpoint else run.dtype
        model = setup.model(params.unstack(state.weights))
        made = export(model, run.out / "model", force=True, config=config, dtype=dtype).folder
    if distributed.is_coordinator():
        title = f"{run.out.resolve().name}: {run.steps:,} steps of {run.batch} x {run.length} tokens"
        metrics.draw(metrics.read(run.out / "metrics.jsonl"), run.out / "loss.png", title)
    return made


def program(setup: Setup) -> Any:
    """The step of a run, jitted; the state that goes in is used up."""
    run = setup.run
    how = {"dtype": jnp.dtype(run.dtype), "remat": run.remat, "z_loss": run.z_loss, "accumulate": run.accumulate}
    how |= {"dropout": run.lora.dropout if run.method == "lora" else 0.0, "seed": run.seed}
    return jax.jit(step.make_step(setup.family, setup.config, setup.tx(), **how), donate_argnums=0)


class Loop:
    """The steps of a run, and what is told of them."""

    def __init__(self, setup: Setup, frozen: Any, saved: resume.Checkpoints, log: Log):
        run, family, cfg = setup.run, setup.family, setup.config
        self.setup, self.frozen, self.saved, self.log = setup, frozen, saved, log
        dtype = jnp.dtype(run.dtype)
        self.step = program(setup)
        self.listed = jax.jit(lambda trained, frozen: params.unstack(step.full_weights(trained, frozen, dtype)))
        self.loss = jax.jit(
            lambda trained, frozen, batch: loss(family, cfg, step.full_weights(trained, frozen, dtype), batch)
        )
        self.rate = optimizers.schedule(run.optimizer, run.steps)
        self.last: dict[str, Any] = {}
        self.cost = flops_a_token(setup)

    def run(self, state: step.State) -> step.State:
        """From the state's step to the last. Metrics of a step are read when the next one is under way."""
        run, first = self.setup.run, int(state.step)
        steps = run.steps
        self.begin(first)
        waiting: tuple[int, Any] | None = None
        try:
            with listening() as asked, mesh.use_mesh_of(state.weights):
                if self.due(first):  # what an earlier run may have been cut off from
                    self.evaluate_and_sample(first, state)
                for number, batch in zip(range(first + 1, steps + 1), self.setup.data.iterate(first)):
                    state, found = self.step(state, self.placed(batch), self.frozen)
                    if number == first + 1:  # the first call compiles, which is no step's time
                        self.compiled(number)
                    self.check(waiting)
                    waiting = number, found
                    self.count(number)
                    if number % run.log_every == 0 or number == steps:
                        self.check(waiting)
                        self.report(number, found)
                    if number % run.save_every == 0 or number == steps:
                        self.check(waiting)
                        self.saved.save(number, state)
                    if self.due(number):
                        self.check(waiting)
                        self.evaluate_and_sample(number, state)
                    if signal := asked():
                        self.check(waiting)
                        self.end(number, state, signal)
        finally:
            for service in self.services:
                service.close()
        return state

    def compiled(self, number: int) -> None:
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.log({"step": number, "note": f"compiled in {seconds:.0f} s"})

    def end(self, number: int, state: step.State, signal: int) -> None:
        """The end that was asked for, unless the run ends here anyway."""
        if number == self.setup.run.steps:
            return
        self.saved.save(number, state)
        self.saved.wait()
        raise Ended(f"ended after step {number}, which is saved: the same command goes on from there", signal)

    def due(self, number: int) -> bool:
        """Whether there is an evaluation after this step."""
        run = self.setup.run
        return number > 0 and (number == run.steps or (run.eval_every > 0 and number % run.eval_every == 0))

    def begin(self, first: int) -> None:
        """Opens what lines are written to."""
        run = self.setup.run
        leads = distributed.is_coordinator()
        self.lines: list[metrics.Lines] = []
        distributed.run_on_coordinator(lambda: self.lines.append(metrics.Lines(run.out / "metrics.jsonl", first)))
        for line in self.lines[0].kept if leads else ():
            self.last |= line
        self.services = metrics.services(run.report, run.out, to_dict(run), first) if leads else []
        devices = 1 if self.setup.over is None else self.setup.over.size
        peak, source = hardware.peak(jax.local_devices()[0])
        self.peak = peak * (1 if jax.default_backend() == "cpu" else devices)  # of a CPU all devices are parts
        how = f"goes on after step {first:,}" if first else f"{run.steps:,} steps of {run.batch} x {run.length} tokens"
        how = "all steps have been taken" if first == run.steps else how
        self.log({"step": first, "steps": run.steps, "note": f"{how}; MFU against {devices} x {source}"})
        self.clock, self.counted = time.perf_counter(), 0

    def count(self, number: int) -> None:
        self.counted += self.setup.run.batch * self.setup.run.length
        self.log({"step": number})

    def report(self, number: int, found: step.Metrics) -> None:
        """The line of a step."""
        line = {"step": number, **{name: float(x) for name, x in found._asdict().items()}}
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        speed, self.counted = self.counted / seconds, 0
        line |= {"rate": float(np.asarray(self.rate(number - 1))), "epoch": round(self.setup.data.epoch(number), 4)}
        self.add(line | {"tokens_per_second": speed, "mfu": speed * self.cost / self.peak})

    def add(self, line: dict[str, Any]) -> None:
        for place in [*self.lines, *self.services]:
            place.add(line)
        self.last = self.last | line
        self.log(line)

    def placed(self, batch: Any) -> Any:
        """This process's rows, as part of what all have."""
        over, shape = self.setup.over, (self.setup.run.batch, self.setup.run.length)
        if over is None:
            return jax.tree.map(jnp.asarray, batch)
        where, before = mesh.sharding("BT", shape, over), self.setup.data.share.start

        def rows(a: np.ndarray, index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(shape[0])
            return a[begin - before : end - before]

        return jax.tree.map(lambda a: jax.make_array_from_callback(shape, where, partial(rows, a)), batch)

    def check(self, waiting: tuple[int, Any] | None) -> None:
        """Raises Diverged for a step that was not taken: its loss or its gradient is no number."""
        if waiting is None or np.isfinite([waiting[1].loss, waiting[1].gradient]).all():
            return
        number, found = waiting
        self.saved.wait()
        self.saved.delete_diverged(number - 1)  # its weights gave this loss, and would again at any rate
        good = self.saved.latest
        what = f"the loss of step {number} is {float(found.loss)}, the norm of its gradient {float(found.gradient)}"
        way = "there is no checkpoint yet; lower the learning rate (--optimizer.lr)"
        if good == number - 1:
            way = f"{self.saved.folder / str(good)} holds the weights that gave it, and there is no older checkpoint: "
            way += "begin again with a lower --optimizer.lr and another --out"
        elif good is not None:
            way = (
                f"the last checkpoint is {self.saved.folder / str(good)}; with a lower --optimizer.lr the same command "
            )
            way += "goes on from there"
        raise Diverged(f"{what}: {way}")

    def evaluate_and_sample(self, number: int, state: step.State) -> None:
        """The loss on what is not learned, and sample texts, from the weights as they are."""
        run, begun = self.setup.run, time.perf_counter()
        if self.setup.valid is not None:
            most = None if number == run.steps else run.eval_batches
            if (found := self.evaluate(state.weights, most)) is not None:
                self.add({"step": number, "valid_loss": found})
        if run.samples:
            from jaxlm.inference.generation import generate
            from jaxlm.inference.prompts import resolve_max_tokens, to_ids

            model = self.setup.model(self.listed(state.weights, self.frozen))
            for i, prompt in enumerate(run.samples):
                most = min(run.sample_tokens, resolve_max_tokens(model, to_ids(model, prompt, {}), None))
                told = generate(model, prompt, max_tokens=most, temperature=0.8, seed=(run.seed + i) % (1 << 32))
                self.add({"step": number, "prompt": prompt, "text": told.text})
        self.clock += time.perf_counter() - begun  # this is no training time

    def evaluate(self, trained: Any, most: int | None) -> float | None:
        """Nats a learned token over the validation data, or its first batches; None if these hold no such token."""
        nats = tokens = 0.0
        for batch in itertools.islice(self.setup.valid.once(), most):
            sums = self.loss(trained, self.frozen, self.placed(batch))
            nats, tokens = nats + float(sums.nats), tokens + float(sums.tokens)
        return nats / tokens if tokens else None


def flops_a_token(setup: Setup) -> float:
    """FLOPs of training a token, analytic."""
    run, adapter = setup.run, None
    if run.method == "lora":
        adapter = params.num_elements(setup.trained(jax.random.key(0), shapes=True))
    return flops.training(setup.family.PARAMS, setup.config, run.length, adapter)


class Ended(KeyboardInterrupt):
    """A run that has ended because it was asked to; its state is saved. signal: by which number it was asked."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.signal = number


@contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Meanwhile SIGINT and SIGTERM only leave a note; the yielded function gives its number, 0 for none. A second one
    ends the process's work at once. Several processes could not end after the same step, and are not listened for; nor
    is anything outside the main thread, or a signal that is ignored.
    """
    asked: list[int] = []

    def hear(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nending after this step (once more: at once)\n")  # no print: one may be under way

    here = threading.current_thread() is threading.main_thread() and not distributed.is_multiprocess()
    wanted = (signal.SIGINT, signal.SIGTERM) if here else ()
    before = {number: signal.getsignal(number) for number in wanted}
    for number in (heard := [number for number in wanted if before[number] is not signal.SIG_IGN]):
        signal.signal(number, hear)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number in heard:
            signal.signal(number, before[number])
