"""One training step: a pure function of the state and a batch, the same on one device and on any mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import mesh, params
from jaxlm.training.loss import Sums, loss
from jaxlm.training.optimisers import NORMS

# What the backward pass keeps of the forward one; the rest is computed again. No policy keeps a gathered weight.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(mesh.GATHERED),
    "full": True,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class State(NamedTuple):
    """What training carries from step to step. Weights are float32 whatever is computed in."""

    weights: Any
    optimiser: Any  # optax's state
    step: jax.Array  # [] int32: how many have been taken


class Metrics(NamedTuple):
    """Of one step, scalars in float32: nats a learned token, the gradient's norm before clipping, learned tokens."""

    loss: jax.Array
    gradient: jax.Array
    tokens: jax.Array


def start(rule: optax.GradientTransformation, weights: Any) -> State:
    """The state before the first step."""
    return State(weights, rule.init(weights), jnp.zeros((), jnp.int32))


def make(
    family: Any,
    cfg: Any,
    rule: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dtype: Any = jnp.float32,
    remat: str = "none",
    z_loss: float = 0.0,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The step of a run: (state, batch) -> (state, metrics).

    accumulate: into how many parts a batch is cut, one after the other; the gradient is that of the whole. dtype: of
    products and activations; weights are cast to it for each use and their gradients come back in float32. A step
    whose loss is not finite leaves weights and optimiser as they were.
    """
    sum_of = partial(loss, family, cfg, z_loss=z_loss, remat=REMAT[remat])

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        parts = jax.tree.map(partial(_parts, accumulate), batch)
        gradient, sums = _gradient(sum_of, state.weights, parts, dtype)
        count = jnp.maximum(sums.tokens, 1)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        metrics = Metrics(sums.nats / count, optax.tree.norm(gradient), sums.tokens)
        updates, optimiser = rule.update(gradient, state.optimiser, state.weights)
        new = State(optax.apply_updates(state.weights, updates), optimiser, state.step + 1)
        sound = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.gradient)
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state), metrics

    return step


def _gradient(sum_of: Callable[[Any, Any], Sums], weights: Any, parts: Any, dtype: Any) -> tuple[Any, Sums]:
    """The gradient of the summed loss, and the sums, over all parts (a leading axis) of a batch."""

    def total(weights: Any, part: Any) -> tuple[jax.Array, Sums]:
        sums = sum_of(jax.tree.map(lambda w: w.astype(dtype), weights), part)
        return sums.loss, sums

    def add(before: Any, part: Any) -> tuple[Any, None]:
        (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(weights, part)
        return jax.tree.map(jnp.add, before, (gradient, sums)), None

    if jax.tree.leaves(parts)[0].shape[0] == 1:
        (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(weights, jax.tree.map(lambda x: x[0], parts))
        return gradient, sums
    zero = jax.tree.map(jnp.zeros_like, weights), Sums(*[jnp.zeros(())] * 3)
    return jax.lax.scan(add, zero, parts)[0]


def places(state: Any, over: Any, table: Any) -> Any:
    """The sharding of each array of a state (given as shapes): moments lie where their weight does, what is no weight's
    is whole on every device."""
    named = {
        jax.tree_util.keystr(path): mesh.sharding(letters, leaf.shape, over, _axes(letters))
        for (path, leaf), letters in zip(
            jax.tree_util.tree_leaves_with_path(state.weights),
            jax.tree.leaves(params.letters(table, state.weights)),
            strict=True,
        )
    }
    shapes = {jax.tree_util.keystr(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(state.weights)}

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        owner = next((n for n in named if name.endswith(n) and shapes[n] == leaf.shape), None)
        return mesh.sharding("", leaf.shape, over) if owner is None else named[owner]

    return jax.tree_util.tree_map_with_path(of, state)


def _axes(letters: str) -> mesh.Table:
    """Norms are small, and whole on every device."""
    return mesh.ON if letters.lstrip("L") in NORMS else mesh.ON_TRAINED


def _parts(count: int, x: jax.Array) -> jax.Array:
    """[B,T] -> [count,B/count,T]. Every part takes its rows from all over the batch, so that on a mesh each device has
    its share of each."""
    return mesh.constrain(x.reshape(x.shape[0] // count, count, x.shape[1]).swapaxes(0, 1), " BT")
