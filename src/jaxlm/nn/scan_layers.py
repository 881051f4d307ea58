"""The layer loop: unrolled for a list of layers, `jax.lax.scan` for stacked layers, with activation checkpointing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxlm.devices import mesh
from jaxlm.nn.kv_cache import KVCache, LayerCache, advance

Layer = Callable[[Array, dict[str, Any], LayerCache | None], tuple[Array, LayerCache | None]]


def scan_layers(
    period: Sequence[Layer],
    x: Float[Array, "B T D"],
    layers: Any,
    cache: KVCache | None,
    pos: Int[Array, "B T"],
    *,
    remat: Any = None,
    hidden: list[Array] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Applies the layers to the residual stream. Layer i is computed by `period[i % len(period)]`.

    Args:
        period: The layer functions of one period of layer types; one function if all layers have the same type.
        x: Residual stream.
        layers: A list of weight dicts (unrolled), or the result of `params.stack`: {"stacked": [a dict per layer of the
            period, each leaf with a leading axis], "rest": [dicts]}. Each scan step computes one period; the rest is
            unrolled. With a KV cache, stacked layers are unrolled too: a scan would copy the cache.
        cache: KV cache, None without one.
        pos: Position of each token, -1 for padding.
        remat: Activation checkpointing: a policy of jax.checkpoint, True to save nothing, None for none.
        hidden: A list to which x is appended before the first layer and after every layer.

    Returns:
        The residual stream after the last layer, and the updated cache.
    """
    if remat is not None:
        policy = None if remat is True else remat
        period = [jax.checkpoint(layer, policy=policy) for layer in period]
    if mesh.traced(x):  # within a program, each layer function is traced once, not once per layer
        period = [jax.jit(layer) for layer in period]
    if hidden is not None:
        hidden.append(x)
    if isinstance(layers, dict) and cache is not None:
        layers = unstack_layers(layers)
    if isinstance(layers, dict):
        x = _scan(period, x, layers["stacked"], hidden)
        layers = layers["rest"]
    views: list[Any] = [None] * len(layers)
    if cache is not None:
        cache, views[:] = advance(cache, pos)
    for i, w in enumerate(layers):
        x, views[i] = period[i % len(period)](x, w, views[i])
        if hidden is not None:
            hidden.append(x)
    if cache is None:
        return x, None
    return x, replace(cache, layers=[{"k": view.k, "v": view.v} for view in views])


def _scan(
    period: Sequence[Layer], x: Float[Array, "B T D"], stacked: list[Any], hidden: list[Array] | None
) -> Float[Array, "B T D"]:
    def body(x: Array, weights: list[Any]) -> tuple[Array, list[Array]]:
        states = []
        for layer, w in zip(period, weights, strict=True):
            x, _ = layer(x, w, None)
            states.append(x)
        return x, states if hidden is not None else []

    x, states = jax.lax.scan(body, x, stacked)
    if hidden is not None:
        hidden.extend(state[i] for i in range(states[0].shape[0]) for state in states)
    return x


def unstack_layers(layers: dict[str, Any]) -> list[Any]:
    """The list of weight dicts that `params.stack` stacked."""
    leaves = jax.tree.leaves(layers["stacked"])
    count = leaves[0].shape[0] if leaves else 0
    scanned = [jax.tree.map(lambda a, i=i: a[i], w) for i in range(count) for w in layers["stacked"]]
    return scanned + list(layers["rest"])
