"""The loss: cross-entropy from per-token log-probabilities, in float32, without ever forming the logits of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.devices import mesh

CHUNK = 1024  # tokens whose logits exist at once on a device


class Sums(NamedTuple):
    """Of one batch, to be added to those of others: what is minimized, its cross-entropy part (nats), and the number of
    tokens that count. Scalars, float32."""

    loss: jax.Array
    nats: jax.Array
    tokens: jax.Array


def token_logprobs(
    family: Any, cfg: Any, weights: Any, x: jax.Array, targets: jax.Array, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Hidden states x [B,T,D], targets [B,T] int32 -> the log-probability of each target and the log of the softmax's
    denominator, both [B,T] float32. See `over_logits`."""

    def one(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return of_targets(logits, targets) - log_z, log_z

    # In float32 because the chunks' gradients are added up in the type that enters the loop.
    weights = jax.tree.map(_float32, {_head(cfg): weights[_head(cfg)]})
    return over_logits(family, cfg, weights, x, targets, one, chunk)


def over_logits(
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

    return _by_rows(all_of, (x, targets), {_head(cfg): weights[_head(cfg)]})


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


def _head(cfg: Any) -> str:
    """The name of the weight that gives logits."""
    return "embed" if cfg.tied else "head"


def of_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit of each target: [B,T,V], [B,T] -> [B,T]."""
    # Not a gather: over a vocabulary that is divided, a sum of one term stays where the logits are.
    places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    return jnp.sum(jnp.where(places == targets[..., None], logits, 0.0), axis=-1)


def _float32(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a  # an adapter may hold a key


def loss(
    family: Any, cfg: Any, weights: Any, batch: Any, *, z_loss: float = 0.0, chunk: int = CHUNK, **how: Any
) -> Sums:
    """Sums over the learned tokens of a batch (tokens, targets, pos [B,T] int32, learned [B,T] bool).

    z_loss weighs the square of the softmax's log-denominator, which keeps logits from drifting (PaLM, arXiv:2204.02311,
    section 5). `how` goes to `fold` (remat).
    """
    x, _ = family.forward(cfg, batch.tokens, weights, None, batch.pos, **how)
    logprobs, log_z = token_logprobs(family, cfg, weights, x, batch.targets, chunk)
    counts = batch.loss_mask.astype(jnp.float32)
    nats = -jnp.sum(logprobs * counts)
    return Sums(nats + z_loss * jnp.sum(jnp.square(log_z) * counts), nats, jnp.sum(counts))
