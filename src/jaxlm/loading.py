"""`load`: a model from a checkpoint."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import devices, models
from jaxlm.checkpoint import hf, hub
from jaxlm.model import Model, Weights
from jaxlm.tokenizer import Tokenizer


def load(
    name: str | Path,
    *,
    dtype: Any = "auto",
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    allow_fields: Collection[str] = (),
    family: Any = None,
    device: Any = None,
    progress: bool | None = None,
) -> Model:
    """A model from a Hugging Face hub id or a folder.

    dtype: "auto" keeps the file's type (devices.auto_dtype says why), or "float32", "bfloat16", "float16". revision:
    branch, tag or commit. offline: the local cache alone. allow_fields: names of config fields that may pass although
    the code does not know them. family: a module of jaxlm.models that must compute it. device: where the weights go,
    jax's default if left out. progress: show a bar on stderr (default: when it is a terminal). Raises ValueError,
    FileNotFoundError or MemoryError, each with what to do.
    """
    device = jax.local_devices(backend=device)[0] if isinstance(device, str) else device or _default_device()
    found = find(name, revision=revision, token=token, offline=offline, allow_fields=allow_fields, family=family)
    weights = _read_weights(str(name), found.checkpoint.tensors.pairs, dtype, device, progress)
    return Model(
        found.family, found.config, weights, found.tokenizer, found.generation_config, str(name), found.checkpoint
    )


class Found(NamedTuple):
    """A checkpoint before its weights are read: all that is known of it, checked."""

    family: Any
    config: Any
    checkpoint: hf.Checkpoint
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]


def find(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    allow_fields: Collection[str] = (),
    family: Any = None,
) -> Found:
    """What `load` would load, with every check but the reading of weights; arguments as there."""
    folder = hub.resolve(name, revision=revision, token=token, offline=offline)
    raw = hf.read_json(folder / "config.json")
    known = models.family_of(raw.get("model_type"))
    if family is not None and known is not family:
        raise ValueError(f"{name} has model_type {raw['model_type']!r}, which {family.__name__} does not compute")
    try:
        config = known.Config.from_hf(raw, allow_fields)
        tensors = hf.match(known.PARAMS, config, hf.read_index(folder), known.UNREAD)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    path = folder / "generation_config.json"
    checkpoint = hf.Checkpoint(folder, raw, hf.read_json(path) if path.exists() else {}, tensors)
    generation_config = {"eos_token_id": raw.get("eos_token_id"), **checkpoint.generation_config}
    return Found(known, config, checkpoint, Tokenizer.load(folder, generation_config, raw), generation_config)


def _read_weights(name: str, pairs: Any, dtype: Any, device: Any, progress: bool | None) -> Weights:
    stored = [hf.DTYPES[tensor.dtype] for _, tensor in pairs]
    kept = [wanted_dtype(dtype, d, device.platform) for d in stored]
    elements = [math.prod(row.shape) for row, _ in pairs]
    total = sum(n * d.itemsize for n, d in zip(elements, kept))
    smaller = ", or dtype='bfloat16' (--dtype bfloat16) halves it" if kept and kept[0].itemsize == 4 else ""
    devices.require(total, device, f"the weights of {name}", f"use a smaller model or a larger machine{smaller}")
    with loading_bar(sum(tensor.nbytes for _, tensor in pairs), progress) as advance:
        return hf.load_weights(pairs, lambda d: wanted_dtype(dtype, d, device.platform), device, advance)


def wanted_dtype(dtype: Any, stored: np.dtype, platform: str) -> np.dtype:
    """The type to keep a tensor in: `dtype`, or for "auto" what devices.auto_dtype says of the stored type."""
    if isinstance(dtype, str) and dtype == "auto":
        return devices.auto_dtype(stored, platform)
    with suppress(TypeError):
        if (wanted := np.dtype(jnp.dtype(dtype))) in hf.DTYPES.values():
            return wanted
    raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")


def _default_device() -> Any:
    default = jax.config.values["jax_default_device"]
    return jax.devices(default)[0] if isinstance(default, str) else default or jax.local_devices()[0]


@contextmanager
def loading_bar(total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on stderr; the yielded function hears of bytes as they are read."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    visible = console.is_terminal if show is None else show
    columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
