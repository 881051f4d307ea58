"""Products of activations and weights. A weight knows its form: each form brings its own rule to `einsum`."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.devices import mesh


def einsum(spec: str | tuple[str, ...], x: jax.Array, w: Any, dtype: Any = None) -> Any:
    """`einsum(spec, x, w)` in x's dtype (or `dtype`), accumulated in float32; float32 products keep full precision.

    Products that share their input are asked for together, as tuples of specs and weights, so that they can run as
    one; the answer is then a tuple. On a mesh the result lies where its letters say.
    """
    if isinstance(spec, tuple):
        return tuple(einsum(s, x, v, dtype) for s, v in zip(spec, w, strict=True))
    return mesh.constrain(product(spec, x, w).astype(dtype or x.dtype), spec.split("->")[1])


class WeightForm(ABC):
    """A weight in another form than one array: a pytree node with its own rule for products."""

    @abstractmethod
    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """What `multiply` gives for the array that this stands for: float32."""


def product(spec: str, x: jax.Array, w: Any) -> jax.Array:
    """One product with a weight in any form, float32 out."""
    if isinstance(w, WeightForm):
        return w.product(spec, x)
    if not mesh.active():
        return multiply(spec, x, w.astype(x.dtype))

    def gathering(x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(spec, x, mesh.constrain(w.astype(x.dtype), spec.split("->")[0].split(",")[1]))

    # Where training divides a weight over `data` it is gathered for each product. The backward pass gathers it again:
    # kept, the gathered weights of all layers would exist at once. A layer that is computed again there shares its
    # gathers with its gradients (prevent_cse).
    return jax.checkpoint(gathering, prevent_cse=False)(x, w)


def multiply(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One product with a plain array, float32 out. Accelerators would cut float32 inputs unless told not to."""
    if mesh.active():
        return _product(spec, x, w)
    if x.shape[:2] == (1, 1):
        return jax.lax.platform_dependent(x, w, cpu=partial(_single_row, spec), default=partial(_product, spec))
    # Rows as one axis: with two, gradients on CPU take up to 1.5 times as long.
    y = _product(spec.replace("BT", "B"), x.reshape(-1, *x.shape[2:]), w)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)


def _single_row(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of a single token on CPU, at the rate at which memory is read.

    XLA reads a weight once, converting as it goes, where a vector meets the transpose of float32 rows and nothing is
    fused onto the result (jax 0.12 also wants devices.COMPILER_OPTIONS); otherwise it first writes the whole weight as
    float32. reduce_precision to float32's own bits changes nothing and keeps the neighbors off.
    """
    inputs, out = spec.split("->")
    summed = inputs.split(",")[0][2:]
    if not inputs.endswith(summed):
        raise ValueError(f"einsum {spec!r}: the weight's last letters must be the ones that are summed, {summed!r}")
    vector = x.reshape(-1).astype(jnp.float32)
    rows = w.reshape(-1, vector.size)
    width = vector.size if vector.size < 4096 else 2048  # XLA's fast way takes vectors of less than 16 KiB

    def part(begin: int) -> jax.Array:
        columns = rows[:, begin : begin + width].astype(jnp.float32)
        y = vector[begin : begin + width] @ columns.T
        return jax.lax.reduce_precision(y, exponent_bits=8, mantissa_bits=23)

    y = sum((part(begin) for begin in range(width, vector.size, width)), part(0))
    return y.reshape(1, 1, *w.shape[: len(out) - 2])


def embed(tokens: jax.Array, w: jax.Array) -> jax.Array:
    """Rows [B,T,D] of the table w [V,D]. A row's gradient is the float32 sum over its tokens: in half precision, a
    frequent token's would end where one more adds nothing."""
    return mesh.constrain(_rows(mesh.constrain(w, "VD"), tokens), "BTD")


@jax.custom_vjp
def _rows(w: jax.Array, tokens: jax.Array) -> jax.Array:
    return w[tokens]


def _rows_forward(w: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return w[tokens], (tokens, w[:, :0])  # no element of w: its length and type


def _rows_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    tokens, like = kept
    total = jnp.zeros((like.shape[0], g.shape[-1]), jnp.float32).at[tokens].add(g.astype(jnp.float32))
    return total.astype(like.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
