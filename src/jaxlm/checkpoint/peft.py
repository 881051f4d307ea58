"""LoRA adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, matched with a family's PARAMS.

The tensors of a module are `base_model.model.<module>.lora_A.weight` [r, inputs] and `….lora_B.weight` [outputs, r],
heads joined as in a checkpoint: here they are a and b of a `lora.Lora`.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.checkpoint import hf
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.atomic import staged
from jaxlm.checkpoint.meta import ConcatTensor
from jaxlm.checkpoint.peft_config import CONFIG, WEIGHTS, Settings, read_settings
from jaxlm.checkpoint.safetensors import DTYPES, Tensor, listed, read_header
from jaxlm.nn import lora, params

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


class Pair(NamedTuple):
    """The two tensors beside one weight, and what their product is multiplied by."""

    row: params.TensorSpec
    a: Tensor
    b: Tensor
    scale: float


class Adapter(NamedTuple):
    """An adapter before its tensors are read: all that is known of it, checked. ignored: what it adds to the half of a
    model that sees."""

    folder: Path
    settings: Settings
    pairs: list[Pair]
    ignored: list[Tensor]


def find(
    folder: Path,
    table: params.Table,
    cfg: Any,
    ignored_prefixes: Collection[str] = (),
    allow: Collection[str] = (),
    base: Mapping[str, Tensor | ConcatTensor] = MappingProxyType({}),
) -> Adapter:
    """The adapter in a folder, every tensor of it matched with the weight that it is for. ignored_prefixes: beginnings
    of names of a checkpoint that may be left; allow: names of unknown config fields that may pass; base: the model's
    own tensors by our paths, of which PEFT stores some again. ValueError with all misfits together."""
    settings = read_settings(folder, allow)
    left, pairs = read_header(folder / WEIGHTS), []
    faults: dict[str, list[str]] = {}
    for row in lora.products(table, cfg):
        found = _modules(row, left)
        if found:
            pairs += _matched(row, found, settings, left, faults)
        elif any(settings.targets(_module(name)) for name in row.names):
            faults.setdefault("missing, though target_modules has them", []).append(_module(row.names[0]))
    passed = [tensor for name, tensor in left.items() if name.removeprefix(PREFIX).startswith(tuple(ignored_prefixes))]
    others = [tensor for tensor in left.values() if tensor not in passed]
    if unexpected := [tensor.name for tensor in others if not _copied(tensor, table, cfg, base)]:
        faults["unexpected, or unlike the base's own"] = unexpected
    if cfg.tied and any(".lm_head." in name for name in unexpected):
        faults["for a head of its own, but this one is the embedding"] = []
    if not pairs and not faults:
        faults["missing"] = [f"{PREFIX}…{A}"]
    if faults:
        report = "; ".join(f"{what}: {listed(names)}" if names else what for what, names in faults.items())
        named = f" It names the base {settings.base}." if settings.base else ""
        raise ValueError(f"{folder}: the adapter does not fit the model. {report}. Is it one of another base?{named}")
    return Adapter(folder, settings, pairs, passed)


def _copied(tensor: Tensor, table: params.Table, cfg: Any, base: Mapping[str, Tensor | ConcatTensor]) -> bool:
    """Whether a tensor is the base's own embedding or head, value for value in the tensor's type: PEFT stores them
    beside an adapter of the head, and where it takes the vocabulary for resized."""
    name = tensor.name.removeprefix(PREFIX).replace(".base_layer.", ".")
    path = next((path for path in ("embed", "head") if name in table[path][1:]), "")
    own = base.get("embed" if cfg.tied and path == "head" else path)
    if own is None or own.shape != tensor.shape or tensor.dtype not in DTYPES:
        return False
    ours, theirs = files.LazyTensor(own, own.shape), files.LazyTensor(tensor, tensor.shape)
    step = max(1, files.SLICE // (ours.nbytes // len(ours)))
    parts = ((begin, min(step, len(ours) - begin)) for begin in range(0, len(ours), step))
    return all(np.array_equal(ours.read_rows(*part).astype(theirs.dtype), theirs.read_rows(*part)) for part in parts)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _modules(row: params.TensorSpec, tensors: Collection[str]) -> list[str]:
    """The spellings of a row's module under which there is a tensor."""
    modules = [_module(name) for name in row.names]
    return [m for m in modules if PREFIX + m + A in tensors or PREFIX + m + B in tensors]


def _matched(
    row: params.TensorSpec, found: list[str], settings: Settings, left: dict[str, Tensor], faults: dict[str, list[str]]
) -> Iterator[Pair]:
    """Takes the pair of a row out of the tensors that are left."""

    def fault(what: str, name: str) -> None:
        faults.setdefault(what, []).append(name)

    halves = [[left.pop(PREFIX + module + end, None) for end in (A, B)] for module in found]
    a, b = halves[0]
    if len(found) > 1:
        return fault("stored in two spellings", " and ".join(found))
    if a is None or b is None:
        return fault("without its other half", PREFIX + found[0] + (B if a is None else A))
    rank, alpha = settings.of(found[0])
    out, inputs = row.stored_shape
    for tensor, shape in ((a, (rank, inputs)), (b, (out, rank))):
        if tensor.shape != shape:
            fault("misshapen", f"{tensor.name} {list(tensor.shape)} instead of {list(shape)}")
        if tensor.dtype not in DTYPES:
            fault(f"of a type that is not read (it must be {', '.join(DTYPES)})", f"{tensor.name} {tensor.dtype}")
    yield Pair(row, a, b, lora.scale(alpha, rank, settings.rslora))


def read(
    adapter: Adapter, L: int, kept: Callable[[np.dtype], np.dtype], where: Callable[[params.TensorSpec], Any]
) -> dict[str, Any]:
    """The tree of an adapter of a model of L layers (see nn/lora.py), in the type that `kept` gives for the stored one
    and with the sharding that `where` gives for a row of an array's letters and shape."""
    tree: dict[str, Any] = {"layers": [{} for _ in range(L)]}
    for pair in adapter.pairs:
        halves = zip((pair.a, pair.b), lora.halves(pair.row, pair.a.shape[0]))
        a, b = (_placed(tensor, half.shape, kept(DTYPES[tensor.dtype]), where(half)) for tensor, half in halves)
        params.put(tree, pair.row.path, lora.Lora(None, a, b, None, pair.scale))
    return tree


def _placed(tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype, where: Any) -> jax.Array:
    """A whole tensor in host memory (adapters are small), and each device's part of it."""
    host = np.empty(tensor.shape, dtype)
    hf.read_block(tensor, host)
    host = host.reshape(shape)
    return jax.make_array_from_callback(shape, where, lambda index: host[index])


# Writing


def write(
    out: Path,
    adapter: Any,
    table: params.Table,
    cfg: Any,
    *,
    base: str | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    seeing: bool = False,
    force: bool = False,
    writes: bool = True,
) -> None:
    """Writes an adapter's tree (layers listed) as a folder that PEFT reads, which takes its name when it is whole.

    base: hub id or folder of the model that it is for. rslora, dropout: as it was trained; scales are the leaves' own.
    seeing: the base also sees (its config has a text_config), so transformers names its modules otherwise. force:
    replace an adapter that stands there. Where leaves lie with several processes all must call it, and one `writes`.
    FileExistsError or OSError (no room), each with what to do; then nothing is left.
    """
    leaves = dict(sorted(_named(adapter, table, cfg, seeing)))
    entries = [entry for module, (row, leaf) in leaves.items() for entry in _entries(module, row, leaf)]
    if not writes:
        for entry in entries:
            _ = list(entry.chunks()) if entry.spread else None
        return
    config = _config({module: leaf for module, (_, leaf) in leaves.items()}, table, cfg, rslora, seeing)
    config |= {"base_model_name_or_path": _lasting(base), "lora_dropout": dropout}
    out = Path(os.path.realpath(os.path.expanduser(out)))
    check = partial(files.check_target, out, (), force, {CONFIG}, "an adapter")
    check()
    with staged(out, sum(entry.nbytes for entry in entries) + (1 << 20), force, check) as folder:
        files.write_json(folder / CONFIG, config)
        files.write_safetensors(folder / WEIGHTS, entries, lambda nbytes: None)


def _named(
    adapter: Any, table: params.Table, cfg: Any, seeing: bool
) -> Iterator[tuple[str, tuple[params.TensorSpec, lora.Lora]]]:
    """Each leaf with its row, under the name that transformers gives its module."""
    for row in lora.products(table, cfg):
        if _has(adapter, row.path):
            name = row.names[-1] if seeing and row.path.startswith("layers.") else row.names[0]
            yield _module(name), (row, params.get(adapter, row.path))


def _has(adapter: Any, path: str) -> bool:
    first, *rest = path.split(".")
    if not rest:
        return first in adapter
    layers, number = adapter["layers"], int(rest[0])  # there are none where the head alone is adapted
    return number < len(layers) and rest[1] in layers[number]


def _entries(module: str, row: params.TensorSpec, leaf: lora.Lora) -> Iterator[files.Entry]:
    rank, (out, inputs) = leaf.a.shape[0], row.stored_shape
    for end, value, shape in ((A, leaf.a, (rank, inputs)), (B, leaf.b, (out, rank))):
        yield files.array_entry(PREFIX + module + end, value, shape, np.dtype(value.dtype))


def _config(
    leaves: Mapping[str, lora.Lora], table: params.Table, cfg: Any, rslora: bool, seeing: bool
) -> dict[str, Any]:
    """What adapter_config.json says of the tensors. Modules are named by their last part where that says the same."""
    numbers = {module: (leaf.a.shape[0], _alpha(leaf, rslora)) for module, leaf in leaves.items()}
    [((rank, alpha), _)] = Counter(numbers.values()).most_common(1)
    short = {module.rpartition(".")[2] for module in leaves}
    modules = [_module(row.names[0]) for row in lora.products(table, cfg)]
    all_of_them = not seeing and all(m in leaves for m in modules if m.rpartition(".")[2] in short)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": sorted(short if all_of_them else leaves),
        "rank_pattern": {module: r for module, (r, _) in numbers.items() if r != rank},
        "alpha_pattern": {module: x for module, (_, x) in numbers.items() if x != alpha},
        "bias": "none",
    }


def _alpha(leaf: lora.Lora, rslora: bool) -> float:
    """The alpha that gives a leaf's scale, as a person wrote it if any number of few digits does."""
    rank = leaf.a.shape[0]
    exact = leaf.scale * (math.sqrt(rank) if rslora else rank)
    near: list[float] = [round(exact), round(exact, 6)]
    return next((alpha for alpha in near if lora.scale(alpha, rank, rslora) == leaf.scale), exact)


def _lasting(base: str | None) -> str | None:
    """A folder's name, valid from anywhere."""
    return os.path.abspath(base) if base and os.path.isdir(base) else base
