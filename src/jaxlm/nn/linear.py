"""Products of activations and weights. A weight knows its form: each form brings its own rule to `einsum`."""

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.devices import mesh

# Up to so many rows are multiplied one by one on CPU. A decoding step of two rows takes 2.4 times as long as one of a
# single row with one product for both, and 1.8 times with two (jax 0.12). With three rows jax 0.10 is slower one by one
# (docs/performance.md).
MAX_SINGLE_ROWS = 2


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
    """One product with a plain array, float32 out. Accelerators would cut float32 inputs unless told not to.

    On one device each operand has two axes: x rows and the summed letters, w the kept and the summed letters. With more
    axes XLA on CPU transposes and copies the weight at each product, which takes up to 14 times as long
    (docs/performance.md). On a mesh the letters stay apart, for each has axes of its own.
    """
    summed = _summed(spec)
    if mesh.active() or not summed:
        return _product(spec, x, w)
    x_letters, w_letters = spec.split("->")[0].split(",")
    if (x.ndim, w.ndim) != (len(x_letters), len(w_letters)) or x.shape[-summed:] != w.shape[-summed:]:
        # einsum would say so too. Flattened, a weight [D, H, N] would pass for [D, N, H] and give wrong numbers.
        raise ValueError(f"einsum {spec!r}: shapes {x.shape} and {w.shape} do not fit its letters")
    rows, kept = x.shape[:-summed], w.shape[:-summed]
    width = math.prod(w.shape[-summed:])
    flat_x, flat_w = x.reshape(math.prod(rows), width), w.reshape(math.prod(kept), width)
    plain = partial(_product, "BD,FD->BF")
    if 1 <= math.prod(rows) <= MAX_SINGLE_ROWS:
        y = jax.lax.platform_dependent(flat_x, flat_w, cpu=_few_rows, default=plain)
    else:
        y = plain(flat_x, flat_w)
    return y.reshape(*rows, *kept)


def _summed(spec: str) -> int:
    """The number of summed letters, where they are the last of both x and w and the result has x's other letters, then
    w's. 0 for any other spec, for instance a letter of experts in all three, or a weight [in, out].

    Those run as plain einsum. They are right there, on one device as on a mesh, and cost speed on CPU alone.
    """
    inputs, out = spec.split("->")
    x_letters, w_letters = inputs.split(",")
    summed = "".join(letter for letter in w_letters if letter not in out)
    rows, kept = x_letters.removesuffix(summed), w_letters.removesuffix(summed)
    return len(summed) if (rows + summed, kept + summed, rows + kept) == (x_letters, w_letters, out) else 0


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)


def _few_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B,D], w [F,D] -> [B,F], a row at a time."""
    w = w.astype(jnp.float32)  # once, so that gradients of the rows are added up in float32
    return jnp.stack([_single_row(row, w) for row in x.astype(jnp.float32)])


def _single_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [D], w [F,D] -> [F], float32: the product of a single token on CPU, at the rate at which memory is read.

    XLA reads a weight once, converting as it goes, where a vector meets the transpose of float32 rows and nothing is
    fused onto the result (jax 0.12 also wants hardware.COMPILER_OPTIONS); otherwise it first writes the whole weight as
    float32. reduce_precision to float32's own bits changes nothing and keeps the neighbors off.
    """
    width = x.size if x.size < 4096 else 2048  # XLA's fast way takes vectors of less than 16 KiB

    def part(begin: int) -> jax.Array:
        y = x[begin : begin + width] @ w[:, begin : begin + width].T
        return jax.lax.reduce_precision(y, exponent_bits=8, mantissa_bits=23)

    return sum((part(begin) for begin in range(width, x.size, width)), part(0))


def embed(tokens: Any, w: jax.Array) -> jax.Array:
    """Rows [B,T,D] of the table w [V,D]. A row's gradient is the float32 sum over its tokens: in half precision, a
    frequent token's would end where one more adds nothing."""
    return mesh.constrain(_rows(mesh.constrain(w, "VD"), tokens), "BTD")


@jax.custom_vjp
def _rows(w: jax.Array, tokens: Any) -> jax.Array:
    return w[tokens]


def _rows_forward(w: jax.Array, tokens: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    return w[tokens], (tokens, w[:, :0])  # no element of w: its length and type


def _rows_backward(kept: tuple[Any, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    tokens, like = kept
    total = jnp.zeros((like.shape[0], g.shape[-1]), jnp.float32).at[tokens].add(g.astype(jnp.float32))
    return total.astype(like.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
