"""The arithmetic of `jaxlm plan` beside the shapes that training and generation really have."""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.tiny_models import FAMILIES, tiny

from jaxlm import models
from jaxlm.bench import plan, plan_training, programs, published
from jaxlm.bench.plan_training import Training
from jaxlm.devices import specs, topology
from jaxlm.inference import decoding, roofline


def named(name: str) -> tuple[Any, Any]:
    config = published.MODELS[name].config
    family = models.family_of(config["model_type"])
    return family, family.Config.from_hf(config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "lion"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sizes", [{"data": 1, "model": 1}, {"data": 4, "model": 2}])
def test_the_state_of_training(name: str, optimizer: Any, sizes: dict[str, int]) -> None:
    """Weights and moments of one device, as `train` shards them. The counters of the optimizer are a few bytes."""
    model = tiny(name, hidden_size=256, intermediate_size=512)
    count = sizes["data"] * sizes["model"]
    where = programs.setting(model.family, model.config, jax.devices()[:count], sizes, 4, jnp.bfloat16)
    how = Training(16, optimizer=optimizer, weight_dtype="bfloat16")
    shapes = programs.training_shapes(where, how).state
    of = roofline.layout(model.family.PARAMS, model.config, sizes)
    memory = plan_training.memory(of, how)
    assert memory.weights == programs.share(shapes.weights)
    assert memory.optimizer == pytest.approx(programs.share(shapes.opt_state), abs=400)


def test_the_state_of_adafactor_at_full_size() -> None:
    family, cfg = named("Qwen/Qwen3-4B")
    of = roofline.layout(family.PARAMS, cfg, {"data": 1, "model": 1})
    how = Training(512, optimizer="adafactor")
    where = programs.Setting(family, cfg, None, 1, jax.devices()[0])
    real = programs.share(programs.training_shapes(where, how).state.opt_state)
    assert plan_training.memory(of, how).optimizer == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize("sizes", [{"data": 1, "model": 1}, {"data": 2, "model": 2}])
def test_the_memory_of_generation(name: str, sizes: dict[str, int]) -> None:
    """Weights and KV caches of one device, as the engine makes them."""
    model, rows, context = tiny(name), 4, 40
    devices = jax.devices()[: sizes["data"] * sizes["model"]]
    where = programs.setting(model.family, model.config, devices, sizes, rows, jnp.bfloat16)
    of = roofline.layout(model.family.PARAMS, model.config, sizes)
    found = plan.memory(of, specs.BY_NAME["v6e"], rows, context)
    assert found.weights == programs.share(programs.weights(where))
    assert found.cache == programs.share(programs.cache(where, context, 1))
    chunk = roofline.prefill_tokens(rows, "tpu")
    assert found.new_cache == programs.share(programs.cache(where, context, chunk))
    assert decoding.bucket(context) == 48


def test_new_prompts_have_the_rows_of_the_engine() -> None:
    """48 prompts are prefilled as 64 rows."""
    family, cfg = named("Qwen/Qwen3-8B")
    of, H100 = roofline.layout(family.PARAMS, cfg, {"data": 1, "model": 1}), specs.BY_NAME["H100"]
    memory = plan.memory(of, H100, 48, 4096)
    assert memory.new_cache == pytest.approx(64 / 48 * memory.cache, rel=1e-3)
    found = plan.plan(family, cfg, H100, batch=8, context=4096)
    assert found.max_batch < 48


def test_gradient_accumulation_by_hand() -> None:
    """Four times the tokens and the work of a part, the state of one, and a sum of gradients beside those of a part."""
    family, cfg = named("meta-llama/Llama-3.1-8B")
    v6e = specs.BY_NAME["v6e"]
    one, four = (
        plan_training.plan(family, cfg, v6e, 8, 8 * n, Training(1024, accumulate=n)) for n in (1, 4)
    )  # fmt: skip
    assert four.tokens == 4 * one.tokens
    assert four.step.compute == pytest.approx(4 * one.step.compute)
    assert four.memory.gradients == 2 * one.memory.gradients
    assert (four.memory.weights, four.memory.optimizer) == (one.memory.weights, one.memory.optimizer)


def test_a_step_that_waits_for_collectives_says_so() -> None:
    family, cfg = named("Qwen/Qwen3-4B")
    found = plan_training.plan(family, cfg, specs.BY_NAME["v5e"], 16, 16, Training(512))
    assert found.step.links > found.step.compute
    assert found.step.seconds == found.step.links
    assert found.step.bound == "interconnect"


def test_needs_names_slices_that_exist() -> None:
    family, cfg = named("Qwen/Qwen3-8B")
    assert plan.plan(family, cfg, specs.BY_NAME["v5e"], 1).needs == 4  # two chips would do, but there is no such slice
    assert plan.counts(specs.BY_NAME["v5p"])[:3] == [1, 4, 8]
    assert plan.counts(specs.BY_NAME["H100"])[:3] == [1, 2, 4]


def test_the_largest_sizes_are_found_by_bisection() -> None:
    for limit in (0, 1, 5, 100):
        for best in range(limit + 1):
            assert plan.most(lambda n, best=best: n <= best, limit) == best


def test_a_plan_of_many_devices() -> None:
    family, cfg = named("meta-llama/Llama-3.1-405B")
    v5p = specs.BY_NAME["v5p"]
    small = plan.plan(family, cfg, v5p, 4)
    assert not small.fits
    assert small.needs is not None
    enough = plan.plan(family, cfg, v5p, small.needs)
    assert enough.fits
    assert not plan.plan(family, cfg, v5p, small.needs // 2).fits


def test_a_program_of_all_layers_from_two_short_ones() -> None:
    """On the CPU, where the whole program is compiled too."""
    model = tiny("llama3", num_hidden_layers=12, hidden_size=64)
    where = programs.setting(model.family, model.config, jax.devices()[:1], {}, 2, jnp.float32)
    compile = partial(programs.decode, context=32, platform="cpu")
    quick, whole = programs.of_all_layers(compile, where), programs.account(compile(where))
    assert quick.arguments == whole.arguments
    assert quick.aliased == whole.aliased
    assert quick.total == pytest.approx(whole.total, rel=0.02)


@pytest.mark.parametrize("layers", [2, 6])
def test_settings_of_fewer_layers(layers: int) -> None:
    family, cfg = named("google/gemma-3-4b-pt")
    where = programs.with_layers(programs.Setting(family, cfg, None, 1, jax.devices()[0]), layers)
    assert where.cfg.L == len(where.cfg.windows) == layers
    assert len(programs.weights(where)["layers"]) == layers
    assert len(programs.cache(where, 64, 1).layers) == layers


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [("v6e", 8, "2x4"), ("v5e", 1, "1x1"), ("v2", 8, "2x2"), ("v5p", 4, "2x2x1"), ("v5p", 8, "2x2x2"),
     ("v5p", 64, "4x4x4"), ("v4", 4, "2x2x1"), ("v5e", 256, "16x16")],
)  # fmt: skip
def test_shapes_of_slices(name: str, count: int, shape: str) -> None:
    assert specs.slice_shape(specs.BY_NAME[name], count) == shape


def test_slices_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="no slice of 3 devices; there are 1, 4"):
        specs.slice_shape(specs.BY_NAME["v6e"], 3)


def test_meshes_that_do_not_match() -> None:
    best = {"data": 1, "model": 8}
    assert plan.check_mesh(8, {"data": 2, "model": 4}, best) == {"data": 2, "model": 4}
    with pytest.raises(ValueError, match="data=1,model=3 needs 3 devices, not 8: try data=1,model=8"):
        plan.check_mesh(8, {"model": 3}, best)


def test_the_mesh_is_made_of_the_topology() -> None:
    """The axis sizes of a plan are those that `load` takes."""
    family, cfg = named("Qwen/Qwen3-0.6B")
    found = plan.plan(family, cfg, specs.BY_NAME["v5e"], 8)
    assert topology.parse(plan.text(found.mesh)) == found.mesh


def test_only_training_needs_optax() -> None:
    """`check` and `plan --compile` work after a plain install."""
    code = "import sys; sys.modules['optax'] = None; import jaxlm.bench.checking, jaxlm.bench.compiling, jaxlm.cli.plan"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
