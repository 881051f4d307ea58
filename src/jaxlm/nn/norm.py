"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*x"], weight: Float[Array, "*normed"], eps: float, axes: int = 1, offset: float = 0.0
) -> Float[Array, "*x"]:
    """`x / sqrt(mean(x²) + eps) * (offset + weight)`, computed in float32 and returned in x's dtype.

    Args:
        x: [...,D], or [...,N,H] with axes=2.
        weight: The last `axes` axes of x.
        eps: Added to the mean square (`rms_norm_eps`).
        axes: Number of trailing axes that are normalized together: 2 over all heads at once (OLMo 2).
        offset: 1 where checkpoints store the weight minus 1 (Gemma).
    """
    over = tuple(range(-axes, 0))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=over, keepdims=True) + eps)
    return (y * (offset + weight.astype(jnp.float32))).astype(x.dtype)
