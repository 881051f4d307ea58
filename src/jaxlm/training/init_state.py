"""The first state of a run and the weights beside it, each in its place: drawn, or read from a checkpoint."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import loading
from jaxlm.checkpoint import peft
from jaxlm.nn import params
from jaxlm.training import step
from jaxlm.training.setup import Setup


def init_state(setup: Setup) -> step.State:
    """The first state, in its place: random weights, those of a checkpoint, or an adapter."""
    run = setup.run
    if run.adapter is not None:
        trained = _adapter(setup)
    elif run.method == "lora" or setup.checkpoint is None:
        trained = setup.trained(jax.random.key(run.seed))
    else:
        trained = read(setup)
    tx = setup.tx()
    where = None if setup.over is None else step.state_shardings(setup.state_shapes(), setup.over, setup.family.PARAMS)
    return jax.jit(lambda w: step.init_state(tx, w), out_shardings=where, donate_argnums=0)(trained)


def frozen_weights(setup: Setup) -> Any:
    """The weights beside an adapter; None where all are trained."""
    return read(setup) if setup.run.method == "lora" else None


def read(setup: Setup) -> Any:
    """A checkpoint's weights, stacked: float32 where they are trained, else in the type of the run."""
    run, over, checkpoint = setup.run, setup.over, setup.checkpoint
    assert checkpoint is not None

    def where(row: params.TensorSpec) -> Any:
        return step.weight_sharding(row.letters, row.shape, over)

    dtype = "float32" if run.method == "full" else run.dtype
    weights = loading.read_weights(str(run.model), checkpoint.tensors.pairs, dtype, where, None)
    return _stacked(weights, setup)


def _stacked(weights: Any, setup: Setup) -> Any:
    """Listed weights, stacked name by name; those listed are used up, so that there is never a second copy of all."""

    def stack(tree: Any) -> Any:
        return params.stack(tree, setup.period)

    layers = weights.pop("layers")
    rest = len(layers) % setup.period
    found: dict[str, Any] = {"stacked": [{} for _ in range(setup.period)], "rest": [{} for _ in range(rest)]}
    for name in tuple(layers[0]):
        column = {"layers": [{name: layer.pop(name)} for layer in layers]}
        where = None
        if setup.over is not None:
            where = step.weight_shardings(jax.eval_shape(stack, column), setup.over, setup.family.PARAMS)
        made = jax.jit(stack, out_shardings=where)(column)["layers"]
        for whole, part in zip(found["stacked"] + found["rest"], made["stacked"] + made["rest"], strict=True):
            whole |= part
    return {**weights, "layers": found}


def _adapter(setup: Setup) -> Any:
    """The adapter that a run goes on from, stacked."""
    run, table = setup.run, setup.family.PARAMS
    found = peft.find(Path(str(run.adapter)), table, setup.config, setup.family.IGNORED_PREFIXES)

    def where(row: params.TensorSpec) -> Any:
        return step.weight_sharding(row.letters, row.shape, setup.over)

    tree = peft.read(found, setup.config.L, lambda stored: np.dtype(np.float32), where)
    return params.stack(tree, setup.period)
