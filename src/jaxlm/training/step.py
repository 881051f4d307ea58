"""One training step: a pure function of the state and a batch, the same on one device and on any mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.devices import mesh
from jaxlm.nn import lora, params
from jaxlm.training.loss import Sums, loss

# What the backward pass keeps of the forward one (a policy of `fold`); the rest is computed again. Under none of them
# does it keep gathered weights (ops/products.py) or blocks of scores (ops/attention.py).
REMAT: dict[str, Any] = {
    "none": None,
    "full": True,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class State(NamedTuple):
    """What training carries from step to step. What is trained (all weights, or an adapter) is float32 whatever is
    computed in."""

    weights: Any
    opt_state: Any  # optax's state
    step: jax.Array  # [] int32: how many have been taken


class Metrics(NamedTuple):
    """Of one step, scalars in float32: nats a learned token, the gradient's norm before clipping, learned tokens."""

    loss: jax.Array
    gradient: jax.Array
    tokens: jax.Array


def init_state(tx: optax.GradientTransformation, weights: Any) -> State:
    """The state before the first step."""
    return State(weights, tx.init(weights), jnp.zeros((), jnp.int32))


def make_step(
    family: Any,
    cfg: Any,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dtype: Any = jnp.float32,
    remat: str = "none",
    z_loss: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> Callable[..., tuple[State, Metrics]]:
    """The step of a run: (state, batch, frozen) -> (state, metrics). frozen: None, or the weights to which the state's
    are an adapter; they get no gradient.

    accumulate: into how many parts a batch is cut, one after the other; the gradient is that of the whole. dtype: of
    products and activations; weights are cast to it for each use and their gradients come back in float32. dropout: of
    what adapters see, drawn from (seed, step). A step whose loss is not finite leaves weights and optimizer as they
    were.
    """
    sum_of = partial(loss, family, cfg, z_loss=z_loss, remat=REMAT[remat])

    def step(state: State, batch: Any, frozen: Any = None) -> tuple[State, Metrics]:
        def total(trained: Any, part: Any, number: jax.Array) -> tuple[jax.Array, Sums]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), number)
            sums = sum_of(full_weights(lora.keyed(trained, key, dropout), frozen, dtype), part)
            return sums.loss, sums

        letters = params.letters(family.PARAMS, state.weights)
        parts = jax.tree.map(partial(_parts, accumulate), batch)
        gradient, sums = _gradient(total, state.weights, letters, parts)
        count = jnp.maximum(sums.tokens, 1)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        metrics = Metrics(sums.nats / count, optax.tree.norm(gradient), sums.tokens)
        updates, opt_state = tx.update(gradient, state.opt_state, state.weights)
        new = State(optax.apply_updates(state.weights, updates), opt_state, state.step + 1)
        all_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.gradient)
        return jax.tree.map(lambda a, b: jnp.where(all_finite, a, b), new, state), metrics

    return step


def full_weights(trained: Any, frozen: Any, dtype: Any) -> Any:
    """The weights with which a model computes, what is trained of them in `dtype`."""
    trained = jax.tree.map(lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, trained)
    return trained if frozen is None else lora.join(frozen, trained)


def _gradient(total: Callable[..., Any], weights: Any, letters: Any, parts: Any) -> tuple[Any, Sums]:
    """The gradient of the summed loss, and the sums, over all parts (a leading axis) of a batch."""

    def gradient_of(weights: Any, part: Any, number: jax.Array) -> tuple[Any, Any]:
        found, gradient = jax.value_and_grad(total, has_aux=True)(weights, part, number)
        # Divided as the weights are: where nothing says so, a gradient may be summed whole on every device.
        return found, jax.tree.map(lambda g, name: mesh.constrain(g, name, _on(name)), gradient, letters)

    count = jax.tree.leaves(parts)[0].shape[0]

    def add(before: Any, numbered: Any) -> tuple[Any, None]:
        (_, sums), gradient = gradient_of(weights, *numbered)
        return jax.tree.map(jnp.add, before, (gradient, sums)), None

    if count == 1:
        (_, sums), gradient = gradient_of(weights, jax.tree.map(lambda x: x[0], parts), jnp.zeros((), jnp.int32))
        return gradient, sums
    zero = jax.tree.map(jnp.zeros_like, weights), Sums(*[jnp.zeros(())] * 3)
    return jax.lax.scan(add, zero, (parts, jnp.arange(count)))[0]


def state_shardings(state: Any, over: Any, table: Any) -> Any:
    """The sharding of each array of a state (given as shapes): moments lie where their weight does, what is no weight's
    is whole on every device."""
    named = {
        jax.tree_util.keystr(path): (leaf.shape, weight_sharding(letters, leaf.shape, over))
        for (path, leaf), letters in zip(
            jax.tree_util.tree_leaves_with_path(state.weights),
            jax.tree.leaves(params.letters(table, state.weights)),
            strict=True,
        )
    }

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        found = next((where for n, (shape, where) in named.items() if name.endswith(n) and shape == leaf.shape), None)
        return mesh.sharding("", leaf.shape, over) if found is None else found

    return jax.tree_util.tree_map_with_path(of, state)


def weight_shardings(weights: Any, over: Any, table: Any) -> Any:
    """The sharding of each weight alone (given as shapes), stacked or listed."""
    return jax.tree.map(
        lambda letters, w: weight_sharding(letters, w.shape, over), params.letters(table, weights), weights
    )


def weight_sharding(letters: str, shape: tuple[int, ...], over: Any) -> Any:
    """Where a weight in training lies. Norms are small, and whole on every device."""
    if over is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return mesh.sharding(letters, shape, over, _on(letters))


def _on(letters: str) -> mesh.Rules:
    return mesh.RULES if letters.lstrip("L") in params.NORMS else mesh.FSDP_RULES


def _parts(count: int, x: jax.Array) -> jax.Array:
    """[B,T] -> [count,B/count,T]. Every part takes its rows from all over the batch, so that on a mesh each device has
    its share of each."""
    return mesh.constrain(x.reshape(x.shape[0] // count, count, x.shape[1]).swapaxes(0, 1), " BT")
