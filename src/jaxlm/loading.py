"""`load`: a model from a checkpoint."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlm import adapters, devices, models, params, processes, topology
from jaxlm import mesh as meshes
from jaxlm.checkpoint import hf, hub, meta, peft, peft_hub
from jaxlm.checkpoint.peft_config import read_settings
from jaxlm.model import Model, Weights
from jaxlm.tokenizer import Tokenizer, eos_ids


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    format: str | None = None,
    tokenizer: str | Path | None = None,
    rope_factor: float | None = None,
    dtype: Any = "auto",
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    allow_fields: Collection[str] = (),
    family: Any = None,
    mesh: Any = None,
    device: Any = None,
    progress: bool | None = None,
) -> Model:
    """A model from a Hugging Face hub id or a folder.

    adapter: a LoRA adapter in PEFT's form, a hub id or a folder; as `name` it brings the base that it names. format:
    "hf", or "meta" for Meta's original Llama 3 files (params.json, consolidated.*.pth; on the hub in `original/`); None
    goes by what a folder holds. tokenizer: a folder or tokenizer.model, where it lies elsewhere. rope_factor: what
    params.json does not say of a shape that Meta did not publish: 8 as in Llama 3.1 and 3.3, 32 as in 3.2. dtype:
    "auto" keeps the file's type, or "float32", "bfloat16", "float16". revision: branch, tag or commit of `name`.
    offline: the local cache alone. allow_fields: names of config fields that may pass although the code does not know
    them. family: a module of jaxlm.models that must compute it. mesh: over which devices the weights are spread, as
    "data=2,model=4", {"data": 2, "model": 4} or a jax Mesh with these axes; where there are several devices the default
    is all of them, on `model` as far as the heads divide. device: one device instead (or jax_default_device says one).
    progress: show a bar on stderr (default: when it is a terminal). ValueError, OSError or MemoryError say what to do.
    """
    form = {"format": format, "tokenizer": tokenizer, "rope_factor": rope_factor, "allow_fields": allow_fields}
    found = find(name, adapter=adapter, **form, family=family, revision=revision, token=token, offline=offline)
    source, where = str(name) + (f" with {adapter}" if adapter else ""), placement(found.config, mesh, device)
    _agree(source, found, dtype, where)
    weights = read_weights(source, found.checkpoint.tensors.pairs, dtype, where, progress)
    weights = adapters.adapted(weights, found.checkpoint, partial(wanted_dtype, dtype), where)
    model = Model(found.family, found.config, weights, *found[3:], source, found.checkpoint)
    if model.shared:
        processes.gather("loaded")  # one may have read longer than a program's first exchange waits
    return model


class Found(NamedTuple):
    """A checkpoint before its weights are read: all that is known of it, checked."""

    family: Any
    config: Any
    checkpoint: hf.Checkpoint
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]


def find(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    format: str | None = None,
    tokenizer: str | Path | None = None,
    rope_factor: float | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    allow_fields: Collection[str] = (),
    family: Any = None,
) -> Found:
    """What `load` would load, with every check but the reading of weights; arguments as there."""
    where = {"token": token, "offline": offline}
    try:
        folder = hub.resolve(name, format=format, revision=revision, **where)
        found = _found(name, folder, format, rope_factor, allow_fields, family)
    except FileNotFoundError:
        alone = None
        if format != "meta":
            with suppress(OSError, ValueError):
                alone = peft_hub.resolve(name, revision=revision, **where)
        if alone is None:
            raise
        if adapter is not None:
            raise ValueError(f"{name} is an adapter: name its base beside {adapter}, or {name} alone") from None
        return _with_base(name, alone, tokenizer=tokenizer, allow_fields=allow_fields, family=family, **where)
    if adapter is not None:
        known, place = found.family, peft_hub.resolve(adapter, **where)
        own = {row.path: tensor for row, tensor in found.checkpoint.tensors.pairs}
        beside = peft.find(place, known.PARAMS, found.config, known.UNREAD, allow_fields, own)
        found = found._replace(checkpoint=replace(found.checkpoint, adapter=beside))
    return _with_text(found, tokenizer)


def _with_base(name: str | Path, alone: Path, **more: Any) -> Found:
    """An adapter that was named where a model should be, with the base that its config names."""
    settings = read_settings(alone, more["allow_fields"])
    if settings.base is None:
        raise ValueError(f"{name} is an adapter and does not say of which model: name it (-m BASE --adapter {name})")
    revision = None if Path(settings.base).exists() else settings.revision
    try:
        return find(settings.base, adapter=alone, revision=revision, **more)
    except FileNotFoundError as error:
        way_out = f"if the base lies elsewhere, name it (-m BASE --adapter {name})"
        raise FileNotFoundError(f"{name} is an adapter of {settings.base}, and {error}; {way_out}") from None


def _found(
    name: str | Path, folder: Path, format: str | None, rope_factor: float | None, allow: Collection[str], family: Any
) -> Found:
    """Config and tensors of a folder, checked."""
    original = format == "meta" or not (folder / hub.CONFIG).is_file()
    raw = {"model_type": "llama"} if original else hf.read_json(folder / hub.CONFIG)
    known = models.family_of(raw.get("model_type"))
    if family is not None and known is not family:
        raise ValueError(f"{name} has model_type {raw['model_type']!r}, which {family.__name__} does not compute")
    try:
        if original:
            config, checkpoint = _original(folder, known, rope_factor, allow)
        elif rope_factor is not None:
            raise ValueError("--rope-factor (rope_factor=) is for Meta's own files, config.json names the factor")
        else:
            config = known.Config.from_hf(raw, allow)
            tensors = hf.match(known.PARAMS, config, hf.read_index(folder), known.UNREAD)
            checkpoint = hf.Checkpoint(folder, raw, {}, tensors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Found(known, config, checkpoint, None, {})


def _original(folder: Path, family: Any, rope_factor: float | None, allow: Collection[str]) -> tuple[Any, Any]:
    """Config and Checkpoint of Meta's files. They always have the head: tied is one that is the embedding, byte for
    byte."""
    given = hf.read_json(folder / meta.PARAMS)
    shards = meta.read_shards(folder, given)
    raw = meta.hf_config(given, meta.vocabulary(shards, given), rope_factor, allow)
    config = family.Config.from_hf(raw)
    table = {path: (family.PARAMS[path][0], name) for path, name in meta.NAMES.items()}
    joined, faults = meta.join(shards, config.D, config.H)
    tensors = {row.path: tensor for row, tensor in hf.match(table, config, joined, (), faults, meta.PARAMS).pairs}
    if hf.same(tensors["head"], tensors["embed"]):
        raw["tie_word_embeddings"] = True
        config = family.Config.from_hf(raw)
    pairs = [(row, tensors[row.path]) for row in params.rows(family.PARAMS, config)]
    return config, hf.Checkpoint(folder, raw, {}, hf.Matched(pairs, [], []), "meta", given)


def _with_text(found: Found, given: str | Path | None) -> Found:
    """With the tokenizer, and with what the files say of generation."""
    checkpoint, folder = found.checkpoint, found.checkpoint.folder
    if (path := folder / "generation_config.json").exists():
        checkpoint = replace(checkpoint, generation_config=hf.read_json(path))
    ends = eos_ids(checkpoint.generation_config, checkpoint.config)  # what either file says; both may be right
    original = checkpoint.format == "meta"
    beside = [folder, folder.parent] if original and folder.name == hub.ORIGINAL else [folder]
    # Meta's files name no end; those beside the tokenizer may.
    named = (None, None) if original and not ends else ({"eos_token_id": ends}, {})
    tokenizer = None
    for place in [_place(given)] if given else beside:
        if (tokenizer := Tokenizer.load(place, *named)) is not None:
            checkpoint = replace(checkpoint, tokenizer=None if place == folder else place)
            break
    if tokenizer is None and given:
        raise FileNotFoundError(f"{given} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if tokenizer is not None and original:
        tokenizer, checkpoint, ends = _with_ends(tokenizer, checkpoint)
    generation_config = {**checkpoint.generation_config, "eos_token_id": ends}
    return found._replace(checkpoint=checkpoint, tokenizer=tokenizer, generation_config=generation_config)


def _place(given: str | Path) -> Path:
    """The folder of a tokenizer.json, for it is read with the files beside it; else the path itself."""
    path = Path(given).expanduser()
    return path.parent if path.name == "tokenizer.json" and path.is_file() else path


def _with_ends(tokenizer: Tokenizer, checkpoint: hf.Checkpoint) -> tuple[Tokenizer, hf.Checkpoint, list[int]]:
    """Meta's checkpoint with the ids that the config files of Hugging Face's form would name."""
    vocabulary = tokenizer.get_vocab()
    ends = sorted(tokenizer.eos_ids) or [vocabulary[token] for token in meta.ENDS if token in vocabulary]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    config, generation_config = {**checkpoint.config, **ids}, {**ids, **checkpoint.generation_config}
    return Tokenizer(tokenizer.hf, ends), replace(checkpoint, config=config, generation_config=generation_config), ends


def placement(cfg: Any, mesh: Any, device: Any) -> Callable[[params.Row], Any]:
    """The sharding of each weight, from what `load` was given as `mesh` and `device`."""
    one = device if device is not None else jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if mesh is None and one is None and jax.device_count() > 1:
        mesh = topology.default({"N": cfg.N, "F": cfg.F}, jax.device_count())
    if mesh is None:
        one = jax.local_devices(backend=one)[0] if isinstance(one, str) else one or jax.local_devices()[0]
        return lambda row: SingleDeviceSharding(one)
    if device is not None:
        raise ValueError("give mesh= or device=, not both")
    over = topology.grouped(mesh, cfg.K) if isinstance(mesh, Mesh) else topology.make(mesh, cfg.K)
    if over.size == 1:
        return lambda row: SingleDeviceSharding(over.devices.item())
    return lambda row: meshes.sharding(row.letters, row.shape, over)


def spread(model: Model, mesh: Any) -> Model:
    """The same model over a mesh, as `load` takes it."""
    where, weights = placement(model.config, mesh, None), {}
    for row in params.rows(model.family.PARAMS, model.config):
        params.put(weights, row.path, adapters.placed(params.get(model.weights, row.path), row, where))
    more = (model.tokenizer, model.generation_config, model.source, model.checkpoint)
    return Model(model.family, model.config, weights, *more)


def _agree(name: str, found: Found, dtype: Any, where: Callable[[params.Row], Any]) -> None:
    """ValueError unless every process is about to load the same model into the same places."""
    if where(found.checkpoint.tensors.pairs[0][0]).is_fully_addressable:
        return
    family = found.family.__name__.rpartition(".")[2]
    stored = [(tensor.name, tensor.dtype, tensor.shape) for _, tensor in found.checkpoint.tensors.pairs]
    beside = found.checkpoint.adapter
    scales = [(pair.a.name, pair.a.shape, pair.scale) for pair in beside.pairs] if beside else None
    digest = hashlib.sha256(repr((found.config, stored, scales)).encode()).hexdigest()[:8]
    over = dict(where(found.checkpoint.tensors.pairs[0][0]).mesh.shape)
    told = f"{name} ({family}, {found.checkpoint.format}, {digest}) as {dtype} over {over}"
    processes.agree("the model", (family, digest, str(dtype), over), told)


def read_weights(
    name: str, pairs: Any, dtype: Any, where: Callable[[params.Row], Any], progress: bool | None
) -> Weights:
    device = next(iter(where(pairs[0][0]).addressable_devices))

    def kept(stored: np.dtype) -> np.dtype:
        return wanted_dtype(dtype, stored, device.platform)

    # Of each tensor: the elements on one device, and those of all different blocks that this process holds.
    shares = [
        (math.prod(where(row).shard_shape(row.shape)), len(hf.local_blocks(where(row), row.shape))) for row, _ in pairs
    ]
    elements = [n * blocks if device.platform == "cpu" else n for n, blocks in shares]
    types = [hf.DTYPES[tensor.dtype] for _, tensor in pairs]
    smaller = ", or dtype='bfloat16' (--dtype bfloat16) halves it" if pairs and kept(types[0]).itemsize == 4 else ""
    needed = sum(n * kept(stored).itemsize for n, stored in zip(elements, types))
    devices.require(needed, device, f"the weights of {name}", f"use a smaller model or a larger machine{smaller}")
    total = sum(n * blocks * stored.itemsize for (n, blocks), stored in zip(shares, types))
    with loading_bar(total, progress) as advance:
        return hf.load_weights(pairs, kept, where, advance)


def wanted_dtype(dtype: Any, stored: np.dtype, platform: str) -> np.dtype:
    """The type to keep a tensor in: `dtype`, or for "auto" what devices.auto_dtype says of the stored type."""
    if isinstance(dtype, str) and dtype == "auto":
        return devices.auto_dtype(stored, platform)
    with suppress(TypeError):
        if (wanted := np.dtype(jnp.dtype(dtype))) in hf.DTYPES.values():
            return wanted
    raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")


@contextmanager
def loading_bar(total: int, show: bool | None, what: str = "loading") -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on stderr; the yielded function hears of bytes as they pass."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    visible = console.is_terminal if show is None else show
    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
