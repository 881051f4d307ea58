"""Model: the functions of a family bound to weights."""

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
        """The logits of every position. Pure, jitted, and differentiable in the weights.

        Args:
            tokens: [B,T] int32.
            weights: a pytree such as `model.weights`.
            kv: a KV cache from `init_kv`, or None.
            pos: position of each token [B,T] int32 (-1: padding), or one int, the first position of every row. The
                default is 0, or the position after the last one in the KV cache.

        Returns:
            logits [B,T,V] float32, and the KV cache with these tokens in it (None without one). Logits of a position
            past the end of the KV cache are NaN.

        Raises:
            ValueError: wrong shapes, or token ids outside the vocabulary (checked for lists and numpy arrays only).
        """
        tokens = self._ids(tokens)
        if kv is not None and (rows := next(iter(kv.positions.values())).shape[0]) != tokens.shape[0]:
            raise ValueError(
                f"{tokens.shape[0]} rows of tokens do not fit a KV cache of {rows}: init_kv(batch, length)"
            )
        if kv is not None and isinstance(pos, int) and pos + tokens.shape[1] > kv.length:
            raise ValueError(f"positions {pos} to {pos + tokens.shape[1] - 1} do not fit a KV cache of {kv.length}")
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
            raise ValueError(f"tokens must have shape [B,T] (a batch of one is [[…]]), not {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, not {tokens.dtype}")
        return tokens

    def hidden_states(self, tokens: Any, weights: Weights | None = None, pos: Any = None) -> list[jax.Array]:
        """The residual stream [B,T,D] before the first layer and after each layer, the last one normalized: L + 1
        arrays, as with `output_hidden_states` in transformers."""
        weights = self.weights if weights is None else weights
        with mesh.use_mesh_of(weights):
            return _programs(self.family, self.config)["hidden"](self._ids(tokens), weights, pos)

    def init_kv(self, batch: int, length: int, *, chunk: int | None = None, dtype: Any = None) -> caches.KVCache:
        """An empty KV cache.

        Args:
            batch: number of rows.
            length: maximum number of tokens per row.
            chunk: maximum number of tokens written per call. If given, a sliding-window layer keeps only
                window + chunk - 1 positions, in a ring buffer.
            dtype: of keys and values. The default depends on the platform.
        """
        cfg = self.config
        if batch < 1 or length < 1:
            raise ValueError(f"a KV cache needs at least one row and one position, not {batch} and {length}")
        dtype = dtype or hardware.cache_dtype(self.dtype, self.device.platform)
        sizes = (batch, length, cfg.windows, cfg.K, cfg.H, jnp.dtype(dtype), chunk)
        return caches.init(*sizes) if self.mesh is None else _empty(self.mesh, *sizes)()

    @property
    def ignored(self) -> list[str]:
        """Names of the tensors of checkpoint and adapter that are known and not used, such as a vision tower's."""
        if self.checkpoint is None:
            return []
        adapter = self.checkpoint.adapter
        return [t.name for t in (*self.checkpoint.tensors.ignored, *(adapter.ignored if adapter else ()))]

    @property
    def dtype(self) -> Any:
        """dtype of the activations: that of the embedding."""
        return self.weights["embed"].dtype

    @property
    def mesh(self) -> Any:
        """The device mesh of the weights, None for one device."""
        return mesh.mesh_of(self.weights)

    @property
    def is_multiprocess(self) -> bool:
        """Whether other processes hold shards of the weights. All processes must then make the same calls."""
        embed = self.weights["embed"]
        return isinstance(embed, jax.Array) and not embed.is_fully_addressable

    @property
    def device(self) -> Any:
        """A device of the weights."""
        return next(iter(self.weights["embed"].devices()))

    @classmethod
    def init(cls, family: Any, config: Any, key: jax.Array, dtype: Any = jnp.float32, **more: Any) -> "Model":
        """A model with random weights (nn.params.init)."""
        return cls(family, config, params.init(family.PARAMS, config, key, family.NORM_IDENTITY, dtype), **more)

    def __repr__(self) -> str:
        count, added = params.count(self.family.PARAMS, self.config), lora.count(self.weights)
        adapter = f" and {added:,} of an adapter" if added else ""
        name = self.family.__name__.rpartition(".")[2]
        return f"Model({self.source}: {name}, {count:,} parameters{adapter}, {self.dtype})"


def positions(tokens: jax.Array, kv: caches.KVCache | None, pos: Any) -> jax.Array:
    """Positions [B,T] int32 from any `pos` that `Model.forward` accepts."""
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
    """A function that makes an empty KV cache on a mesh. No device ever holds the whole."""
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
