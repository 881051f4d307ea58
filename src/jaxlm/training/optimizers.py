"""Optimizers and schedules, from optax; which weights decay and which are matrices follows from their letters."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm.nn import params
from jaxlm.training.config import Optimizer


def schedule(of: Optimizer, steps: int) -> optax.Schedule:
    """Step -> learning rate. ValueError for a wsd whose warm-up and decay take more than all steps."""
    warm = min(steps, round(of.warmup * steps) if of.warmup < 1 else round(of.warmup))
    rest, end = max(steps - warm, 1), of.lr * of.final
    if of.schedule == "cosine":
        after = optax.cosine_decay_schedule(of.lr, rest, of.final)
    elif of.schedule == "linear":
        after = optax.linear_schedule(of.lr, end, rest)
    elif of.schedule == "wsd":
        down = max(1, round(of.decay * steps))
        if of.warmup < 1 and of.warmup + of.decay <= 1:  # two roundings up
            down = min(down, rest)
        if down > rest:
            raise ValueError(
                f"optimizer: wsd's warm-up ({warm} steps) and decay ({down}) leave nothing of {steps} steps between "
                "them: lower optimizer.warmup or optimizer.decay"
            )
        after = optax.join_schedules(
            [optax.constant_schedule(of.lr), optax.linear_schedule(of.lr, end, down)], [rest - down]
        )
    else:
        after = optax.constant_schedule(of.lr)
    return optax.join_schedules([optax.linear_schedule(0.0, of.lr, warm), after], [warm]) if warm else after


def make_optimizer(of: Optimizer, steps: int, letters: Any) -> optax.GradientTransformation:
    """The optimizer of a run. letters: a tree like the weights that holds each one's letters (params.letters)."""
    rate = schedule(of, steps)
    decays = decaying(letters)
    common: dict[str, Any] = {"weight_decay": of.weight_decay, "mask": decays}
    if of.name == "adamw":
        tx = optax.adamw(rate, of.b1, of.b2, of.eps, **common)
    elif of.name == "lion":
        tx = optax.lion(rate, of.b1, of.b2, **common)
    elif of.name == "adafactor":
        # Its own decay would not follow the rate: 0.1 would take a tenth off each weight at each step.
        decay = optax.add_decayed_weights(-of.weight_decay, decays)
        tx = optax.chain(optax.adafactor(None), decay, optax.scale_by_schedule(rate))
    else:
        tx = _muon(of, rate, letters, decays)
    return optax.chain(optax.clip_by_global_norm(of.clip), tx) if of.clip else tx


def decaying(letters: Any) -> Any:
    """Which weights decay: all but norms."""
    return jax.tree.map(lambda name: name.lstrip("L") not in params.NORMS, letters)


def _muon(of: Optimizer, rate: optax.Schedule, letters: Any, decays: Any) -> optax.GradientTransformation:
    """Muon on the matrices of layers, whose axes are joined as their product sees them; a leading L is a batch."""

    def axes(name: str) -> MuonDimensionNumbers | None:
        plain = name.lstrip("L")
        if plain in params.NORMS or "V" in plain:
            return None
        first, split = len(name) - len(plain), len(name) - len(params.summed_letters(name))
        return MuonDimensionNumbers(tuple(range(split, len(name))), tuple(range(first, split)))

    numbers = jax.tree.map(axes, letters)
    return muon(
        rate,
        weight_decay=of.weight_decay,
        weight_decay_mask=decays,
        adam_b1=of.b1,
        adam_b2=of.b2,
        muon_weight_dimension_numbers=lambda _: numbers,
        consistent_rms=0.2,  # its updates are as large as adamw's, so that one rate serves both (arXiv:2502.16982)
    )
