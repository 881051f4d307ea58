"""Logits for a chunk of tokens at a time: [B,T,V] never exists, neither forward nor backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.devices import mesh

CHUNK = 1024  # tokens whose logits exist at once on a device


def map_chunked_logits(
    family: Any, cfg: Any, weights: Any, x: jax.Array, targets: jax.Array, one: Callable[..., Any], chunk: int = CHUNK
) -> Any:
    """`one(logits [B,t,V], targets [B,t])`, a tree of arrays [B,t], for all tokens of x [B,T,D]: arrays [B,T].

    Goes over `chunk` tokens at a time and computes their logits again for the gradient, so that [B,T,V] never exists.
    On a mesh each part of `data` does so with its own rows.
    """

    def all_of(rows: tuple[jax.Array, jax.Array], weights: Any) -> Any:
        B, T, _ = rows[0].shape
        size = min(T, max(1, chunk // B))
        count = -(-T // size)

        def split(a: jax.Array) -> jax.Array:
            a = jnp.pad(a, [(0, 0), (0, count * size - T)] + [(0, 0)] * (a.ndim - 2))
            return a.reshape(B, count, size, *a.shape[2:]).swapaxes(0, 1)

        def part(of: tuple[jax.Array, jax.Array]) -> Any:
            return one(family.logits(cfg, of[0], weights), of[1])

        found = jax.lax.map(jax.checkpoint(part), jax.tree.map(split, rows))
        return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, count * size)[:, :T], found)

    return _by_rows(all_of, (x, targets), {head_name(cfg): weights[head_name(cfg)]})


def _by_rows(run: Callable[[Any, Any], Any], rows: Any, weights: Any) -> Any:
    """`run(rows, weights)`, trees of arrays [B,…] from trees of arrays [B,…] and of weights.

    Where `data` divides B, each part of it runs by itself, on its rows and the whole weights: these are gathered once,
    before, and the parts' gradients are summed once, behind, however often `run` uses a weight.
    """
    B = jax.tree.leaves(rows)[0].shape[0]
    part, whole = PartitionSpec(mesh.DATA), PartitionSpec()
    if mesh.traced_spec("B", (B,)) != part:
        return run(rows, weights)

    def varying(w: jax.Array) -> jax.Array:  # from here on gradients are the part's own
        return jax.lax.pcast(w, mesh.DATA, to="varying") if jnp.issubdtype(w.dtype, jnp.floating) else w

    def of_part(rows: Any, weights: Any) -> Any:
        return run(rows, jax.tree.map(varying, weights))

    return jax.shard_map(of_part, in_specs=(part, whole), out_specs=part, axis_names={mesh.DATA})(rows, weights)


def head_name(cfg: Any) -> str:
    """The name of the weight that gives logits."""
    return "embed" if cfg.tied else "head"


def target_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit of each target: [B,T,V], [B,T] -> [B,T]."""
    # Not a gather: over a vocabulary that is divided, a sum of one term stays where the logits are.
    places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    return jnp.sum(jnp.where(places == targets[..., None], logits, 0.0), axis=-1)
