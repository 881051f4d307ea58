"""Limits: rates, and the least time of prefill and of decoding steps."""

import jax
import pytest
from helpers.tiny_models import tiny

from jaxlm import loading
from jaxlm.bench import limits
from jaxlm.bench.limits import Rates
from jaxlm.devices import topology
from jaxlm.nn import flops, params


@pytest.fixture
def model():
    return tiny("gemma3")  # a window of 5 tokens in one of two layers


def test_the_slower_of_memory_and_arithmetic_is_the_limit() -> None:
    rates = Rates(1, read=10.0, matmul=100.0)
    assert rates.limit(50, 200) == (5.0, "memory")
    assert rates.limit(10, 200) == (2.0, "compute")
    assert Rates(2, read=10.0, matmul=100.0).limit(50, 200) == (2.5, "memory")


def test_rates_are_bytes_and_flops_over_the_best_time(monkeypatch) -> None:
    device = jax.devices()[0]
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "_best", lambda function, x: 0.5)
    assert limits.read_rate(device) == 2 * (1 << 22)
    assert limits.matmul_rate(device, "bfloat16") == 4 * 2048**3


def test_the_best_rates_of_a_run_count(monkeypatch) -> None:
    reads, matmuls = iter([3.0, 5.0, 4.0]), {"float32": 7.0, "bfloat16": 9.0}
    monkeypatch.setattr(limits, "read_rate", lambda device: next(reads))
    monkeypatch.setattr(limits, "matmul_rate", lambda device, dtype: matmuls[dtype])
    rates = Rates()
    for _ in range(3):
        rates.measure(jax.devices()[0], "bfloat16")
    assert (rates.read, rates.matmul, rates.matmul_dtype) == (5.0, 9.0, "bfloat16")


def test_a_real_rate_is_that_of_a_machine() -> None:
    rate = limits.matmul_rate(jax.devices("cpu")[0], "float32")
    assert 1e8 < rate < 1e15


def test_decoding_reads_the_weights_and_a_cache_that_grows(model) -> None:
    weights, per_slot = params.nbytes(model.weights), 2 * 2 * 20 * 4  # k and v, two kv heads of width 20, float32
    slots = [(length, min(length, 5)) for length in (4, 5, 6, 7)]  # full attention, and the window
    total = sum(weights + 3 * per_slot * (full + local) for full, local in slots)
    found = limits.decode_limit(model, Rates(read=1.0, matmul=1e30), 3, 4, depth=3)
    assert found == (pytest.approx(total), "memory")


def test_decoding_of_many_rows_is_bound_by_arithmetic(model) -> None:
    table, cfg = model.family.PARAMS, model.config
    total = 64 * (flops.forward(table, cfg, 1, 3) + flops.forward(table, cfg, 1, 4))
    assert limits.decode_limit(model, Rates(read=1e30, matmul=1.0), 64, 2, depth=3) == (pytest.approx(total), "compute")


def test_prefill_is_bound_by_arithmetic_or_by_reading_the_weights_once(model) -> None:
    table, cfg = model.family.PARAMS, model.config
    compute = limits.prefill_limit(model, Rates(read=1e30, matmul=1.0), 2, 10, 6)
    assert compute == (pytest.approx(2 * flops.forward(table, cfg, 10, 6)), "compute")
    memory = limits.prefill_limit(model, Rates(read=1.0, matmul=1e30), 2, 10, 0)
    assert memory == (params.nbytes(model.weights), "memory")


def test_limits_of_a_mesh_are_those_of_one_device(model, monkeypatch) -> None:
    """On data=8 each device reads all weights, for its rows. On model=2 it reads a half."""
    monkeypatch.setattr(limits, "devices_of", lambda model: model.mesh.size)
    rates = Rates(read=1.0, matmul=1e30)
    for sizes, rows, part in (({"data": 8, "model": 1}, 8, 1), ({"data": 1, "model": 2}, 8, 2)):
        spread = loading.spread(model, topology.make(sizes, model.config.K, jax.devices()[: 8 if part == 1 else 2]))
        of = limits.layout_of(spread)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(spread.weights))
        assert limits.prefill_limit(spread, rates, rows, 1, 0).seconds == held
        kept = limits.decode_limit(spread, rates, rows, 1, 10).seconds - held
        per_slot = 2 * 2 * 20 * 4 * (11 + 5)
        assert kept == per_slot * rows // of.data // part
