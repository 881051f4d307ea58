"""`jaxlm bench train` and `load`, measured with tiny models."""

import math
import mmap

import jax
import numpy as np
import pytest
from helpers import tiny_files
from helpers.tiny_models import tiny

from jaxlm.bench import load_time, memory_use, tables
from jaxlm.bench.load_time import LoadSession
from jaxlm.bench.train_step import TrainSession
from jaxlm.checkpoint.source import ModelSource
from jaxlm.nn import flops
from jaxlm.training import step


@pytest.fixture(autouse=True)
def rates(monkeypatch) -> None:
    monkeypatch.setattr("jaxlm.bench.limits.read_rate", lambda device: 1e9)
    monkeypatch.setattr("jaxlm.bench.limits.matmul_rate", lambda device, dtype: 1e9)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_steps(method, monkeypatch) -> None:
    losses, states = [], []
    make = step.make_step

    def recorded(*args, **options):
        take = make(*args, **options)

        def wrapped(state, batch, frozen=None):
            new, metrics = take(state, batch, frozen)
            jax.debug.callback(lambda loss: losses.append(float(loss)), metrics.loss)
            states.append(jax.tree.leaves(state.weights))
            return new, metrics

        return wrapped

    monkeypatch.setattr(step, "make_step", recorded)
    model = tiny("llama3")
    session = TrainSession(model, [(2, 16)], 3, method, rank=4)
    session.run(lambda text, seconds: None)
    jax.effects_barrier()
    (row,) = session.rows
    assert len(row.seconds) == 3
    assert len(losses) == 4  # the first step is not counted
    assert losses[-1] < losses[0]  # the same batch: it learns
    size = sum(math.prod(leaf.shape) for leaf in states[0]) if method == "lora" else None
    operations = flops.training(model.family.PARAMS, model.config, 16, size) * 2 * 16
    assert row.operations == operations
    assert row.compile_seconds > 0
    (record,) = tables.train_records(session)
    assert record["limit_tokens_per_second"] == pytest.approx(1e9 / operations * 32)
    assert record["mfu"] == pytest.approx(np.mean([32 / s for s in row.seconds]) / (1e9 / operations * 32))
    assert tables.train_table([record]).count("\n") == 2


def test_rows_longer_than_the_context() -> None:
    with pytest.raises(ValueError, match="context length"):
        TrainSession(tiny("llama3", max_position_embeddings=64), [(1, 65)], 1).run(lambda text, seconds: None)


@pytest.fixture
def folder(tmp_path):
    tiny_files.write(tmp_path)
    return tmp_path


def test_loading(folder, monkeypatch) -> None:
    calls = []

    def once(source, options):
        found = load_time.load_once(source, options)
        calls.append(found)
        return found

    monkeypatch.setattr(load_time, "in_fresh_process", once)
    session = LoadSession(ModelSource(str(folder)), {"dtype": "bfloat16", "mesh": None}, 2)
    session.run(lambda text, seconds: None)
    assert len(calls) == 3  # the first is not counted
    assert session.load_seconds == [each["load"] for each in calls[1:]]
    assert session.file_bytes == (folder / "model.safetensors").stat().st_size
    assert session.weight_bytes == 2 * 102_848
    (record,) = tables.load_records(session)
    assert record["bytes_per_second"] == pytest.approx(
        session.file_bytes * np.mean([1 / s for s in session.load_seconds])
    )
    assert record["limit_bytes_per_second"] == session.file_bytes / min(session.read_seconds)
    assert tables.load_table([record]).count("\n") == 2


def test_the_plain_reader_reads_everything(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(load_time, "BLOCK", 1000)
    data = np.random.default_rng(0).integers(0, 256, 4321).astype(np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    read = []
    fill = load_time._fill
    monkeypatch.setattr(load_time, "_fill", lambda *args: (fill(*args), read.append(args))[0])
    assert load_time.read_files([tmp_path / "a"]) > 0
    parts = {at: part for _, part, at in read}
    np.testing.assert_array_equal(np.concatenate([parts[at] for at in sorted(parts)]), data)
    with pytest.raises(OSError, match="became shorter"):
        fill(tmp_path / "a", np.empty(10, np.uint8), 4320)


def test_a_fresh_process(folder) -> None:
    found = load_time.in_fresh_process(ModelSource(str(folder)), {"dtype": "auto", "mesh": None})
    assert found["weight_bytes"] == 4 * 102_848
    assert found["load"] > 0
    assert found["memory"] is None or found["memory"] < 1e9


def test_the_peak_is_reset(monkeypatch, tmp_path) -> None:
    """Some sandboxes do not let a process write to its own clear_refs; the peak is not known then."""
    cpu = jax.devices("cpu")[0]

    def use_and_free() -> None:
        """An array may take memory that was freed but is still resident."""
        with mmap.mmap(-1, 100_000_000) as block:
            block.write(b"1" * 100_000_000)

    memory_use.reset_peak()
    use_and_free()
    high = memory_use.peak(cpu)
    assert high is not None
    assert high > 100_000_000
    if memory_use.reset_peak():
        assert memory_use.peak(cpu) < high - 50_000_000  # pyright: ignore[reportOptionalOperand]
    use_and_free()
    monkeypatch.setattr(memory_use, "CLEAR", tmp_path / "missing" / "clear_refs")
    assert not memory_use.reset_peak()
    assert memory_use.peak(cpu)
    assert memory_use.peak(cpu, was_reset=False) is None  # it would be that of an earlier measurement
