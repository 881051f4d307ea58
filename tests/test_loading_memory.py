"""Loading needs the weights' memory once: measured in a fresh process, by the code of benchmarks/load.py. Weights that
do not fit are refused before they are read."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest
from helpers import checkpoint_files, gguf_writer

import jaxlm
from jaxlm.checkpoint import hf, safetensors
from jaxlm.devices import host_memory
from jaxlm.nn import params

# Far less than a second copy of the weights or of the file; what the conversion uses is a buffer for each reader.
FACTOR, CONSTANT = 1.1, 64e6


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "benchmarks" / "load.py"
    spec = importlib.util.spec_from_file_location("bench_load", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_peak_memory_is_the_weights(stored, dtype, bench, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"load-memory-{stored}"
    if not folder.exists():
        bench.make(folder, stored, layers=2, vocabulary=16384, shard=64 << 20)
    found = bench.fresh("memory", folder, dtype)
    assert found["weights"] == 48_240_128 * (2 if dtype == "bfloat16" else 4)
    assert found["peak"] >= found["weights"]  # the measurement sees them
    assert found["peak"] <= FACTOR * found["weights"] + CONSTANT, found
    assert found["RssFile"] < 16e6  # nothing is mapped


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_peak_memory_of_metas_form_is_the_weights(stored, dtype, bench, tmp_path_factory):
    """Shards are joined and rows reordered on the way, not in a copy."""
    folder = tmp_path_factory.getbasetemp() / f"load-memory-meta-{stored}"
    if not folder.exists():
        bench.make_meta(folder, stored, layers=2, vocabulary=16384)
    found = bench.fresh("memory", folder, dtype)
    assert found["weights"] == 58_725_376 * (2 if dtype == "bfloat16" else 4)
    assert found["peak"] >= found["weights"]
    assert found["peak"] <= FACTOR * found["weights"] + CONSTANT, found
    assert found["RssFile"] < 16e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_a_quantized_file_is_the_weights(dtype, bench, tmp_path_factory):
    """Blocks become floats in pieces, and the file is not mapped while they are read."""
    path = tmp_path_factory.getbasetemp() / "load-memory.gguf"
    if not path.exists():
        gguf_writer.large_file(path)
    found = bench.fresh("memory", path, dtype)
    assert found["weights"] == 50_336_768 * (2 if dtype == "bfloat16" else 4)
    assert found["peak"] >= found["weights"]
    assert found["peak"] <= FACTOR * found["weights"] + CONSTANT, found
    assert found["RssFile"] < 16e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_a_load_that_quantizes(bench, tmp_path_factory):
    """The quantized weights, the largest array and what is read ahead, but not all arrays. The constant also holds the
    compiler's memory."""
    folder = tmp_path_factory.getbasetemp() / "load-memory-bfloat16-16"
    bench.make(folder, "bfloat16", layers=16, vocabulary=16384, shard=64 << 20)
    found = bench.fresh("memory", folder, "bfloat16", "int8")
    assert found["peak"] >= found["weights"]
    assert found["peak"] <= FACTOR * found["weights"] + 2 * 16384 * 1024 + hf.AHEAD / 4 + 2 * CONSTANT, found


@pytest.fixture
def free(tmp_path, monkeypatch):
    """Sets the free memory of the system, and what a cgroup limit leaves of it."""

    def write(system: int, cgroup: int) -> None:
        (tmp_path / "meminfo").write_text(f"MemAvailable: {system // 1024} kB\n")
        (tmp_path / "cgroup").write_text("0::/\n")
        (tmp_path / "memory.max").write_text(f"{cgroup + 12345}\n")
        (tmp_path / "memory.current").write_text("12345\n")

    for name, path in (("MEMINFO", "meminfo"), ("CGROUP", "cgroup"), ("CGROUPS", "")):
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    return write


@pytest.mark.parametrize("limit", ["system", "cgroup"])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_weights_that_do_not_fit_are_refused_before_they_are_read(stored, limit, free, tmp_path, monkeypatch):
    arrays = checkpoint_files.tensors({**checkpoint_files.LLAMA, "vocab_size": 65536}, kind=stored)
    folder = checkpoint_files.folder(tmp_path / "m", {**checkpoint_files.LLAMA, "vocab_size": 65536}, arrays)
    needed, large = sum(array.nbytes for array in arrays.values()), 1 << 40
    short, read = needed // 4, []
    for module in (hf, safetensors):
        monkeypatch.setattr(module, "read_into", lambda *args: read.append(args))
    free(*((short, large) if limit == "system" else (large, short)))
    with pytest.raises(MemoryError) as caught:
        jaxlm.load(folder)
    text = f"the weights of {folder} need {needed / 1e6:.1f} MB, but {jax.devices()[0]} has {short / 1e6:.1f} MB free"
    assert text in str(caught.value)
    half = f"--dtype bfloat16), which needs {needed / 2e6:.1f} MB"
    assert (half in str(caught.value)) == (stored == "F32")
    assert not read


def test_the_message_names_the_types_that_fit(free, tmp_path):
    """Many layers of small arrays: int8 and the largest array need less than bfloat16."""
    config = {**checkpoint_files.LLAMA, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}
    arrays = checkpoint_files.tensors(config, kind="BF16")
    folder = checkpoint_files.folder(tmp_path / "m", config, arrays)
    needed = sum(array.nbytes for array in arrays.values())
    free(needed - 4096, 1 << 40)
    with pytest.raises(MemoryError, match=r"--quantize int8, which needs .*, or --quantize int4, which needs"):
        jaxlm.load(folder)
    free(needed // 2, 1 << 40)
    with pytest.raises(MemoryError) as caught:
        jaxlm.load(folder, quantize="int8")
    assert "--quantize int8, which" not in str(caught.value)
    assert "--quantize int4, which needs" in str(caught.value)
    free(needed - 4096, 1 << 40)
    jaxlm.load(folder, quantize="int8")


def test_weights_that_just_fit_are_loaded(free, tmp_path):
    arrays = checkpoint_files.tensors(kind="BF16")
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays)
    needed = -(-sum(array.nbytes for array in arrays.values()) // 1024) * 1024
    free(needed, needed)
    jaxlm.load(folder)
    with pytest.raises(MemoryError, match=r"the weights of .* need"):  # twice as much
        jaxlm.load(folder, dtype="float32")


@pytest.mark.parametrize("type", ["int8", "int4"])
def test_the_memory_of_quantized_weights_decides(type, free, tmp_path):
    """While a weight is quantized, it exists as an array too. The quantized model fits where the other does not."""
    config = {**checkpoint_files.LLAMA, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}
    arrays = checkpoint_files.tensors(config, kind="F32")
    folder = checkpoint_files.folder(tmp_path / "m", config, arrays)
    whole, largest = sum(a.nbytes for a in arrays.values()), max(a.nbytes for a in arrays.values())
    few = params.nbytes(jaxlm.load(folder, quantize=type).weights)
    enough = -(-(few + largest) // 1024) * 1024
    assert enough < whole
    free(enough, enough)
    assert params.nbytes(jaxlm.load(folder, quantize=type).weights) == few
    with pytest.raises(MemoryError, match=r"the weights of .* need"):
        jaxlm.load(folder)
    free(few, few)
    with pytest.raises(MemoryError, match=r"the weights of .* need"):
        jaxlm.load(folder, quantize=type)
