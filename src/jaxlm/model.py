"""Model: the functions of a family bound to weights."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.activations import Patch, marked, matching, names_of, run
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.devices import hardware, mesh, pickling
from jaxlm.nn import check_weights, lora, params, quantize
from jaxlm.nn import kv_cache as caches
from jaxlm.nn.quantized_kv import check_name, dtype_of, head_bytes
from jaxlm.processing import html_views
from jaxlm.processing.tokenizer import Tokenizer

Weights = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A language model: weights (a plain pytree) and pure functions of them.

    A model can be unpacked: `weights, forward, init_kv, tokenizer, config = model`.

    `dataclasses.replace(model, weights=weights)` is the model with other weights, such as those of a training loop of
    one's own. They have the names and shapes of the model's own, in any floating point dtype; others raise ValueError.
    A model can be pickled and copied, with the shardings of its weights.

    Attributes:
        family: The module of the architecture (jaxlm.models.llama3 and others).
        config: The family's Config.
        weights: {"embed": [V,D], "layers": [{"q": [N,H,D], ...}, ...], "norm": [D], "head": [V,D] unless tied}.
        tokenizer: The tokenizer; None if the checkpoint has none.
        generation_config: Contents of generation_config.json, with every EOS id in `eos_token_id`.
        source: The hub id or folder that it was loaded from.
        checkpoint: The files of the checkpoint; None for a model without a checkpoint.
        kv_dtype: Name of the dtype of KV caches (nn/quantized_kv.py: DTYPES), or "auto": by platform.
    """

    family: Any
    config: Any
    weights: Weights
    tokenizer: Tokenizer | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    source: str = "random weights"
    checkpoint: Checkpoint | None = None
    kv_dtype: str = "auto"
    _process: int = field(init=False)  # the process that it was made in

    def __post_init__(self) -> None:
        if self.generation_config is None:
            object.__setattr__(self, "generation_config", {})
        check_weights.check(self.family.PARAMS, self.config, self.weights)
        check_name(self.kv_dtype)
        object.__setattr__(self, "_process", os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        family, weights = pickling.to_name(self.family), pickling.to_host(self.weights)
        return {**vars(self), "family": family, "weights": weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        family, weights = pickling.to_module(state["family"]), pickling.to_devices(state["weights"])
        vars(self).update(state, family=family, weights=weights, _process=os.getpid())

    __copy__ = replace

    def __deepcopy__(self, memo: dict[int, Any]) -> "Model":
        """A model whose arrays are copies, on the same devices. The original's may then be donated."""
        weights = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, self.weights)
        tokenizer, generation_config = copy.deepcopy((self.tokenizer, self.generation_config), memo)
        return replace(self, weights=weights, tokenizer=tokenizer, generation_config=generation_config)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.weights, self.forward, self.init_kv, self.tokenizer, self.config))

    def forward(
        self, tokens: Any, weights: Weights, kv: caches.KVCache | None = None, pos: Any = None
    ) -> tuple[jax.Array, caches.KVCache | None]:
        """Computes the logits of every position. Pure, jitted, and differentiable with respect to the weights.

        Args:
            tokens: [B,T] int32.
            weights: A pytree such as `model.weights`.
            kv: A KV cache from `init_kv`, or None.
            pos: Position of each token [B,T] int32 (-1: padding), or one int, the first position of every row. The
                default is 0, or the position after the last one in the KV cache.

        Returns:
            Logits [B,T,V] float32, and the updated KV cache (None without one). Logits of positions past the end of the
            KV cache are NaN.

        Raises:
            ValueError: The shapes are wrong, or token ids are outside the vocabulary (checked for lists and numpy
                arrays only: an id of a jax array that is too large stands for the last id, as XLA clamps indices).
            RuntimeError: The process was forked after JAX had started.
        """
        tokens, pos = self._inputs(tokens, kv, pos)
        with mesh.use_mesh_of(weights):
            return _programs(self.family, self.config)["forward"](tokens, weights, kv, pos)

    def _inputs(self, tokens: Any, kv: caches.KVCache | None, pos: Any) -> tuple[jax.Array, Any]:
        """The token ids as an array, and pos as an array or None, checked against the KV cache."""
        self.check_process()
        tokens = self._ids(tokens)
        if kv is not None and not isinstance(kv, caches.KVCache):
            raise TypeError(f"kv must be a KV cache from init_kv, or None, not {type(kv).__name__}")
        if kv is not None and (rows := next(iter(kv.positions.values())).shape[0]) != tokens.shape[0]:
            raise ValueError(
                f"{tokens.shape[0]} rows of tokens do not fit a KV cache of {rows}: init_kv(batch, length)"
            )
        if kv is not None and isinstance(pos, int | np.integer) and pos + tokens.shape[1] > kv.length:
            raise ValueError(f"positions {pos} to {pos + tokens.shape[1] - 1} do not fit a KV cache of {kv.length}")
        if pos is not None and not isinstance(pos, jax.Array):
            pos = np.asarray(pos)
        if pos is not None and not jnp.issubdtype(pos.dtype, jnp.integer):
            raise ValueError(f"pos must be integers, not {pos.dtype}")
        return tokens, pos if pos is None else jnp.asarray(pos, jnp.int32)

    def _ids(self, tokens: Any) -> jax.Array:
        if isinstance(tokens, str | Mapping):
            raise TypeError(f"tokens must be token ids [B,T], not {type(tokens).__name__}: "
                            "model.forward([model.tokenizer.encode(text)], model.weights)")  # fmt: skip
        if not isinstance(tokens, jax.Array):
            try:
                ids = np.asarray(tokens)
            except ValueError:
                raise ValueError(
                    "the rows of tokens have different lengths: pad them, and pass pos with -1 for padding"
                ) from None
            if ids.dtype.kind not in "iuf":
                raise ValueError(f"tokens must be integers, not {'text' if ids.dtype.kind == 'U' else ids.dtype}")
            if ids.size and (ids.min() < 0 or ids.max() >= self.config.V):
                raise ValueError(f"tokens must be ids from 0 to {self.config.V - 1}, not {ids.min()} to {ids.max()}")
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"tokens must have shape [B,T] (a batch of one is [[…]]), not {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, not {tokens.dtype}")
        return tokens

    def hidden_states(self, tokens: Any, weights: Weights | None = None, pos: Any = None) -> list[jax.Array]:
        """Computes hidden states as transformers does with `output_hidden_states`.

        Args:
            tokens: [B,T] int32.
            weights: A pytree such as `model.weights`, which is the default.
            pos: As in `forward`.

        Returns:
            L + 1 arrays [B,T,D]: the residual stream before the first layer and after each layer, the last one
            normalized.
        """
        weights = self.weights if weights is None else weights
        with mesh.use_mesh_of(weights):
            return _programs(self.family, self.config)["hidden"](*self._inputs(tokens, None, pos), weights)

    @property
    def activation_names(self) -> tuple[str, ...]:
        """Names of the activations that `activations` captures and patches."""
        return names_of(self.family.PARAMS, self.config.L)

    @overload
    def activations(
        self,
        tokens: Any,
        names: str | Iterable[str] = (),
        *,
        patch: Mapping[str, Patch] | None = None,
        weights: Weights | None = None,
        kv: None = None,
        pos: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    @overload
    def activations(
        self,
        tokens: Any,
        names: str | Iterable[str] = (),
        *,
        patch: Mapping[str, Patch] | None = None,
        weights: Weights | None = None,
        kv: caches.KVCache,
        pos: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], caches.KVCache]: ...

    def activations(
        self,
        tokens: Any,
        names: str | Iterable[str] = (),
        *,
        patch: Mapping[str, Patch] | None = None,
        weights: Weights | None = None,
        kv: caches.KVCache | None = None,
        pos: Any = None,
    ) -> Any:
        """Captures and patches activations of a forward pass. Differentiable, and works within jax.jit.

            logits, acts = model.activations(tokens, ["layers.3.residual", "layers.*.mlp"])
            logits, _ = model.activations(tokens, patch={"layers.3.attention": lambda x: x.at[:, -1].set(0)})

        `activation_names` lists the names. docs/activations.md describes them, with examples.

        Args:
            tokens: [B,T] int32.
            names: Names of the activations to capture. `*` matches any text: "layers.*.mlp".
            patch: What replaces activations, by name or pattern: a function of the activation that returns one of the
                same shape, or an array that is broadcast to its shape. The result is converted to its dtype.
            weights: A pytree such as `model.weights`, which is the default.
            kv: A KV cache from `init_kv`, or None.
            pos: As in `forward`.

        Returns:
            The logits [B,T,V] float32 of the run, and the captured activations by name, as they are after a patch. With
            a KV cache also the updated one.

        Raises:
            ValueError: As in `forward`, or a name is unknown, or a patch has the wrong shape.
        """
        known = self.activation_names
        wanted = matching(known, [names] if isinstance(names, str) else names)
        patches = {name: new for key, new in (patch or {}).items() for name in matching(known, [key])}
        weights = self.weights if weights is None else weights
        tokens, pos = self._inputs(tokens, kv, pos)
        with mesh.use_mesh_of(weights):
            program = _programs(self.family, self.config)["activations"]
            (logits, kv), found = run(program, (tokens, weights, kv, pos), wanted, patches)
        return (logits, found) if kv is None else (logits, found, kv)

    def init_kv(self, batch: int, length: int, *, chunk: int | None = None, dtype: Any = None) -> caches.KVCache:
        """Creates an empty KV cache.

        Args:
            batch: Number of rows.
            length: Maximum number of tokens per row.
            chunk: Maximum number of tokens per call of `forward`. If given, a sliding-window layer stores only
                window + chunk - 1 positions, in a ring buffer.
            dtype: dtype of keys and values, as `kv_dtype`, which is the default.

        Raises:
            ValueError: `batch` or `length` is less than 1, or the dtype is unknown.
            MemoryError: It does not fit in the memory of the model's device.
        """
        cfg = self.config
        if batch < 1 or length < 1:
            raise ValueError(f"a KV cache needs at least one row and one position, not {batch} and {length}")
        dtype = self.cache_dtype if dtype is None else dtype_of(dtype)
        if self.mesh is None:
            slots = sum(caches.slot_counts(length, cfg.windows, min(chunk or length, length)))
            nbytes = 2 * batch * slots * cfg.K * head_bytes(dtype, cfg.H)
            what = f"the keys and values of a KV cache of {batch:,} rows and {length:,} tokens"
            hardware.require(nbytes, self.device, what, "use fewer rows or a shorter length")
        sizes = (batch, length, cfg.windows, cfg.K, cfg.H, dtype, chunk)
        return caches.allocator(self.mesh or self.device, *sizes)()

    def check_process(self) -> None:
        """Raises RuntimeError in a process that was forked from the one that made the model: JAX would hang there."""
        if self._process != os.getpid():
            raise RuntimeError("this process was forked after JAX had started, where JAX hangs: start processes with "
                               "multiprocessing.get_context('spawn')")  # fmt: skip

    @property
    def ignored(self) -> list[str]:
        """Names of known tensors of the checkpoint and adapter that are not loaded, such as those of a vision tower."""
        if self.checkpoint is None:
            return []
        adapter = self.checkpoint.adapter
        return [t.name for t in (*self.checkpoint.tensors.ignored, *(adapter.ignored if adapter else ()))]

    @property
    def dtype(self) -> Any:
        """dtype of the activations, which is that of the embedding."""
        return self.weights["embed"].dtype

    @property
    def cache_dtype(self) -> Any:
        """dtype of KV caches."""
        automatic = self.kv_dtype == "auto"
        return hardware.cache_dtype(self.dtype, self.device.platform) if automatic else dtype_of(self.kv_dtype)

    @property
    def mesh(self) -> Any:
        """The device mesh of the weights; None for a single device."""
        return mesh.mesh_of(self.weights)

    @property
    def is_multiprocess(self) -> bool:
        """Whether the weights are sharded over several processes. All of them must then make the same calls."""
        leaf = jax.tree.leaves(self.weights["embed"])[0]
        return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable

    @property
    def device(self) -> Any:
        """One of the devices of the weights."""
        return next(iter(jax.tree.leaves(self.weights["embed"])[0].devices()))

    @classmethod
    def init(cls, family: Any, config: Any, key: jax.Array, dtype: Any = jnp.float32, **more: Any) -> "Model":
        """Creates a model with random weights.

        Args:
            family: The module of the architecture.
            config: The family's Config.
            key: A PRNG key.
            dtype: dtype of the weights.
            more: Other attributes of Model, such as `tokenizer`.
        """
        return cls(family, config, params.init(family.PARAMS, config, key, family.NORM_IDENTITY, dtype), **more)

    def __repr__(self) -> str:
        count, added = params.count(self.family.PARAMS, self.config), lora.count(self.weights)
        adapter = f" and {added:,} of an adapter" if added else ""
        name = self.family.__name__.rpartition(".")[2]
        sizes = {} if self.mesh is None else self.mesh.shape
        over = f", mesh {','.join(f'{axis}={size}' for axis, size in sizes.items())}" if sizes else ""
        weights = f"{count:,} parameters{adapter}, {quantize.describe(self.weights)}{self.dtype}{over}"
        return f"Model({self.source}: {name}, {weights})"

    def _repr_html_(self) -> str:
        cfg, tokenizer = self.config, self.tokenizer
        rows = {
            "model": repr(self).removeprefix(f"Model({self.source}: ").removesuffix(")"),
            "memory": f"{hardware.gigabytes(params.nbytes(self.weights))} on {self.device.device_kind}",
            "layers": f"{cfg.L} of width {cfg.D:,}, {cfg.N} query heads, {cfg.K} kv heads",
            "context": f"{cfg.context:,} tokens",
            "tokenizer": "none" if tokenizer is None else f"{len(tokenizer):,} tokens",
            "chat template": "yes" if tokenizer is not None and tokenizer.has_template else "no",
        }
        return html_views.table(self.source, rows)


def require_model(model: Any, caller: str) -> None:
    """Raises ValueError, with the way to a Model, if `model` is something else."""
    if isinstance(model, Model):
        return model.check_process()
    homes, what = {cls.__module__ for cls in type(model).__mro__}, type(model).__name__
    if isinstance(model, str | Path):
        what, way = "a name", f"jaxlm.{caller}(jaxlm.load({str(model)!r}), …)"
    elif "jaxlm.nnx" in homes:
        way = "pass module.to_model()"
    elif any(home.startswith(("transformers.", "torch.")) for home in homes):
        way = "load its checkpoint with jaxlm.load"
    else:
        way = "jaxlm.load(NAME) makes one"
    raise ValueError(f"{caller} needs a model, not {what}: {way}")


def positions(tokens: jax.Array, kv: caches.KVCache | None, pos: Any) -> jax.Array:
    """Positions [B,T] int32 from any `pos` that `Model.forward` accepts."""
    B, T = tokens.shape
    if pos is None:
        first = 0 if kv is None else next_position(kv)[:, None]
    elif jnp.shape(pos) == (B, T):
        return jnp.asarray(pos, jnp.int32)
    elif jnp.shape(pos) == ():
        first = jnp.asarray(pos, jnp.int32)
    else:
        raise ValueError(f"pos has shape {jnp.shape(pos)}; it must be one int or have the tokens' shape {(B, T)}")
    return jnp.broadcast_to(first + jnp.arange(T, dtype=jnp.int32), (B, T))


def next_position(kv: caches.KVCache) -> jax.Array:
    """The position after the newest token of each row [B]; 0 for an empty row."""
    return jnp.max(jnp.stack([a.max(axis=1) for a in kv.positions.values()]), axis=0) + 1


@lru_cache(maxsize=32)
def _programs(family: Any, cfg: Any) -> dict[str, Any]:
    """The jitted functions of one architecture, shared by all models with this config."""

    def forward(tokens: jax.Array, weights: Weights, kv: Any, pos: Any, **options: Any) -> Any:
        check_weights.check(family.PARAMS, cfg, weights)
        pos = positions(tokens, kv, pos)
        x, new = family.forward(cfg, tokens, weights, kv, pos, **options)
        logits = family.logits(cfg, x, weights)
        return (logits if kv is None else jnp.where((pos < kv.length)[:, :, None], logits, jnp.nan)), new

    def hidden(tokens: jax.Array, pos: Any, weights: Weights) -> list[jax.Array]:
        check_weights.check(family.PARAMS, cfg, weights)
        states: list[jax.Array] = []
        x, _ = family.forward(cfg, tokens, weights, None, positions(tokens, None, pos), hidden=states)
        return [*states[:-1], x]

    def with_activations(tokens: jax.Array, weights: Weights, kv: Any, pos: Any) -> Any:
        states: list[jax.Array] = []
        return forward(tokens, marked(family.PARAMS, weights), kv, pos, hidden=states), states

    programs = {"forward": forward, "hidden": hidden, "activations": with_activations}
    return {name: jax.jit(program) for name, program in programs.items()}
