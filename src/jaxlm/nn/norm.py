"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, axes: int = 1, offset: float = 0.0) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * (offset + weight)` over the last `axes` axes of x; float32 inside, x.dtype outside.

    axes is 2 where heads are normalized together (OLMo 2); offset is 1 where the weight is stored around zero (Gemma).
    """
    over = tuple(range(-axes, 0))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=over, keepdims=True) + eps)
    return (y * (offset + weight.astype(jnp.float32))).astype(x.dtype)
