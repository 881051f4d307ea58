"""Two processes of four virtual devices each take the steps that one process of eight takes."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from pairs import ended, free_port, two
from training.runs import lines, made, run_of

import jaxlm
from jaxlm.training import loop

SCRIPT = Path(__file__).with_name("train_together.py")


@pytest.mark.parametrize("mesh", ["data=4,model=2", pytest.param("data=1,model=8", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(shared, tmp_path, mesh) -> None:
    """Only the order of sums over devices differs: losses and weights agree to float32's rounding. Each process makes
    the rows that its devices hold, and one writes."""
    files = made(tmp_path, shared)
    shutil.copytree(shared / "checkpoints/stories260K", tmp_path / "tokenizer")
    both = tmp_path / "both"
    port = free_port()
    commands = ([str(SCRIPT), port, str(i), str(tmp_path), str(both), mesh] for i in range(2))
    for status, _, err in ended(two(*commands), 240):
        assert status == 0, err
    one = run_of(files, tmp_path / "one", batch=8, steps=6, save_every=4, eval_every=3, mesh=mesh)
    loop.train(replace(one, samples=("the cat",), sample_tokens=3))
    ours, theirs = lines(both), lines(tmp_path / "one")
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        numbers = [name for name, value in line.items() if not isinstance(value, str)]
        np.testing.assert_allclose([line[n] for n in numbers], [other[n] for n in numbers], rtol=1e-4)
    for a, b in zip(*(jax.tree.leaves(jaxlm.load(out / "model").weights) for out in (both, tmp_path / "one"))):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
