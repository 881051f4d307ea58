"""Checks weights against the PARAMS table of a family, for weights that a user puts in place of a model's own."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import params
from jaxlm.nn.linear import WeightForm


def check(table: params.Table, cfg: Any, weights: Any) -> None:
    """Checks names, shapes and dtypes of weights. Nothing is computed, so tracers and jax.ShapeDtypeStruct are taken.

    Of a WeightForm, such as a quantized weight, the shape is checked.

    Args:
        table: The family's PARAMS.
        cfg: The family's Config.
        weights: A tree such as `model.weights`. The layers are a list, or stacked (`params.stack`).

    Raises:
        ValueError: The weights do not fit; the message names the first misfits.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights must be a dict like model.weights, not {_kind(weights)}")
    expected = {row.path: row.shape for row in params.tensors(table, cfg)}
    found = dict(_leaves(weights))
    wrong = [f"{path} is missing" for path in expected if path not in found]
    wrong += [f"{path} is unknown" for path in found if path not in expected]
    for path, (shape, leaf) in found.items():
        if path not in expected:
            continue
        dtype = jnp.float32 if isinstance(leaf, WeightForm) else getattr(leaf, "dtype", None)
        if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            wrong.append(f"{path} is {_kind(leaf)}, not an array of floating point numbers")
        elif shape != expected[path]:
            wrong.append(f"{path} has the shape {list(shape)}, not {list(expected[path])}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(wrong[:3])}{more}")


def _leaves(weights: Mapping[str, Any]) -> Iterator[tuple[str, tuple[tuple[int, ...] | None, Any]]]:
    """The path of each weight, with the shape of one layer, and the weight."""
    for name, leaf in weights.items():
        if name != "layers":
            yield name, (getattr(leaf, "shape", None), leaf)
    layers = weights.get("layers", [])
    if not isinstance(layers, Mapping):
        for number, layer in enumerate(layers if isinstance(layers, list | tuple) else ()):
            yield from _layer(number, layer, 0)
        return
    stacked, rest = layers.get("stacked", []), layers.get("rest", [])
    arrays = jax.tree.leaves(stacked)
    count = max((shape[0] for a in arrays if (shape := getattr(a, "shape", None))), default=0)
    for number in range(count * len(stacked)):
        yield from _layer(number, stacked[number % len(stacked)], 1)
    for number, layer in enumerate(rest, count * len(stacked)):
        yield from _layer(number, layer, 0)


def _layer(number: int, layer: Any, axes: int) -> Iterator[tuple[str, tuple[tuple[int, ...] | None, Any]]]:
    """The weights of a layer, whose shapes have this number of leading axes more."""
    for name, leaf in layer.items() if isinstance(layer, Mapping) else ():
        if isinstance(leaf, WeightForm) and axes:
            leaf = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[axes:], a.dtype), leaf)
            shape = leaf.shape
        else:
            shape = getattr(leaf, "shape", None)
            shape = None if shape is None else tuple(shape[axes:])
        yield f"layers.{number}.{name}", (shape, leaf)


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"an array of {dtype}"
