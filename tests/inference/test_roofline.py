"""Predicted bytes, FLOPs and times of generation, by hand and beside the arrays and FLOPs of real programs."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import FAMILIES, tiny

from jaxlm import models
from jaxlm.bench import published
from jaxlm.devices import mesh, specs, topology
from jaxlm.inference import roofline
from jaxlm.nn import kv_cache, params, quantize


def layout(name: str, **sizes: int) -> roofline.Layout:
    config = published.MODELS[name].config
    family = models.family_of(config["model_type"])
    return roofline.layout(family.PARAMS, family.Config.from_hf(config), {"data": 1, "model": 1, **sizes})


def test_llama_by_hand() -> None:
    """Llama 3.1 8B on one H100: 32 layers of 218,112,000 weights, embedding and head of 128,256 x 4,096."""
    of, H100 = layout("meta-llama/Llama-3.1-8B"), specs.BY_NAME["H100"]
    table = 128256 * 4096
    assert roofline.weight_bytes(of) == 2 * 8_030_261_248
    assert roofline.read_bytes(of) == 2 * (8_030_261_248 - table)
    cache = 8 * (2 * 32 * 8 * 128 * 1000 * 2 + 4 * 1000)
    assert roofline.cache_bytes(of, 8, 1000) == cache
    step = roofline.decode(of, H100, 8, 1000)
    assert step.memory == pytest.approx((2 * (8_030_261_248 - table) + cache) / 3350e9)
    layers = 8_030_261_248 - 2 * table
    flops = 8 * (2 * (layers + table) + 4 * 32 * 128 * 32 * 1001)
    assert step.compute == pytest.approx(flops / 989e12)
    assert step.links == 0
    assert step.bound == "memory bandwidth"
    prompt = roofline.prefill(of, H100, 1, 2000)
    assert prompt.compute == pytest.approx(
        (2000 * 2 * layers + 2 * table + 4 * 32 * 128 * 32 * 2000 * 2001 / 2) / 989e12
    )
    assert prompt.bound == "compute"


def test_a_tied_embedding_is_read() -> None:
    """It is the head too. Llama 3.2 1B has 1,235,814,400 parameters."""
    of = layout("meta-llama/Llama-3.2-1B")
    assert roofline.read_bytes(of) == roofline.weight_bytes(of) == 2 * 1_235_814_400


def test_tensor_parallelism_by_hand() -> None:
    """Llama 3.1 8B on model=8, 16 rows of 1,000 tokens on v6e: an eighth of everything, and 65 all-reduces."""
    of, v6e = layout("meta-llama/Llama-3.1-8B", model=8), specs.BY_NAME["v6e"]
    table, norms = 128256 * 4096, 65 * 4096
    step = roofline.decode(of, v6e, 16, 1000)
    weights = 2 * ((8_030_261_248 - table - norms) // 8 + norms)
    cache = 16 * (2 * 32 * 1 * 128 * 1000 * 2 + 4 * 1000)
    assert step.memory == pytest.approx((weights + cache) / 1640e9)
    layers = (8_030_261_248 - 2 * table - norms) // 8 + norms
    assert step.compute == pytest.approx(16 * (2 * (layers + table / 8) + 4 * 4 * 128 * 32 * 1001) / 918e12)
    assert step.links == pytest.approx(65 * 2 * 7 / 8 * 16 * 4096 * 2 / 400e9)
    assert roofline.latency(of, v6e) == pytest.approx(65 * 8e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sizes", [{"data": 1, "model": 1}, {"data": 2, "model": 2}, {"data": 1, "model": 4}])
def test_bytes_are_those_of_the_arrays(name: str, sizes: dict[str, int]) -> None:
    """Weights and caches, sharded as `load` and the engine shard them."""
    model, rows, length = tiny(name), 4, 12
    cfg, table = model.config, model.family.PARAMS
    over = topology.make(sizes, cfg.K, jax.devices()[: sizes["data"] * sizes["model"]])
    of = roofline.layout(table, cfg, sizes, itemsize=4)

    def on_first(a: Any, letters: str) -> int:
        shape = mesh.sharding(letters, a.shape, over).shard_shape(a.shape)
        return int(np.prod(shape)) * a.dtype.itemsize

    held = sum(on_first(jax.ShapeDtypeStruct(r.shape, jnp.float32), r.letters) for r in params.tensors(table, cfg))
    assert roofline.weight_bytes(of) == held
    for chunk in (1, 3):
        cache = kv_cache.init(rows, length, cfg.windows, cfg.K, cfg.H, jnp.float32, chunk)
        nbytes = kv_cache.map_arrays(cache, on_first)
        assert roofline.cache_bytes(of, rows, length, chunk) == sum(jax.tree.leaves(nbytes))


@pytest.mark.parametrize("sizes", [{"data": 1, "model": 1}, {"data": 2, "model": 2}])
def test_bytes_of_quantized_weights_are_those_of_the_arrays(sizes: dict[str, int]) -> None:
    model = tiny("llama3")
    cfg, table = model.config, model.family.PARAMS
    over = topology.make(sizes, cfg.K, jax.devices()[: sizes["data"] * sizes["model"]])
    for name in quantize.TYPES:
        convert, held = quantize.quantizer(name), 0
        for row in params.tensors(table, cfg):
            array = jax.device_put(params.get(model.weights, row.path), mesh.sharding(row.letters, row.shape, over))
            held += sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(convert(row, array)))
        assert roofline.weight_bytes(roofline.layout(table, cfg, sizes, 4, quantize=name)) == held


def test_small_models_are_replicated_and_large_ones_are_split() -> None:
    H100 = specs.BY_NAME["H100"]

    def best(name: str, rows: int = 64, count: int = 8, **more: int) -> dict[str, int]:
        of = layout(name)
        return roofline.best_mesh(of.table, of.cfg, H100, count, rows, 4096, **more)

    assert best("Qwen/Qwen3-0.6B") == {"data": 8, "model": 1}
    assert best("meta-llama/Llama-3.1-8B") == {"data": 1, "model": 8}
    assert best("meta-llama/Llama-3.1-70B")["model"] == 8
    # 16 GPUs of two hosts: a group stays within a host, if the model fits there
    assert best("meta-llama/Llama-3.1-70B", count=16, host=8) == {"data": 2, "model": 8}
    # what fits nowhere gets the mesh that needs the least
    assert best("meta-llama/Llama-3.1-405B")["model"] == 8


def test_the_default_mesh_comes_from_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    of = layout("Qwen/Qwen3-0.6B")
    monkeypatch.setattr(roofline.jax, "device_count", lambda: 8)
    for kind, platform, expected in (
        ("NVIDIA H100 80GB HBM3", "gpu", {"data": 8, "model": 1}),
        ("TPU v5 lite", "tpu", {"data": 2, "model": 4}),
        ("NVIDIA X1", "gpu", {"data": 1, "model": 8}),  # not in the table
        ("cpu", "cpu", {"data": 1, "model": 8}),
    ):
        device = SimpleNamespace(device_kind=kind, platform=platform)
        monkeypatch.setattr(roofline.jax, "devices", lambda device=device: [device] * 8)
        assert roofline.default_mesh(of.table, of.cfg) == expected, kind


def test_groups_stay_within_a_host_whatever_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GPUs on two hosts, which jax numbers as slices, with one process per GPU."""
    of = layout("meta-llama/Llama-3.1-8B")
    kind = {"device_kind": "NVIDIA H100 80GB HBM3", "platform": "gpu"}
    devices = [SimpleNamespace(slice_index=i // 8, **kind) for i in range(16)]
    monkeypatch.setattr(roofline.jax, "device_count", lambda: 16)
    monkeypatch.setattr(roofline.jax, "devices", lambda: devices)
    monkeypatch.setattr(roofline.jax, "local_device_count", lambda: 1)
    assert roofline.default_mesh(of.table, of.cfg) == {"data": 2, "model": 8}


def test_the_rows_of_prefill_are_those_of_the_engine() -> None:
    assert [roofline.prefill_rows(rows, 1) for rows in (1, 2, 3, 8, 9, 48)] == [1, 2, 4, 8, 16, 64]
    assert roofline.prefill_rows(3, 6) == 6
