"""The training loop: from a `Run` to a trained model, resumable at every checkpoint.

    begin    weights (random or a checkpoint's), tokenizer, data, optimiser; the state, or that of the last checkpoint
    go on    batch of this step -> step -> metrics; lines, evaluations and checkpoints at their intervals
    end      the last checkpoint, the model as a Hugging Face folder, the curve of the loss

The batch of a step is a function of (seed, step), so the state of the data is the step.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import loading, mesh, models, params
from jaxlm.exporting import export
from jaxlm.model import Model
from jaxlm.tokenizer import Tokenizer
from jaxlm.training import optimisers, saving, step
from jaxlm.training.config import Run, to_dict
from jaxlm.training.loss import loss

FREE = ("log_every", "save_every", "keep", "eval_every", "eval_batches", "samples", "resume", "mesh", "out")
Tell = Callable[[dict[str, Any]], None]


class Diverged(ValueError):
    """The loss is no number any more."""


class Trained(NamedTuple):
    """What a run made: its folder, the model in it, and the last line of its metrics."""

    folder: Path
    model: Path
    last: dict[str, Any]


def train(run: Run, tell: Tell = lambda line: None) -> Trained:
    """Trains, or goes on. `tell` hears of every line of metrics. Raises ValueError, OSError or Diverged; what the
    folder held before stays good."""
    run.check()
    model = first_model(run)
    data, valid = (_batches(run, model.tokenizer, sources) for sources in (run.data.train, run.data.valid))
    period = len(params.period(model.config.windows))
    weights = params.stack(jax.tree.map(lambda w: w.astype(jnp.float32), model.weights), period)
    rule = optimisers.make(run.optimiser, run.steps, params.letters(model.family.PARAMS, weights))
    state = jax.jit(lambda w: step.start(rule, w))(weights)
    over = _mesh(run, model)
    if over is not None:
        state = jax.device_put(state, step.places(jax.eval_shape(lambda s: s, state), over, model.family.PARAMS))
    _settle(run)
    with saving.opened(run.out, run.keep) as saved:
        if run.resume == "auto" and saved.latest is not None:
            state = saved.restore(saved.latest, state)
        elif saved.latest is not None:
            raise ValueError(f"{run.out} holds a run already: --resume auto goes on with it, or choose another --out")
        loop = Loop(run, model, rule, saved, tell)
        state = loop.run(state, data, valid)
        saved.save(run.steps, state)
    done = Model(model.family, model.config, params.unstack(state.weights), model.tokenizer, **_kept(model))
    config = None if model.checkpoint else json.loads(Path(str(run.shape)).read_text())
    written = export(done, run.out / "model", force=True, config=config, dtype=run.dtype)
    return Trained(run.out, written.folder, loop.last)


def first_model(run: Run) -> Model:
    """The model as the run finds it: a checkpoint, or random weights in a config.json's shape."""
    if run.model is not None:
        return loading.load(run.model, dtype="float32", tokenizer=run.tokenizer)
    raw = json.loads(Path(str(run.shape)).read_text())
    family = models.family_of(raw.get("model_type"))
    cfg = family.Config.from_hf(raw)
    tokenizer = Tokenizer.load(run.tokenizer) if run.tokenizer else None
    if tokenizer is None:
        raise ValueError(f"{run.tokenizer or 'a new model'}: give the folder of a tokenizer (--tokenizer)")
    if tokenizer.vocab_size > cfg.V:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, {run.shape} room for {cfg.V} (vocab_size)")
    return Model.init(family, cfg, jax.random.key(run.seed), tokenizer=tokenizer, source=str(run.shape))


def _kept(model: Model) -> dict[str, Any]:
    return {"generation_config": model.generation_config, "source": model.source, "checkpoint": model.checkpoint}


def _mesh(run: Run, model: Model) -> Any:
    """The mesh of a run: by default all devices on `data`."""
    count = jax.device_count() if jax.config.values["jax_default_device"] is None else 1
    if run.mesh is None and count == 1:
        return None
    return mesh.make(run.mesh or {mesh.DATA: count}, model.config.K)


def _batches(run: Run, tokenizer: Any, sources: tuple[str, ...]) -> Any:
    from jaxlm.training.batches import Batches
    from jaxlm.training.corpus import prepare
    from jaxlm.training.texts import TextOptions

    if not sources:
        return None
    options = TextOptions(form=run.data.form, learn=run.data.learn)
    corpus = prepare(sources, tokenizer, options, on_bad=run.data.on_bad)
    place = (jax.process_index(), jax.process_count())
    return Batches(corpus, run.batch, run.length, run.seed, run.data.packing, *place)


def _settle(run: Run) -> None:
    """The run's folder, with the configuration in it; ValueError where another run stands there."""
    run.out.mkdir(parents=True, exist_ok=True)
    path, told = run.out / "run.json", to_dict(run)
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in told if name not in FREE and told[name] != before.get(name)]
        if changed:
            raise ValueError(f"{run.out} holds a run with another {', '.join(changed)}: choose another --out")
    path.write_text(json.dumps(told, indent=2) + "\n")


class Loop:
    """The steps of a run, and what is told of them."""

    def __init__(self, run: Run, model: Model, rule: Any, saved: saving.Checkpoints, tell: Tell):
        self.run_, self.model, self.saved, self.tell = run, model, saved, tell
        family, cfg = model.family, model.config
        how = {"dtype": jnp.dtype(run.dtype), "remat": run.remat, "z_loss": run.z_loss, "accumulate": run.accumulate}
        self.step = jax.jit(step.make(family, cfg, rule, **how), donate_argnums=0)
        self.loss = jax.jit(lambda weights, batch: loss(family, cfg, weights, batch))
        self.rate = optimisers.schedule(run.optimiser, run.steps)
        self.last: dict[str, Any] = {}

    def run(self, state: Any, data: Any, valid: Any) -> Any:
        """From the state's step to the last. Metrics of a step are read when the next one is under way."""
        run, begin = self.run_, int(state.step)
        metrics = Lines(run.out / "metrics.jsonl", begin)
        waiting: tuple[int, Any] | None = None
        clock, counted = time.perf_counter(), 0.0
        with mesh.on(state.weights):
            for number, batch in zip(range(begin + 1, run.steps + 1), data.iterate(begin)):
                state, found = self.step(state, self._placed(batch, state))
                self._check(waiting)
                waiting = number, found
                counted += batch.learned.size
                if number % run.log_every == 0 or number == run.steps:
                    self._check(waiting)
                    seconds, clock = time.perf_counter() - clock, time.perf_counter()
                    line = {"step": number, **{n: float(x) for n, x in found._asdict().items()}}
                    line |= {"rate": float(np.asarray(self.rate(number - 1))), "tokens_per_second": counted / seconds}
                    counted = 0.0
                    metrics.add(line)
                    self.last = line
                    self.tell(line)
                if number % run.save_every == 0 and number < run.steps:
                    self._check(waiting)
                    self.saved.save(number, state)
                if valid is not None and (number == run.steps or (run.eval_every and number % run.eval_every == 0)):
                    line = {"step": number, "valid_loss": self.evaluate(state.weights, valid)}
                    metrics.add(line)
                    self.tell(line)
        return state

    def _placed(self, batch: Any, state: Any) -> Any:
        return jax.tree.map(lambda a: mesh.place(a, "BT", mesh.of(state.weights)), batch)

    def _check(self, waiting: tuple[int, Any] | None) -> None:
        """Raises Diverged for a step that was not taken: its loss or its gradient is no number."""
        if waiting is None or np.isfinite([waiting[1].loss, waiting[1].gradient]).all():
            return
        good, (number, found) = self.saved.latest, waiting
        way = (
            "there is no checkpoint yet" if good is None else f"the last checkpoint is {self.saved.folder / str(good)}"
        )
        what = f"the loss of step {number} is {float(found.loss)}, the norm of its gradient {float(found.gradient)}"
        raise Diverged(f"{what}: {way}; lower the learning rate (optimiser.lr) or clip (optimiser.clip)")

    def evaluate(self, weights: Any, valid: Any) -> float:
        """Nats a learned token over the first batches of the validation data."""
        sums = [self.loss(weights, jax.tree.map(jnp.asarray, valid.batch(i))) for i in range(self.run_.eval_batches)]
        return float(sum(s.nats for s in sums) / sum(s.tokens for s in sums))


class Lines:
    """metrics.jsonl: one JSON object a line. What a run wrote past the step it goes on from is taken away first."""

    def __init__(self, path: Path, begin: int):
        self.path = path
        kept = [line for line in self._whole(path) if json.loads(line)["step"] <= begin]
        beside = path.with_suffix(".partial")
        beside.write_text("".join(kept))
        beside.replace(path)

    @staticmethod
    def _whole(path: Path) -> Iterator[str]:
        """The lines that were written to their end."""
        if path.exists():
            yield from (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))

    def add(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
