"""Facts about a checkpoint as plain values, for `jaxlm info`, from the config and the headers of weight files."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax.numpy as jnp

from jaxlm.checkpoint import quantized
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.meta import ConcatTensor
from jaxlm.checkpoint.peft import Adapter
from jaxlm.checkpoint.quantized import STORED
from jaxlm.checkpoint.safetensors import DTYPES
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import mesh, topology
from jaxlm.inference import roofline
from jaxlm.inference.sampling_params import DEFAULTS, SamplingParams, unsupported
from jaxlm.loading import resolving
from jaxlm.models.config import ROPE_FIELDS
from jaxlm.nn import Rope, params
from jaxlm.nn.quantize import stored
from jaxlm.processing.tokenizer import Tokenizer

LENGTHS = (1024, 8192)  # sequence lengths to compute the KV cache size for, besides the context length


def describe(
    source: ModelSource, dtype: str = "auto", mesh_spec: str | None = None, quantize: str | None = None
) -> dict[str, Any]:
    """Everything that `jaxlm info` shows, as JSON values.

    Args:
        source: The checkpoint.
        dtype: Data type of the weights; auto keeps the type of the files.
        mesh_spec: Device mesh, such as "data=1,model=8", for sizes per device.
        quantize: The type of quantized weights, as in `jaxlm.load`.
    """
    resolved = resolving.match_tensors(source, headers_only=True)
    try:
        resolved = resolving.with_tokenizer(resolved, source.tokenizer)
        tokenizer = resolved.tokenizer and _tokenizer(resolved.tokenizer, resolved.checkpoint.format)
    except ValueError as error:
        tokenizer = {"error": str(error)}
    family, cfg, checkpoint = resolved.family, resolved.config, resolved.checkpoint
    adapter, windows = checkpoint.adapter, cfg.windows
    weights, loaded_dtype = _weights(resolved, dtype, quantize)
    if quantize == STORED and not weights.get("quantized"):
        raise ValueError(f"{source} has no quantized weights: leave out --quantize stored")
    if quantize is not None and quantize != STORED:
        leaves = [stored(row, loaded_dtype, quantize) for row in params.tensors(family.PARAMS, cfg)]
        weights |= {"bytes": sum(map(params.nbytes, leaves)), "quantize": quantize, "quantized": 0}
    rows = [row for row in params.tensors(family.PARAMS, cfg) if "layers." not in row.path or ".0." in row.path]
    facts = {
        "model": adapter.settings.base if adapter and source.adapter is None else str(source.name),
        "family": family.__name__.rpartition(".")[2],
        "model_type": checkpoint.config["model_type"],
        "architectures": _architectures(checkpoint.config),
        "parameters": {
            "total": params.count(family.PARAMS, cfg),
            "embedding": sum(math.prod(row.shape) for row in rows if row.path in ("embed", "head")),
            "layer": sum(math.prod(row.shape) for row in rows if ".0." in row.path),
        },
        "weights": weights,
        "sizes": {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name in "VDFLNKH"},
        "tied_head": cfg.tied,
        "tensors": [
            {"path": row.path.replace(".0.", ".", 1), "letters": row.letters, "shape": row.shape, "name": row.names[0]}
            for row in rows
        ],
        "layers": [
            {"window": w, "count": windows.count(w), "layers": [i for i, of in enumerate(windows) if of == w]}
            for w in sorted(set(windows), key=lambda w: (w is None, w or 0))
        ],
        "kv": _kv_cache(cfg, loaded_dtype),
        "mesh": _mesh(family, cfg, loaded_dtype, mesh_spec, quantize) if mesh_spec else None,
        "context": cfg.context,
        "rope": _ropes(cfg),
        "tokenizer": tokenizer,
        "generation": _generation(checkpoint),
    }
    return facts | ({"adapter": _adapter(adapter)} if adapter else {})


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name[:80] for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _weights(resolved: resolving.Resolved, dtype_name: str, quantize: str | None) -> tuple[dict[str, Any], Any]:
    """Bytes and data types of the weights, and the data type that they are loaded in."""
    family, checkpoint = resolved.family, resolved.checkpoint
    tensors, count = checkpoint.tensors, params.count(family.PARAMS, resolved.config)
    if not tensors.pairs:
        configs = (checkpoint.config, checkpoint.config.get("text_config") or {})
        names = [config.get(key) for config in configs for key in ("dtype", "torch_dtype")]
        named = next((name for name in names if name in [dtype.name for dtype in DTYPES.values()]), None)
        dtype = jnp.dtype(dtype_name if dtype_name != "auto" else named or "bfloat16")
        size = {"dtype": dtype.name, "bytes": count * dtype.itemsize}
        return {"present": False, "reason": tensors.no_weights, **size, "config_dtype": named}, dtype
    stored, counts, loaded = Counter[str](), Counter[str](), Counter[str]()
    kept = 0  # bytes of weights that stay quantized
    for row, tensor in tensors.pairs:
        part = tensor.parts[0] if isinstance(tensor, ConcatTensor) else tensor
        kind = part.encoding or DTYPES[tensor.dtype].name
        stored[kind] += tensor.nbytes
        counts[kind] += 1
        packed = quantized.kept(tensor, dtype_name, quantize)
        of_array = DTYPES[tensor.dtype] if dtype_name == "auto" else jnp.dtype(dtype_name)
        nbytes = math.prod(row.shape) * of_array.itemsize if packed is None else packed.loaded_nbytes
        loaded[tensor.dtype] += nbytes
        kept += 0 if packed is None else nbytes
    dtype = DTYPES[loaded.most_common(1)[0][0]] if dtype_name == "auto" else jnp.dtype(dtype_name)
    all_tensors = [*(tensor for _, tensor in tensors.pairs), *tensors.heads, *tensors.ignored]
    return {
        "present": True,
        "files": len({part.file for tensor in all_tensors for part in getattr(tensor, "parts", (tensor,))}),
        "dtype": dtype.name,
        "bytes": loaded.total(),
        "quantized": kept,
        "format": checkpoint.format,
        "stored": dict(stored),
        "counts": dict(counts),
        "ignored": dict(Counter(_pattern(tensor.name, family.IGNORED_PREFIXES) for tensor in tensors.ignored)),
        "ignored_bytes": sum(tensor.nbytes for tensor in tensors.ignored),
    }, dtype


def _pattern(name: str, prefixes: tuple[str, ...]) -> str:
    return next((prefix + "*" for prefix in prefixes if name.startswith(prefix)), "*." + name.rpartition(".")[2])


def _kv_cache(cfg: Any, dtype: Any) -> dict[str, Any]:
    """Bytes of the KV cache of one sequence. A layer with a sliding window keeps no more than the window."""
    layer = 2 * cfg.K * cfg.H * dtype.itemsize
    lengths = sorted({*(n for n in LENGTHS if n < cfg.context), cfg.context})
    return {
        "bytes_per_token_and_layer": layer,
        "bytes_per_token": layer * len(cfg.windows),
        "bytes_per_token_past_the_window": layer * cfg.windows.count(None),
        "bytes": {n: layer * sum(n if w is None else min(n, w) for w in cfg.windows) for n in lengths},
    }


def _mesh(family: Any, cfg: Any, dtype: Any, spec: str, quantize: str | None) -> dict[str, Any]:
    """For a device of a mesh: bytes of weights and of the KV cache of one sequence, and the shards per letter."""
    sizes = topology.parse(spec)
    type = None if quantize == STORED else quantize
    of = roofline.layout(family.PARAMS, cfg, sizes, dtype.itemsize, quantize=type)
    shards = {letter: mesh.num_shards(letter, (getattr(cfg, letter),), of.over) for letter in "NKFV"}
    return {
        **sizes,
        "devices": math.prod(sizes.values()),
        "weights": roofline.weight_bytes(of),
        "kv": {length: nbytes // shards["K"] for length, nbytes in _kv_cache(cfg, dtype)["bytes"].items()},
        "shards": shards,
    }


def _ropes(cfg: Any) -> dict[str, dict[str, Any]]:
    """The RoPE parameters of a config by field name."""
    ropes = {f.name: value for f in dataclasses.fields(cfg) if isinstance(value := getattr(cfg, f.name), Rope)}
    return {
        name: {"type": rope.type, **{field: getattr(rope, field) for field in ROPE_FIELDS[rope.type].values()}}
        for name, rope in ropes.items()
    }


def _tokenizer(tokenizer: Tokenizer, format: str) -> dict[str, Any]:
    kind = {}
    if format == "gguf":
        kind = {"kind": "SentencePiece" if tokenizer.hf.backend_tokenizer.model.byte_fallback else "byte-level BPE"}
    return kind | {
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.hf.bos_token,
        "stop": {str(tokenizer.hf.convert_ids_to_tokens(i)): i for i in tokenizer.stop_ids},
        "chat_template": tokenizer.has_template,
        "reasoning": tokenizer.thinking is not None,
    }


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """The default sampling parameters, from generation_config.json."""
    raw, has_file = checkpoint.generation_config, (checkpoint.folder / "generation_config.json").exists()
    has_file |= checkpoint.format == "gguf" and bool(raw)  # general.sampling.* in the metadata
    try:
        resolved = SamplingParams().resolve(raw)
    except ValueError as error:
        return {"file": has_file, "error": str(error)}
    neutral = {**DEFAULTS, "stop": (), "max_tokens": None}
    options = {name: getattr(resolved, name) for name in ("temperature", *neutral)}
    options = {name: value for name, value in options.items() if name == "temperature" or value != neutral[name]}
    return {"file": has_file, "options": options, "unsupported": unsupported(raw)}


def _adapter(adapter: Adapter) -> dict[str, Any]:
    """Parameters and bytes of a LoRA adapter, and for each kind of weight the number of layers, ranks and scales."""
    kinds: dict[str, dict[str, Any]] = {}
    for pair in adapter.pairs:
        kind = kinds.setdefault(pair.row.path.split(".")[-1], {"count": 0, "ranks": [], "scales": []})
        kind["count"] += 1
        kind["ranks"] = sorted({*kind["ranks"], pair.rank})
        kind["scales"] = sorted({*kind["scales"], pair.scale})
    halves = [tensor for pair in adapter.pairs for tensor in (pair.a, pair.b)]
    return {
        "folder": str(adapter.folder),
        "parameters": sum(math.prod(tensor.shape) for tensor in halves),
        "bytes": sum(tensor.nbytes for tensor in halves),
        "weights": kinds,
        "ignored": len(adapter.ignored),
    }
