"""From a `Run` to what its loop needs: the model's functions, its data and its optimiser, all checked.

Nothing that is large is made before all that a user can get wrong has been checked, and `shapes` alone tells what a run
takes.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import loading, lora, mesh, models, params, processes, topology
from jaxlm.checkpoint import export, hf, peft
from jaxlm.exporting import sources
from jaxlm.model import Model
from jaxlm.prompts import room, to_ids
from jaxlm.tokenizer import Tokenizer
from jaxlm.training import metrics, optimisers, step
from jaxlm.training.config import Run, to_dict

LENGTH, STEPS = 1024, 1000  # where a run says nothing
# What a new model's generation_config.json says: small ones repeat themselves where the likeliest token is taken.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
Progress = Callable[[int, int], None]  # documents, tokens


class Setup(NamedTuple):
    """A run before its first step. run: with its steps resolved; raw: the contents of config.json; checkpoint: where
    the model came from, None where it begins with random weights; over: the mesh, None for one device."""

    run: Run
    family: Any
    config: Any
    raw: dict[str, Any]
    tokenizer: Tokenizer
    generation_config: dict[str, Any]
    checkpoint: hf.Checkpoint | None
    data: Any
    valid: Any
    over: Any

    @property
    def period(self) -> int:
        """How many unlike layers there are."""
        return len(params.period(self.config.windows))

    def model(self, weights: Any) -> Model:
        """These weights, their layers listed, as a model."""
        more = {"source": str(self.run.model or self.run.shape), "checkpoint": self.checkpoint}
        return Model(self.family, self.config, weights, self.tokenizer, self.generation_config, **more)

    def rule(self) -> Any:
        """The optimiser."""
        letters = params.letters(self.family.PARAMS, self.trained(jax.random.key(0), shapes=True))
        return optimisers.make(self.run.optimiser, self.run.steps, letters)

    def trained(self, key: jax.Array, shapes: bool = False) -> Any:
        """What is trained, stacked, before the first step: random weights or an adapter; a checkpoint's weights are
        read by `begin`. Or their shapes alone."""
        table = self.family.PARAMS

        def made(key: jax.Array) -> Any:
            if self.run.method == "lora":
                return params.stack(self.adapter(key), self.period)
            return params.stack(params.init(table, self.config, key, self.family.NORM), self.period)

        if shapes:
            return jax.eval_shape(made, key)
        where = None if self.over is None else step.weight_places(jax.eval_shape(made, key), self.over, table)
        return jax.jit(made, out_shardings=where)(key)

    def adapter(self, key: jax.Array) -> Any:
        """A new adapter, its layers listed."""
        of, cfg = self.run.lora, self.config
        rows = lora.targets(self.family.PARAMS, cfg, of.targets or ("all-linear",))
        return lora.init(rows, cfg.L, of.rank, _scale(self.run), key)

    def state_shapes(self) -> step.State:
        """The state as jax.ShapeDtypeStruct."""
        rule = self.rule()
        return jax.eval_shape(lambda w: step.start(rule, w), self.trained(jax.random.key(0), shapes=True))

    def state_like(self) -> step.State:
        """The same, each array with its place: what a checkpoint is restored into."""
        shapes = self.state_shapes()
        if self.over is None:
            places = jax.tree.map(lambda a: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
        else:
            places = step.places(shapes, self.over, self.family.PARAMS)
        return jax.tree.map(lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes, places)

    def frozen_shapes(self) -> Any:
        """The weights beside an adapter, None where all are trained."""
        if self.run.method == "full":
            return None
        weights = params.shapes(self.family.PARAMS, self.config, jnp.dtype(self.run.dtype))
        return jax.eval_shape(lambda w: params.stack(w, self.period), weights)


def set_up(run: Run, progress: Progress | None = None) -> Setup:
    """Checks and prepares all but the weights. Raises ValueError or OSError with what is wrong and the way out."""
    run.check()
    paths = {name: getattr(run, name) for name in ("out", "shape", "tokenizer", "adapter")}
    run = replace(run, **{name: path and Path(path).expanduser() for name, path in paths.items()})
    family, cfg, raw, tokenizer, generation_config, checkpoint = _described(run)
    dtype = run.dtype if run.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    run = replace(run, length=run.length or min(LENGTH, cfg.context), dtype=dtype)
    if run.method == "lora":
        _check_adapter(run, family, cfg)
    processes.on_first(lambda: metrics.require(run.report))
    _room_at_the_end(run, checkpoint)
    over = _mesh(run, cfg)
    if over is not None and run.batch // run.accumulate % over.shape[mesh.DATA]:
        raise ValueError(
            f"a part of {run.batch // run.accumulate} rows (batch / accumulate) cannot be shared by "
            f"{over.shape[mesh.DATA]} devices on {mesh.DATA}: make the batch a multiple, or the mesh smaller"
        )
    data, valid = (_batches(run, tokenizer, over, part, progress) for part in ("train", "validation"))
    steps = run.steps or (data.steps(run.epochs) if run.epochs else STEPS)
    optimisers.schedule(run.optimiser, steps)
    run = replace(run, steps=steps, epochs=0.0, log_every=min(run.log_every, -(-steps // 10)))
    if processes.several():
        processes.agree("the run", to_dict(run), json.dumps(to_dict(run)))
    setup = Setup(run, family, cfg, raw, tokenizer, generation_config, checkpoint, data, valid, over)
    model = setup.model({})  # prompts need none of its weights
    for prompt in run.samples:
        room(model, to_ids(model, prompt, {}), None)
    return setup


def _check_adapter(run: Run, family: Any, cfg: Any) -> None:
    """ValueError for targets that are none, and for an adapter to go on from that is another than the run's."""
    rows = lora.targets(family.PARAMS, cfg, run.lora.targets or ("all-linear",))
    if run.lora.dropout and any(row.path == "head" for row in rows):
        raise ValueError("lora.dropout does not go with the target head, whose logits are computed in parts: leave one")
    if run.adapter is None:
        return
    found = peft.find(run.adapter, family.PARAMS, cfg, family.UNREAD)
    if found.unread:
        raise ValueError(f"{run.adapter} also adapts the half of the model that sees, which is not read yet")
    theirs = {pair.row.path: (pair.a.shape[0], pair.scale) for pair in found.pairs}
    if theirs != dict.fromkeys((row.path for row in rows), (run.lora.rank, _scale(run))):
        raise ValueError(
            f"{run.adapter} has another rank, alpha or targets than this run: give its own (--lora.rank, --lora.alpha, "
            "--lora.rslora, --lora.targets)"
        )


def _scale(run: Run) -> float:
    return lora.scale(run.lora.alpha, run.lora.rank, run.lora.rslora)


def _room_at_the_end(run: Run, checkpoint: hf.Checkpoint | None) -> None:
    """FileExistsError where what the run makes could not take its place hours later."""
    if run.out.exists() and not run.out.is_dir():
        raise FileExistsError(f"{run.out} is a file: choose the name of a folder (--out)")
    if run.method == "lora":
        export.check_target((run.out / "adapter").resolve(), (), True, {peft.CONFIG}, "an adapter")
    else:
        export.check_target((run.out / "model").resolve(), sources(checkpoint), True)


def _described(run: Run) -> tuple[Any, ...]:
    """Family, config, config.json, tokenizer, generation_config and checkpoint, before a weight is read."""
    if run.model is not None:
        found = loading.find(run.model, tokenizer=run.tokenizer)
        raw, tokenizer, checkpoint = found.checkpoint.config, found.tokenizer, found.checkpoint
        family, cfg, generation_config = found.family, found.config, found.generation_config
        if checkpoint.adapter is not None:
            raise ValueError(f"{run.model} is an adapter: give its base as --model and it as --adapter, or fuse them")
    else:
        raw, checkpoint = _shape(Path(str(run.shape))), None
        family = models.family_of(raw.get("model_type"))
        cfg = family.Config.from_hf(raw)
        tokenizer = Tokenizer.load(run.tokenizer) if run.tokenizer else None
        ids = _ids(tokenizer) if tokenizer else {}
        raw, generation_config = {**raw, **ids}, {**SAMPLING, **ids}
    if tokenizer is None:
        where = run.tokenizer or run.model or "a new model"
        raise ValueError(f"{where}: there is no tokenizer: name its folder (--tokenizer), or make one from the texts "
                         "(jaxlm tokenizer train)")  # fmt: skip
    if tokenizer.vocab_size > cfg.V:
        where = run.shape or run.model
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, {where} room for {cfg.V} (vocab_size)")
    if run.length > cfg.context:
        raise ValueError(f"rows of {run.length} tokens (length), but the model is made for {cfg.context}")
    return family, cfg, raw, tokenizer, generation_config, checkpoint


def _shape(path: Path) -> dict[str, Any]:
    """The contents of a config.json, or of a folder's."""
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} (--shape) is not there: it should be the config.json of a model")
    return hf.read_json(path)


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which tokens begin and end a text: a new model's are its tokenizer's, whatever its shape was copied from."""
    ends = sorted(tokenizer.eos_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _mesh(run: Run, cfg: Any) -> Any:
    """The mesh of a run: by default all devices on `data`."""
    one = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    count = jax.device_count() if one is None else 1
    over = topology.make(run.mesh or {mesh.DATA: count}, cfg.K) if run.mesh or count > 1 else None
    return None if over is None or over.size == 1 else over


def _batches(run: Run, tokenizer: Any, over: Any, part: str, progress: Progress | None) -> Any:
    """The batches of some sources. One process tokenises, the others find its corpus in the cache."""
    from jaxlm.training.batches import Batches
    from jaxlm.training.corpus import prepare
    from jaxlm.training.texts import TextOptions

    data = run.data
    names = (*data.train, *filter(None, [data.dataset])) if part == "train" else data.valid
    if not names:
        return None
    fields = {name: getattr(data, name) for name in ("form", "learn", "text_field", "prompt_field", "completion_field")}
    options = TextOptions(**fields, template_args=dict(map(_variable, data.template_arg)))
    where = {"split": part, "config": data.config, "revision": data.revision}

    def prepared() -> Any:
        return prepare(names, tokenizer, options, **where, on_bad=data.on_bad, progress=progress)

    corpus = prepared() if processes.first() else None
    processes.gather("prepared")
    more = {"share": rows_here(run.batch, over), "long": data.long}
    return Batches(corpus or prepared(), run.batch, run.length, run.seed, data.packing, **more)


def _variable(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a template's variable."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"data.template_arg {text!r}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def rows_here(B: int, over: Any) -> slice:
    """Which rows of a batch this process makes: those that its devices hold, and what lies between them."""
    if over is None:
        return slice(0, B)
    where = mesh.sharding("BT", (B, 1), over)
    found = [index[0].indices(B) for index in where.addressable_devices_indices_map((B, 1)).values() if index]
    return slice(min(begin for begin, _, _ in found), max(end for _, end, _ in found))
