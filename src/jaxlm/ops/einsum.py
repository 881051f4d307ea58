"""Products of activations and weights. A weight knows its form: each form brings its own rule to `einsum`."""

from typing import Any

import jax
import jax.numpy as jnp


def einsum(spec: str | tuple[str, ...], x: jax.Array, w: Any, dtype: jnp.dtype | None = None) -> Any:
    """`einsum(spec, x, w)` in x's dtype (or `dtype`), accumulated in float32; float32 products keep full precision.

    Products that share their input are asked for together, as tuples of specs and weights, so that they can run as
    one; the answer is then a tuple.
    """
    if isinstance(spec, tuple):
        return tuple(einsum(s, x, v, dtype) for s, v in zip(spec, w, strict=True))
    return multiply(spec, x, w).astype(dtype or x.dtype)


def multiply(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One product with a plain array, float32 out. Accelerators would cut float32 inputs unless told not to."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


def embed(tokens: jax.Array, w: jax.Array) -> jax.Array:
    """Rows [B,T,D] of the table w [V,D]."""
    return w[tokens]
