"""Rows of an array that is divided over devices, for a process that writes them."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def gather_rows(x: jax.Array, begin: int, count: int) -> np.ndarray:
    """Some rows of the leading axis, in host memory, the same in every process: all of them must ask. No device and no
    process ever holds more than these of an array that is divided."""
    bits = np.asarray(_gather_rows(x.sharding, count)(x, begin))
    return bits.astype(f"u{x.dtype.itemsize}").view(x.dtype)


@cache
def _gather_rows(where: NamedSharding, count: int) -> Callable[[jax.Array, int], jax.Array]:
    """The rows as numbers of 32 bits, which every device adds up alike: what a device does not hold it counts as 0."""
    first, *rest = (*where.spec, None)

    def local(part: jax.Array, begin: jax.Array) -> jax.Array:
        index = begin + jnp.arange(count)
        if first is not None:
            index -= lax.axis_index(first) * part.shape[0]
        whole = jnp.uint32 if part.dtype.itemsize == 4 else jnp.uint16
        out = (
            lax.bitcast_convert_type(part, whole).at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        )
        out = out.astype(jnp.uint32)
        out = out if first is None else lax.psum(out, first)
        for axis, over in enumerate(rest, 1):
            out = out if over is None else lax.all_gather(out, over, axis=axis, tiled=True)
        return out

    specs = (where.spec, PartitionSpec())
    return jax.jit(jax.shard_map(local, mesh=where.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))
