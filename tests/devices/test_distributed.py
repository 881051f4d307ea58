"""Multi-process runs: two processes of four virtual devices each, on loopback, load, generate and export as one."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import checkpoint_files
from helpers.process_pair import HEARTBEAT, free_port, start_processes, wait_for
from helpers.process_pair_script import DRAWN, GREEDY, PROMPTS, TEXT
from helpers.train_pair_script import assert_same_run
from helpers.training_runs import quick_runs, write_files

import jaxlm
from jaxlm.checkpoint.safetensors import chunks, read_index
from jaxlm.cli import main
from jaxlm.cli.common import STORIES
from jaxlm.devices import distributed

RAW = {**checkpoint_files.LLAMA, "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
       "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
# The mesh of generation, the share of a weight that each process reads, and the mesh of training.
MESHES = [("model=8", 0.5, "data=4,model=2"),
          pytest.param(("data=2,model=4", 1.0, "data=1,model=8"), marks=pytest.mark.slow)]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {name: b"".join(map(bytes, chunks(tensor))) for name, tensor in read_index(folder).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two checkpoints, `model` and `other`, and the files of a training run."""
    root = tmp_path_factory.mktemp("pair")
    checkpoint_files.folder(root / "model", RAW, checkpoint_files.tensors(RAW))
    checkpoint_files.folder(root / "other", {**RAW, "rope_theta": 5e5}, checkpoint_files.tensors(RAW))
    shutil.copy(STORIES / "tokenizer.json", root / "model")
    write_files(root)
    return root


class Pair(NamedTuple):
    """What two processes left: their status, stdout and stderr, and their results."""

    folder: Path
    part: float
    ended: list[tuple[int, str, str]]
    results: list[dict[str, Any]]


@pytest.fixture(scope="module", params=MESHES)
def pair(request, folder) -> Pair:
    """Two processes of four virtual devices each. Starting them takes long, so they run once for all tests."""
    mesh, part, train_mesh = request.param
    script, port = str(Path(__file__).parents[1] / "helpers" / "process_pair_script.py"), free_port()
    files = [folder / f"{i}.json" for i in range(2)]
    for file in files:
        file.unlink(missing_ok=True)
    for name in ("exported", "both", "one"):
        shutil.rmtree(folder / name, ignore_errors=True)
    commands = ([script, port, str(i), str(folder), mesh, train_mesh] for i in range(2))
    ended = wait_for(start_processes(*commands), 200)
    assert all(file.is_file() for file in files), ended
    return Pair(folder, part, ended, [json.loads(file.read_text()) for file in files])


def test_two_processes_equal_one(pair):
    """Greedy text, sampled text and exported files are those of one process. Each process reads only its own shards."""
    first, second = pair.results
    assert first["texts"] == second["texts"]
    assert first["drawn"] == second["drawn"]
    assert first["seed"] == second["seed"]
    assert first["part"] == second["part"] == pair.part
    model = jaxlm.load(pair.folder / "model")
    assert first["texts"] == [text.tokens for text in jaxlm.generate(model, PROMPTS, **GREEDY)]
    assert first["drawn"] == [text.tokens for text in jaxlm.generate(model, PROMPTS, seed=first["seed"], **DRAWN)]
    assert contents(pair.folder / "exported") == contents(pair.folder / "model")


def test_two_processes_train_as_one(pair):
    """As one process does on one device. Each loads the rows that its devices hold, and the coordinator writes."""
    with quick_runs():
        assert_same_run(pair.folder, pair.folder / "both", mesh="")


def test_only_the_coordinator_prints(pair, capsys):
    """The prompt is on the coordinator's stdin alone."""
    (_, text, err), (_, silence, _) = pair.ended
    assert silence == ""
    assert main(["generate", "Once upon a time", "-m", str(pair.folder / "model"), *TEXT]) == 0
    assert text == capsys.readouterr().out
    assert "for 2 processes at 127.0.0.1:" in err


def test_different_prompts_are_an_error_in_every_process(pair):
    for result in pair.results:
        assert "the processes disagree about what to generate: process 0 has 1 prompts of" in result["prompts"]


def test_different_models_are_an_error_that_names_both(pair):
    for result in pair.results:
        assert "the processes disagree about the model: process 0 has" in result["models"]
        assert str(pair.folder / "model") in result["models"]
        assert str(pair.folder / "other") in result["models"]


def test_a_mesh_of_too_few_devices(pair):
    """A command that fails names its process."""
    for index, (status, _, err) in enumerate(pair.ended):
        assert status == 1
        assert f"process {index}: jaxlm: " in err
        assert "4 devices, but there are 8 in 2 processes" in err


@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_other(dead):
    """It is killed while the other one waits for it."""
    code = (
        f"import sys; from jaxlm.devices import distributed as p; p.HEARTBEAT = {HEARTBEAT};"
        "p.start(sys.argv[1], 2, int(sys.argv[2]));"
        "p.gather('here'); print('here', file=sys.stderr, flush=True);"
        "import time; time.sleep(600 * (p.process_index() == int(sys.argv[3]))); p.gather('there')"
    )
    address = f"127.0.0.1:{free_port()}"
    started = start_processes(*(["-c", code, address, str(i), str(dead)] for i in range(2)))
    for line in iter(started[dead].stderr.readline, ""):
        if line.strip() == "here":
            break
    time.sleep(0.5)
    began = time.monotonic()
    started[dead].send_signal(signal.SIGKILL)
    status, _, err = wait_for(started, 4 * HEARTBEAT)[1 - dead]
    assert status != 0
    assert "distributed service detected fatal errors" in err or "Gloo" in err
    assert time.monotonic() - began < 4 * HEARTBEAT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "127.0.0.1:1"}, "--num-processes"),
        ({"coordinator": "127.0.0.1", "count": 2, "index": 0}, "HOST:PORT"),
        ({"coordinator": "127.0.0.1:1", "count": 2, "index": 2}, "--process-id 2"),
    ],
)
def test_invalid_flags_are_rejected(flags, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(**flags)


def test_timeout_when_the_other_process_does_not_connect(folder):
    joint = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "0"]
    run = f"cli.main({['generate', 'Once', '-m', str(folder / 'model'), *joint]})"
    command = f"from jaxlm import cli; from jaxlm.devices import distributed; distributed.CONNECT = 1; {run}"
    [(status, out, err)] = wait_for(start_processes(["-c", command]))
    assert status != 0
    assert not out
    assert "for 2 processes at 127.0.0.1:" in err
    assert "distributed service detected fatal errors" in err


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "4"}, 1),  # a batch script, without srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ],
)
def test_num_launched_of_each_launcher(monkeypatch, names, count):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert distributed.num_launched() == count


def test_chat_runs_in_one_process(folder, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        main(["chat", "-m", str(folder / "model")])
    assert "chat runs in a single process" in capsys.readouterr().err
