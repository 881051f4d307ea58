"""The loss: cross-entropy in float32, computed in chunks, so that the logits of a whole batch never exist."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.chunked_logits import head_name, map_chunked_logits, target_logits
from jaxlm.nn.quantized import is_quantized


class Sums(NamedTuple):
    """Sums over the loss mask of a batch; float32 scalars that add up over batches.

    Attributes:
        loss: What is minimized: cross-entropy and z-loss.
        nats: Cross-entropy in nats: what metrics and validation report.
        tokens: Number of tokens.
    """

    loss: jax.Array
    nats: jax.Array
    tokens: jax.Array


def token_logprobs(
    family: Any, cfg: Any, weights: Any, x: jax.Array, targets: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target, and the log of the softmax denominator.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        weights: The weights; only the head is used.
        x: Hidden states [B,T,D].
        targets: Token ids [B,T] int32.
        chunk: Tokens per chunk (see map_chunked_logits).

    Returns:
        Two arrays [B,T] float32.
    """

    def of_chunk(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return target_logits(logits, targets) - log_z, log_z

    # In float32, because the gradients of the chunks are summed in the dtype that enters the loop.
    # Quantized weights are frozen, and stay in few bits.
    weights = jax.tree.map(_float32, {head_name(cfg): weights[head_name(cfg)]}, is_leaf=is_quantized)
    return map_chunked_logits(family, cfg, weights, x, targets, of_chunk, chunk)


def _float32(a: Any) -> Any:
    is_float = not is_quantized(a) and jnp.issubdtype(a.dtype, jnp.floating)  # an adapter may hold a random key
    return a.astype(jnp.float32) if is_float else a


def loss(
    family: Any, cfg: Any, weights: Any, batch: Any, *, z_loss: float = 0.0, chunk: int | None = None, **options: Any
) -> Sums:
    """Returns the sums over the loss mask of a batch. `step.make_step` divides by the number of tokens.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        weights: The weights.
        batch: tokens, targets, pos [B,T] int32 and loss_mask [B,T] bool (data.packing.Batch).
        z_loss: Coefficient of the squared log of the softmax denominator, which keeps logits from drifting (PaLM,
            arXiv:2204.02311, section 5).
        chunk: Tokens per chunk of logits (see map_chunked_logits).
        options: Options of scan_layers (remat).
    """
    x, _ = family.forward(cfg, batch.tokens, weights, None, batch.pos, **options)
    logprobs, log_z = token_logprobs(family, cfg, weights, x, batch.targets, chunk)
    mask = batch.loss_mask.astype(jnp.float32)
    nats = -jnp.sum(logprobs * mask)
    return Sums(nats + z_loss * jnp.sum(jnp.square(log_z) * mask), nats, jnp.sum(mask))
