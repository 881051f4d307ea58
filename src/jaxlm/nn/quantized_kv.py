"""Keys and values in 8 bits: int8 or float8_e4m3fn, with a float32 scale for each token and kv head.

Numbers of float8 are stored as their bits: XLA converts whole arrays of float8 to write a slot and to read a slice.

The scale is the largest magnitude of the token's head over the largest number of the format, so that it follows from
the data. Attention multiplies its scores by the scale of the keys, and its probabilities by that of the values: the KV
cache is never converted as a whole.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import bitcast_convert_type
from jaxtyping import Array, Float

# dtypes of a KV cache by name.
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "int8": jnp.int8,
                          "fp8": jnp.float8_e4m3fn}  # fmt: skip
FP8 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = {jnp.dtype(jnp.int8): 127.0, FP8: 448.0}  # of the formats with a scale


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values x of a layer, x ≈ numbers(float32) * scale[..., None]. A pytree; its leaves may be shardings.

    Attributes:
        values: [B,K,S,H] int8, or uint8 with the bits of float8_e4m3fn.
        scale: [B,K,S] float32; 0 where all of x is 0.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """int8 or float8_e4m3fn."""
        return FP8 if self.values.dtype == jnp.uint8 else self.values.dtype

    def numbers(self, dtype: Any) -> Array:
        """The stored numbers in a float dtype, without the scale. All of them are exact in bfloat16 and float16."""
        return (self.values if self.dtype == jnp.int8 else bitcast_convert_type(self.values, FP8)).astype(dtype)


def dtype_of(name: Any) -> np.dtype:
    """The dtype of a name in DTYPES, or of a dtype.

    Raises:
        ValueError: A KV cache cannot have this dtype.
    """
    with suppress(TypeError):  # it is no dtype
        if (dtype := jnp.dtype(DTYPES.get(name, name))) in [jnp.dtype(each) for each in DTYPES.values()]:
            return dtype
    raise ValueError(f"a KV cache in {name!r} is not supported: use one of {', '.join(DTYPES)}")


def check_name(kv_dtype: Any) -> None:
    """Raises ValueError unless it is "auto" or a name in DTYPES."""
    if kv_dtype != "auto" and kv_dtype not in DTYPES:
        raise ValueError(f"kv_dtype={kv_dtype!r} is not supported: use one of auto, {', '.join(DTYPES)}")


def name_of(dtype: Any) -> str:
    """The name of a dtype in DTYPES."""
    return next(name for name, each in DTYPES.items() if jnp.dtype(each) == dtype)


def head_bytes(dtype: Any, H: int) -> int:
    """Bytes of the keys (or values) of one token and kv head."""
    return H * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) in LARGEST else 0)


def empty(shape: tuple[int, int, int, int], dtype: Any) -> Any:
    """Zeros [B,K,S,H]: an array, or a QuantizedKV if the dtype has a scale."""
    if jnp.dtype(dtype) not in LARGEST:
        return jnp.zeros(shape, dtype)
    return QuantizedKV(jnp.zeros(shape, stored(dtype)), jnp.zeros(shape[:-1], jnp.float32))


def stored(dtype: Any) -> Any:
    """The dtype of the values of a QuantizedKV."""
    return jnp.uint8 if jnp.dtype(dtype) == FP8 else dtype


def quantize(x: Float[Array, "... H"], dtype: Any) -> QuantizedKV:
    """Rounds each head of each token to the nearest numbers of the format. It has no gradient: see `no_gradient`."""
    x, largest = no_gradient(x.astype(jnp.float32)), LARGEST[jnp.dtype(dtype)]
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    # The quotient may round to a little more than `largest`, which float8 would turn into NaN.
    values = jnp.clip(x / jnp.where(scale == 0, 1, scale)[..., None], -largest, largest)
    is_int8 = jnp.dtype(dtype) == jnp.int8
    return QuantizedKV(
        jnp.round(values).astype(dtype) if is_int8 else bitcast_convert_type(values.astype(FP8), jnp.uint8), scale
    )


@jax.custom_jvp
def no_gradient(x: Array) -> Array:
    """x. Differentiating it raises ValueError, because the gradient of rounding is 0."""
    return x


@no_gradient.defjvp
def _no_gradient_jvp(primals: Any, tangents: Any) -> Any:
    raise ValueError("a KV cache in int8 or fp8 has no gradient: use init_kv(batch, length, dtype='float32')")


def as_stored(x: Float[Array, "B T K H"], dtype: Any) -> Float[Array, "B T K H"]:
    """New keys or values as a KV cache of this dtype stores them, in the dtype of x if there is a scale."""
    if jnp.dtype(dtype) not in LARGEST:
        return x.astype(dtype)
    quantized = quantize(x, dtype)
    return (quantized.numbers(jnp.float32) * quantized.scale[..., None]).astype(x.dtype)
