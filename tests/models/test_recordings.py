"""float32 logits against recordings of transformers (tests/recordings), on every version of jax, without torch.

Positions run from 0 to 63 in one row, and from 0 to 31 and 9,000 to 9,031 in the other.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_models import FULL, SLIDING, from_config

from jaxlm import Model
from jaxlm.models import FAMILIES
from jaxlm.nn.rope import FixedRope

pytestmark = pytest.mark.smoke

RECORDINGS = sorted((Path(__file__).parents[1] / "recordings").glob("*.npz"))
LIMIT = 1e-4  # standard deviations of the logits


def load(path: Path) -> tuple[dict[str, np.ndarray], Model]:
    with np.load(path) as file:
        recording = dict(file)
    return recording, from_config(json.loads(str(recording["config"])), int(recording["seed"]))


def distance(model: Model, recording: dict[str, np.ndarray], ropes: dict[str, FixedRope]) -> float:
    """The largest difference from the recorded logits, in their standard deviations."""
    cfg, family = replace(model.config, **ropes), model.family

    @jax.jit
    def logits(tokens: jax.Array, pos: jax.Array, weights: Any) -> jax.Array:
        x, _ = family.forward(cfg, tokens, weights, None, pos)
        return family.logits(cfg, x, weights)

    tokens, pos = recording["tokens"].astype(np.int32), recording["pos"].astype(np.int32)
    ours = np.asarray(logits(tokens, pos, model.weights))[:, recording["kept"]]
    return float(np.abs(ours - recording["logits"]).max() / recording["deviation"])


def test_there_are_recordings_of_every_family() -> None:
    families = {family.__name__.rpartition(".")[2] for family in FAMILIES.values()}
    assert {path.stem.split("_")[0] for path in RECORDINGS} == families
    assert sum(path.stat().st_size for path in RECORDINGS) < 1_000_000


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_logits(path: Path) -> None:
    recording, model = load(path)
    # One unit in the last place of a frequency moves the logits at position 9,000 by 1e-3 standard deviations:
    # frequencies are compared on their own, logits with the recorded frequencies.
    ropes = {}
    for name, kind in {"rope": FULL, "local_rope": SLIDING}.items():
        if f"{kind}_radians" in recording:  # absent where no layer is of this type
            radians, amplitude = recording[f"{kind}_radians"], float(recording[f"{kind}_amplitude"])
            ropes[name] = FixedRope(tuple(radians.tolist()), amplitude)
            ours = getattr(model.config, name).frequencies(model.config.H)
            ulps = ours.radians.view(np.int32).astype(np.int64) - radians.view(np.int32)
            assert np.abs(ulps).max() <= 2
            assert ours.amplitude == pytest.approx(amplitude, rel=1e-6)
    assert distance(model, recording, ropes) <= LIMIT
    model.weights["layers"][-1]["k"] *= -1
    assert distance(model, recording, ropes) >= 100 * LIMIT
