"""Model: a family's functions bound to weights; and `load`, which makes one from a checkpoint."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import devices, models, params
from jaxlm.checkpoint import hf, hub
from jaxlm.decoding import Programs
from jaxlm.ops import cache as caches
from jaxlm.tokenizer import Tokenizer

Weights = dict[str, Any]


class Model:
    """Weights (a plain pytree) and the pure functions that take them.

    `weights, forward, init_kv, tokenizer, config = model` unpacks it; tokenizer is None where the checkpoint has none.
    """

    def __init__(
        self,
        family: Any,
        config: Any,
        weights: Weights,
        tokenizer: Tokenizer | None = None,
        generation_config: dict[str, Any] | None = None,
        source: str = "random weights",
    ):
        self.family = family
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.generation_config = generation_config or {}
        self.source = source
        self.programs = Programs(family, config)
        self.unread: list[str] = []  # tensors of the checkpoint that are known and not used

    def __iter__(self) -> Iterator[Any]:
        return iter((self.weights, self.forward, self.init_kv, self.tokenizer, self.config))

    def forward(
        self, tokens: Any, weights: Weights, kv: caches.Cache | None = None, pos: Any = None
    ) -> tuple[jax.Array, caches.Cache | None]:
        """tokens [B,T] int32 -> logits [B,T,V] float32, and the cache with these tokens in it (None without one).

        pos is each token's position [B,T] int32 (-1: padding), or one int for all rows: the first token's. Left out, a
        row begins at 0, or after what its cache holds. Pure and jitted; differentiable in the weights. Logits of a
        position past the cache are NaN. ValueError for ids outside the vocabulary (of lists and numpy arrays: what lies
        on a device is not looked at).
        """
        tokens = self._ids(tokens)
        if kv is not None and isinstance(pos, int) and pos + tokens.shape[1] > kv.length:
            raise ValueError(f"positions {pos} to {pos + tokens.shape[1] - 1} do not fit a cache of {kv.length}")
        pos = pos if pos is None else jnp.asarray(pos, jnp.int32)
        return _programs(self.family, self.config)["forward"](tokens, weights, kv, pos)

    def _ids(self, tokens: Any) -> jax.Array:
        if not isinstance(tokens, jax.Array):
            ids = np.asarray(tokens)
            if ids.size and (ids.min() < 0 or ids.max() >= self.config.V):
                raise ValueError(f"tokens must be ids from 0 to {self.config.V - 1}, not {ids.min()} to {ids.max()}")
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have two axes [B,T] (a batch of one is [[…]]), not shape {tokens.shape}")
        return tokens

    def hidden_states(self, tokens: Any, weights: Weights | None = None, pos: Any = None) -> list[jax.Array]:
        """The residual stream [B,T,D] before the first layer and after each, the last one normed: L + 1 arrays, as
        transformers' `output_hidden_states` counts them."""
        weights = self.weights if weights is None else weights
        return _programs(self.family, self.config)["hidden"](self._ids(tokens), weights, pos)

    def init_kv(self, batch: int, length: int, *, chunk: int | None = None, dtype: Any = None) -> caches.Cache:
        """An empty cache for `batch` rows of up to `length` tokens. With `chunk`, at most so many are written a call,
        and layers with a sliding window keep window + chunk - 1 positions instead of all."""
        cfg = self.config
        dtype = dtype or devices.cache_dtype(self.dtype, self.device.platform)
        return caches.init(batch, length, cfg.windows, cfg.K, cfg.H, dtype, chunk)

    @property
    def dtype(self) -> Any:
        """The type of the activations: the embedding's."""
        return self.weights["embed"].dtype

    @property
    def device(self) -> Any:
        """Where the weights lie."""
        return next(iter(self.weights["embed"].devices()))

    @classmethod
    def init(cls, family: Any, config: Any, key: jax.Array, dtype: Any = jnp.float32, **more: Any) -> "Model":
        """Random weights: see params.init."""
        return cls(family, config, params.init(family.PARAMS, config, key, family.NORM, dtype), **more)

    def __repr__(self) -> str:
        count = params.count(self.family.PARAMS, self.config)
        return f"Model({self.source}: {self.family.__name__.rpartition('.')[2]}, {count:,} parameters, {self.dtype})"


def positions(tokens: jax.Array, kv: caches.Cache | None, pos: Any) -> jax.Array:
    """pos as [B,T] int32, from what `Model.forward` accepts."""
    B, T = tokens.shape
    if pos is None:
        first = 0 if kv is None else caches.next_position(kv)[:, None]
    elif jnp.shape(pos) == (B, T):
        return jnp.asarray(pos, jnp.int32)
    elif jnp.shape(pos) == ():
        first = jnp.asarray(pos, jnp.int32)
    else:
        raise ValueError(f"pos has shape {jnp.shape(pos)}; it must be one int or have the tokens' shape {(B, T)}")
    return jnp.broadcast_to(first + jnp.arange(T, dtype=jnp.int32), (B, T))


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

    dtype: "auto" keeps the file's type (devices.auto_dtype says why), or
    "float32", "bfloat16", "float16". revision: branch, tag or commit. offline: the local cache alone. allow_fields:
    names of config fields that may pass although the code does not know them. family: a module of jaxlm.models that
    must compute it. device: where the weights go, jax's default if left out. progress: show a bar on stderr (default:
    when it is a terminal). Raises ValueError, FileNotFoundError or MemoryError, each with what to do.
    """
    device = jax.local_devices(backend=device)[0] if isinstance(device, str) else device or _default_device()
    folder = hub.resolve(name, revision=revision, token=token, offline=offline)
    raw = hf.read_json(folder / "config.json")
    known = models.family_of(raw.get("model_type"))
    if family is not None and known is not family:
        raise ValueError(f"{name} has model_type {raw['model_type']!r}, which {family.__name__} does not compute")
    try:
        config = known.Config.from_hf(raw, allow_fields)
        pairs, unread = hf.match(known.PARAMS, config, hf.read_index(folder), known.UNREAD)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    generation = folder / "generation_config.json"
    generation_config = hf.read_json(generation) if generation.exists() else {}
    generation_config.setdefault("eos_token_id", raw.get("eos_token_id"))
    tokenizer = Tokenizer.load(folder, generation_config, raw)
    weights = _read_weights(str(name), pairs, dtype, device, progress)
    model = Model(known, config, weights, tokenizer, generation_config, str(name))
    model.unread = unread
    return model


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


@cache
def _programs(family: Any, cfg: Any) -> dict[str, Any]:
    """The jitted functions of one architecture, shared by all models of its shape."""

    def forward(tokens: jax.Array, weights: Weights, kv: Any, pos: Any) -> Any:
        pos = positions(tokens, kv, pos)
        x, new = family.forward(cfg, tokens, weights, kv, pos)
        logits = family.logits(cfg, x, weights)
        return (logits if kv is None else jnp.where((pos < kv.length)[:, :, None], logits, jnp.nan)), new

    def hidden(tokens: jax.Array, weights: Weights, pos: Any) -> list[jax.Array]:
        states: list[jax.Array] = []
        x, _ = family.forward(cfg, tokens, weights, None, positions(tokens, None, pos), hidden=states)
        return [*states[:-1], x]

    return {"forward": jax.jit(forward), "hidden": jax.jit(hidden)}
