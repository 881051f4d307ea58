"""Exporting: every tensor byte for byte as it came, and a folder that is whole or not there."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers.tiny_models import CONFIGS, from_config

import jaxlm
from jaxlm import exporting, models
from jaxlm.checkpoint import atomic, safetensors
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.source import ModelSource
from jaxlm.models import llama3
from jaxlm.nn import params

SIZES = {
    name: checkpoint_files.LLAMA[name] for name in checkpoint_files.LLAMA if name not in ("model_type", "rope_theta")
}
RAW = {family: {**CONFIGS[family], **SIZES} for family in CONFIGS}
SEEING = {
    "model_type": "gemma3", "dtype": "bfloat16", "vision_config": {"dtype": "bfloat16"}, "tie_word_embeddings": True,
    "text_config": {**RAW["gemma3"], "torch_dtype": "bfloat16", "tie_word_embeddings": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Slices so small that every tensor has several, the last one shorter."""
    monkeypatch.setattr(files, "SLICE", 100)
    monkeypatch.setattr(safetensors, "SLICE", 24)


def open_model(folder):
    return exporting.open_model(ModelSource(folder))


def random(shape, kind, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(checkpoint_files.KINDS[kind])


def checkpoint(path, raw=checkpoint_files.LLAMA, kind="F32", shards=1, spelling=0, **more):
    """A checkpoint folder of any family; more: further tensors."""
    family = models.family_of(raw["model_type"])
    rows = params.tensors(family.PARAMS, family.Config.from_hf(raw))
    arrays = {
        row.names[spelling if len(row.names) > 2 else 0]: random(row.stored_shape, kind, i)
        for i, row in enumerate(rows)
    }
    return checkpoint_files.folder(path, raw, {**arrays, **more}, shards)


def digests(folder):
    """name -> type, shape and sha256 of every tensor in a folder."""
    return {
        name: (tensor.dtype, tensor.shape, hashlib.sha256(b"".join(map(bytes, safetensors.chunks(tensor)))).hexdigest())
        for name, tensor in safetensors.read_index(folder).items()
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Tensors


@pytest.mark.parametrize("read", [jaxlm.load, open_model])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", checkpoint_files.KINDS)
@pytest.mark.parametrize("family", RAW)
def test_every_tensor_comes_out_as_it_went_in(family, kind, shards, read, tmp_path):
    folder = checkpoint(tmp_path / "in", RAW[family], kind, shards)
    done = jaxlm.export(read(folder), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(folder)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()
    tensors = safetensors.read_index(folder).values()
    assert done == (tmp_path / "out", len(tensors), sum(tensor.nbytes for tensor in tensors), ())


def test_the_file_is_the_one_that_the_formats_library_writes(tmp_path):
    from safetensors.numpy import save_file

    folder = checkpoint(tmp_path / "in", kind="F32")
    arrays = {name: random(t.shape, "F32") for name, t in safetensors.read_index(folder).items()}
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float16)  # a narrow one among wide ones
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    jaxlm.export(jaxlm.load(folder), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spelling", [0, 1, 2])
def test_each_spelling_of_gemma_with_what_is_not_read(spelling, tmp_path):
    """And a stored copy of the tied head, and a tensor of a type that jaxlm cannot compute with."""
    unread = {"vision_tower.a.weight": random((3, 5), "F32"), "vision_tower.ids": np.arange(9, dtype=np.int8)}
    folder = checkpoint(tmp_path / "in", SEEING, "BF16", 2, spelling, **unread)
    embed = next(t for name, t in safetensors.read_index(folder).items() if "embed_tokens" in name)
    head = np.concatenate(list(map(np.copy, safetensors.chunks(embed)))).view(ml_dtypes.bfloat16).reshape(embed.shape)
    folder = checkpoint(tmp_path / "in", SEEING, "BF16", 2, spelling, **unread, **{"lm_head.weight": head})
    model = jaxlm.load(folder, dtype="float32")
    jaxlm.export(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(folder)

    model.weights["embed"] = model.weights["embed"].at[3, 2].set(7)
    jaxlm.export(model, tmp_path / "changed")
    before, after = digests(folder), digests(tmp_path / "changed")
    changed = [name for name in before if before[name] != after[name]]
    assert sorted(changed) == sorted([embed.name, "lm_head.weight"])
    assert after[embed.name] == after["lm_head.weight"]

    jaxlm.export(model, tmp_path / "wide", dtype="float32")
    wide, config = digests(tmp_path / "wide"), json.loads((tmp_path / "wide/config.json").read_text())
    assert {kind for name, (kind, _, _) in wide.items() if "vision" not in name} == {"F32"}
    assert all(wide[name] == before[name] for name in unread)
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == ("float32", "float32")
    assert config["vision_config"] == {"dtype": "bfloat16"}


@pytest.mark.parametrize("read", [jaxlm.load, open_model])
@pytest.mark.parametrize("spelled", ["dtype", "torch_dtype", None])
def test_another_type(spelled, read, tmp_path):
    raw = {**checkpoint_files.LLAMA, **({spelled: "float32"} if spelled else {})}
    folder = checkpoint(tmp_path / "in", raw, "F32")
    jaxlm.export(read(folder), tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {**raw, spelled or "dtype": "bfloat16"}
    loaded = jaxlm.load(folder, dtype="bfloat16")
    exported = jaxlm.load(tmp_path / "out")
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), loaded.weights, exported.weights)
    )


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_the_sources_type_comes_back_from_another(dtype, tmp_path):
    folder = checkpoint(tmp_path / "in", kind="BF16")
    jaxlm.export(jaxlm.load(folder, dtype="float32"), tmp_path / "out", dtype=dtype)
    assert digests(tmp_path / "out") == digests(folder)


@pytest.mark.parametrize("read", [jaxlm.load, open_model])
def test_values_beyond_float16_are_refused_before_anything_is_written(read, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "in", kind="BF16")
    arrays = checkpoint_files.tensors(kind="BF16")
    arrays["model.layers.1.mlp.down_proj.weight"][7, 11] = np.inf  # float16 has it
    checkpoint_files.write(folder / "model.safetensors", arrays)
    assert jaxlm.export(read(folder), tmp_path / "out", dtype="float16").tensors == len(arrays)
    arrays["model.layers.1.mlp.down_proj.weight"][7, 11] = -66048
    checkpoint_files.write(folder / "model.safetensors", arrays)
    monkeypatch.setattr(exporting, "staged", None)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight has values beyond float16.*--dtype bfloat16"):
        read(folder) and jaxlm.export(read(folder), tmp_path / "new", dtype="float16")
    assert names(tmp_path) == ["in", "out"]


def test_a_type_that_is_none(tmp_path):
    model = open_model(checkpoint(tmp_path / "in"))
    with pytest.raises(ValueError, match="dtype 'int8' is not one of auto, float32, bfloat16, float16"):
        jaxlm.export(model, tmp_path / "out", dtype="int8")


def test_shards(tmp_path, monkeypatch):
    """Of limited size, unless one tensor is larger; named and indexed as transformers does it."""
    folder = checkpoint(tmp_path / "in", kind="BF16")
    monkeypatch.setattr(files, "SHARD", 300)
    jaxlm.export(jaxlm.load(folder), tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert names(tmp_path / "out") == ["config.json", *shards, "model.safetensors.index.json"]
    for shard in shards:
        tensors = safetensors.read_header(tmp_path / "out" / shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 300
        assert all(index["weight_map"][name] == shard for name in tensors)
    assert len(shards) < len(index["weight_map"])
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in safetensors.read_index(folder).values())}
    assert digests(tmp_path / "out") == digests(folder)


def test_stacked_layers(tmp_path):
    folder = checkpoint(tmp_path / "in", RAW["qwen3"])
    model = jaxlm.load(folder)
    model = replace(model, weights=params.stack(model.weights))
    jaxlm.export(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(folder)


def test_weights_that_are_not_the_configs(tmp_path):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    model.weights["layers"][1]["q"] = model.weights["layers"][1]["q"][:1]
    model.weights["adapter"] = model.weights.pop("norm")
    with pytest.raises(
        ValueError, match=r"3 \(adapter unknown, layers.1.q has shape \(1, 4, 8\) instead of \(2, 4, 8\), norm"
    ):
        jaxlm.export(model, tmp_path / "out")


def test_memory_is_a_slice(tmp_path, monkeypatch):
    """Beside the arrays there is never a second copy of one: none for the view, and a slice where it is converted."""
    monkeypatch.setattr(files, "SLICE", 1 << 16)
    raw = {**checkpoint_files.LLAMA, "vocab_size": 20_000, "hidden_size": 64, "head_dim": 32}
    model = from_config(raw)
    assert model.weights["embed"].nbytes > 5e6
    tracemalloc.start()
    try:
        for dtype in ("float32", "bfloat16", "float16"):
            jaxlm.export(model, tmp_path / dtype, config=raw, dtype=dtype)
            jaxlm.export(open_model(tmp_path / "float32"), tmp_path / f"{dtype} from a file", dtype=dtype)
        assert tracemalloc.get_traced_memory()[1] < 1.5e6
    finally:
        tracemalloc.stop()


def test_a_part_of_an_array_that_lies_elsewhere():
    """The way that is taken on accelerators and for sharded arrays."""
    value = jnp.arange(7 * 3 * 2, dtype=jnp.bfloat16).reshape(7, 3, 2)
    assert np.array_equal(files._cut(value, 4, 3), np.asarray(value)[4:7])


# Models without a checkpoint


def test_random_weights_need_a_config(tmp_path):
    raw = {**RAW["gemma3"], "dtype": "float32"}
    family = models.family_of("gemma3_text")
    config = family.Config.from_hf(raw)
    model = replace(from_config(raw, dtype=jnp.bfloat16), generation_config={"temperature": 0.5})
    with pytest.raises(ValueError, match=r"export\(model, out, config="):
        jaxlm.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="windows"):
        jaxlm.export(model, tmp_path / "out", config={**raw, "sliding_window": 9})
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        jaxlm.export(model, tmp_path / "out", config={**raw, "attn_logit_softcapping": 50.0})
    assert names(tmp_path) == []
    jaxlm.export(model, tmp_path / "out", config=raw)
    loaded = jaxlm.load(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**raw, "dtype": "bfloat16"}
    assert "model.layers.1.mlp.up_proj.weight" in digests(tmp_path / "out")  # the first spelling
    assert loaded.config == config
    assert loaded.generation_config["temperature"] == 0.5
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), loaded.weights, model.weights))


def test_a_changed_config_of_a_loaded_model(tmp_path):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    cfg = llama3.Config.from_hf({**checkpoint_files.LLAMA, "num_hidden_layers": 1})
    weights = {**model.weights, "layers": model.weights["layers"][:1]}
    cut = jaxlm.Model(llama3, cfg, weights, checkpoint=model.checkpoint)
    with pytest.raises(ValueError, match=r"\(L is 2 there and 1 here\)"):
        jaxlm.export(cut, tmp_path / "out")
    jaxlm.export(cut, tmp_path / "out", config={**checkpoint_files.LLAMA, "num_hidden_layers": 1})
    before, after = digests(tmp_path / "in"), digests(tmp_path / "out")
    assert after == {name: before[name] for name in before if ".layers.1." not in name}


def test_types_that_no_file_has(tmp_path):
    model = from_config(checkpoint_files.LLAMA)
    model.weights["norm"] = model.weights["norm"].astype(jnp.int8)
    with pytest.raises(ValueError, match="int8"):
        jaxlm.export(model, tmp_path / "out", config=checkpoint_files.LLAMA)


# What stands beside the weights


def test_the_other_files_are_copied(tmp_path):
    folder = checkpoint(tmp_path / "in", {**checkpoint_files.LLAMA, "odd": None})
    beside = {
        "chat_template.jinja": "{{ x }}\r\n",
        "generation_config.json": '{"top_k":  3}',
        "special_tokens_map.json": "{}",
    }
    for name, text in beside.items():
        (folder / name).write_bytes(text.encode())
    (folder / "notes.txt").write_text("not a part of the model")
    jaxlm.export(jaxlm.load(folder), tmp_path / "out")
    assert names(tmp_path / "out") == sorted(["config.json", "model.safetensors", *beside])
    assert all((tmp_path / "out" / name).read_bytes() == text.encode() for name, text in beside.items())


def test_a_field_that_was_let_pass(tmp_path):
    folder = checkpoint(tmp_path / "in")
    (folder / "config.json").write_text(json.dumps({**checkpoint_files.LLAMA, "future": 1, "hidden_act": "gelu"}))
    jaxlm.export(jaxlm.load(folder, allow_fields=["future", "hidden_act"]), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["future"] == 1


# The folder


def test_what_is_replaced(tmp_path):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    (tmp_path / "empty").mkdir()
    jaxlm.export(model, tmp_path / "empty")
    old = checkpoint(tmp_path / "old", kind="F16")
    before = digests(old)
    with pytest.raises(
        FileExistsError, match=r"old is a checkpoint already: --force \(force=True\) replaces the whole"
    ):
        jaxlm.export(model, old)
    assert digests(old) == before
    (tmp_path / "link").symlink_to(old)
    assert jaxlm.export(model, tmp_path / "link", force=True).folder == old
    assert (tmp_path / "link").is_symlink()
    assert digests(old) == digests(tmp_path / "in") != before
    assert names(tmp_path) == ["empty", "in", "link", "old"]
    jaxlm.export(model, str(tmp_path / "new/deep"))
    assert digests(tmp_path / "new/deep") == digests(old)


def test_what_is_never_replaced(tmp_path):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work/config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name, message in {
        "in": "holds the files that this model was loaded from: choose another",
        ".": "holds the files that this model was loaded from",
        "work": r"work exists and is not a checkpoint, it holds 1 \(config.json\)",
        "file": "file is a file: choose a folder",
    }.items():
        with pytest.raises(FileExistsError, match=message):
            jaxlm.export(model, tmp_path / name, force=True)
    shutil.move(tmp_path / "in/model.safetensors", tmp_path / "work/weights.safetensors")
    (tmp_path / "in/model.safetensors").symlink_to(tmp_path / "work/weights.safetensors")
    model = jaxlm.load(tmp_path / "in")
    with pytest.raises(FileExistsError, match="work holds the files"):
        jaxlm.export(model, tmp_path / "work", force=True)
    assert names(tmp_path) == ["file", "in", "work"]


def interrupt(monkeypatch, error):
    """Makes the tenth slice fail."""
    written = []

    def counted(parts, advance):
        for part in parts:
            written.append(part.nbytes)
            if len(written) == 10:
                raise error
            yield part

    monkeypatch.setattr(files, "counted", counted)


@pytest.mark.parametrize(("error", "message"), [
    (KeyboardInterrupt("stop"), "stop"),
    (OSError(errno.ENOSPC, "No space left on device"), "is full"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
])  # fmt: skip
def test_a_failure_leaves_all_as_it_was(error, message, tmp_path, monkeypatch):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    old = checkpoint(tmp_path / "old", kind="F16")
    before = digests(old)
    for out, force in (("new", False), ("old", True)):
        interrupt(monkeypatch, error)
        with pytest.raises(type(error), match=message):
            jaxlm.export(model, tmp_path / out, force=force)
        assert names(tmp_path) == ["in", "old"]
    assert digests(old) == before


def test_a_renaming_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    old = checkpoint(tmp_path / "old", kind="F16")
    before, rename = digests(old), os.rename

    def failing(a, b):
        if str(a).endswith(".partial"):
            raise PermissionError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError):
        jaxlm.export(model, old, force=True)
    assert digests(old) == before
    assert names(tmp_path) == ["in", "old"]


def interrupted_after_the_first(monkeypatch):
    """Ctrl-C when the old folder has just made way."""
    rename, done = os.rename, []

    def renamed(a, b):
        rename(a, b)
        done.append(a)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", renamed)
    return KeyboardInterrupt


def failing_folder(monkeypatch, number=errno.EIO):
    """Folders cannot be flushed."""
    fsync = os.fsync

    def flush(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "no")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    return OSError


def failing_last(monkeypatch):
    """The folder around the new one cannot be flushed, when it has its name already."""
    sync = atomic._sync

    def failing(path):
        if path.name != "old" and list(path.glob("old")):
            raise OSError(errno.EIO, "no")
        sync(path)

    monkeypatch.setattr(atomic, "_sync", failing)
    return OSError


@pytest.mark.parametrize("fault", [interrupted_after_the_first, failing_folder, failing_last])
def test_the_old_folder_comes_back(fault, tmp_path, monkeypatch):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    old = checkpoint(tmp_path / "old", kind="F16")
    before = digests(old)
    with pytest.raises(fault(monkeypatch)):
        jaxlm.export(model, old, force=True)
    assert digests(old) == before
    assert names(tmp_path) == ["in", "old"]


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    failing_folder(monkeypatch, errno.EINVAL)
    jaxlm.export(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "in")


def test_a_file_that_cannot_be_flushed(tmp_path, monkeypatch):
    def flush(descriptor):
        raise OSError(errno.EINVAL, "no")

    model = jaxlm.load(checkpoint(tmp_path / "in"))
    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="no"):
        jaxlm.export(model, tmp_path / "out")
    assert names(tmp_path) == ["in"]


def test_what_came_to_stand_there_meanwhile_is_kept(tmp_path, monkeypatch):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    old, write = checkpoint(tmp_path / "old"), files.write_weights

    def meanwhile(*args):
        write(*args)
        (old / "config.json").unlink()
        (old / "notes.txt").write_text("mine")

    monkeypatch.setattr(files, "write_weights", meanwhile)
    with pytest.raises(FileExistsError, match="old exists and is not a checkpoint"):
        jaxlm.export(model, old, force=True)
    assert (old / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["in", "old"]


def test_everything_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    flushed, fsync, rename = [], os.fsync, os.rename
    before = {}

    def flush(descriptor):
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    def renamed(a, b):
        before.update(inodes={a.stat().st_ino} | {path.stat().st_ino for path in a.iterdir()}, flushed=set(flushed))
        rename(a, b)

    model = jaxlm.load(checkpoint(tmp_path / "in"))
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", renamed)
    jaxlm.export(model, tmp_path / "out")
    assert len(before["inodes"]) == 3
    assert before["inodes"] == before["flushed"]
    assert flushed[-1] == tmp_path.stat().st_ino


def test_room_is_checked_first(tmp_path, monkeypatch):
    model = jaxlm.load(checkpoint(tmp_path / "in"))
    (tmp_path / ".out.1234.partial").mkdir()
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        OSError, match=r"out needs 33,\d+,\d+ bytes .* 1,000 bytes .* killed left 1 \(.out.1234.partial\)"
    ):
        jaxlm.export(model, tmp_path / "out")
    assert names(tmp_path) == [".out.1234.partial", "in"]


KILLED = """
import sys, time
import jaxlm
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.source import ModelSource
from jaxlm.exporting import open_model
files.SLICE = 100
def counted(parts, advance):
    for part in parts:
        time.sleep(0.01)
        yield part
files.counted = counted
jaxlm.export(open_model(ModelSource(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_killed_while_writing(tmp_path):
    """Nothing bears the name; a second attempt succeeds."""
    folder = checkpoint(tmp_path / "in")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out")])
    begun = time.monotonic()
    while not list(tmp_path.glob(".out.*/model.safetensors")):
        assert process.poll() is None
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 2
    jaxlm.export(open_model(folder), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(folder)


def test_a_format_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="gguf"):
        jaxlm.export(open_model(checkpoint(tmp_path / "in")), tmp_path / "out", format="gguf")
