"""Multi-process runs: two processes of four virtual devices each, on loopback, load, generate and export as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import checkpoint_files
from helpers.process_pair import HEARTBEAT, free_port, start_processes, wait_for
from helpers.process_pair_script import DRAWN, GREEDY, PROMPTS

import jaxlm
from jaxlm.checkpoint.safetensors import chunks, read_index
from jaxlm.cli import main
from jaxlm.devices import distributed

RAW = {**checkpoint_files.LLAMA, "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
       "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {name: b"".join(map(bytes, chunks(tensor))) for name, tensor in read_index(folder).items()}


def generate(folders: list[Path], *flags: str) -> list[list[str]]:
    """The command line of each process."""
    joint = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(len(folders)), *flags]
    return [
        ["-m", "jaxlm", "generate", "Once", "-m", str(f), *joint, "--process-id", str(i)] for i, f in enumerate(folders)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoint_files.folder(tmp_path_factory.mktemp("model"), RAW, checkpoint_files.tensors(RAW))


@pytest.mark.parametrize(
    ("mesh", "part"), [("model=8", 0.5), pytest.param("data=2,model=4", 1.0, marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(folder, tmp_path, mesh, part):
    """Greedy text, sampled text and exported files are those of one process. Each process reads only its own shards."""
    script, port = str(Path(__file__).parents[1] / "helpers" / "process_pair_script.py"), free_port()
    commands = ([script, port, str(i), str(folder), str(tmp_path), mesh] for i in range(2))
    for status, _, err in wait_for(start_processes(*commands)):
        assert status == 0, err
    model = jaxlm.load(folder)
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == second
    assert first["part"] == part
    assert first["texts"] == [text.tokens for text in jaxlm.generate(model, PROMPTS, **GREEDY)]
    assert first["drawn"] == [text.tokens for text in jaxlm.generate(model, PROMPTS, seed=first["seed"], **DRAWN)]
    assert contents(tmp_path / "exported") == contents(folder)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory, shared) -> Path:
    """A model with a tokenizer."""
    raw = {**RAW, "vocab_size": 512}
    folder = checkpoint_files.folder(tmp_path_factory.mktemp("with_tokenizer"), raw, checkpoint_files.tensors(raw))
    shutil.copy(shared / "checkpoints/stories260K/tokenizer.json", folder)
    return folder


def test_only_the_coordinator_prints(with_tokenizer, capsys):
    """The prompt is on the coordinator's stdin alone."""
    flags = ["--max-tokens", "4", "--temperature", "0", "--ignore-eos"]
    commands = generate([with_tokenizer, with_tokenizer], *flags)
    for command in commands:
        command[3] = "-"
    started = start_processes(*commands, stdin=[subprocess.PIPE, subprocess.DEVNULL])
    started[0].stdin.write("Once upon a time")
    started[0].stdin.close()
    started[0].stdin = None
    (first, text, err), (second, silence, _) = wait_for(started)
    assert (first, second) == (0, 0), err
    assert silence == ""
    assert main(["generate", "Once upon a time", "-m", str(with_tokenizer), *flags]) == 0
    assert text == capsys.readouterr().out
    assert "for 2 processes at 127.0.0.1:" in err


def test_different_prompts_are_an_error_in_every_process(with_tokenizer):
    commands = generate([with_tokenizer, with_tokenizer])
    commands[1][3] = "Twice"
    for status, _, err in wait_for(start_processes(*commands)):
        assert status == 1
        assert "the processes disagree about what to generate: process 0 has 1 prompts of" in err


def test_different_models_are_an_error_that_names_both(folder, tmp_path):
    other = checkpoint_files.folder(tmp_path / "other", {**RAW, "rope_theta": 5e5}, checkpoint_files.tensors(RAW))
    for status, out, err in wait_for(start_processes(*generate([folder, other]))):
        assert (status, out) == (1, "")
        assert "the processes disagree about the model: process 0 has" in err
        assert str(folder) in err
        assert str(other) in err


def test_a_mesh_of_too_few_devices(folder):
    for status, _, err in wait_for(start_processes(*generate([folder, folder], "--mesh", "model=4"))):
        assert status == 1
        assert "4 devices, but there are 8 in 2 processes" in err


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_the_other(folder, tmp_path, dead):
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
    run = f"cli.main({generate([folder, folder])[0][2:]})"
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
        main(["chat", "-m", str(folder)])
    assert "chat runs in a single process" in capsys.readouterr().err
