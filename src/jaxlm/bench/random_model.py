"""A model with random weights, of a config.json or of a published model's config: a speed does not need a download."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import loading, models
from jaxlm.bench import published
from jaxlm.checkpoint.hf import read_json
from jaxlm.devices import hardware
from jaxlm.model import Model
from jaxlm.nn import params


def find_config(name: str) -> dict[str, Any]:
    """The contents of config.json, of a file, a folder or a published model. Of a vision-language model, only those of
    its text model.

    Args:
        name: A path, or the hub id of a published model, with or without the organization, in any case.

    Raises:
        ValueError: There is no such file and no such model.
    """
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        raw = read_json(path)
    elif (model := published.find(name)) is not None:
        raw = model.config
    else:
        near = published.suggestions(name)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ValueError(
            f"--random-weights {name} is neither a config.json nor a published model that jaxlm knows{hint}"
        )
    return raw.get("text_config") or raw


def random_model(name: str, dtype: str = "auto", mesh: Any = None) -> tuple[Model, dict[str, Any]]:
    """Makes a model with random weights.

    Args:
        name: As in `find_config`.
        dtype: dtype of the weights; "auto" is that of the config, or bfloat16.
        mesh: As in `jaxlm.load`.

    Returns:
        The model, and its config.json.

    Raises:
        ValueError: The config is not found or not supported.
        MemoryError: The weights do not fit in memory.
    """
    raw = find_config(name)
    family = models.family_of(raw.get("model_type"))
    cfg = family.Config.from_hf(raw)
    if dtype == "auto":
        dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16")
    nbytes = params.count(family.PARAMS, cfg) * jnp.dtype(dtype).itemsize
    hardware.require(
        nbytes, jax.local_devices()[0], f"the weights of {name}", "use a smaller model or --dtype bfloat16"
    )
    known = published.find(name)
    source = known.id if known is not None and not Path(name).exists() else name
    return draw(family, cfg, dtype, mesh, source=f"{source} (random weights)"), raw


def draw(family: Any, cfg: Any, dtype: Any, mesh: Any = None, **more: Any) -> Model:
    """A model with random weights, sharded as `load` shards them. Each device draws its part, so that a model may be
    larger than the memory of one device.

    Args:
        family: The module of the architecture.
        cfg: The family's Config.
        dtype: dtype of the weights.
        mesh: As in `jaxlm.load`.
        more: Other attributes of Model, such as `source`.
    """
    where, root = loading.placement(family.PARAMS, cfg, mesh, None), jax.random.key(0)
    weights: dict[str, Any] = {}
    programs: dict[Any, Any] = {}  # one for each shape
    for i, row in enumerate(params.tensors(family.PARAMS, cfg)):
        scale = None if row.path.endswith("norm") else row.stored_shape[-1] ** -0.5
        if (row.letters, row.shape, scale) not in programs:
            one = partial(_draw, row.shape, scale, family.NORM_IDENTITY, jnp.dtype(dtype))
            programs[row.letters, row.shape, scale] = jax.jit(one, out_shardings=where(row))
        params.put(weights, row.path, programs[row.letters, row.shape, scale](jax.random.fold_in(root, i)))
    return Model(family, cfg, weights, **more)


def _draw(shape: tuple[int, ...], scale: float | None, identity: float, dtype: Any, key: jax.Array) -> jax.Array:
    """Normally distributed values with this standard deviation; None: all are `identity`."""
    return jnp.full(shape, identity, dtype) if scale is None else jax.random.normal(key, shape, dtype) * scale
