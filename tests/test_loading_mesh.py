"""Loading into the shards of a mesh: every part is the right part of its tensor, and nothing else is read."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import meta_files
from helpers.tiny_models import CONFIGS, from_config

import jaxlm
from jaxlm.checkpoint import hf
from jaxlm.devices import mesh
from jaxlm.nn import params

MESHES = ("model=8", "data=2,model=4")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch) -> None:
    monkeypatch.setattr(hf, "SLICE", 700)
    monkeypatch.setattr(hf, "AHEAD", 1000)


def compare(folder: Path, spec: str) -> jaxlm.Model:
    """The model on a mesh, every array of which is bit for bit that of one device."""
    alone, there = jaxlm.load(folder), jaxlm.load(folder, mesh=spec)
    for row in params.tensors(alone.family.PARAMS, alone.config):
        a, b = (params.get(model.weights, row.path) for model in (alone, there))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), row.path
        assert b.sharding == mesh.sharding(row.letters, row.shape, there.mesh)
    return there


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize(("family", "N", "K"), [("llama3", 8, 4), ("qwen3", 8, 1), ("olmo2", 6, 3), ("gemma3", 1, 1)])
def test_hugging_faces_form(tmp_path, family, N, K, spec) -> None:
    """Heads that are divided, in groups, alone; vectors of heads; products whose inputs are cut (columns)."""
    sizes = {"head_dim": 8, "hidden_size": 8 * N, "intermediate_size": 96, "vocab_size": 200, "num_hidden_layers": 1}
    raw = {**CONFIGS[family], **sizes, "num_attention_heads": N, "num_key_value_heads": K}
    raw |= {"layer_types": ["sliding_attention"]} if family == "gemma3" else {}
    jaxlm.export(from_config(raw), tmp_path / "m", config=raw)
    compare(tmp_path / "m", spec)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("spec", ["model=8", "data=4,model=2"])
def test_metas_form(tmp_path, shards, spec) -> None:
    """Tensors in parts by rows and by columns, their heads in pairs."""
    folder = meta_files.folder(tmp_path, shards, "BF16")
    there = compare(folder, spec)
    jaxlm.export(there, tmp_path / "again")
    a, b = (jaxlm.load(f) for f in (folder, tmp_path / "again"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights)))


def test_what_several_devices_hold_is_read_once(tmp_path) -> None:
    raw = {**CONFIGS["llama3"], "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    jaxlm.export(from_config(raw), tmp_path / "m", config=raw)
    there = jaxlm.load(tmp_path / "m", mesh="model=8")
    q, norm = there.weights["layers"][0]["q"], there.weights["norm"]
    assert {shard.data.shape for shard in q.addressable_shards} == {(1, 8, 64)}
    assert len(mesh.local_blocks(q.sharding, q.shape)) == 8
    assert len(mesh.local_blocks(norm.sharding, norm.shape)) == 1


def test_the_default_is_all_devices(tmp_path, monkeypatch) -> None:
    raw = {**CONFIGS["llama3"], "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
    jaxlm.export(from_config({**raw, "hidden_size": 64}), tmp_path / "m", config={**raw, "hidden_size": 64})
    assert jaxlm.load(tmp_path / "m").mesh is None  # the tests name a default device
    with jax.default_device(None):
        assert dict(jaxlm.load(tmp_path / "m").mesh.shape) == {"data": 1, "model": 4, "group": 2}
    with pytest.raises(ValueError, match="device"):
        jaxlm.load(tmp_path / "m", mesh="model=8", device="cpu")
    with pytest.raises(ValueError, match='mesh 4: give "data=2,model=4"'):
        jaxlm.load(tmp_path / "m", mesh=4)
