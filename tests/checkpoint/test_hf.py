"""Reading weights: bit for bit what the file holds, without a copy, and whole or not at all."""

import gc
import os
import signal
import struct
import threading
import time
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import checkpoint_files

from jaxlm.checkpoint import hf, safetensors
from jaxlm.models import llama3
from jaxlm.nn import params

CPU = jax.devices("cpu")[0]
BF16 = np.dtype(ml_dtypes.bfloat16)


def there(row):
    return jax.sharding.SingleDeviceSharding(CPU)


def pairs(folder, raw=checkpoint_files.LLAMA):
    family = checkpoint_files.FAMILY[raw["model_type"]]
    return hf.match(family.PARAMS, checkpoint_files.config(raw), hf.read_index(folder), family.IGNORED_PREFIXES)[0]


def load(folder, raw=checkpoint_files.LLAMA, dtype=None, advance=lambda n: None):
    return hf.load_weights(pairs(folder, raw), lambda stored: np.dtype(dtype or stored), there, advance)


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


@pytest.fixture
def small(monkeypatch):
    """Slices so small that every tensor has several, the last one shorter."""
    monkeypatch.setattr(safetensors, "SLICE", 24)
    monkeypatch.setattr(hf, "SLICE", 24)


# What is read


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", checkpoint_files.KINDS)
def test_every_tensor_arrives_bit_for_bit(kind, shards, tmp_path, small):
    arrays = checkpoint_files.tensors(kind=kind)
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays, shards)
    read: list[int] = []
    weights = load(folder, advance=read.append)
    for row in params.tensors(llama3.PARAMS, checkpoint_files.config()):
        layer, _, name = row.path.removeprefix("layers.").rpartition(".")
        value = weights["layers"][int(layer)][name] if layer else weights[name]
        assert value.shape == row.shape
        assert np.array_equal(bits(value).reshape(row.stored_shape), bits(arrays[row.names[0]])), row.path
    assert sum(read) == sum(array.nbytes for array in arrays.values())


def test_every_bit_pattern_is_kept(tmp_path, small):
    arrays = checkpoint_files.tensors(kind="BF16")
    arrays["model.embed_tokens.weight"][:4, :] = np.arange(0xFF70, 0xFF90, dtype=np.uint16).view(BF16).reshape(4, 8)
    weights = load(
        checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays)
    )  # infinities and every kind of NaN
    assert np.array_equal(bits(weights["embed"]), bits(arrays["model.embed_tokens.weight"]))


def nearest_bfloat16(x):
    """float32 to bfloat16 by its bits: to nearest, ties to even."""
    u = x.view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def test_conversion_to_bfloat16_rounds_to_nearest_even(tmp_path, small):
    arrays = checkpoint_files.tensors()
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x00000001, 0x80018000, 0x7F7FFFFF, 0xFF800000])
    arrays["model.embed_tokens.weight"][:] = ties.astype(np.uint32).view(np.float32)
    arrays["model.embed_tokens.weight"][1:, :6] *= np.float32(1.37)
    weights = load(checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays), dtype=BF16)
    assert np.array_equal(bits(weights["embed"]), nearest_bfloat16(arrays["model.embed_tokens.weight"]))
    assert weights["layers"][1]["q"].dtype == BF16


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_conversion_to_float32_is_exact(kind, tmp_path, small):
    arrays = checkpoint_files.tensors(kind=kind)
    embed = arrays["model.embed_tokens.weight"]
    embed[:] = np.random.default_rng(0).integers(0, 0x7C00, embed.shape, np.uint16).view(embed.dtype)
    weights = load(checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays), dtype=np.float32)
    wide = [struct.unpack("<f", b"\0\0" + struct.pack("<H", u))[0] for u in bits(embed).ravel()]
    half = [struct.unpack("<e", struct.pack("<H", u))[0] for u in bits(embed).ravel()]
    assert np.array_equal(np.asarray(weights["embed"]).ravel(), wide if kind == "BF16" else half)


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_float16_refuses_what_it_cannot_hold(kind, tmp_path, small):
    arrays = checkpoint_files.tensors(kind=kind)
    arrays["model.layers.1.mlp.down_proj.weight"][7, 11] = -65280  # both types have it
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays)
    assert load(folder, dtype=np.float16)["layers"][1]["down"][7, 11] == -65280
    arrays["model.layers.1.mlp.down_proj.weight"][7, 11] = -66048
    checkpoint_files.write(folder / "model.safetensors", arrays)
    with pytest.raises(
        ValueError, match=r"model.safetensors: model.layers.1.mlp.down_proj.weight has .* another dtype"
    ):
        load(folder, dtype=np.float16)


def test_layer_1_is_not_layer_11(tmp_path):
    raw = {**checkpoint_files.LLAMA, "num_hidden_layers": 12}
    arrays = checkpoint_files.tensors(raw)
    for name, array in arrays.items():
        if name.startswith("model.layers."):
            array[:] = int(name.split(".")[2])
    weights = load(checkpoint_files.folder(tmp_path / "m", raw, arrays, shards=2), raw)
    assert [{float(leaf.min()), float(leaf.max())} for w in weights["layers"] for leaf in w.values()] == [
        {float(i)} for i in range(12) for _ in range(9)
    ]


# Without a copy


@pytest.mark.parametrize("dtype", [None, np.float32, BF16])
@pytest.mark.parametrize("kind", checkpoint_files.KINDS)
def test_on_cpu_the_buffer_is_the_array(kind, dtype, tmp_path, monkeypatch):
    made_buffers = []

    def aligned(nbytes):
        buffer = safetensors.aligned(nbytes)
        made_buffers.append(buffer.ctypes.data)
        return buffer

    arrays = checkpoint_files.tensors(kind=kind)
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, arrays)
    monkeypatch.setattr(hf, "aligned", aligned)
    leaves = jax.tree.leaves(load(folder, dtype=dtype))
    assert len(leaves) == len(arrays)
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves} <= set(made_buffers)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc/self/status")
def test_large_buffers_have_huge_pages_and_no_more_than_they_need():
    """3 MB: a huge page, and small ones. A second huge page would hold 2 MB for 1."""

    def resident():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    before, buffers = resident(), [safetensors.aligned(3 << 20) for _ in range(32)]
    for buffer in buffers:
        buffer[:] = 1
        assert buffer.nbytes == 3 << 20
        assert buffer.ctypes.data % safetensors.HUGE_PAGE == 0
    assert resident() - before <= 1.1 * 32 * (3 << 20)
    del buffer, buffers
    gc.collect()
    assert resident() - before <= 8 << 20  # they are returned to the system


def test_small_tensors_share_a_task(tmp_path, monkeypatch):
    """And large ones are divided: a task reads about SLICE bytes."""
    tasks = []

    def read_pieces(pieces):
        tasks.append(sum(out.nbytes for _, out, *_ in pieces))
        return original(pieces)

    original = hf._read_pieces
    monkeypatch.setattr(hf, "_read_pieces", read_pieces)
    monkeypatch.setattr(hf, "SLICE", 512)
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors())
    load(folder)
    assert sum(tasks) == sum(array.nbytes for array in checkpoint_files.tensors().values())
    assert all(512 <= nbytes < 1024 for nbytes in sorted(tasks)[1:])


def test_the_array_outlives_the_buffers_name():
    buffer = safetensors.aligned(4 * 6000)
    value = buffer.view(np.float32).reshape(20, 30, 10)
    value[:] = np.arange(6000).reshape(20, 30, 10)
    [array] = hf.place([value], [CPU])
    assert array.unsafe_buffer_pointer() == value.ctypes.data
    del buffer, value
    gc.collect()
    others = [np.full(6000, -1, np.float32) for _ in range(100)]  # would take the memory if it were free
    assert np.array_equal(np.asarray(array).ravel(), np.arange(6000)), others


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_pieces_make_the_whole(rows, monkeypatch):
    """How accelerators get a large tensor; the last piece is shorter."""
    value = np.arange(16 * 4 * 2, dtype=np.float32).reshape(16, 4, 2)
    monkeypatch.setattr(hf, "PIECE", rows * 32)
    assert np.array_equal(hf._place_pieces(value, CPU), value)


# While reading


def test_file_removed_while_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "AHEAD", 0)
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors(), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        load(folder, advance=lambda n: second.unlink(missing_ok=True))
    assert str(second) in str(caught.value)


def test_file_cut_while_reading(tmp_path, small):
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors())
    file, found = folder / "model.safetensors", pairs(folder)
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(ValueError) as caught:
        hf.load_weights(found, lambda stored: stored, there)
    assert str(file) in str(caught.value)
    assert "ends within lm_head.weight" in str(caught.value)


def test_interrupt_leaves_nothing(tmp_path, monkeypatch, small):
    """Ctrl-C in the middle: no thread, no open file, no memory, no file on disk, and the rest is not read."""
    buffers, read = [], []

    def aligned(nbytes):
        buffer = safetensors.aligned(nbytes)
        buffers.append(weakref.ref(buffer.base))
        return buffer

    def read_into(*args):
        safetensors.read_into(*args)
        read.append(args)
        time.sleep(0.001)

    def interrupted(nbytes):
        if len(read) > 60:
            signal.raise_signal(signal.SIGINT)

    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors(), shards=2)
    files, found = sorted(folder.iterdir()), pairs(folder)
    monkeypatch.setattr(hf, "aligned", aligned)
    monkeypatch.setattr(hf, "read_into", read_into)
    monkeypatch.setattr(hf, "AHEAD", 5000)
    with pytest.raises(KeyboardInterrupt) as caught:
        hf.load_weights(found, lambda stored: stored, there, interrupted)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxlm-read")]
    assert 60 < len(read) < 100  # of some 250 that were asked for
    read.clear()
    del caught
    gc.collect()
    assert len(buffers) > 10
    assert not [ref for ref in buffers if ref() is not None]
    assert sorted(folder.iterdir()) == files
    if os.path.isdir("/proc/self/fd"):
        assert not [fd for fd in os.listdir("/proc/self/fd") if str(folder) in link(fd)]


def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # the one that listed them
        return ""
