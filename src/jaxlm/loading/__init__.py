"""Loads models: reads the weights of a checkpoint onto devices. resolving.py finds and checks it first."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlm import adapters
from jaxlm.checkpoint import hf, quantized, quantized_loading
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import distributed, hardware, topology
from jaxlm.devices import mesh as meshes
from jaxlm.inference import roofline
from jaxlm.loading.resolving import Resolved, resolve, with_adapter, with_tokenizer
from jaxlm.model import Model, Weights, require_model
from jaxlm.nn import params
from jaxlm.nn.quantize import check_type, quantizer, stored
from jaxlm.nn.quantized_kv import check_name


def load(
    name: str | Path | ModelSource,
    *,
    adapter: str | Path | None = None,
    format: str | None = None,
    tokenizer: str | Path | None = None,
    rope_factor: float | None = None,
    dtype: Any = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
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
        adapter: Hub id or folder of a LoRA adapter to apply.
        format: "hf", or "meta" for Meta's original Llama 3 files. Default: detected.
        tokenizer: Folder of the tokenizer, or a tokenizer.model, if it is not stored with the weights.
        rope_factor: RoPE scaling factor of Meta's files, which params.json does not state.
        dtype: "float32", "bfloat16" or "float16" for all weights, which dequantizes those of a quantized checkpoint
            unless quantize="stored". "auto" keeps the types of the files: quantized weights stay quantized, but those
            of GGUF files become bfloat16.
        quantize: Quantize the weights while they are loaded: "int8", "int8-weights", "int4" or "fp8" (nn/quantize.py).
            "stored" keeps quantized weights as they are in the files, those of GGUF files too.
        kv_dtype: dtype of the KV caches of the model: "float32", "bfloat16", "float16", or 8 bits, "int8" or "fp8".
            "auto" depends on the platform.
        revision: Branch, tag or commit on the hub.
        token: Hub access token. Default: HF_TOKEN, or the token saved by `hf auth login`.
        offline: Use the local cache only.
        allow_fields: Names of config fields that are refused, to ignore because they do not change the result.
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
    if not isinstance(name, str | Path | ModelSource):
        raise TypeError(f"load needs a hub id, a folder or a GGUF file, not {type(name).__name__}")
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
    check_name(kv_dtype)
    resolved = resolve(source, family)
    checkpoint, where = resolved.checkpoint, placement(resolved.family.PARAMS, resolved.config, mesh, device, quantize)
    kind = dtype if quantize is None else f"{dtype} ({quantize})"
    _assert_same_model(str(source), resolved, kind, where)
    weights = read_weights(str(source), checkpoint.tensors.pairs, dtype, where, progress, quantize)
    weights = adapters.adapted(weights, checkpoint, partial(wanted_dtype, dtype), where)
    model = Model(
        family=resolved.family,
        config=resolved.config,
        weights=weights,
        tokenizer=resolved.tokenizer,
        generation_config=resolved.generation_config,
        source=str(source),
        checkpoint=checkpoint,
        kv_dtype=kv_dtype,
    )
    if model.is_multiprocess:
        distributed.gather("loaded")  # wait for slower processes: the first collective of a program has a timeout
    return model


def load_adapter(
    model: Model,
    name: str | Path,
    *,
    dtype: Any = "auto",
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    allow_fields: Collection[str] = (),
) -> Model:
    """Loads a LoRA adapter onto a model that is loaded already. Both models share the arrays of the base.

    An Engine serves several of them in one batch (adapters=).

    Args:
        model: The base model.
        name: Hub id or folder of the adapter.
        dtype: dtype of the factors, as in `load`.
        revision: Branch, tag or commit of the adapter on the hub.
        token: Hub access token, as in `load`.
        offline: Use the local cache only.
        allow_fields: Names of fields of the adapter's config that are refused, to ignore.

    Returns:
        The model with the adapter. It has the tokenizer and chat template in the folder of the adapter, if there are
        some.

    Raises:
        ValueError: The adapter does not fit the model, or the model has an adapter already, or no checkpoint.
        OSError: A file does not exist or cannot be read, or the hub cannot be reached.
    """
    require_model(model, "load_adapter")
    if model.checkpoint is None or model.checkpoint.adapter is not None:
        has = "has an adapter already: load its base" if model.checkpoint else "was not loaded: load it from a folder"
        raise ValueError(f"{name} cannot be loaded onto {model.source}, which {has}")
    source = ModelSource(name, revision=revision, token=token, offline=offline, allow_fields=allow_fields)
    base = Resolved(model.family, model.config, replace(model.checkpoint, notes=()), None, {})
    resolved = with_tokenizer(with_adapter(base, source, model.source), model.checkpoint.tokenizer)
    where = placement(model.family.PARAMS, model.config, model.mesh, None if model.mesh else model.device)
    text = f"{model.source} with {name}"
    _assert_same_model(text, resolved, dtype, where)
    return replace(
        model,
        weights=adapters.adapted(model.weights, resolved.checkpoint, partial(wanted_dtype, dtype), where),
        tokenizer=resolved.tokenizer,
        generation_config=resolved.generation_config,
        source=text,
        checkpoint=resolved.checkpoint,
    )


def placement(
    table: params.Table, cfg: Any, mesh: Any, device: Any, quantize: str | None = None
) -> Callable[[params.TensorSpec], Any]:
    """A function from a TensorSpec to the sharding of its array, for these arguments of `load`."""
    one = device if device is not None else jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if mesh is None and one is None and jax.device_count() > 1:
        mesh = roofline.default_mesh(table, cfg, None if quantize == quantized.STORED else quantize)
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
    name: str,
    pairs: Any,
    dtype: Any,
    where: Callable[[params.TensorSpec], Any],
    progress: bool | None,
    quantize: str | None = None,
    rules: meshes.Rules = meshes.RULES,
) -> Weights:
    """Reads the tensors of a checkpoint onto their devices.

    Args:
        name: Name of the model, for messages.
        pairs: Pairs of TensorSpec and tensor (hf.MatchResult.pairs).
        dtype: As in `load`.
        where: The sharding of the array of a TensorSpec.
        progress: As in `load`.
        quantize: As in `load`.
        rules: How quantized weights are sharded (nn.quantize.quantizer).

    Raises:
        MemoryError: The weights do not fit. Raised before anything is read.
    """
    device = next(iter(where(pairs[0][0]).addressable_devices))

    def loaded_dtype(file_dtype: np.dtype) -> np.dtype:
        return wanted_dtype(dtype, file_dtype, device.platform)

    packed, pairs = _kept_and_others(name, pairs, dtype, quantize)
    quantize = None if quantize == quantized.STORED else quantize
    # For each tensor: the elements per device, and the number of different blocks on the devices of this process.
    blocks = [
        (math.prod(where(row).shard_shape(row.shape)), len(meshes.local_blocks(where(row), row.shape)))
        for row, _ in pairs
    ]
    file_dtypes = [hf.DTYPES[tensor.dtype] for _, tensor in pairs]
    dtypes = [loaded_dtype(file_dtype) for file_dtype in file_dtypes]
    copies = [count if device.platform == "cpu" else 1 for _, count in blocks]
    arrays = [n * count * dtype.itemsize for (n, _), count, dtype in zip(blocks, copies, dtypes)]

    def held(type: str | None) -> int:
        """Bytes of the weights in device memory. While they are quantized, also those of the largest array."""
        if type is None:
            return sum(arrays) + sum(quantized_loading.bytes_per_device(row, tensor, where) for row, tensor in packed)
        leaves = [stored(row, dtype, type, device.platform) for (row, _), dtype in zip(pairs, dtypes)]
        shards = [_shard_bytes(leaf, row, where(row)) for (row, _), leaf in zip(pairs, leaves)]
        return sum(n * count for n, count in zip(shards, copies)) + max(arrays, default=0)

    needed, free = held(quantize), hardware.available_memory(device)
    smaller = [f"dtype='bfloat16' (--dtype bfloat16), which needs {hardware.gigabytes(needed // 2)}"]
    if quantize is not None or packed or dtypes[0].itemsize < 4:
        smaller = []
    if free is not None and needed > free and quantize != "int4" and not packed:
        sizes = {type: held(type) for type in ("int8", "int4") if type != quantize}
        as_stored = [(row, found) for row, tensor in pairs if (found := quantized.packed(tensor))]
        if as_stored and quantize is None:
            paths = {row.path for row, _ in as_stored}
            others = sum(n for (row, _), n in zip(pairs, arrays) if row.path not in paths)
            kept = sum(quantized_loading.bytes_per_device(*pair, where) for pair in as_stored)
            sizes[quantized.STORED] = kept + others
        smaller += [f"--quantize {type}, which needs {hardware.gigabytes(n)}" for type, n in sizes.items() if n <= free]
    hint = ", or ".join(["use a smaller model or a larger machine", *smaller])
    hardware.require(needed, device, f"the weights of {name}", hint)
    total = sum(n * count * file_dtype.itemsize for (n, count), file_dtype in zip(blocks, file_dtypes))
    total += sum(tensor.nbytes for _, tensor in packed)
    with loading_bar(total, progress) as advance:
        if quantize is not None:
            # Reading is faster than quantizing: little has to be read ahead, and memory is what quantizing is for.
            convert = quantizer(quantize, rules)
            return hf.load_weights(pairs, loaded_dtype, where, advance, convert, hf.AHEAD // 4)
        weights = hf.load_weights(pairs, loaded_dtype, where, advance)
        quantized_loading.load_weights(weights, packed, loaded_dtype, where, advance)
        return weights


def _kept_and_others(name: str, pairs: Any, dtype: Any, quantize: str | None) -> tuple[list[Any], list[Any]]:
    """The pairs whose weights stay quantized, with their Packed, and the others."""
    if quantize is not None:
        check_type(quantize, (quantized.STORED,))
    packed = [(row, found) for row, tensor in pairs if (found := quantized.kept(tensor, dtype, quantize))]
    if quantize == quantized.STORED and not packed:
        raise ValueError(f"{name} has no quantized weights: leave out quantize='stored' (--quantize stored)")
    paths = {row.path for row, _ in packed}
    return packed, [pair for pair in pairs if pair[0].path not in paths]


def _shard_bytes(leaf: Any, row: params.TensorSpec, sharding: Any) -> int:
    """Bytes of a weight on one device, an array or a WeightForm, where an array of the row has this sharding."""
    if isinstance(sharding, SingleDeviceSharding):
        return params.nbytes(leaf)
    pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(params.letters_of(leaf, row.letters)), strict=True)
    return sum(params.nbytes(a) // meshes.num_shards(letters, a.shape, sharding.mesh) for a, letters in pairs)


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
