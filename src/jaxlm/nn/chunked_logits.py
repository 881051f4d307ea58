"""Logits computed in chunks of tokens, so that [B,T,V] is never in memory, in the forward and the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.devices import mesh
from jaxlm.nn import params
from jaxlm.nn.quantized import is_quantized

# Logits per device that are in memory at once: at most this many tokens, and bytes in float32. Each chunk of the
# backward pass reads and writes the head's gradient, [V,D] in float32. So chunks are large: 2,048 tokens of 151,936
# logits.
CHUNK, CHUNK_BYTES = 4096, 5 << 28


def map_chunked_logits(
    family: Any,
    cfg: Any,
    weights: Any,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    fn: Callable[..., Any],
    chunk: int | None = None,
) -> Any:
    """Maps a function over the logits of all tokens, `chunk` tokens at a time.

    The backward pass recomputes the logits of each chunk (activation checkpointing). On a mesh, each shard of `data`
    processes its own rows.

    Args:
        family: The model's family, for its `logits`.
        cfg: The model's config.
        weights: A tree with the output head (`head_name`).
        x: Hidden states.
        targets: Target token of each hidden state.
        fn: Called with logits [B,t,V] float32 and targets [B,t]; returns a tree of arrays [B,t].
        chunk: Tokens per chunk and shard. Default: as many as CHUNK and CHUNK_BYTES allow.

    Returns:
        The tree that `fn` returns, of arrays [B,T].
    """

    limit = chunk or min(CHUNK, CHUNK_BYTES // (4 * cfg.V))

    def map_rows(rows: tuple[Array, Array], weights: Any) -> Any:
        B, T, _ = rows[0].shape
        count = -(-T // min(T, max(1, limit // mesh.local_size("B", (B,)))))
        size = -(-T // count)  # of equal size, or else the last chunk would be mostly padding

        def split(a: Array) -> Array:
            a = jnp.pad(a, [(0, 0), (0, count * size - T)] + [(0, 0)] * (a.ndim - 2))
            return a.reshape(B, count, size, *a.shape[2:]).swapaxes(0, 1)

        def map_chunk(rows: tuple[Array, Array]) -> Any:
            return fn(family.logits(cfg, rows[0], weights), rows[1])

        out = jax.lax.map(jax.checkpoint(map_chunk), jax.tree.map(split, rows))
        return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, count * size)[:, :T], out)

    head = weights[head_name(cfg)]
    if any(map(is_quantized, jax.tree.leaves(head, is_leaf=is_quantized))):
        # Its product runs on each device's part by itself (nn/quantized.py). It has no gradient, and is gathered here,
        # once for all chunks.
        head = jax.tree.map(mesh.constrain, head, params.letters_of(head, "VD"))
        return map_rows((x, targets), {head_name(cfg): head})
    return _per_data_shard(map_rows, (x, targets), {head_name(cfg): head})


def _per_data_shard(run: Callable[[Any, Any], Any], rows: Any, weights: Any) -> Any:
    """`run(rows, weights)` with rows a tree of arrays [B,...], by shard_map where `data` divides B.

    The weights are then all-gathered once before `run`, and their gradients reduced once after it, however often `run`
    uses a weight.
    """
    B = jax.tree.leaves(rows)[0].shape[0]
    sharded, replicated = PartitionSpec(mesh.DATA), PartitionSpec()
    if mesh.traced_spec("B", (B,)) != sharded:
        return run(rows, weights)

    def varying(w: Array) -> Array:  # gradients of the result are per shard
        return jax.lax.pcast(w, mesh.DATA, to="varying") if jnp.issubdtype(w.dtype, jnp.floating) else w

    def per_shard(rows: Any, weights: Any) -> Any:
        return run(rows, jax.tree.map(varying, weights))

    in_specs = (sharded, replicated)
    return jax.shard_map(per_shard, in_specs=in_specs, out_specs=sharded, axis_names={mesh.DATA})(rows, weights)


def head_name(cfg: Any) -> str:
    """Name of the weight of the output head."""
    return "embed" if cfg.tied else "head"


def target_logits(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The logit of each target."""
    # A masked sum, not a gather: over a sharded vocabulary it needs one all-reduce of [B,T] and no logits are moved.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
