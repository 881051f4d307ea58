"""Planted faults: each takes our model (and a monkeypatch) and returns one that computes something else.

The errors are those of published implementations. A parity case counts only if its fault moves the logits 100 times
past the limit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import Model

Fault = Callable[[Model, pytest.MonkeyPatch], Model]


def _with(model: Model, config: Any = None, weights: Any = None) -> Model:
    changed = {"config": config, "weights": weights}
    return replace(model, **{name: value for name, value in changed.items() if value is not None})


def config(**changes: Any) -> Fault:
    """Other numbers in the config."""
    return lambda model, patch: _with(model, replace(model.config, **changes))


def rope(**changes: Any) -> Fault:
    """Other numbers in the rope section, the global one in Gemma."""
    return lambda model, patch: _with(model, replace(model.config, rope=replace(model.config.rope, **changes)))


def weights(name: str, change: Callable[[jax.Array], jax.Array]) -> Fault:
    """Other values in every weight whose name has this end."""

    def fault(model: Model, patch: pytest.MonkeyPatch) -> Model:
        def edit(path: Any, value: jax.Array) -> jax.Array:
            return change(value) if str(path[-1].key).endswith(name) else value

        return _with(model, weights=jax.tree_util.tree_map_with_path(edit, model.weights))

    return fault


def skipped_layer(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """The last layer adds nothing to the residual stream."""
    layers = model.weights["layers"]
    skipped = {**layers[-1], **{name: jnp.zeros_like(layers[-1][name]) for name in ("o", "down")}}
    return _with(model, weights={**model.weights, "layers": [*layers[:-1], skipped]})


def tied_head_ignored(model: Model, patch: pytest.MonkeyPatch) -> Model:
    head = jnp.roll(model.weights["embed"], 1, axis=0)
    return _with(model, replace(model.config, tied=False), {**model.weights, "head": head})


def tied_by_mistake(model: Model, patch: pytest.MonkeyPatch) -> Model:
    weights = {name: weight for name, weight in model.weights.items() if name != "head"}
    return _with(model, replace(model.config, tied=True), weights)


def interleaved(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """q and k in the order of Meta's files, rotated pairs side by side."""

    def permute(w: jax.Array) -> jax.Array:
        heads, H, D = w.shape
        return w.reshape(heads, 2, H // 2, D).swapaxes(1, 2).reshape(heads, H, D)

    both = weights("q", permute)(model, patch)
    return weights("k", permute)(both, patch)


def rolled_kv_heads(model: Model, patch: pytest.MonkeyPatch) -> Model:
    both = weights("k", lambda w: jnp.roll(w, 1, axis=0))(model, patch)
    return weights("v", lambda w: jnp.roll(w, 1, axis=0))(both, patch)


def swapped_norms(model: Model, patch: pytest.MonkeyPatch) -> Model:
    layers = [{**w, "attn_norm": w["mlp_norm"], "mlp_norm": w["attn_norm"]} for w in model.weights["layers"]]
    return _with(model, weights={**model.weights, "layers": layers})


def norms_forgotten(model: Model, patch: pytest.MonkeyPatch) -> Model:
    return weights("norm", lambda w: jnp.full_like(w, model.family.NORM_IDENTITY))(model, patch)


norm_without_one = weights("norm", lambda w: w - 1)
q_norm_forgotten = weights("q_norm", jnp.zeros_like)


def norm_of_each_head(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """OLMo's q and k normalized head by head, as Qwen3's are."""
    whole = model.family.rms_norm
    patch.setattr(model.family, "rms_norm", lambda x, w, eps, axes=1: whole(x, w, eps))
    return config(context=1)(model, patch)  # unlike the model's, so that the patched program is compiled


def window(change: int) -> Fault:
    """Windows wider by `change`."""

    def fault(model: Model, patch: pytest.MonkeyPatch) -> Model:
        return config(windows=tuple(w and w + change for w in model.config.windows))(model, patch)

    return fault


window_off = window(10**6)


def local_theta_is_global(model: Model, patch: pytest.MonkeyPatch) -> Model:
    return _with(model, replace(model.config, local_rope=model.config.rope))


def scaling_everywhere(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """The scaling of RoPE on local layers too."""
    stretched = replace(model.config.rope, theta=model.config.local_rope.theta)
    return _with(model, replace(model.config, local_rope=stretched))


def rope_in_every_layer(model: Model, patch: pytest.MonkeyPatch) -> Model:
    return config(rotated=(True,) * model.config.L)(model, patch)


def rope_in_the_other_layers(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """no_rope_layers read as its name says: 1 for a layer without RoPE."""
    return config(rotated=tuple(not rotates for rotates in model.config.rotated))(model, patch)


def query_scale_of_width(model: Model, patch: pytest.MonkeyPatch) -> Model:
    return _with(model, replace(model.config, scale=model.config.H**-0.5))


def embedding_unscaled(model: Model, patch: pytest.MonkeyPatch) -> Model:
    cfg, w = model.config, model.weights
    head = w["embed"] if cfg.tied else w["head"]
    return _with(model, replace(cfg, tied=False), {**w, "embed": w["embed"] / np.sqrt(cfg.D), "head": head})
