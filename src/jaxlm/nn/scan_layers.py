"""The walk over layers: unrolled where the layers are a list, scanned where they are stacked. The data decides."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from jaxlm.nn import kv_cache as caches

Layer = Callable[[jax.Array, dict[str, Any], caches.LayerCache | None], tuple[jax.Array, caches.LayerCache | None]]


def scan_layers(
    period: Sequence[Layer],
    x: jax.Array,
    layers: Any,
    cache: caches.KVCache | None,
    pos: jax.Array,
    *,
    remat: Any = None,
    hidden: list[jax.Array] | None = None,
) -> tuple[jax.Array, caches.KVCache | None]:
    """Sends the residual stream x [B,T,D] through `layers`; layer i is computed by period[i % len(period)].

    layers is a list of weight dicts (unrolled), or {"stacked": [one dict a place of the period, each leaf with a
    leading axis], "rest": [dicts]} from params.stack (scanned a period at a time, the rest unrolled). With a cache,
    layers are always unrolled: a scan would copy it. remat is a policy of jax.checkpoint, True for "save nothing".
    `hidden` receives x before the first layer and after each.
    """
    if remat is not None:
        policy = None if remat is True else remat
        period = [jax.checkpoint(layer, policy=policy) for layer in period]
    if hidden is not None:
        hidden.append(x)
    if isinstance(layers, dict) and cache is not None:
        layers = unstack_layers(layers)
    if isinstance(layers, dict):
        x = _scan(period, x, layers["stacked"], hidden)
        layers = layers["rest"]
    views: list[Any] = [None] * len(layers)
    if cache is not None:
        cache, views[:] = caches.advance(cache, pos)
    for i, w in enumerate(layers):
        x, views[i] = period[i % len(period)](x, w, views[i])
        if hidden is not None:
            hidden.append(x)
    if cache is None:
        return x, None
    return x, replace(cache, layers=[{"k": view.k, "v": view.v} for view in views])


def _scan(period: Sequence[Layer], x: jax.Array, stacked: list[Any], hidden: list[jax.Array] | None) -> jax.Array:
    def body(x: jax.Array, weights: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
        seen = []
        for layer, w in zip(period, weights, strict=True):
            x, _ = layer(x, w, None)
            seen.append(x)
        return x, seen if hidden is not None else []

    x, seen = jax.lax.scan(body, x, stacked)
    if hidden is not None:
        hidden.extend(s[i] for i in range(seen[0].shape[0]) for s in seen)
    return x


def unstack_layers(layers: dict[str, Any]) -> list[Any]:
    """The list form of stacked layers."""
    leaves = jax.tree.leaves(layers["stacked"])
    count = leaves[0].shape[0] if leaves else 0
    scanned = [jax.tree.map(lambda a, i=i: a[i], w) for i in range(count) for w in layers["stacked"]]
    return scanned + list(layers["rest"])
