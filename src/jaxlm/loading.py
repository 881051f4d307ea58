"""Loads models. `load` reads a checkpoint; `resolve` checks it without reading its weights."""

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

from jaxlm import adapters, models
from jaxlm.checkpoint import gguf_files, gguf_models, headers, hf, hub, meta, peft
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from jaxlm.checkpoint.peft_config import read_settings
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import distributed, hardware, topology
from jaxlm.devices import mesh as meshes
from jaxlm.inference import roofline
from jaxlm.inference.sampling_params import log_unsupported
from jaxlm.model import Model, Weights
from jaxlm.nn import params
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import eos_ids


def load(
    name: str | Path | ModelSource,
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
    """Loads a model from a Hugging Face hub id, a folder or a GGUF file.

    Args:
        name: Hub id, folder, .gguf file (on the hub: `org/name:file.gguf`) or ModelSource. If it is a LoRA adapter, its
            base model is loaded too.
        adapter, format, tokenizer, rope_factor, revision, token, offline, allow_fields: See ModelSource.
        dtype: "float32", "bfloat16" or "float16"; "auto" keeps the type of the file, and is bfloat16 for a quantized
            GGUF file.
        family: Module of jaxlm.models that the checkpoint must belong to. Default: any.
        mesh: Devices to shard the weights over, as "data=2,model=4", {"data": 2, "model": 4} or a jax Mesh with these
            axes. Default with several devices: all of them, with the sizes that decode a full batch fastest by
            arithmetic (`jaxlm plan`).
        device: A single device instead of a mesh. Default: jax_default_device, if set.
        progress: Show a progress bar on stderr. Default: only on a terminal.

    Returns:
        The model.

    Raises:
        ValueError: An argument or a file is invalid, or the architecture is not supported.
        OSError: A file does not exist or cannot be read, or the hub cannot be reached.
        MemoryError: The weights do not fit in device memory.
    """
    source = ModelSource.of(
        name,
        adapter=adapter,
        format=format,
        tokenizer=tokenizer,
        rope_factor=rope_factor,
        revision=revision,
        token=token,
        offline=offline,
        allow_fields=allow_fields,
    )
    resolved = resolve(source, family)
    checkpoint, where = resolved.checkpoint, placement(resolved.family.PARAMS, resolved.config, mesh, device)
    _assert_same_model(str(source), resolved, dtype, where)
    weights = read_weights(str(source), checkpoint.tensors.pairs, dtype, where, progress)
    weights = adapters.adapted(weights, checkpoint, partial(wanted_dtype, dtype), where)
    model = Model(
        family=resolved.family,
        config=resolved.config,
        weights=weights,
        tokenizer=resolved.tokenizer,
        generation_config=resolved.generation_config,
        source=str(source),
        checkpoint=checkpoint,
    )
    if model.is_multiprocess:
        distributed.gather("loaded")  # wait for slower processes: the first collective of a program has a timeout
    return model


class Resolved(NamedTuple):
    """A checked checkpoint whose weights are not read yet."""

    family: Any
    config: Any
    checkpoint: hf.Checkpoint
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]


def resolve(source: ModelSource, family: Any = None) -> Resolved:
    """Does everything that `load` does before it reads weights: finds or downloads files, checks and matches them."""
    return with_tokenizer(match_tensors(source, family), source.tokenizer)


def match_tensors(source: ModelSource, family: Any = None, *, headers_only: bool = False) -> Resolved:
    """Reads the config of a checkpoint, matches its tensors with the family's PARAMS, and finds its adapter.

    Args:
        source: The checkpoint.
        family: As in `load`.
        headers_only: Read small files and headers only, for `jaxlm info`. No weights are downloaded. The checkpoint may
            have no weights; tensors.no_weights is the reason then.

    Returns:
        The checkpoint, without a tokenizer yet.
    """
    try:
        resolved = _match_folder(source, family, headers_only)
    except FileNotFoundError:
        if (adapter := _as_adapter(source)) is None:
            raise
        return _match_base(source, adapter, family, headers_only)
    if source.adapter is None:
        return resolved
    adapter = peft.find(
        hub.resolve_adapter(source.of_adapter()),
        resolved.family.PARAMS,
        resolved.config,
        resolved.family.IGNORED_PREFIXES,
        source.allow_fields,
        {row.path: tensor for row, tensor in resolved.checkpoint.tensors.pairs if tensor.file.is_file()},
    )
    notes = resolved.checkpoint.notes
    if (named := adapter.settings.base) and not _same_model(named, str(source.name)):
        notes += (f"the adapter {source.adapter} names the base model {named}; it is used with {source.name}",)
    return resolved._replace(checkpoint=replace(resolved.checkpoint, adapter=adapter, notes=notes))


def _same_model(one: str, other: str) -> bool:
    """Whether two names are the same hub id or folder."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _as_adapter(source: ModelSource) -> Path | None:
    """The folder of the adapter `source.name`; None if it is not an adapter."""
    if source.format == "meta" or str(source.name).endswith(gguf_files.SUFFIX):
        return None
    with suppress(OSError, ValueError):
        return hub.resolve_adapter(source)
    return None


def _match_base(source: ModelSource, adapter: Path, family: Any, headers_only: bool) -> Resolved:
    """Matches the base model of an adapter, with the adapter."""
    if source.adapter is not None:
        raise ValueError(
            f"{source.name} is an adapter: pass its base model with {source.adapter}, or pass {source.name} only"
        )
    settings = read_settings(adapter, source.allow_fields)
    if settings.base is None:
        raise ValueError(
            f"{source.name} is an adapter without the name of its base model: pass the base "
            f"(-m BASE --adapter {source.name})"
        )
    revision = None if Path(settings.base).exists() else settings.revision
    base = replace(source, name=settings.base, adapter=adapter, revision=revision)
    try:
        return match_tensors(base, family, headers_only=headers_only)
    except FileNotFoundError as error:
        hint = f"if the base model is elsewhere, pass it (-m BASE --adapter {source.name})"
        raise FileNotFoundError(f"{source.name} is an adapter of {settings.base}, and {error}; {hint}") from None


def _match_folder(source: ModelSource, family: Any, headers_only: bool) -> Resolved:
    """Reads and checks the config and tensors of a checkpoint."""
    if (gguf := gguf_files.find(source, headers_only)) is not None:
        known, config, checkpoint = gguf_models.open_gguf(gguf, source.allow_fields)
        if family is not None and known is not family:
            raise ValueError(f"{gguf} does not belong to {family.__name__}: omit family=")
        return Resolved(known, config, checkpoint, None, {})
    if headers_only:
        folder, read_index = headers.find(source)
    else:
        folder = hub.resolve(source)
        read_index = partial(hf.read_index, folder)
    config_json = folder if folder.is_file() else folder / hub.CONFIG
    is_meta = source.format == "meta" or not config_json.is_file()
    raw = {"model_type": "llama"} if is_meta else hf.read_json(config_json)
    with explain_errors(str(source.name)):
        known = models.family_of(raw.get("model_type"))
        if family is not None and known is not family:
            raise ValueError(f"model_type {raw['model_type']!r} does not belong to {family.__name__}: omit family=")
        if is_meta:
            config, checkpoint = _match_meta(source, folder, known)
        elif source.rope_factor is not None:
            raise ValueError("--rope-factor (rope_factor=) applies to Meta's files only: config.json has the factor; "
                             "omit it")  # fmt: skip
        else:
            config = known.Config.from_hf(raw, source.allow_fields)
            tensors = _match_hf(folder, known, config, read_index, headers_only)
            checkpoint = hf.Checkpoint(folder, raw, {}, tensors)
    if (path := folder / "generation_config.json").exists():
        checkpoint = replace(checkpoint, generation_config=hf.read_json(path))
        if not headers_only:  # `jaxlm info` shows the names itself
            log_unsupported(checkpoint.generation_config)
    return Resolved(known, config, checkpoint, None, {})


def _match_hf(
    folder: Path, family: Any, config: Any, read_index: headers.ReadIndex, headers_only: bool
) -> hf.MatchResult:
    """Matches the tensors of a checkpoint in Hugging Face's format."""
    try:
        index = read_index()
    except FileNotFoundError as error:
        # Some tools copy the config.json of the base into an adapter's folder, which is not a checkpoint.
        if not headers_only or (folder / ADAPTER_CONFIG).is_file():
            raise
        return hf.MatchResult([], [], [], no_weights=str(error))
    return hf.match(family.PARAMS, config, index, family.IGNORED_PREFIXES, headers_only=headers_only)


def _match_meta(source: ModelSource, folder: Path, family: Any) -> tuple[Any, hf.Checkpoint]:
    """Reads the config and tensors of Meta's files. They always have a head. It is treated as tied if its bytes equal
    those of the embedding."""
    params_json = hf.read_json(folder / meta.PARAMS)
    shards = meta.read_shards(folder, params_json)
    raw = meta.hf_config(params_json, meta.vocabulary(shards, params_json), source.rope_factor, source.allow_fields)
    config = family.Config.from_hf(raw)
    table = {path: (family.PARAMS[path][0], name) for path, name in meta.NAMES.items()}
    joined, faults = meta.join(shards, config.D, config.H)
    tensors = {row.path: tensor for row, tensor in hf.match(table, config, joined, (), faults, meta.PARAMS).pairs}
    if hf.same(tensors["head"], tensors["embed"]):
        raw["tie_word_embeddings"] = True
        config = family.Config.from_hf(raw)
    pairs = [(row, tensors[row.path]) for row in params.tensors(family.PARAMS, config)]
    return config, hf.Checkpoint(folder, raw, {}, hf.MatchResult(pairs, [], []), "meta", params_json)


def with_tokenizer(resolved: Resolved, path: str | Path | None) -> Resolved:
    """Adds the tokenizer, from `path` or the checkpoint's folder, and the EOS ids."""
    checkpoint, folder = resolved.checkpoint, resolved.checkpoint.folder
    ends = loaded_generation_config(checkpoint)["eos_token_id"]
    is_meta = checkpoint.format == "meta"
    folders = [folder, folder.parent] if is_meta and folder.name == hub.ORIGINAL else [folder]
    folders = [path for path in folders if path.suffix != ".json"]  # headers_only: it may be a config file
    # Meta's files have no EOS ids, so those in the folder of the tokenizer are used.
    eos_of = (None, None) if is_meta and not ends else ({"eos_token_id": ends}, {})
    tokenizer = None
    for place in [_tokenizer_path(path)] if path else folders:
        if (tokenizer := Tokenizer.load(place, *eos_of)) is not None:
            checkpoint = replace(checkpoint, tokenizer=None if place == folder else place)
            break
    if checkpoint.adapter is not None and not path:
        tokenizer, checkpoint = adapters.choose_tokenizer(tokenizer, checkpoint, resolved.config, ends)
    if tokenizer is None and path:
        raise FileNotFoundError(
            f"{path} has no tokenizer: pass a folder with tokenizer.json, tokenizer.model or vocab.json"
        )
    if tokenizer is not None and is_meta:
        tokenizer, checkpoint = _with_eos_ids(tokenizer, checkpoint)
    return resolved._replace(
        checkpoint=checkpoint, tokenizer=tokenizer, generation_config=loaded_generation_config(checkpoint)
    )


def loaded_generation_config(checkpoint: hf.Checkpoint) -> dict[str, Any]:
    """Returns the contents of generation_config.json with the EOS ids of both files, either of which may be
    incomplete."""
    return {**checkpoint.generation_config, "eos_token_id": eos_ids(checkpoint.generation_config, checkpoint.config)}


def _tokenizer_path(path: str | Path) -> Path:
    """The folder of a tokenizer.json, because other files in the folder belong to it; other paths are unchanged."""
    path = Path(path).expanduser()
    return path.parent if path.name == "tokenizer.json" and path.is_file() else path


def _with_eos_ids(tokenizer: Tokenizer, checkpoint: hf.Checkpoint) -> tuple[Tokenizer, hf.Checkpoint]:
    """Adds BOS and EOS ids from the tokenizer to the configs of a checkpoint in Meta's format, which has none."""
    vocabulary = tokenizer.get_vocab()
    ends = sorted(tokenizer.eos_ids) or [vocabulary[token] for token in meta.ENDS if token in vocabulary]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    config, generation_config = {**checkpoint.config, **ids}, {**ids, **checkpoint.generation_config}
    return Tokenizer(tokenizer.hf, ends), replace(checkpoint, config=config, generation_config=generation_config)


def placement(table: params.Table, cfg: Any, mesh: Any, device: Any) -> Callable[[params.TensorSpec], Any]:
    """A function from a TensorSpec to the sharding of its array, for the arguments `mesh` and `device` of `load`."""
    one = device if device is not None else jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if mesh is None and one is None and jax.device_count() > 1:
        mesh = roofline.default_mesh(table, cfg)
    if mesh is None:
        one = jax.local_devices(backend=one)[0] if isinstance(one, str) else one or jax.local_devices()[0]
        return lambda row: SingleDeviceSharding(one)
    if device is not None:
        raise ValueError("mesh= and device= exclude each other: pass one of them")
    over = topology.with_kv_groups(mesh, cfg.K) if isinstance(mesh, Mesh) else topology.make(mesh, cfg.K)
    if over.size == 1:
        return lambda row: SingleDeviceSharding(over.devices.item())
    return lambda row: meshes.sharding(row.letters, row.shape, over)


def spread(model: Model, mesh: Any) -> Model:
    """Shards a model over a mesh; `mesh` as in `load`."""
    where, weights = placement(model.family.PARAMS, model.config, mesh, None), {}
    for row in params.tensors(model.family.PARAMS, model.config):
        params.put(weights, row.path, adapters.placed(params.get(model.weights, row.path), row, where))
    return replace(model, weights=weights)


def _assert_same_model(name: str, resolved: Resolved, dtype: Any, where: Callable[[params.TensorSpec], Any]) -> None:
    """Raises ValueError unless all processes load the same model onto the same mesh. A collective."""
    pairs, adapter = resolved.checkpoint.tensors.pairs, resolved.checkpoint.adapter
    sharding = where(pairs[0][0])
    if sharding.is_fully_addressable:
        return
    family = resolved.family.__name__.rpartition(".")[2]
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for _, tensor in pairs]
    scales = [(pair.a.name, pair.a.shape, pair.scale) for pair in adapter.pairs] if adapter else None
    digest = hashlib.sha256(repr((resolved.config, tensors, scales)).encode()).hexdigest()[:8]
    over = dict(sharding.mesh.shape)
    text = f"{name} ({family}, {resolved.checkpoint.format}, {digest}) as {dtype} over {over}"
    distributed.assert_equal("the model", (family, digest, str(dtype), over), text)


def read_weights(
    name: str, pairs: Any, dtype: Any, where: Callable[[params.TensorSpec], Any], progress: bool | None
) -> Weights:
    """Reads the tensors of a checkpoint onto their devices.

    Args:
        name: Name of the model, for messages.
        pairs: Pairs of TensorSpec and tensor (hf.MatchResult.pairs).
        dtype: As in `load`.
        where: The sharding of the array of a TensorSpec.
        progress: As in `load`.

    Raises:
        MemoryError: The weights do not fit. Raised before anything is read.
    """
    device = next(iter(where(pairs[0][0]).addressable_devices))

    def loaded_dtype(file_dtype: np.dtype) -> np.dtype:
        return wanted_dtype(dtype, file_dtype, device.platform)

    # For each tensor: the elements per device, and the number of different blocks on the devices of this process.
    blocks = [
        (math.prod(where(row).shard_shape(row.shape)), len(hf.local_blocks(where(row), row.shape))) for row, _ in pairs
    ]
    elements = [n * count if device.platform == "cpu" else n for n, count in blocks]
    file_dtypes = [hf.DTYPES[tensor.dtype] for _, tensor in pairs]
    is_float32 = pairs and loaded_dtype(file_dtypes[0]).itemsize == 4
    needed = sum(n * loaded_dtype(file_dtype).itemsize for n, file_dtype in zip(elements, file_dtypes))
    half = hardware.gigabytes(needed // 2)
    smaller = f", or dtype='bfloat16' (--dtype bfloat16), which needs {half}" if is_float32 else ""
    hardware.require(needed, device, f"the weights of {name}", f"use a smaller model or a larger machine{smaller}")
    total = sum(n * count * file_dtype.itemsize for (n, count), file_dtype in zip(blocks, file_dtypes))
    with loading_bar(total, progress) as advance:
        return hf.load_weights(pairs, loaded_dtype, where, advance)


def wanted_dtype(dtype: Any, file_dtype: np.dtype, platform: str) -> np.dtype:
    """The dtype of a loaded tensor: `dtype`, or for "auto" the default of the platform for the type in the file."""
    if isinstance(dtype, str) and dtype == "auto":
        return hardware.auto_dtype(file_dtype, platform)
    with suppress(TypeError):
        if (wanted := np.dtype(jnp.dtype(dtype))) in hf.DTYPES.values():
            return wanted
    raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")


@contextmanager
def loading_bar(total: int, show: bool | None, what: str = "loading") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with bytes, rate and remaining time. Yields a function that advances it by bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    visible = console.is_terminal if show is None else show
    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
