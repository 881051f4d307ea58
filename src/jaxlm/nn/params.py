"""What follows from a family's PARAMS table: shapes, names in a checkpoint, initial values, counts, and stacking.

A row is `our path: (letters, checkpoint name, further spellings …)`. Paths that begin with `layers.` stand for one
weight a layer, and `{}` in the name for the layer's number. Letters give the shape through the config's sizes, in the
order in which the checkpoint stores it; a checkpoint writes neighboring head letters (NH, KH) as one axis.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Table = Mapping[str, tuple[str, ...]]
NORMS = ("D", "H", "NH", "KH")  # letters of what is multiplied element by element


class TensorSpec(NamedTuple):
    """One tensor: our path (`layers.3.q`), its letters, its shape here and in a checkpoint, and its possible names."""

    path: str
    letters: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    names: tuple[str, ...]


def tensors(table: Table, cfg: Any) -> Iterator[TensorSpec]:
    """Every tensor of a model, in the table's order; a tied head is none of its own."""
    for path, (letters, *names) in table.items():
        if path == "head" and cfg.tied:
            continue
        shape = tuple(getattr(cfg, letter) for letter in letters)
        stored = tuple(math.prod(getattr(cfg, x) for x in axis) for axis in _axes(letters))
        if not path.startswith("layers."):
            yield TensorSpec(path, letters, shape, stored, tuple(names))
            continue
        for i in range(cfg.L):
            yield TensorSpec(path.replace("layers.", f"layers.{i}.", 1), letters, shape, stored, format_names(names, i))


def format_names(names: Sequence[str], layer: int) -> tuple[str, ...]:
    return tuple(name.format(layer) for name in names)


def _axes(letters: str) -> list[str]:
    """The letters of each stored axis: `NHD` is stored as [N*H, D]."""
    axes: list[str] = []
    for letter in letters:
        if letter == "H" and axes and axes[-1] in ("N", "K"):
            axes[-1] += letter
        else:
            axes.append(letter)
    return axes


def put(weights: dict[str, Any], path: str, value: Any) -> None:
    """Stores a leaf under a path such as `layers.3.q` in {"embed": …, "layers": [{…}, …]}."""
    if not path.startswith("layers."):
        weights[path] = value
        return
    _, layer, name = path.split(".")
    layers = weights.setdefault("layers", [])
    while len(layers) <= int(layer):
        layers.append({})
    layers[int(layer)][name] = value


def get(weights: Mapping[str, Any], path: str) -> Any:
    """The leaf under a path; layers are a list."""
    if not path.startswith("layers."):
        return weights[path]
    _, layer, name = path.split(".")
    return weights["layers"][int(layer)][name]


def shapes(table: Table, cfg: Any, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The weights as jax.ShapeDtypeStruct: nothing is allocated."""
    weights: dict[str, Any] = {}
    for row in tensors(table, cfg):
        put(weights, row.path, jax.ShapeDtypeStruct(row.shape, dtype))
    return weights


def summed_letters(letters: str) -> str:
    """Those of a weight's letters over which its product sums: they come last."""
    return _axes(letters.lstrip("L"))[-1]


def letters(table: Table, weights: Any) -> Any:
    """A tree like the weights, listed or stacked, that holds the letters of each; stacked ones begin with L."""

    def of(path: Any, leaf: Any) -> str:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        own = table["layers." + names[-1] if names[0] == "layers" else names[-1]][0]
        if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("a", "b"):  # of a Lora
            last = summed_letters(own)
            own = f"r{last}" if path[-1].name == "a" else f"{own.removesuffix(last)}r"
        return "L" * ("stacked" in names) + own

    return jax.tree_util.tree_map_with_path(of, weights)


def init(table: Table, cfg: Any, key: jax.Array, neutral: float, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights: norms at their neutral value, the embedding with deviation 1 / sqrt(D) (so that a tied head
    gives logits of deviation 1), every product with deviation 1 / sqrt(inputs)."""
    weights: dict[str, Any] = {}
    for i, row in enumerate(tensors(table, cfg)):
        if row.path.endswith("norm"):
            value = jnp.full(row.shape, neutral, dtype)
        else:
            inputs = row.stored_shape[-1]
            value = (jax.random.normal(jax.random.fold_in(key, i), row.shape) * inputs**-0.5).astype(dtype)
        put(weights, row.path, value)
    return weights


def count(table: Table, cfg: Any) -> int:
    """How many parameters a model has; a tied head counts once."""
    return sum(math.prod(row.shape) for row in tensors(table, cfg))


def num_elements(weights: Any) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))


def nbytes(weights: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(weights))


def period(kinds: Sequence[Any]) -> Sequence[Any]:
    """The shortest beginning of `kinds` whose repetition gives all of it: one period of unlike layers."""
    for p in range(1, len(kinds) + 1):
        if all(kind == kinds[i % p] for i, kind in enumerate(kinds)):
            return kinds[:p]
    return kinds


def stack(weights: dict[str, Any], period: int = 1) -> dict[str, Any]:
    """Layers as {"stacked": [one dict a place of the period, leaves with a leading axis], "rest": [...]}, for scans."""
    layers = weights["layers"]
    whole = len(layers) // period * period
    stacked = [jax.tree.map(lambda *a: jnp.stack(a), *layers[i:whole:period]) for i in range(period)] if whole else []
    return {**weights, "layers": {"stacked": stacked, "rest": layers[whole:]}}


def unstack(weights: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack`."""
    from jaxlm.nn.scan_layers import unstack_layers

    return {**weights, "layers": unstack_layers(weights["layers"])}
