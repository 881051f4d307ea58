"""The loss: cross-entropy from per-token log-probabilities, in float32, without ever forming the logits of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 1024  # tokens of all rows whose logits exist at once


class Sums(NamedTuple):
    """Of one batch, to be added to those of others: what is minimised, its cross-entropy part (nats), and the number of
    tokens that count. Scalars, float32."""

    loss: jax.Array
    nats: jax.Array
    tokens: jax.Array


def token_logprobs(
    family: Any, cfg: Any, weights: Any, x: jax.Array, targets: jax.Array, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Hidden states x [B,T,D], targets [B,T] int32 -> the log-probability of each target and the log of the softmax's
    denominator, both [B,T] float32. See `over_logits`."""
    head = "embed" if cfg.tied else "head"
    # In float32 because the chunks' gradients are added up in the type that enters the loop.
    weights = {**weights, head: jax.tree.map(_float32, weights[head])}

    def one(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return of_targets(logits, targets) - log_z, log_z

    return over_logits(family, cfg, weights, x, targets, one, chunk)


def over_logits(
    family: Any, cfg: Any, weights: Any, x: jax.Array, targets: jax.Array, one: Callable[..., Any], chunk: int = CHUNK
) -> Any:
    """`one(logits [B,t,V], targets [B,t])`, a tree of arrays [B,t], for all tokens of x [B,T,D]: arrays [B,T].

    Goes over `chunk` tokens at a time and computes their logits again for the gradient, so that [B,T,V] never exists.
    """
    B, T, _ = x.shape
    size = min(T, max(1, chunk // B))
    count = -(-T // size)

    def split(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, count * size - T)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(B, count, size, *a.shape[2:]).swapaxes(0, 1)

    def part(of: tuple[jax.Array, jax.Array]) -> Any:
        return one(family.logits(cfg, of[0], weights), of[1])

    found = jax.lax.map(jax.checkpoint(part), (split(x), split(targets)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, count * size)[:, :T], found)


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
    counts = batch.learned.astype(jnp.float32)
    nats = -jnp.sum(logprobs * counts)
    return Sums(nats + z_loss * jnp.sum(jnp.square(log_z) * counts), nats, jnp.sum(counts))
