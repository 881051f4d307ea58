"""The loss: cross-entropy from per-token log-probabilities, in float32, without ever forming the logits of a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.chunked_logits import CHUNK, head_name, map_chunked_logits, target_logits


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
    denominator, both [B,T] float32. See `map_chunked_logits`."""

    def one(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return target_logits(logits, targets) - log_z, log_z

    # In float32 because the chunks' gradients are added up in the type that enters the loop.
    weights = jax.tree.map(_float32, {head_name(cfg): weights[head_name(cfg)]})
    return map_chunked_logits(family, cfg, weights, x, targets, one, chunk)


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
