"""float32 logits against recordings of transformers (tests/recordings), so that every version of jax is checked.

Positions run from 0 to 63 in one row, 0 to 31 and 9,000 to 9,031 in the other.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_models import FULL, SLIDING, from_config

from jaxlm import Model
from jaxlm.nn import Rope
from jaxlm.nn.rope import Frequencies

pytestmark = pytest.mark.smoke

RECORDINGS = sorted((Path(__file__).parents[1] / "recordings").glob("*.npz"))
LIMIT = 1e-4  # of the logits' deviation


def load(path: Path) -> tuple[dict[str, np.ndarray], Model]:
    with np.load(path) as file:
        recording = dict(file)
    return recording, from_config(json.loads(str(recording["config"])), int(recording["seed"]))


def distance(model: Model, recording: dict[str, np.ndarray]) -> float:
    """The largest difference from the recorded logits, in their deviations."""
    cfg, family = model.config, model.family

    @jax.jit  # anew: frequencies have been replaced
    def logits(tokens: jax.Array, pos: jax.Array, weights: Any) -> jax.Array:
        x, _ = family.forward(cfg, tokens, weights, None, pos)
        return family.logits(cfg, x, weights)

    tokens, pos = recording["tokens"].astype(np.int32), recording["pos"].astype(np.int32)
    ours = np.asarray(logits(tokens, pos, model.weights))[:, recording["kept"]]
    return float(np.abs(ours - recording["logits"]).max() / recording["deviation"])


def ropes(model: Model) -> dict[str, Rope]:
    cfg = model.config
    return {FULL: cfg.rope, SLIDING: cfg.local_rope} if hasattr(cfg, "local_rope") else {FULL: cfg.rope}


def test_there_are_recordings_of_every_family() -> None:
    assert {path.stem.split("_")[0] for path in RECORDINGS} == {"llama3", "qwen3", "olmo2", "gemma3"}
    assert sum(path.stat().st_size for path in RECORDINGS) < 1_000_000


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_logits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, model = load(path)
    theirs = {}
    for kind, rope in ropes(model).items():
        if f"{kind}_radians" in recording:  # a model of one kind of layer has one
            radians, amplitude = recording[f"{kind}_radians"], float(recording[f"{kind}_amplitude"])
            theirs[rope] = Frequencies(radians, amplitude)
            ours = model.family.frequencies(rope, model.config.H)
            ulps = ours.radians.view(np.int32).astype(np.int64) - radians.view(np.int32)
            assert np.abs(ulps).max() <= 2
            assert ours.amplitude == pytest.approx(amplitude, rel=1e-6)
    # An ulp of a frequency moves the logits at position 9,000 by 1e-3 deviations: compare with theirs.
    exact = model.family.frequencies
    monkeypatch.setattr(model.family, "frequencies", lambda rope, H: theirs.get(rope) or exact(rope, H))
    assert distance(model, recording) <= LIMIT
    model.weights["layers"][-1]["k"] *= -1
    assert distance(model, recording) >= 100 * LIMIT
