"""Model: a family's functions bound to weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.devices import hardware, mesh
from jaxlm.nn import kv_cache as caches
from jaxlm.nn import lora, params
from jaxlm.processing.tokenizer import Tokenizer

Weights = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """Weights (a plain pytree) and the pure functions that take them. `dataclasses.replace` gives a changed copy.

    `weights, forward, init_kv, tokenizer, config = model` unpacks it.

    Attributes:
        family: the module that computes it (jaxlm.models.llama3 and others).
        config: the family's Config.
        weights: {"embed": [V,D], "layers": [{"q": [N,H,D], ...}, ...], "norm": [D], "head": [V,D] unless tied}.
        tokenizer: None where the checkpoint has none.
        generation_config: contents of generation_config.json, with every EOS id in `eos_token_id`.
        source: the name or folder that it was loaded from.
        checkpoint: the checkpoint's files, None for a model that came from none.
    """

    family: Any
    config: Any
    weights: Weights
    tokenizer: Tokenizer | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    source: str = "random weights"
    checkpoint: Checkpoint | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.weights, self.forward, self.init_kv, self.tokenizer, self.config))

    def forward(
        self, tokens: Any, weights: Weights, kv: caches.KVCache | None = None, pos: Any = None
    ) -> tuple[jax.Array, caches.KVCache | None]:
        """tokens [B,T] int32 -> logits [B,T,V] float32, and the cache with these tokens in it (None without one).

        pos is each token's position [B,T] int32 (-1: padding), or one int for all rows: the first token's. Left out, a
        row begins at 0, or after what its cache holds. Pure and jitted; differentiable in the weights. Logits of a
        position past the cache are NaN. ValueError for ids outside the vocabulary (of lists and numpy arrays: what lies
        on a device is not looked at).
        """
        tokens = self._ids(tokens)
        if kv is not None and (rows := next(iter(kv.positions.values())).shape[0]) != tokens.shape[0]:
            raise ValueError(f"{tokens.shape[0]} rows of tokens do not fit a cache of {rows}: init_kv(batch, length)")
        if kv is not None and isinstance(pos, int) and pos + tokens.shape[1] > kv.length:
            raise ValueError(f"positions {pos} to {pos + tokens.shape[1] - 1} do not fit a cache of {kv.length}")
        pos = pos if pos is None else jnp.asarray(pos, jnp.int32)
        with mesh.use_mesh_of(weights):
            return _programs(self.family, self.config)["forward"](tokens, weights, kv, pos)

    def _ids(self, tokens: Any) -> jax.Array:
        if not isinstance(tokens, jax.Array):
            ids = np.asarray(tokens)
            if ids.size and (ids.min() < 0 or ids.max() >= self.config.V):
                raise ValueError(f"tokens must be ids from 0 to {self.config.V - 1}, not {ids.min()} to {ids.max()}")
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"tokens must have two axes [B,T] (a batch of one is [[…]]), not shape {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be whole numbers, not {tokens.dtype}")
        return tokens

    def hidden_states(self, tokens: Any, weights: Weights | None = None, pos: Any = None) -> list[jax.Array]:
        """The residual stream [B,T,D] before the first layer and after each, the last one normed: L + 1 arrays, as
        transformers' `output_hidden_states` counts them."""
        weights = self.weights if weights is None else weights
        with mesh.use_mesh_of(weights):
            return _programs(self.family, self.config)["hidden"](self._ids(tokens), weights, pos)

    def init_kv(self, batch: int, length: int, *, chunk: int | None = None, dtype: Any = None) -> caches.KVCache:
        """An empty cache for `batch` rows of up to `length` tokens. With `chunk`, at most so many are written a call,
        and layers with a sliding window keep window + chunk - 1 positions instead of all."""
        cfg = self.config
        if batch < 1 or length < 1:
            raise ValueError(f"a cache needs at least one row and one position, not {batch} and {length}")
        dtype = dtype or hardware.cache_dtype(self.dtype, self.device.platform)
        sizes = (batch, length, cfg.windows, cfg.K, cfg.H, jnp.dtype(dtype), chunk)
        return caches.init(*sizes) if self.mesh is None else _empty(self.mesh, *sizes)()

    @property
    def ignored(self) -> list[str]:
        """Names of the checkpoint's and the adapter's tensors that are known and not used."""
        if self.checkpoint is None:
            return []
        adapter = self.checkpoint.adapter
        return [t.name for t in (*self.checkpoint.tensors.ignored, *(adapter.ignored if adapter else ()))]

    @property
    def dtype(self) -> Any:
        """The type of the activations: the embedding's."""
        return self.weights["embed"].dtype

    @property
    def mesh(self) -> Any:
        """The mesh over which the weights are spread, None for one device."""
        return mesh.mesh_of(self.weights)

    @property
    def is_multiprocess(self) -> bool:
        """Whether parts of the weights lie with other processes, which then must do all that this one does."""
        embed = self.weights["embed"]
        return isinstance(embed, jax.Array) and not embed.is_fully_addressable

    @property
    def device(self) -> Any:
        """Where the weights lie."""
        return next(iter(self.weights["embed"].devices()))

    @classmethod
    def init(cls, family: Any, config: Any, key: jax.Array, dtype: Any = jnp.float32, **more: Any) -> "Model":
        """Random weights: see params.init."""
        return cls(family, config, params.init(family.PARAMS, config, key, family.NORM_IDENTITY, dtype), **more)

    def __repr__(self) -> str:
        count, added = params.count(self.family.PARAMS, self.config), lora.count(self.weights)
        beside = f" and {added:,} of an adapter" if added else ""
        name = self.family.__name__.rpartition(".")[2]
        return f"Model({self.source}: {name}, {count:,} parameters{beside}, {self.dtype})"


def positions(tokens: jax.Array, kv: caches.KVCache | None, pos: Any) -> jax.Array:
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


@lru_cache(maxsize=32)
def _empty(over: Any, *sizes: Any) -> Any:
    """What makes an empty cache over a mesh: no device ever holds the whole."""
    made = partial(caches.init, *sizes)
    where = caches.map_arrays(jax.eval_shape(made), lambda a, letters: mesh.sharding(letters, a.shape, over))
    return jax.jit(made, out_shardings=where)


@lru_cache(maxsize=32)
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
