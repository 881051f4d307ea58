"""Products of activations and weights. Weights dispatch their own product (plain, LoRA, quantized)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.devices import mesh

PRODUCT = "product"  # the name of every product's result for policies of jax.checkpoint

# On CPU, up to this number of rows are multiplied one by one. With jax 0.12, a decoding step of two rows takes 2.4
# times as long as that of a single row with one product for both rows, and 1.8 times as long with two products. With
# three rows, separate products are slower on jax 0.10 (docs/performance.md). Rows of int8 are rounded, and two of them
# share a product.
MAX_SINGLE_ROWS = 2
# Up to this number of rows, a product is limited by memory bandwidth, as in a decoding step.
MAX_DECODE_ROWS = 128


def einsum(spec: str | tuple[str, ...], x: jax.Array, w: Any, dtype: Any = None) -> Any:
    """Computes `einsum(spec, x, w)`, accumulated in float32. float32 inputs are multiplied in full precision.

    On a mesh, the sharding of the result follows from its letters.

    Args:
        spec: An einsum spec such as "BTD,FD->BTF". Several products with the same input may be passed together, as
            tuples of specs and weights, so that they can run as one.
        x: Activations.
        w: A weight, an array or a WeightForm; a tuple of weights for a tuple of specs.
        dtype: dtype of the result. Default: that of x.

    Returns:
        The result; a tuple of results for a tuple of specs.
    """
    if isinstance(spec, tuple):
        return tuple(einsum(s, x, v, dtype) for s, v in zip(spec, w, strict=True))
    y = mesh.constrain(product(spec, x, w).astype(dtype or x.dtype), spec.split("->")[1])
    return checkpoint_name(y, PRODUCT)


class WeightForm(ABC):
    """A weight that is not a plain array, such as LoRA or integers with scales: a pytree node that implements its own
    product."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the represented array."""

    @abstractmethod
    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """The result of `multiply` with the represented array, in float32."""

    @abstractmethod
    def letters(self, own: str) -> Any:
        """The letters of the fields, in a form like this one, of a weight with the letters `own`."""

    def rows(self, index: Any) -> jax.Array:
        """Rows of the represented array [V,D], such as the embeddings of tokens."""
        raise ValueError(f"the embedding cannot be {type(self).__name__}: it is looked up, not multiplied")


def product(spec: str, x: jax.Array, w: Any) -> jax.Array:
    """One product with an array or a WeightForm, in float32."""
    if isinstance(w, WeightForm):
        return w.product(spec, x)
    if not mesh.active():
        return multiply(spec, x, w.astype(x.dtype))

    def gathering(x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(spec, x, mesh.constrain(w.astype(x.dtype), spec.split("->")[0].split(",")[1]))

    # In training (FSDP), a weight that is sharded over `data` is all-gathered for each product. The backward pass
    # gathers it again; otherwise the gathered weights of all layers would exist at once. With activation checkpointing,
    # the recomputed layer and its gradients share one gather (prevent_cse=False).
    return jax.checkpoint(gathering, prevent_cse=False)(x, w)


def multiply(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One product with a plain array, in float32. float32 inputs are multiplied in full precision on accelerators too.

    On one device, the operands are reshaped to two axes: x to rows and summed letters, w to kept and summed letters.
    With more axes, XLA on CPU transposes and copies the weight at each product, which takes up to 14 times as long
    (docs/performance.md). On a mesh they are not reshaped, because each letter has its own mesh axes.

    Raises:
        ValueError: The shapes do not match the letters of the spec.
    """
    summed = _summed(spec)
    if not summed:
        return plain_einsum(spec, x, w)
    x_letters, w_letters = spec.split("->")[0].split(",")
    if (x.ndim, w.ndim) != (len(x_letters), len(w_letters)) or x.shape[-summed:] != w.shape[-summed:]:
        # Checked before reshaping. Afterwards, einsum would accept a weight [D,H,N] in place of [D,N,H].
        raise ValueError(f"einsum {spec!r}: shapes {x.shape} and {w.shape} do not fit its letters")
    decoding = 1 <= mesh.local_size(x_letters[:-summed], x.shape[:-summed]) <= MAX_DECODE_ROWS
    if mesh.active():
        forms = {"default": partial(plain_einsum, spec)} | ({"tpu": partial(_rows_first, spec)} if decoding else {})
        return _for_platform(forms, x, w)
    rows, kept = x.shape[:-summed], w.shape[:-summed]
    width = math.prod(w.shape[-summed:])
    flat_x, flat_w = x.reshape(math.prod(rows), width), w.reshape(math.prod(kept), width)
    forms = {"default": partial(plain_einsum, "BD,FD->BF")} | ({"tpu": eight_rows} if decoding else {})
    if 1 <= math.prod(rows) <= MAX_SINGLE_ROWS:
        forms["cpu"] = _few_rows
    return _for_platform(forms, flat_x, flat_w).reshape(*rows, *kept)


def _for_platform(forms: dict[str, Callable[..., jax.Array]], x: jax.Array, w: jax.Array) -> jax.Array:
    """A product in the form for the platform for which the program is lowered."""
    return forms["default"](x, w) if len(forms) == 1 else jax.lax.platform_dependent(x, w, **forms)


def _summed(spec: str) -> int:
    """The number of summed letters, if they are the last letters of both x and w, and the result has the other letters
    of x followed by those of w.

    0 for any other spec, such as one with a batch letter of experts in all three, or a weight [in, out]. Those are
    computed by a plain einsum, which is correct everywhere and slower only on CPU.
    """
    inputs, out = spec.split("->")
    x_letters, w_letters = inputs.split(",")
    summed = "".join(letter for letter in w_letters if letter not in out)
    rows, kept = x_letters.removesuffix(summed), w_letters.removesuffix(summed)
    return len(summed) if (rows + summed, kept + summed, rows + kept) == (x_letters, w_letters, out) else 0


def plain_einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)


def _rows_first(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One product of few rows on TPU. The barrier keeps XLA from computing x again for each part of the weight,
    as in silu(gate) * up before `down`."""
    return plain_einsum(spec, jax.lax.optimization_barrier(x), w)


def eight_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B,D], w [F,D] -> [B,F] on TPU, for few rows. Fewer than 8 are padded to 8, because XLA computes the
    product of a few rows without the matrix unit."""
    rows = x.shape[0]
    return _rows_first("BD,FD->BF", jnp.pad(x, ((0, max(0, 8 - rows)), (0, 0))), w)[:rows]


def _few_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B,D], w [F,D] -> [B,F], one row at a time."""
    w = w.astype(jnp.float32)  # converted once, so that the gradients of the rows are summed in float32
    return jnp.stack([single_row(row, w) for row in x.astype(jnp.float32)])


def single_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [D], w [F,D] -> [F], float32: the product of a single token on CPU, limited by memory bandwidth only.

    XLA reads the weight once and converts it on the fly if a vector is multiplied with the transpose of float32 rows
    and no other operation is fused with the product. (jax 0.12 also needs hardware.COMPILER_OPTIONS.) Otherwise it
    first writes the whole weight as float32. reduce_precision to the precision of float32 does not change values, and
    prevents the fusion. The same holds for x and w in int32, whose exact sums are rounded to float32.
    """
    width = x.size if x.size < 4096 else 2048  # XLA's fast kernel takes vectors of less than 16 KiB

    def part(begin: int) -> jax.Array:
        y = x[begin : begin + width] @ w[:, begin : begin + width].T
        return jax.lax.reduce_precision(y.astype(jnp.float32), exponent_bits=8, mantissa_bits=23)

    return sum((part(begin) for begin in range(width, x.size, width)), part(0))


def embed(tokens: Any, w: Any) -> jax.Array:
    """Looks up token embeddings [B,T,D] in the table w [V,D].

    The gradient of a row is summed over its tokens in float32. In half precision, the sum over a frequent token would
    stop growing.
    """
    if isinstance(w, WeightForm):
        return mesh.constrain(w.rows(tokens), "BTD")
    return mesh.constrain(_rows(mesh.constrain(w, "VD"), tokens), "BTD")


@jax.custom_vjp
def _rows(w: jax.Array, tokens: Any) -> jax.Array:
    return w[tokens]


def _rows_forward(w: jax.Array, tokens: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    return w[tokens], (tokens, w[:, :0])  # an empty slice, which has the length and dtype of w


def _rows_backward(residuals: tuple[Any, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    tokens, like = residuals
    total = jnp.zeros((like.shape[0], g.shape[-1]), jnp.float32).at[tokens].add(g.astype(jnp.float32))
    return total.astype(like.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
