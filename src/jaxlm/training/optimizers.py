"""Optimizers and learning rate schedules, from optax. The letters of a weight determine whether it has
weight decay, and whether it is a matrix."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm.nn import params
from jaxlm.training.config import Optimizer


def schedule(of: Optimizer, steps: int) -> optax.Schedule:
    """Returns the learning rate schedule: step to learning rate.

    Raises ValueError for a wsd schedule whose warmup and decay together exceed the number of steps.
    """
    warm = min(steps, round(of.warmup * steps) if of.warmup < 1 else round(of.warmup))
    rest, end = max(steps - warm, 1), of.lr * of.final
    if of.schedule == "cosine":
        after = optax.cosine_decay_schedule(of.lr, rest, of.final)
    elif of.schedule == "linear":
        after = optax.linear_schedule(of.lr, end, rest)
    elif of.schedule == "wsd":
        down = max(1, round(of.decay * steps))
        if of.warmup < 1 and of.warmup + of.decay <= 1:  # both were rounded up
            down = min(down, rest)
        if down > rest:
            raise ValueError(
                f"the wsd schedule has {warm} steps of warmup and {down} of decay, but the run has {steps} steps: "
                "lower optimizer.warmup or optimizer.decay"
            )
        after = optax.join_schedules(
            [optax.constant_schedule(of.lr), optax.linear_schedule(of.lr, end, down)], [rest - down]
        )
    else:
        after = optax.constant_schedule(of.lr)
    return optax.join_schedules([optax.linear_schedule(0.0, of.lr, warm), after], [warm]) if warm else after


def make_optimizer(of: Optimizer, steps: int, letters: Any) -> optax.GradientTransformation:
    """Returns the optimizer of a run: gradient clipping, then the update with weight decay and the learning rate.

    Args:
        of: The optimizer settings.
        steps: Number of steps of the run.
        letters: The letters of each weight, in a tree like the weights (params.letters).
    """
    learning_rate = schedule(of, steps)
    decays = decaying(letters)
    common: dict[str, Any] = {"weight_decay": of.weight_decay, "mask": decays}
    if of.name == "adamw":
        tx = optax.adamw(learning_rate, of.b1, of.b2, of.eps, **common)
    elif of.name == "lion":
        tx = optax.lion(learning_rate, of.b1, of.b2, **common)
    elif of.name == "adafactor":
        # optax.adafactor's own decay is not scaled by the learning rate: 0.1 would shrink weights by 10% per step.
        decay = optax.add_decayed_weights(-of.weight_decay, decays)
        tx = optax.chain(optax.adafactor(None), decay, optax.scale_by_schedule(learning_rate))
    else:
        tx = _muon(of, learning_rate, letters, decays)
    return optax.chain(optax.clip_by_global_norm(of.clip), tx) if of.clip else tx


def decaying(letters: Any) -> Any:
    """Returns the mask of weights with weight decay: all but norms."""
    return jax.tree.map(lambda name: name.lstrip("L") not in params.NORMS, letters)


def _muon(of: Optimizer, learning_rate: optax.Schedule, letters: Any, decays: Any) -> optax.GradientTransformation:
    """Returns Muon for the matrices of layers and adam for the rest. Axes are merged into input and output axes of the
    matrix product; the axis L of stacked layers is a batch axis."""

    def axes(name: str) -> MuonDimensionNumbers | None:
        plain = name.lstrip("L")
        if plain in params.NORMS or "V" in plain:
            return None
        first, split = len(name) - len(plain), len(name) - len(params.summed_letters(name))
        return MuonDimensionNumbers(tuple(range(split, len(name))), tuple(range(first, split)))

    numbers = jax.tree.map(axes, letters)
    return muon(
        learning_rate,
        weight_decay=of.weight_decay,
        weight_decay_mask=decays,
        adam_b1=of.b1,
        adam_b2=of.b2,
        # optax.tree_utils.tree_map_params calls init with a placeholder for the tree of weights.
        muon_weight_dimension_numbers=lambda tree: numbers if isinstance(tree, dict) else MuonDimensionNumbers(),
        consistent_rms=0.2,  # updates of adamw's size, so that one learning rate serves both (arXiv:2502.16982)
    )
