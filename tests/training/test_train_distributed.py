"""Two processes of four virtual devices each resume the training of an adapter as one process of eight does.

tests/devices/test_distributed.py has the same for a model, in the pair of processes that it starts anyway.
"""

from pathlib import Path

import pytest
from helpers.process_pair import free_port, start_processes, wait_for
from helpers.train_pair_script import assert_near, assert_same_run
from helpers.training_runs import write_files

import jaxlm
from jaxlm.nn import lora

SCRIPT = Path(__file__).parents[1] / "helpers" / "train_pair_script.py"


@pytest.mark.slow
def test_an_adapter_of_two_processes_resumes(tmp_path) -> None:
    """It is interrupted after a checkpoint."""
    files, both, mesh, port = write_files(tmp_path), tmp_path / "both", "data=4,model=2", free_port()
    commands = ([str(SCRIPT), port, str(i), str(tmp_path), str(both), mesh, "adapter"] for i in range(2))
    for status, _, err in wait_for(start_processes(*commands), 240):
        assert status == 0, err
    one = assert_same_run(tmp_path, both, mesh, adapter=True)
    ours, theirs = (jaxlm.load(files["tokenizer"], adapter=out / "adapter").weights for out in (both, one))
    assert lora.count(ours) > 0
    for (_, a), (_, b) in zip(lora.leaves(ours), lora.leaves(theirs), strict=True):
        assert_near(a.merged() - a.w, b.merged() - b.w)
