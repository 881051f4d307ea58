"""Loading needs the weights' memory once: measured in a fresh process, by the code of benchmarks/load.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

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
    found = bench.measure(folder, dtype, speed=False)
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
    found = bench.measure(folder, dtype, speed=False)
    assert found["weights"] == 58_725_376 * (2 if dtype == "bfloat16" else 4)
    assert found["peak"] >= found["weights"]
    assert found["peak"] <= FACTOR * found["weights"] + CONSTANT, found
    assert found["RssFile"] < 16e6
