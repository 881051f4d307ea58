"""Two processes of four virtual devices each resume the training of an adapter as one process of eight does.

tests/devices/test_distributed.py has the same for a model, in the pair of processes that it starts anyway.
"""

import signal
import time
from pathlib import Path

import pytest
from helpers.process_pair import free_port, start_processes, wait_for
from helpers.train_pair_script import assert_near, assert_same_run
from helpers.training_runs import command, write_files

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


@pytest.mark.slow
def test_a_sigterm_of_one_process_stops_all_after_the_same_step(tmp_path) -> None:
    """As when a cluster takes one machine back. The step is saved."""
    files, out, port = write_files(tmp_path), tmp_path / "run", free_port()
    endless = {"--steps": "100000", "--save-every": "100000", "--eval-every": "0", "--batch": "8"}
    flags = dict(zip(*[iter(command(files, out))] * 2)) | endless
    argv = [part for pair in flags.items() for part in pair]
    processes = [
        ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(i)] for i in range(2)
    ]
    started = start_processes(*(["-m", "jaxlm", "train", *argv, *more] for more in processes))
    deadline = time.monotonic() + 180
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, "the run did not begin"
        assert all(process.poll() is None for process in started), wait_for(started)
        time.sleep(0.5)
    started[1].send_signal(signal.SIGTERM)
    ended = wait_for(started, 120)
    assert [status for status, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    [saved] = [path.name for path in (out / "checkpoints").iterdir() if path.name.isdecimal()]
    assert f"stopped after step {saved} and saved it" in ended[0][2]
