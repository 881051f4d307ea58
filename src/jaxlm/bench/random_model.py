"""A model with random weights, of a config.json or of a published model's config: a speed does not need a download."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import loading
from jaxlm.bench.sources import Shape
from jaxlm.devices import hardware
from jaxlm.model import Model
from jaxlm.nn import params
from jaxlm.nn.quantize import quantizer, stored


def random_model(shape: Shape, dtype: str = "auto", mesh: Any = None, quantize: str | None = None) -> Model:
    """Makes a model with random weights.

    Args:
        shape: What is known of the model (bench/sources.py).
        dtype: dtype of the weights; "auto" is that of the config.
        mesh: As in `jaxlm.load`.
        quantize: As in `jaxlm.load`.

    Raises:
        MemoryError: The weights do not fit in memory.
    """
    dtype = shape.dtype if dtype == "auto" else dtype
    rows = params.tensors(shape.family.PARAMS, shape.config)
    nbytes = sum(params.nbytes(stored(row, dtype, quantize)) for row in rows)
    what = f"the weights of {shape.name}"
    hint = "use a smaller model" + (" or --dtype bfloat16" if jnp.dtype(dtype).itemsize > 2 else "")
    hardware.require(nbytes, jax.local_devices()[0], what, hint)
    return draw(shape.family, shape.config, dtype, mesh, quantize, source=f"{shape.name} (random weights)")


def draw(family: Any, cfg: Any, dtype: Any, mesh: Any = None, quantize: str | None = None, **more: Any) -> Model:
    """A model with random weights, sharded as `load` shards them. Each device draws its part, so that a model may be
    larger than the memory of one device.

    Args:
        family: The module of the architecture.
        cfg: The family's Config.
        dtype: dtype of the weights.
        mesh: As in `jaxlm.load`.
        quantize: As in `jaxlm.load`.
        more: Other attributes of Model, such as `source`.
    """
    where, root = loading.placement(family.PARAMS, cfg, mesh, None, quantize), jax.random.key(0)
    convert = quantizer(quantize) if quantize is not None else lambda row, array: array
    weights: dict[str, Any] = {}
    programs: dict[Any, Any] = {}  # one for each shape
    for i, row in enumerate(params.tensors(family.PARAMS, cfg)):
        scale = None if row.path.endswith("norm") else row.stored_shape[-1] ** -0.5
        if (row.letters, row.shape, scale) not in programs:
            one = partial(_draw, row.shape, scale, family.NORM_IDENTITY, jnp.dtype(dtype))
            programs[row.letters, row.shape, scale] = jax.jit(one, out_shardings=where(row))
        array = programs[row.letters, row.shape, scale](jax.random.fold_in(root, i))
        params.put(weights, row.path, convert(row, array))
    return Model(family, cfg, weights, **more)


def _draw(shape: tuple[int, ...], scale: float | None, identity: float, dtype: Any, key: jax.Array) -> jax.Array:
    """Normally distributed values with this standard deviation; None: all are `identity`."""
    return jnp.full(shape, identity, dtype) if scale is None else jax.random.normal(key, shape, dtype) * scale
