"""Two processes of four virtual devices each train as one process of eight."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.process_pair import free_port, start_processes, wait_for
from helpers.train_pair_script import run_for
from helpers.training_runs import lines, write_files

import jaxlm
from jaxlm.nn import lora
from jaxlm.training import loop

SCRIPT = Path(__file__).parents[1] / "helpers" / "train_pair_script.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files of a run, and a checkpoint that is also the tokenizer."""
    write_files(tmp_path)
    return tmp_path


def runs(folder: Path, mesh: str, *more: str) -> tuple[Path, Path]:
    """Returns the folders of a run by two processes, and of the same run by one. Metrics agree to float32 rounding:
    only the order of sums over devices differs."""
    both, one = folder / "both", folder / "one"
    port = free_port()
    commands = ([str(SCRIPT), port, str(i), str(folder), str(both), mesh, *more] for i in range(2))
    for status, _, err in wait_for(start_processes(*commands), 240):
        assert status == 0, err
    loop.train(run_for(folder, one, mesh, bool(more)))
    for line, other in zip(lines(both), lines(one), strict=True):
        assert line.keys() == other.keys()
        numbers = [name for name, value in line.items() if not isinstance(value, str)]
        np.testing.assert_allclose([line[n] for n in numbers], [other[n] for n in numbers], rtol=1e-4)
    return both, one


def near(a: Any, b: Any) -> None:
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("mesh", ["data=4,model=2", pytest.param("data=1,model=8", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(folder, mesh) -> None:
    """Each loads the rows that its devices hold, and the coordinator writes."""
    ours, theirs = (jaxlm.load(out / "model").weights for out in runs(folder, mesh))
    jax.tree.map(near, ours, theirs)


@pytest.mark.slow
def test_an_adapter_of_two_processes_resumes(folder) -> None:
    base, found = folder / "tokenizer", runs(folder, "data=4,model=2", "adapter")
    ours, theirs = (jaxlm.load(base, adapter=out / "adapter").weights for out in found)
    assert lora.count(ours) > 0
    for (_, a), (_, b) in zip(lora.leaves(ours), lora.leaves(theirs), strict=True):
        near(a.merged() - a.w, b.merged() - b.w)
