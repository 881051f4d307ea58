"""`jaxlm export` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import meta_files, tiny_files

import jaxlm
from jaxlm.checkpoint import safetensors
from jaxlm.cli import main


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    tiny_files.write(path)
    return path


def test_export_prints_what_was_written(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"wrote {tmp_path / 'out'}: 20 tensors, 0.4 MB\n"
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_in_another_dtype_with_flag_m(folder, tmp_path):
    assert main(["export", "-m", str(folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    tensors = safetensors.read_header(tmp_path / "out/model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {"BF16"}
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**tiny_files.CONFIG, "dtype": "bfloat16"}
    assert jaxlm.load(tmp_path / "out").dtype == "bfloat16"


def test_meta_format_is_read_but_not_written(folder, tmp_path, capsys):
    meta_files.convert(folder, tmp_path / "meta")
    assert main(["export", str(tmp_path / "meta"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert main(["export", str(folder), str(tmp_path / "other"), "--format", "meta"]) == 1
    assert "Meta's format" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_existing_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out)]) == 0
    assert main(["export", str(folder), str(out)]) == 1
    assert f"jaxlm: {out} is a checkpoint already: --force (force=True) replaces" in capsys.readouterr().err
    assert main(["export", str(folder), str(out), "--force"]) == 0
    assert main(["export", str(out), str(out), "--force"]) == 1
    assert f"jaxlm: {out} holds the files that this model was loaded from" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["model"], ["-m", "model"], ["-m", "model", "a", "b"]])
def test_usage(argv, capsys):
    assert main(["export", *argv]) == 2
    assert "jaxlm export MODEL OUT" in capsys.readouterr().err


def test_invalid_model(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert f"jaxlm: {tmp_path} is not a checkpoint" in capsys.readouterr().err


SLOW = """
import sys, time
from jaxlm.checkpoint import writer as files
from jaxlm.cli import main
files.SLICE = 100
def counted(parts, advance):
    for part in parts:
        time.sleep(0.01)
        yield part
files.counted = counted
raise SystemExit(main(["export", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_interrupted_while_writing(folder, tmp_path):
    """Ctrl-C leaves neither the folder nor the hidden one."""
    command = [sys.executable, "-c", SLOW, str(folder), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    begun = time.monotonic()
    while not list(tmp_path.glob(".out.*/model.safetensors")):
        assert process.poll() is None
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\ninterrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
