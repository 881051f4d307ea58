"""Two processes of four virtual devices each resume the training of an adapter as one process of eight does.

tests/devices/test_distributed.py has the same for a model, in the pair of processes that it starts anyway.
"""

import json
import signal
import time
from pathlib import Path

import pytest
from helpers import tiny_files
from helpers.base_chats import write_chats
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
    one = assert_same_run(tmp_path, both, mesh, "adapter")
    ours, theirs = (jaxlm.load(files["tokenizer"], adapter=out / "adapter").weights for out in (both, one))
    assert lora.count(ours) > 0
    for (_, a), (_, b) in zip(lora.leaves(ours), lora.leaves(theirs), strict=True):
        assert_near(a.merged() - a.w, b.merged() - b.w)


@pytest.mark.slow
def test_chats_with_new_tokens_in_a_streamed_mixture(tmp_path) -> None:
    """Two processes read the same stream, and draw the same new rows. They are interrupted after a checkpoint."""
    write_files(tmp_path)
    write_chats(tmp_path / "chats.jsonl", {f"Who is {i}?": f"Not {i}" for i in range(20)})
    (tmp_path / "full").mkdir()
    tiny_files.write(tmp_path / "full")
    both, mesh, port = tmp_path / "both", "data=4,model=2", free_port()
    commands = ([str(SCRIPT), port, str(i), str(tmp_path), str(both), mesh, "chats"] for i in range(2))
    for status, _, err in wait_for(start_processes(*commands), 240):
        assert status == 0, err
    one = assert_same_run(tmp_path, both, mesh, "chats")
    before, ours, theirs = (jaxlm.load(folder) for folder in (tmp_path / "full", both / "model", one / "model"))
    assert ours.config.V == theirs.config.V > before.config.V
    assert ours.tokenizer.encode("<|im_end|>") == theirs.tokenizer.encode("<|im_end|>")
    # How many windows were read ahead depends on the time.
    for a, b in zip(*(json.loads((out / "windows.json").read_text()) for out in (both, one)), strict=True):
        n = min(len(a[1]), len(b[1]))
        assert n > 3
        assert (a[0], a[1][:n]) == (b[0], b[1][:n])


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
