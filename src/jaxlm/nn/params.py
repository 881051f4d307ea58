"""The PARAMS table of a family. It defines shapes, checkpoint names, initial values, counts and sharding.

A row is `path: (letters, checkpoint name, aliases ...)`. A path that begins with `layers.` represents one weight per
layer; `{}` in the name is the index of the layer. The letters are the axes in the order of the checkpoint. Their sizes
are fields of the config. An alias is another name that some checkpoints use. A checkpoint stores adjacent head letters
(NH, KH) as one axis.

In the weights, `layers.q` of layer 3 is `weights["layers"][3]["q"]`. Some paths have a fixed meaning: `embed` and
`head` (the head may be tied to the embedding), and those that end with `norm`, whose initial value is the identity.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.linear import WeightForm
from jaxlm.nn.scan_layers import unstack_layers

Table = Mapping[str, tuple[str, ...]]
NORMS = ("D", "H", "NH", "KH")  # letters of norm weights, which are multiplied elementwise


class TensorSpec(NamedTuple):
    """One tensor of a model: its path (`layers.3.q`), letters, shape, shape in a checkpoint, and names there."""

    path: str
    letters: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    names: tuple[str, ...]


def tensors(table: Table, cfg: Any) -> Iterator[TensorSpec]:
    """Every tensor of a model, in the table's order, without a tied head."""
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
    """The names of one layer's tensor."""
    return tuple(name.format(layer) for name in names)


def _axes(letters: str) -> list[str]:
    """The letters of each axis in a checkpoint: `NHD` is stored as [N*H, D]."""
    axes: list[str] = []
    for letter in letters:
        if letter == "H" and axes and axes[-1] in ("N", "K"):
            axes[-1] += letter
        else:
            axes.append(letter)
    return axes


def put(weights: dict[str, Any], path: str, value: Any) -> None:
    """Sets the leaf at a path such as `layers.3.q` in {"embed": ..., "layers": [{...}, ...]}."""
    if not path.startswith("layers."):
        weights[path] = value
        return
    _, layer, name = path.split(".")
    layers = weights.setdefault("layers", [])
    while len(layers) <= int(layer):
        layers.append({})
    layers[int(layer)][name] = value


def get(weights: Mapping[str, Any], path: str) -> Any:
    """The leaf at a path; the layers are a list."""
    if not path.startswith("layers."):
        return weights[path]
    _, layer, name = path.split(".")
    return weights["layers"][int(layer)][name]


def shapes(table: Table, cfg: Any, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The weights as jax.ShapeDtypeStruct, without allocating them."""
    weights: dict[str, Any] = {}
    for row in tensors(table, cfg):
        put(weights, row.path, jax.ShapeDtypeStruct(row.shape, dtype))
    return weights


def summed_letters(letters: str) -> str:
    """The letters of a weight that its matmul contracts, which come last."""
    return _axes(letters.lstrip("L"))[-1]


def letters(table: Table, weights: Any) -> Any:
    """The letters of each weight, as a tree like the weights. Those of stacked weights begin with L."""

    def of(path: Any, leaf: Any) -> Any:
        stacked, own = own_letters(table, path)
        return jax.tree.map(lambda part: stacked + part, letters_of(leaf, own))

    return jax.tree_util.tree_map_with_path(of, weights, is_leaf=lambda leaf: isinstance(leaf, WeightForm))


def own_letters(table: Table, path: Any) -> tuple[str, str]:
    """L if the weight at a path of jax.tree_util is stacked, else an empty string; and the letters of one layer's."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    own = table["layers." + names[-1] if names[0] == "layers" else names[-1]][0]
    return "L" * ("stacked" in names), own


def letters_of(leaf: Any, own: str) -> Any:
    """The letters of an array, or of the fields of a WeightForm that represents an array with these letters."""
    return leaf.letters(own) if isinstance(leaf, WeightForm) else own


def init(table: Table, cfg: Any, key: jax.Array, norm_identity: float, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random initial weights, normally distributed with standard deviation 1 / sqrt(fan-in).

    That of the embedding is 1 / sqrt(D), so that a tied head gives logits with standard deviation 1. Norms start at
    `norm_identity`.
    """
    weights: dict[str, Any] = {}
    for i, row in enumerate(tensors(table, cfg)):
        if row.path.endswith("norm"):
            value = jnp.full(row.shape, norm_identity, dtype)
        else:
            fan_in = row.stored_shape[-1]
            value = (jax.random.normal(jax.random.fold_in(key, i), row.shape) * fan_in**-0.5).astype(dtype)
        put(weights, row.path, value)
    return weights


def count(table: Table, cfg: Any) -> int:
    """Number of parameters of a model; a tied head counts once."""
    return sum(math.prod(row.shape) for row in tensors(table, cfg))


def num_elements(weights: Any) -> int:
    """Number of elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))


def nbytes(weights: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(weights))


def period(layers: Sequence[Any]) -> Sequence[Any]:
    """One period of the layers: their shortest prefix whose repetition gives all of them."""
    for p in range(1, len(layers) + 1):
        if all(layer == layers[i % p] for i, layer in enumerate(layers)):
            return layers[:p]
    return layers


def stack(weights: dict[str, Any], period: int = 1) -> dict[str, Any]:
    """Stacks the layers for `scan_layers`: {"stacked": [a dict per layer of the period, each leaf with a leading axis],
    "rest": [the layers after the last full period]}."""
    layers = weights["layers"]
    end = len(layers) // period * period
    stacked = [jax.tree.map(lambda *a: jnp.stack(a), *layers[i:end:period]) for i in range(period)] if end else []
    return {**weights, "layers": {"stacked": stacked, "rest": layers[end:]}}


def unstack(weights: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack`."""
    return {**weights, "layers": unstack_layers(weights["layers"])}
