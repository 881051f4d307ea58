"""What `jaxlm info` tells of a checkpoint, from its config and the headers of its files; no weight is read."""

import dataclasses
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.cli.common import ModelFlags

LENGTHS = (1024, 8192)  # for which the cache's size is told, beside the whole context


class Found(NamedTuple):
    """Where a model's facts lie: config.json as read, the folder of the small files, the headers' tensors by name;
    where the tokenizer lies, None for that folder."""

    config: dict[str, Any]
    folder: Path | None
    tensors: dict[str, Any] | None
    absent: str  # why there are no tensors
    tokenizer: Path | None = None


def find(name: str, flags: ModelFlags) -> Found:
    """Reads or fetches what is needed."""
    found = _find(name, flags)
    return found._replace(tokenizer=flags.tokenizer.expanduser()) if flags.tokenizer else found


def _find(name: str, flags: ModelFlags) -> Found:
    from jaxlm.checkpoint import hub
    from jaxlm.checkpoint.download import http_error
    from jaxlm.checkpoint.safetensors import read_json

    path = Path(name).expanduser()
    if path.is_file() and path.name != "config.json":
        return Found(read_json(path), None, None, "")
    if path.exists():
        folder = path.parent if path.is_file() else path
        folder = hub.resolve(folder, format=flags.format, revision=flags.revision)
        original = flags.format == "meta" or not (folder / hub.CONFIG).is_file()
        return _original(name, flags) if original else _local(folder)
    if flags.format == "meta":
        cached = hub.look_up(hub.repo_id(name), flags.revision, True)
        if cached.missing or cached.unknown:
            raise FileNotFoundError(
                f"{name}: Meta's files are described once they are in the cache: load the model first"
            )
        return _original(name, flags)
    repo, token = hub.repo_id(name), hub.checked_token(flags.token)
    from huggingface_hub import is_offline_mode

    cached = hub.look_up(repo, flags.revision)
    if cached.folder and not cached.missing:
        return _local(cached.folder)
    if flags.offline or is_offline_mode():
        return _local(cached.folder or hub.offline_copy(repo, flags.revision, cached))
    try:
        return _remote(repo, flags.revision, token)
    except (http_error(), OSError) as error:
        explained = hub.explain(error, repo, flags.revision, cached.folder and not cached.missing)
        if explained is None:
            raise
        raise explained from error


def _local(folder: Path) -> Found:
    from jaxlm.checkpoint.safetensors import read_index, read_json

    config = read_json(folder / "config.json")
    try:
        return Found(config, folder, read_index(folder), "")
    except FileNotFoundError as error:
        return Found(config, folder, None, str(error))


def _original(name: str, flags: ModelFlags) -> Found:
    """A model in Meta's form, as if its files were of Hugging Face's."""
    from jaxlm import loading

    found = loading.find(name, **flags.options()).checkpoint
    tensors = {row.names[0]: tensor for row, tensor in found.tensors.pairs}
    return Found(found.config, found.folder, tensors, "", found.tokenizer)


def _remote(repo: str, revision: str | None, token: str | None) -> Found:
    """A model on the hub: its small files, and the headers of its weight files by HTTP Range."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, RemoteEntryNotFoundError

    from jaxlm.checkpoint import hub
    from jaxlm.checkpoint.safetensors import Tensor, read_json

    if hub.metadata(repo, hub.CONFIG, revision, token) is None:
        raise FileNotFoundError(f"{repo} has no config.json, so it is no checkpoint that jaxlm can load")
    folder = Path(hf_hub_download(repo, hub.CONFIG, revision=revision, token=token)).parent
    for small in hub.OPTIONAL:
        with suppress(RemoteEntryNotFoundError):
            hf_hub_download(repo, small, revision=folder.name, token=token)
    config = read_json(folder / hub.CONFIG)
    try:
        files = HfApi().get_safetensors_metadata(repo, revision=folder.name, token=token).files_metadata
    except NotASafetensorsRepoError as error:
        return Found(config, folder, None, str(error))
    tensors = {}
    for file, header in files.items():
        for name, t in header.tensors.items():
            begin, end = t.data_offsets
            tensors[name] = Tensor(name, Path(file), t.dtype, tuple(t.shape), begin, end - begin)
    return Found(config, folder, tensors, "")


def describe(name: str, found: Found, flags: ModelFlags) -> dict[str, Any]:
    """All that is told, as plain values."""
    from jaxlm import models, params

    family = models.family_of(found.config.get("model_type"))
    cfg = family.Config.from_hf(found.config, flags.allow_field)
    weights, dtype = _weights(family, cfg, found, flags.dtype)
    rows = [row for row in params.rows(family.PARAMS, cfg) if not row.path.startswith("layers.") or ".0." in row.path]
    layer = [row for row in rows if row.path.startswith("layers.")]
    ends = {row.path: math.prod(row.shape) for row in rows if row.path in ("embed", "head")}
    return {
        "model": name,
        "family": family.__name__.rpartition(".")[2],
        "model_type": found.config["model_type"],
        "parameters": {
            "total": params.count(family.PARAMS, cfg),
            "embedding": sum(ends.values()),
            "layer": sum(math.prod(row.shape) for row in layer),
        },
        "weights": weights,
        "sizes": {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name in "VDFLNKH"},
        "tied_head": cfg.tied,
        "tensors": [
            {"path": row.path.replace(".0.", ".", 1), "letters": row.letters, "shape": row.shape, "name": row.names[0]}
            for row in rows
        ],
        "layers": [
            {"window": window, "count": cfg.windows.count(window), "layers": _places(cfg.windows, window)}
            for window in sorted(set(cfg.windows), key=lambda w: (w is None, w or 0))
        ],
        "kv": _kv(cfg, dtype),
        "mesh": _mesh(family, cfg, dtype, flags.mesh) if flags.mesh else None,
        "context": cfg.context,
        "rope": _ropes(cfg),
        "tokenizer": _tokenizer(found),
        "generation": _generation(found),
    }


def _places(windows: tuple[int | None, ...], window: int | None) -> list[int]:
    return [i for i, w in enumerate(windows) if w == window]


def _weights(family: Any, cfg: Any, found: Found, asked: str) -> tuple[dict[str, Any], Any]:
    """Bytes, type and unread tensors; and the type."""
    import jax.numpy as jnp

    from jaxlm import params
    from jaxlm.checkpoint import hf
    from jaxlm.checkpoint.safetensors import DTYPES

    count = params.count(family.PARAMS, cfg)
    if found.tensors is None:
        text = found.config.get("text_config") or {}
        named = [c.get(key) for c in (found.config, text) for key in ("dtype", "torch_dtype")]
        stated = next((name for name in named if name in [dtype.name for dtype in DTYPES.values()]), None)
        dtype = jnp.dtype(asked if asked != "auto" else stated or "bfloat16")
        facts = {"present": False, "why": found.absent, "dtype": dtype.name, "bytes": count * dtype.itemsize}
        return {**facts, "dtype_stated": stated}, dtype
    # A head stored beside the embedding it is tied to is never read: comparing the two would read both.
    tied = set(family.PARAMS["head"][1:]) if cfg.tied else set()
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in tied}
    pairs, _, unread = hf.match(family.PARAMS, cfg, tensors, family.UNREAD)
    stored = Counter[str]()
    for _, tensor in pairs:
        stored[tensor.dtype] += tensor.nbytes
    dtype = DTYPES[stored.most_common(1)[0][0]] if asked == "auto" else jnp.dtype(asked)
    return {
        "present": True,
        "files": len({part.file for tensor in found.tensors.values() for part in getattr(tensor, "parts", (tensor,))}),
        "dtype": dtype.name,
        "bytes": stored.total() if asked == "auto" else count * dtype.itemsize,
        "stored": {DTYPES[kind].name: nbytes for kind, nbytes in stored.items()},
        "unread": dict(Counter(_beginning(tensor.name, family.UNREAD) for tensor in unread)),
        "unread_bytes": sum(tensor.nbytes for tensor in unread),
    }, dtype


def _beginning(name: str, known: tuple[str, ...]) -> str:
    return next((beginning + "*" for beginning in known if name.startswith(beginning)), "*." + name.rpartition(".")[2])


def _kv(cfg: Any, dtype: Any) -> dict[str, Any]:
    """Bytes of the cache: a token in one layer, a token in all layers that keep everything, and a whole sequence. A
    sliding layer keeps its window and no more while it decodes."""
    layer = 2 * cfg.K * cfg.H * dtype.itemsize
    lengths = sorted({*(n for n in LENGTHS if n < cfg.context), cfg.context})
    return {
        "bytes_per_token_and_layer": layer,
        "bytes_per_token": layer * len(cfg.windows),
        "bytes_per_token_past_the_window": layer * cfg.windows.count(None),
        "bytes": {n: layer * sum(n if w is None else min(n, w) for w in cfg.windows) for n in lengths},
    }


def _mesh(family: Any, cfg: Any, dtype: Any, text: str) -> dict[str, Any]:
    """What one device of a mesh holds: bytes of weights and of the cache of one row, and how each letter is divided."""
    from jax.sharding import AbstractMesh

    from jaxlm import mesh, params, topology

    asked = topology.parse(text)
    axes = topology.split(asked, cfg.K)
    over = AbstractMesh(tuple(axes.values()), tuple(axes))
    rows = params.rows(family.PARAMS, cfg)
    elements = sum(math.prod(row.shape) // mesh.parts(row.letters, row.shape, over) for row in rows)
    heads = mesh.parts("K", (cfg.K,), over)
    return {
        **asked,
        "devices": math.prod(asked.values()),
        "weights": elements * dtype.itemsize,
        "kv": {length: nbytes // heads for length, nbytes in _kv(cfg, dtype)["bytes"].items()},
        "over": {x: mesh.parts(x, (getattr(cfg, x),), over) for x in "NKFV"},
    }


def _ropes(cfg: Any) -> dict[str, dict[str, Any]]:
    """Each rope of a config, by its field, with the numbers that its type uses."""
    from jaxlm.config import ROPE_FIELDS
    from jaxlm.ops import Rope

    ropes = {f.name: v for f in dataclasses.fields(cfg) if isinstance(v := getattr(cfg, f.name), Rope)}
    return {
        name: {"type": rope.type, **{ours: getattr(rope, ours) for ours in ROPE_FIELDS[rope.type].values()}}
        for name, rope in ropes.items()
    }


def _tokenizer(found: Found) -> dict[str, Any] | None:
    """None where there is none; an unreadable one is told, not raised. Its ends are the model's, as `load` has them."""
    from jaxlm.tokenizer import Tokenizer

    place = found.tokenizer or found.folder
    try:
        tokenizer = place and Tokenizer.load(place, _generation_config(found), found.config)
    except ValueError as error:
        return {"error": str(error)}
    if not tokenizer:
        if found.tokenizer:
            raise FileNotFoundError(f"{place} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
        return None
    return {
        "vocabulary": tokenizer.vocab_size,
        "begin": tokenizer.hf.bos_token,
        "stop": {str(tokenizer.hf.convert_ids_to_tokens(i)): i for i in tokenizer.stop_ids},
        "chat_template": tokenizer.has_template,
        "thinking": tokenizer.thinking is not None,
    }


def _generation(found: Found) -> dict[str, Any]:
    """What generation does without options: generation_config.json as jaxlm reads it."""
    from jaxlm.options import NEUTRAL, Options, unsupported

    raw = _generation_config(found)
    try:
        options = Options().resolve(raw)
    except ValueError as error:
        return {"file": True, "error": str(error)}
    neutral = {**NEUTRAL, "stop": (), "max_tokens": None}
    given = {name: getattr(options, name) for name in ("temperature", *neutral)}
    given = {name: value for name, value in given.items() if name == "temperature" or value != neutral[name]}
    return {"file": bool(raw), "options": given, "unsupported": unsupported(raw)}


def _generation_config(found: Found) -> dict[str, Any]:
    """generation_config.json of the model's own folder."""
    from jaxlm.checkpoint.safetensors import read_json

    path = found.folder and found.folder / "generation_config.json"
    return read_json(path) if path and path.exists() else {}
