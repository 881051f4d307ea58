"""The training step: a pure function of the state and a batch, for a single device or a mesh.

It implements gradient accumulation, gradient clipping (in the optimizer), mixed precision, activation checkpointing and
FSDP.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.devices import mesh
from jaxlm.nn import linear, lora, params
from jaxlm.training.loss import Sums, loss

# Activation checkpointing: the intermediate results that are saved for the backward pass (a policy of nn.scan_layers).
# The others are recomputed. No policy saves gathered weights (nn/linear.py) or attention scores (nn/attention.py).
REMAT: dict[str, Any] = {
    "none": None,
    "full": True,
    "dots": jax.checkpoint_policies.save_only_these_names(linear.PRODUCT),
}


ROUNDING = 1 << 31  # the random numbers of stochastic rounding: no part of a batch has this number


class State(NamedTuple):
    """The training state. The field names are the keys of a checkpoint.

    Attributes:
        weights: The trained weights (all weights, or an adapter), float32 or bfloat16.
        opt_state: The state of the optax optimizer. Its moments are float32 or bfloat16.
        step: [] int32, the number of steps taken.
    """

    weights: Any
    opt_state: Any
    step: jax.Array


class Metrics(NamedTuple):
    """Metrics of one step, float32 scalars.

    Attributes:
        loss: Cross-entropy in nats per token that counts in the loss.
        grad_norm: Global norm of the gradient before clipping.
        tokens: Number of tokens that count in the loss.
    """

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array


def init_state(tx: optax.GradientTransformation, weights: Any, moment_dtype: Any = jnp.float32) -> State:
    """Returns the state before the first step.

    Args:
        tx: The optimizer.
        weights: The weights to train.
        moment_dtype: dtype in which the optimizer's moments are stored. Its constants (Muon has coefficients) stay.
    """
    opt_state = tx.init(cast(weights, jnp.float32))
    opt_state = optax.tree_utils.tree_map_params(tx, partial(cast, dtype=moment_dtype), opt_state)
    return State(weights, opt_state, jnp.zeros((), jnp.int32))


def make_step(
    family: Any,
    cfg: Any,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dtype: Any = jnp.float32,
    grad_dtype: Any = jnp.float32,
    remat: str = "none",
    z_loss: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> Callable[..., tuple[State, Metrics]]:
    """Returns the training step: (state, batch, frozen) to (state, metrics).

    frozen is None, or the base weights of the adapter in the state. They get no gradient. A step whose loss or gradient
    norm is NaN or Inf leaves weights and optimizer state unchanged.

    The update is computed in float32. Weights and moments keep the dtype that they have in the state. Those in bfloat16
    are rounded stochastically (`stochastic_round`).

    Args:
        accumulate: Gradient accumulation: number of parts of a batch, computed one after the other. The gradient is
            that of the whole batch.
        dtype: Compute dtype. Weights are cast to it before the forward pass.
        grad_dtype: dtype of the gradients from the backward pass to the update, and of their sum over the parts of a
            batch.
        remat: Activation checkpointing, a key of REMAT.
        z_loss: z-loss coefficient.
        dropout: Dropout rate of the adapters' inputs, drawn from (seed, step).
        seed: Seed of dropout and of stochastic rounding.
    """
    sum_of = partial(loss, family, cfg, z_loss=z_loss, remat=REMAT[remat])

    def step(state: State, batch: Any, frozen: Any = None) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total(trained: Any, part: Any, number: jax.Array) -> tuple[jax.Array, Sums]:
            keyed = lora.keyed(trained, jax.random.fold_in(key, number), dropout)
            sums = sum_of(full_weights(keyed, frozen, dtype), part)
            return sums.loss, sums

        letters = params.letters(family.PARAMS, state.weights)
        parts = jax.tree.map(partial(_split_batch, accumulate), batch)
        # Cast here, so that gradients have the compute dtype, and not that of the weights.
        gradient, sums = _gradient(total, cast(state.weights, dtype), letters, parts, grad_dtype)
        count = jnp.maximum(sums.tokens, 1)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / count, gradient)
        metrics = Metrics(sums.nats / count, optax.tree.norm(gradient), sums.tokens)
        new = _update(tx, state, gradient, jax.random.fold_in(key, ROUNDING))
        all_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        return jax.tree.map(lambda a, b: jnp.where(all_finite, a, b), new, state), metrics

    return step


def _update(tx: optax.GradientTransformation, state: State, gradient: Any, key: jax.Array) -> State:
    """Returns the state after an update, computed in float32 and stored in the dtypes of `state`."""
    weights, opt_state = cast(state.weights, jnp.float32), cast(state.opt_state, jnp.float32)
    updates, opt_state = tx.update(gradient, opt_state, weights)
    new = State(optax.apply_updates(weights, updates), opt_state, state.step + 1)
    leaves, structure = jax.tree.flatten(new)
    stored = [
        stochastic_round(a, jax.random.fold_in(key, i)) if b.dtype == jnp.bfloat16 else a
        for i, (a, b) in enumerate(zip(leaves, jax.tree.leaves(state), strict=True))
    ]
    return jax.tree.unflatten(structure, stored)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns a float32 array in bfloat16. Each value is rounded up or down at random, with its own value as the mean.

    Rounding to nearest would lose every update that is smaller than half the distance between two bfloat16 values
    (0.2 to 0.4 % of a weight).
    """
    # bfloat16 is the upper half of float32. A random lower half carries into it with the right probability.
    random = _random_bits(key, x.shape or (1,)).reshape(x.shape)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (random >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 random bits, of which the upper 16 are good: the same on every mesh.

    Each row has a random number from `key`, to which a hash adds the index in the row: steps of the golden ratio
    (Knuth, The Art of Computer Programming 3, section 6.4), then one round of MurmurHash3's finalizer. On TPU,
    jax.random.bits for every element would add half to the time of an update (docs/performance.md).
    """
    rows = jax.lax.optimization_barrier(jax.random.bits(key, (*shape[:-1], 1), jnp.uint32))
    h = rows + jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) * jnp.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    return h ^ (h >> 13)


def full_weights(trained: Any, frozen: Any, dtype: Any) -> Any:
    """Returns the weights of the forward pass: the trained ones cast to `dtype`, an adapter joined with its base."""
    trained = cast(trained, dtype)
    return trained if frozen is None else lora.join(frozen, trained)


def cast(tree: Any, dtype: Any) -> Any:
    """Returns a tree whose floating-point arrays have this dtype. Counters and random keys stay."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def _gradient(total: Callable[..., Any], weights: Any, letters: Any, parts: Any, dtype: Any) -> tuple[Any, Sums]:
    """Returns the gradient of the summed loss and the sums, over all parts (the leading axis) of a batch. dtype is that
    of the gradient."""

    def gradient_of(weights: Any, part: Any, number: jax.Array) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(total, has_aux=True)(weights, part, number)
        gradient = cast(gradient, dtype)
        # Sharded like the weights. Otherwise the compiler may all-reduce whole gradients on every device.
        return value, jax.tree.map(lambda g, name: mesh.constrain(g, name, _rules(name)), gradient, letters)

    count = jax.tree.leaves(parts)[0].shape[0]

    def add(before: Any, numbered: Any) -> tuple[Any, None]:
        (_, sums), gradient = gradient_of(weights, *numbered)
        return jax.tree.map(jnp.add, before, (gradient, sums)), None

    if count == 1:
        (_, sums), gradient = gradient_of(weights, jax.tree.map(lambda x: x[0], parts), jnp.zeros((), jnp.int32))
        return gradient, sums
    zero = jax.tree.map(lambda w: jnp.zeros_like(w, dtype), weights), Sums(*[jnp.zeros(())] * 3)
    return jax.lax.scan(add, zero, (parts, jnp.arange(count)))[0]


def state_shardings(tx: optax.GradientTransformation, state: Any, over: Any, table: Any) -> State:
    """Returns the sharding of each array of a state, given as shapes.

    Moments are sharded like their weights. Arrays with a different shape than their weight (adafactor's factored
    moments), and arrays without a weight (counters), are replicated.

    Args:
        tx: The optimizer of the state.
        state: State of jax.ShapeDtypeStruct.
        over: The mesh.
        table: PARAMS of the family.
    """
    weights = weight_shardings(state.weights, over, table)

    def replicated(leaf: Any) -> Any:
        return mesh.sharding("", leaf.shape, over)

    def moment(leaf: Any, weight: Any, sharding: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # the weight belongs to another part of the optimizer
            return leaf
        return sharding if leaf.shape == weight.shape else replicated(leaf)

    opt_state = optax.tree_utils.tree_map_params(
        tx, moment, state.opt_state, state.weights, weights, transform_non_params=replicated,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )  # fmt: skip
    return State(weights, opt_state, replicated(state.step))


def weight_shardings(weights: Any, over: Any, table: Any) -> Any:
    """Returns the sharding of each weight, given as shapes, stacked or listed."""
    return jax.tree.map(
        lambda letters, w: weight_sharding(letters, w.shape, over), params.letters(table, weights), weights
    )


def weight_sharding(letters: str, shape: tuple[int, ...], over: Any) -> Any:
    """Returns the sharding of a weight in training: FSDP over `data`, tensor parallelism over `model`. Norms are small
    and replicated."""
    if over is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return mesh.sharding(letters, shape, over, _rules(letters))


def _rules(letters: str) -> mesh.Rules:
    return mesh.RULES if letters.lstrip("L") in params.NORMS else mesh.FSDP_RULES


def _split_batch(count: int, x: jax.Array) -> jax.Array:
    """[B,T] to [count,B/count,T] for gradient accumulation. The rows of each part are spread over the batch, so that on
    a mesh every device has rows of each part."""
    return mesh.constrain(x.reshape(x.shape[0] // count, count, x.shape[1]).swapaxes(0, 1), " BT")
