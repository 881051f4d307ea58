"""Prepares a `Run` for the training loop, in stages.

    resolve      the run with default values; family, config, tokenizer; no weights are read
    mesh         the devices
    data         the data loaders for training and validation, and the number of steps
    optimizer    the optax transformation
    state        shapes, dtypes and shardings of the training state

All user input is checked here, before large arrays are allocated.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxlm import models
from jaxlm.checkpoint import hf, peft, writer
from jaxlm.checkpoint.source import ModelSource
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import DataLoader
from jaxlm.data.streaming import StreamingLoader
from jaxlm.devices import distributed, mesh, topology
from jaxlm.exporting import sources
from jaxlm.loading import resolving
from jaxlm.model import Model
from jaxlm.nn import layer_types, lora, params
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.training import metrics, optimizers, samples, step
from jaxlm.training.config import Run, to_dict
from jaxlm.training.loaders import Progress, make_loaders
from jaxlm.training.vocabulary import set_chat_template, with_vocab_size

LENGTH, STEPS = 1024, 1000  # defaults: tokens per row at most, and steps
# generation_config.json of a new model: small models repeat themselves under greedy decoding.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}


class Setup(NamedTuple):
    """A run that is ready for its first step.

    Attributes:
        run: The run, with its defaults resolved.
        family: The module of the architecture.
        config: The model's Config.
        raw: The contents of config.json.
        tokenizer: The tokenizer.
        generation_config: The contents of generation_config.json.
        checkpoint: The checkpoint that training starts from; None for random weights.
        mesh: The mesh; None on one device.
        data: The data loader.
        valid: The data loaders of the validation data by the names of their sets; "" is the name of unnamed ones.
        tx: The optax optimizer.
        state: The training state as jax.ShapeDtypeStruct with shardings.
        new_rows: Rows of the embedding and the head for new tokens (vocabulary.Vocabulary).
        notes: What the user should know.
    """

    run: Run
    family: Any
    config: Any
    raw: dict[str, Any]
    tokenizer: Tokenizer
    generation_config: dict[str, Any]
    checkpoint: hf.Checkpoint | None
    mesh: Any
    data: DataLoader | StreamingLoader | Mixture
    valid: dict[str, DataLoader]
    tx: optax.GradientTransformation
    state: step.State
    new_rows: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def model(self, weights: Any = None) -> Model:
        """Returns a model with these weights, whose layers are a list. None: with the shapes of the weights."""
        weights = params.shapes(self.family.PARAMS, self.config) if weights is None else weights
        more = {"source": str(self.run.model or self.run.shape), "checkpoint": self.checkpoint}
        return Model(self.family, self.config, weights, self.tokenizer, self.generation_config, **more)


class _Resolved(NamedTuple):
    """The model of a run before its weights are read; fields as in Setup."""

    family: Any
    config: Any
    raw: dict[str, Any]
    tokenizer: Tokenizer
    generation_config: dict[str, Any]
    checkpoint: hf.Checkpoint | None
    new_rows: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def set_up(run: Run, progress: Progress | None = None) -> Setup:
    """Checks and prepares a run, except for its weights.

    Args:
        run: The run.
        progress: Called with the number of documents and tokens so far while data are tokenized.

    Raises:
        ValueError: The run is inconsistent, or its data cannot be used.
        OSError: A file cannot be read, or the output folder cannot be written.
    """
    run, model = _resolve(run)
    device_mesh = _make_mesh(run, model.config)
    data, valid = make_loaders(run, model.tokenizer, device_mesh, progress)
    run = _resolve_steps(run, data)
    if distributed.is_multiprocess():
        distributed.assert_equal("the run", to_dict(run), json.dumps(to_dict(run)))
    weights = jax.eval_shape(partial(new_weights, run, model.family, model.config), jax.random.key(0))
    tx = optimizers.make_optimizer(run.optimizer, run.steps, params.letters(model.family.PARAMS, weights))
    state = _abstract_state(run, tx, weights, device_mesh, model.family.PARAMS)
    setup = Setup(run, **model._asdict(), mesh=device_mesh, data=data, valid=valid, tx=tx, state=state)
    samples.check(setup)
    return setup


def new_weights(run: Run, family: Any, cfg: Any, key: jax.Array) -> Any:
    """Returns the weights that a new run trains, with stacked layers: random weights, or a new adapter. Pure."""
    if run.method == "lora":
        rows = lora.targets(family.PARAMS, cfg, run.lora.targets or ("all-linear",))
        weights = lora.init(rows, cfg.L, run.lora.rank, _scale(run), key)
    else:
        weights = params.init(family.PARAMS, cfg, key, family.NORM_IDENTITY)
    return step.cast(params.stack(weights, period(cfg)), run.weight_dtype)


def period(cfg: Any) -> int:
    """Returns the period of the layer types, which are stacked separately (Gemma 3: 6)."""
    return layer_types.layer_period(cfg)


def _abstract_state(run: Run, tx: optax.GradientTransformation, weights: Any, over: Any, table: Any) -> step.State:
    """Returns the training state as jax.ShapeDtypeStruct, each with its sharding. weights: their shapes."""
    shapes = jax.eval_shape(partial(step.init_state, tx, moment_dtype=run.optimizer.moment_dtype), weights)
    if over is None:
        shardings = jax.tree.map(lambda a: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
    else:
        shardings = step.state_shardings(tx, shapes, over, table)
    return jax.tree.map(lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes, shardings)


def _resolve(run: Run) -> tuple[Run, _Resolved]:
    """Returns the run with default values except the number of steps, and its model. Checks what does not depend on the
    data."""
    run.check()
    paths = {name: getattr(run, name) for name in ("out", "shape", "tokenizer", "adapter")}
    run = replace(run, **{name: path and Path(path).expanduser() for name, path in paths.items()})
    model = _of_checkpoint(run) if run.model is not None else _of_shape(run)
    if model.tokenizer.vocab_size > model.config.V:
        raise ValueError(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens, but vocab_size of {run.shape or run.model} is "
            f"{model.config.V}: choose another tokenizer (--tokenizer) or a larger vocab_size"
        )
    model = _with_chat_template(run, model)
    if run.length > model.config.context:
        raise ValueError(f"length is {run.length} tokens, but the context length of the model is "
                         f"{model.config.context}: choose a shorter length")  # fmt: skip
    on_cpu = jax.default_backend() == "cpu"
    dtype = run.dtype if run.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    remat = run.remat if run.remat != "auto" else "dots" if on_cpu else "none"
    run = replace(run, length=run.length or min(LENGTH, model.config.context), dtype=dtype, remat=remat)
    if run.method == "lora":
        _check_adapter(run, model.family, model.config)
    distributed.run_on_coordinator(lambda: metrics.require(run.report))
    _check_outputs(run, model.checkpoint)
    return run, model


def _of_checkpoint(run: Run) -> _Resolved:
    resolved = resolving.resolve(ModelSource(str(run.model), tokenizer=run.tokenizer, adapter=run.adapter))
    if run.adapter is None and resolved.checkpoint.adapter is not None:
        raise ValueError(f"{run.model} is an adapter: pass its base model (--model) and the adapter (--adapter), "
                         "or merge them first (jaxlm fuse)")  # fmt: skip
    tokenizer = _require_tokenizer(resolved.tokenizer, run)
    return _Resolved(
        resolved.family,
        resolved.config,
        resolved.checkpoint.config,
        tokenizer,
        resolved.generation_config,
        replace(resolved.checkpoint, adapter=None),  # the weights of the base model: those of the adapter are trained
        notes=resolved.checkpoint.notes,
    )


def _of_shape(run: Run) -> _Resolved:
    raw = _read_shape(Path(str(run.shape)))
    family = models.family_of(raw.get("model_type"))
    config = family.Config.from_hf(raw)
    tokenizer = _require_tokenizer(Tokenizer.load(run.tokenizer) if run.tokenizer else None, run)
    ids = _special_ids(tokenizer)
    return _Resolved(family, config, {**raw, **ids}, tokenizer, {**SAMPLING, **ids}, None)


def _with_chat_template(run: Run, model: _Resolved) -> _Resolved:
    """Returns the model with the chat template of the run, and a vocabulary that has the tokens of the template."""
    vocabulary = set_chat_template(run, model.tokenizer, model.config.V)
    if vocabulary.size != model.config.V:
        raw = with_vocab_size(model.raw, vocabulary.size)
        model = model._replace(raw=raw, config=model.family.Config.from_hf(raw))
    return model._replace(new_rows=vocabulary.new_rows, notes=model.notes + vocabulary.notes)


def _require_tokenizer(tokenizer: Tokenizer | None, run: Run) -> Tokenizer:
    if tokenizer is None:
        where = run.tokenizer or run.model or "a new model"
        raise ValueError(f"{where} has no tokenizer: pass a folder that has one (--tokenizer), or train one "
                         "(jaxlm tokenizer train)")  # fmt: skip
    return tokenizer


def _read_shape(path: Path) -> dict[str, Any]:
    """Returns the contents of a config.json. The path is the file or its folder."""
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: --shape takes the config.json of a model")
    return hf.read_json(path)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the BOS and EOS ids for config.json. A new model has those of its tokenizer, not those in --shape."""
    ends = sorted(tokenizer.eos_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _check_adapter(run: Run, family: Any, cfg: Any) -> None:
    """Raises ValueError for unknown targets, and for an adapter that does not match the run's LoRA options."""
    rows = lora.targets(family.PARAMS, cfg, run.lora.targets or ("all-linear",))
    if run.lora.dropout and any(row.path == "head" for row in rows):
        raise ValueError("lora.dropout cannot be combined with the target head, whose logits are computed in chunks: "
                         "omit one of them")  # fmt: skip
    if run.adapter is None:
        return
    adapter = peft.find(run.adapter, family.PARAMS, cfg, family.IGNORED_PREFIXES)
    if adapter.ignored:
        raise ValueError(f"{run.adapter} also adapts the vision tower, which is not supported: train another adapter")
    pairs = {pair.row.path: (pair.rank, pair.scale) for pair in adapter.pairs}
    if pairs != dict.fromkeys((row.path for row in rows), (run.lora.rank, _scale(run))):
        theirs = adapter.settings
        if theirs.ranks or theirs.alphas:
            why = "several ranks or alphas, so a run cannot continue it: train another adapter"
        else:
            values = [f"--lora.rank {theirs.rank} --lora.alpha {theirs.alpha:g}", *["--lora.rslora"] * theirs.rslora]
            names = sorted({pair.row.names[0].split(".")[-2] for pair in adapter.pairs})
            why = f"another rank, alpha or targets than this run; its own are {' '.join(values)} --lora.targets "
            why += " ".join(names)
        raise ValueError(f"{run.adapter} has {why}")


def _scale(run: Run) -> float:
    return lora.scale(run.lora.alpha, run.lora.rank, run.lora.rslora)


def _check_outputs(run: Run, checkpoint: hf.Checkpoint | None) -> None:
    """Raises FileExistsError if the result cannot be written at the end of the run."""
    if run.out.exists() and not run.out.is_dir():
        raise FileExistsError(f"{run.out} is a file: choose a folder (--out)")
    if run.method == "lora":
        writer.check_target((run.out / "adapter").resolve(), (), True, {peft.CONFIG}, "an adapter")
    else:
        writer.check_target((run.out / "model").resolve(), sources(checkpoint), True)


def _make_mesh(run: Run, cfg: Any) -> Any:
    """Returns the mesh, by default all devices on `data`; None for one device."""
    one = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    count = jax.device_count() if one is None else 1
    over = topology.make(run.mesh or {mesh.DATA: count}, cfg.K) if run.mesh or count > 1 else None
    if over is None or over.size == 1:
        return None
    if run.batch // run.accumulate % over.shape[mesh.DATA]:
        raise ValueError(
            f"batch / accumulate is {run.batch // run.accumulate} rows, which {over.shape[mesh.DATA]} devices on "
            f"{mesh.DATA} cannot share equally: choose a multiple, or a smaller mesh"
        )
    return over


def _resolve_steps(run: Run, data: Any) -> Run:
    """Returns the run with its number of steps in place of epochs. Metrics are logged ten times at least."""
    steps = run.steps or (data.steps(run.epochs) if run.epochs else STEPS)
    return replace(run, steps=steps, epochs=0.0, log_every=min(run.log_every, -(-steps // 10)))
