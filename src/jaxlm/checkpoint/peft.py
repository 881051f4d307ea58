"""LoRA adapters in the formats of PEFT and of mlx-lm, matched with a family's PARAMS.

In PEFT's adapter_model.safetensors, a module has tensors `base_model.model.<module>.lora_A.weight` [r, inputs] and
`….lora_B.weight` [outputs, r], heads joined as in a checkpoint. They become a and b of a `lora.Lora`. mlx-lm stores
both transposed, under other names (`peft_config.Layout`). Adapters are written in PEFT's format.
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
from jaxlm.checkpoint.peft_config import CONFIG, MLX, PEFT, WEIGHTS, Layout, Settings, read_settings
from jaxlm.checkpoint.quantized_layout import AnyTensor
from jaxlm.checkpoint.safetensors import DTYPES, Tensor, listed, read_header
from jaxlm.nn import lora, params

PREFIX, A, B = PEFT.prefix, PEFT.a, PEFT.b


class Pair(NamedTuple):
    """The two tensors that adapt a weight, and the rank and scale of their product. transposed: as in Layout."""

    row: params.TensorSpec
    a: Tensor
    b: Tensor
    rank: int
    scale: float
    transposed: bool = False


class Adapter(NamedTuple):
    """An adapter before its tensors are read, checked. ignored: its tensors for the vision tower."""

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
    base: Mapping[str, AnyTensor] = MappingProxyType({}),
) -> Adapter:
    """The adapter in a folder, its tensors matched with the weights that they adapt.

    Args:
        folder: the adapter's folder.
        table: the family's PARAMS.
        cfg: the family's Config.
        ignored_prefixes: prefixes of tensor names that are known and not used.
        allow: unknown config fields to accept.
        base: the base model's tensors by path. PEFT stores copies of some of them.

    Raises:
        ValueError: all misfits, together.
    """
    settings = read_settings(folder, allow)
    layout = settings.layout
    left, pairs = read_header(folder / layout.weights), []
    faults: dict[str, list[str]] = {}
    for row in lora.products(table, cfg):
        found = _modules(row, left, layout)
        if found:
            pairs += _matched(row, found, settings, left, faults)
        elif any(settings.targets(_module(name)) for name in row.names):
            faults.setdefault("missing, though target_modules names them", []).append(_module(row.names[0]))
    passed = [
        tensor for name, tensor in left.items() if name.removeprefix(layout.prefix).startswith(tuple(ignored_prefixes))
    ]
    others = [tensor for tensor in left.values() if tensor not in passed]
    if unexpected := [tensor.name for tensor in others if not _copied(tensor, table, cfg, base)]:
        faults["unexpected, or different from the base's"] = unexpected
    if cfg.tied and any(".lm_head." in name for name in unexpected):
        faults["for an untied head, but the base's head is tied to the embedding"] = []
    if not pairs and not faults:
        faults["missing"] = [f"{layout.prefix}…{layout.a}"]
    in_layers = [pair.row.path for pair in pairs if pair.row.path.startswith("layers.")]
    if layout == MLX and in_layers and not any(path.startswith(f"layers.{cfg.L - 1}.") for path in in_layers):
        faults[f"for the last of {cfg.L} layers, which mlx-lm always adapts, none"] = []
    if faults:
        report = "; ".join(f"{what}: {listed(names, 2)}" if names else what for what, names in faults.items())
        base_name = f" It names the base {settings.base}." if settings.base else ""
        raise ValueError(f"{folder}: the adapter does not match the model. {report}. Is its base another?{base_name}")
    return Adapter(folder, settings, pairs, passed)


def _copied(tensor: Tensor, table: params.Table, cfg: Any, base: Mapping[str, AnyTensor]) -> bool:
    """Whether a tensor equals the base's embedding or head, in the tensor's type. PEFT stores copies of them with an
    adapter of the head, or if it considers the vocabulary resized."""
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


def _modules(row: params.TensorSpec, tensors: Collection[str], layout: Layout) -> list[str]:
    """The names of a row's module that have a tensor."""
    modules = [_module(name) for name in row.names]
    return [m for m in modules if any(layout.prefix + m + end in tensors for end in (layout.a, layout.b))]


def _matched(
    row: params.TensorSpec, found: list[str], settings: Settings, left: dict[str, Tensor], faults: dict[str, list[str]]
) -> Iterator[Pair]:
    """Removes the pair of a row from the tensors that are left."""

    def fault(what: str, name: str) -> None:
        faults.setdefault(what, []).append(name)

    layout = settings.layout
    names = [[layout.prefix + module + end for end in (layout.a, layout.b)] for module in found]
    halves = [[left.pop(name, None) for name in pair] for pair in names]
    a, b = halves[0]
    if len(found) > 1:
        return fault("stored under two names", " and ".join(found))
    if a is None or b is None:
        return fault("missing the other of the two", names[0][a is None])
    rank, alpha = settings.of(found[0])
    out, inputs = row.stored_shape
    for tensor, shape in ((a, (rank, inputs)), (b, (out, rank))):
        stored = shape[::-1] if layout.transposed else shape
        if tensor.shape != stored:
            fault("misshapen", f"{tensor.name} {list(tensor.shape)} instead of {list(stored)}")
        if tensor.dtype not in DTYPES:
            fault(f"of an unsupported type (supported: {', '.join(DTYPES)})", f"{tensor.name} {tensor.dtype}")
    yield Pair(row, a, b, rank, lora.scale(alpha, rank, settings.rslora), layout.transposed)


def read(
    adapter: Adapter, L: int, loaded_dtype: Callable[[np.dtype], np.dtype], where: Callable[[params.TensorSpec], Any]
) -> dict[str, Any]:
    """Reads an adapter of a model of L layers as a tree of Loras (see nn/lora.py).

    Args:
        adapter: the adapter.
        L: number of layers.
        loaded_dtype: the type to load a type of the file in.
        where: the sharding of a row's array.
    """
    tree: dict[str, Any] = {"layers": [{} for _ in range(L)]}
    for pair in adapter.pairs:
        a, b = (
            _placed(tensor, pair.transposed, half.shape, loaded_dtype(DTYPES[tensor.dtype]), where(half))
            for tensor, half in zip((pair.a, pair.b), lora.halves(pair.row, pair.rank))
        )
        params.put(tree, pair.row.path, lora.Lora(None, a, b, None, pair.scale))
    return tree


def _placed(tensor: Tensor, transposed: bool, shape: tuple[int, ...], dtype: np.dtype, where: Any) -> jax.Array:
    """Reads a whole tensor into host memory (adapters are small) and puts its shards on their devices."""
    host = np.empty(tensor.shape, dtype)
    hf.read_block(tensor, host)
    host = (host.T if transposed else host).reshape(shape)
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
    has_vision: bool = False,
    force: bool = False,
    writes: bool = True,
    more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes an adapter as a folder that PEFT reads. The folder gets its name when all of it is on disk.

    If the adapter is sharded over several processes, all must call this function, and one `writes`.

    Args:
        out: the folder.
        adapter: the tree of Loras, layers listed. Scales are those of the leaves.
        table: the family's PARAMS.
        cfg: the family's Config.
        base: hub id or folder of the base model.
        rslora, dropout: as in training.
        has_vision: the base has a vision tower (its config has a text_config), so transformers' module names differ.
        force: replace an adapter at `out`.
        writes: whether this process writes.
        more: writes other files into the folder, such as the tokenizer's.

    Raises:
        FileExistsError, OSError (disk full): the message says how to fix it; nothing is left at `out`.
    """
    leaves = dict(sorted(_named(adapter, table, cfg, has_vision)))
    entries = [entry for module, (row, leaf) in leaves.items() for entry in _entries(module, row, leaf)]
    if not writes:
        for entry in entries:
            _ = list(entry.chunks()) if entry.spread else None
        return
    config = _config({module: leaf for module, (_, leaf) in leaves.items()}, table, cfg, rslora, has_vision)
    config |= {"base_model_name_or_path": _absolute(base), "lora_dropout": dropout}
    out = Path(os.path.realpath(os.path.expanduser(out)))
    check = partial(files.check_target, out, (), force, {CONFIG}, "an adapter")
    check()
    with staged(out, sum(entry.nbytes for entry in entries) + (1 << 20), force, check) as folder:
        files.write_json(folder / CONFIG, config)
        with open(folder / WEIGHTS, "wb") as file:
            files.write_safetensors(file, entries, lambda nbytes: None)
        more(folder)


def _named(
    adapter: Any, table: params.Table, cfg: Any, has_vision: bool
) -> Iterator[tuple[str, tuple[params.TensorSpec, lora.Lora]]]:
    """Each leaf with its row, by transformers' name of its module."""
    for row in lora.products(table, cfg):
        if _has(adapter, row.path):
            name = row.names[-1] if has_vision and row.path.startswith("layers.") else row.names[0]
            yield _module(name), (row, params.get(adapter, row.path))


def _has(adapter: Any, path: str) -> bool:
    first, *rest = path.split(".")
    if not rest:
        return first in adapter
    layers, number = adapter["layers"], int(rest[0])  # empty if only the head is adapted
    return number < len(layers) and rest[1] in layers[number]


def _entries(module: str, row: params.TensorSpec, leaf: lora.Lora) -> Iterator[files.Entry]:
    rank, (out, inputs) = leaf.a.shape[0], row.stored_shape
    for end, value, shape in ((A, leaf.a, (rank, inputs)), (B, leaf.b, (out, rank))):
        yield files.array_entry(PREFIX + module + end, value, shape, np.dtype(value.dtype))


def _config(
    leaves: Mapping[str, lora.Lora], table: params.Table, cfg: Any, rslora: bool, has_vision: bool
) -> dict[str, Any]:
    """Contents of adapter_config.json. Modules are named by their last part if that selects the same ones."""
    numbers = {module: (leaf.a.shape[0], _alpha(leaf, rslora)) for module, leaf in leaves.items()}
    [((rank, alpha), _)] = Counter(numbers.values()).most_common(1)
    short = {module.rpartition(".")[2] for module in leaves}
    modules = [_module(row.names[0]) for row in lora.products(table, cfg)]
    all_of_them = not has_vision and all(m in leaves for m in modules if m.rpartition(".")[2] in short)
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
    """The alpha of a leaf's scale: the shortest number that gives exactly this scale."""
    rank = leaf.a.shape[0]
    exact = leaf.scale * (math.sqrt(rank) if rslora else rank)
    near: list[float] = [round(exact), round(exact, 6)]
    return next((alpha for alpha in near if lora.scale(alpha, rank, rslora) == leaf.scale), exact)


def _absolute(base: str | None) -> str | None:
    """The base's name; a folder's path is made absolute, to be valid from anywhere."""
    return os.path.abspath(base) if base and os.path.isdir(base) else base
