"""The processes of rivals and the files that they read, without torch and llama.cpp (tests/oracle/test_bench_rivals.py
has them)."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_files
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.bench import rival_files, rivals
from jaxlm.bench.cases import Case
from jaxlm.bench.rivals import Rival


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxlm" / "bench"


def test_a_rival_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else object())
    rivals.require(["transformers"])
    with pytest.raises(ValueError, match=r"llama.cpp needs xllamacpp: pip install 'jaxlm\[bench\]'"):
        rivals.require(["transformers", "llama.cpp"])


def test_the_message_of_a_process_that_ends() -> None:
    with pytest.raises(ValueError, match="a name ended with status 1: KeyError: 'no rival'"):
        Rival("a name", "no rival")


def test_the_protocol(tmp_path, monkeypatch) -> None:
    """A process that answers with the number of prompts, and prints on stdout, which must not disturb."""
    (tmp_path / "fake_rival.py").write_text(
        "from jaxlm.bench import rivals\n"
        "def serve(scale):\n"
        "    print('a library prints')\n"
        "    return lambda case, prompts: None if case.depth else len(prompts) * float(scale) + case.tokens\n"
        "rivals.SERVERS['fake'] = serve\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    code = "import fake_rival, sys; from jaxlm.bench import rivals; rivals.main(*sys.argv[1:])"
    popen = rivals.subprocess.Popen
    monkeypatch.setattr(
        rivals.subprocess, "Popen", lambda args, **more: popen([sys.executable, "-c", code, *args[3:]], **more)
    )
    rival = Rival("fake one", "fake", "0.5")
    try:
        case = Case("decode", 7, 0, 3)
        sample = rival.run(case, case.prompts(50))
        assert sample is not None
        assert sample.seconds == 8.5
        assert rival.run(case._replace(depth=4), [[1]]) is None
    finally:
        rival.close()
    assert rival.process.returncode is not None


def test_the_processes_do_not_import_jax() -> None:
    """A rival's memory and threads are its own."""
    code = "import sys, jaxlm.bench.rivals; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert rivals.subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_gguf_file_of_a_model_without_a_tokenizer(cache) -> None:
    model, notes = tiny("llama3", vocab_size=300, dtype=jnp.bfloat16), []
    path = rival_files.gguf_for_llama_cpp(model, None, notes.append)
    assert path.parent == cache
    assert path.suffix == ".gguf"
    assert len(notes) == 1
    read = jaxlm.load(path)
    assert read.tokenizer is not None
    assert read.config.V == 300
    for name in ("embed", "norm", "head"):
        np.testing.assert_array_equal(read.weights[name], model.weights[name])
    np.testing.assert_array_equal(read.weights["layers"][1]["q"], model.weights["layers"][1]["q"])
    assert rival_files.gguf_for_llama_cpp(model, None, notes.append) == path
    assert len(notes) == 1  # it is written once


def test_other_weights_have_other_files(cache) -> None:
    model, notes = tiny("llama3", vocab_size=300), []
    one = rival_files.gguf_for_llama_cpp(model, None, notes.append)
    other = tiny("llama3", vocab_size=300, dtype=jnp.bfloat16)
    assert rival_files.gguf_for_llama_cpp(other, None, notes.append) != one
    wider = tiny("llama3", vocab_size=301)
    assert rival_files.gguf_for_llama_cpp(wider, None, notes.append) != one
    assert len(notes) == 3


def test_a_small_vocabulary_has_no_gguf_file() -> None:
    with pytest.raises(ValueError, match="at least 257 tokens"):
        rival_files.gguf_for_llama_cpp(tiny("llama3"), None, print)


def test_the_folder_for_transformers(tmp_path, cache) -> None:
    """The checkpoint's own, or one with the same weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_files.write(folder)
    loaded = jaxlm.load(folder)
    assert rival_files.folder_for_transformers(loaded, None, print) == folder
    notes: list[str] = []
    config = {**tiny_files.CONFIG}
    random = replace(loaded, checkpoint=None, source="random")
    written = rival_files.folder_for_transformers(random, config, notes.append)
    assert written.parent == cache
    assert len(notes) == 1
    np.testing.assert_array_equal(jaxlm.load(written).weights["embed"], loaded.weights["embed"])
    gguf = jaxlm.load(rival_files.gguf_for_llama_cpp(loaded, None, print))
    folder = rival_files.folder_for_transformers(gguf, None, print)
    np.testing.assert_array_equal(jaxlm.load(folder).weights["layers"][0]["k"], loaded.weights["layers"][0]["k"])


def test_contestants_that_do_not_fit_are_left_out(monkeypatch) -> None:
    model, notes, started = tiny("llama3", vocab_size=300), [], []
    monkeypatch.setattr(rival_files.host_memory, "available", lambda: 3 * 40_000)
    monkeypatch.setattr(rivals, "start_transformers", lambda name, *_: started.append(name))
    monkeypatch.setattr(rivals, "start_llama_cpp", lambda *_: started.append("llama.cpp"))
    monkeypatch.setattr(rival_files, "folder_for_transformers", lambda *_: Path())
    monkeypatch.setattr(rival_files.params, "count", lambda *_: 40_000)
    rival_files.start_rivals(["transformers"], model, None, [Case("decode", 2, 0, 1)], notes.append)
    assert started == ["transformers bfloat16", "transformers bfloat16 compiled"]
    assert notes[0].startswith("transformers float32 is left out: it needs 0.2 MB, 0.1 MB are free")
