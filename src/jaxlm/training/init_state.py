"""The first training state, sharded: random weights, the weights of a checkpoint, or an adapter."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import loading
from jaxlm.checkpoint import peft
from jaxlm.devices import mesh
from jaxlm.nn import params
from jaxlm.nn.quantized import without_rounding
from jaxlm.training import step
from jaxlm.training.setup import Setup, new_weights, period
from jaxlm.training.vocabulary import read_with_new_rows


def init_state(setup: Setup) -> step.State:
    """Returns the state before the first step."""
    run = setup.run
    if run.adapter is not None:
        weights = _read_adapter(setup)
    elif run.method == "lora" or setup.checkpoint is None:
        weights = init_weights(setup)
    else:
        weights = _read_checkpoint(setup)
    init = partial(step.init_state, setup.tx, moment_dtype=run.optimizer.moment_dtype)
    init = jax.jit(init, out_shardings=_shardings(setup.state), donate_argnums=0)
    return init(weights)


def init_weights(setup: Setup) -> Any:
    """Returns the weights to train, with stacked layers, initialized from the seed: random weights or an adapter."""
    draw = jax.jit(
        partial(new_weights, setup.run, setup.family, setup.config),
        out_shardings=_shardings(setup.state.weights),
    )
    return draw(jax.random.key(setup.run.seed))


def frozen_weights(setup: Setup) -> Any:
    """Returns the frozen base weights of an adapter, with stacked layers; None if all weights are trained."""
    return without_rounding(_read_checkpoint(setup)) if setup.run.method == "lora" else None


def _shardings(shapes: Any) -> Any:
    """Returns the shardings of jax.ShapeDtypeStruct. Without them the first state would not be committed to its device,
    and the step would be compiled again for the second."""
    return jax.tree.map(lambda a: a.sharding, shapes)


def _read_checkpoint(setup: Setup) -> Any:
    """Returns the weights of the checkpoint, with stacked layers and rows for new tokens: in weight_dtype if they are
    trained, else in the compute dtype or quantized."""
    run, checkpoint = setup.run, setup.checkpoint
    assert checkpoint is not None

    def sharding(row: params.TensorSpec) -> Any:
        return step.weight_sharding(row.letters, row.shape, setup.mesh)

    dtype = run.weight_dtype if run.method == "full" else run.dtype
    pairs = checkpoint.tensors.pairs
    growing = [pair for pair in pairs if setup.new_rows is not None and pair[0].letters.startswith("V")]
    rest = [pair for pair in pairs if pair not in growing]
    grown = {}  # first: what they take is then not free when the memory for the others is checked
    for row, tensor in growing:
        assert setup.new_rows is not None
        row = row._replace(shape=(setup.config.V, *row.shape[1:]))
        grown[row.path] = read_with_new_rows(tensor, row.shape, setup.new_rows, sharding(row)).astype(dtype)
    weights = loading.read_weights(str(run.model), rest, dtype, sharding, None, run.quantize, mesh.FSDP_RULES)
    for path, value in grown.items():
        params.put(weights, path, value)
    return _stack_in_place(weights, setup)


def _stack_in_place(weights: Any, setup: Setup) -> Any:
    """Stacks listed layers, one weight name at a time. The list is consumed, so that no second copy of all weights
    exists."""
    apart = period(setup.config)

    def stack(tree: Any) -> Any:
        return params.stack(tree, apart)

    layers = weights.pop("layers")
    rest = len(layers) % apart
    stacked: dict[str, Any] = {"stacked": [{} for _ in range(apart)], "rest": [{} for _ in range(rest)]}
    for name in tuple(layers[0]):
        column = {"layers": [{name: layer.pop(name)} for layer in layers]}
        shardings = None
        if setup.mesh is not None:
            shardings = step.weight_shardings(jax.eval_shape(stack, column), setup.mesh, setup.family.PARAMS)
        new = jax.jit(stack, out_shardings=shardings)(column)["layers"]
        for layer, part in zip(stacked["stacked"] + stacked["rest"], new["stacked"] + new["rest"], strict=True):
            layer |= part
    return {**weights, "layers": stacked}


def _read_adapter(setup: Setup) -> Any:
    """Returns the adapter that training starts from, with stacked layers."""
    table, dtype = setup.family.PARAMS, jnp.dtype(setup.run.weight_dtype)
    adapter = peft.find(Path(str(setup.run.adapter)), table, setup.config, setup.family.IGNORED_PREFIXES)

    def sharding(row: params.TensorSpec) -> Any:
        return step.weight_sharding(row.letters, row.shape, setup.mesh)

    tree = peft.read(adapter, setup.config.L, lambda stored: dtype, sharding)
    return params.stack(tree, period(setup.config))
