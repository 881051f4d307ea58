"""Models at their published sizes: parameter counts, tensor names and shapes, and the forward pass traced.

Nothing is allocated: `params` and jax.eval_shape work on shapes.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.published_configs import CONFIGS, COUNTS, MIXTURE_OF_EXPERTS, MORE_COUNTS, tensor_shapes

from jaxlm import Model, models
from jaxlm.bench.published import MODELS
from jaxlm.nn import Rope, layer_types, params

REFUSED = "Qwen-Qwen3-30B-A3B"
# Names of param_counts.json that differ from those of COUNTS.
OTHER_NAMES = {"meta-llama-Llama-3.1-70B": "meta-llama-Llama-3.1-70B / 3.3-70B",
               "meta-llama-Llama-3.3-70B": "meta-llama-Llama-3.1-70B / 3.3-70B"}  # fmt: skip


def read(shared: Path, stem: str) -> dict[str, Any]:
    return json.loads((shared / "configs" / f"{stem}.json").read_text())


def config_of(raw: dict[str, Any]) -> Any:
    family = models.family_of(raw["model_type"])
    return family.__name__, family.Config.from_hf(raw)


def test_counts_and_shapes_at_full_size() -> None:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    configs = {**CONFIGS, **{id: MODELS[id].config for id in MORE_COUNTS}}
    for name, count in (COUNTS | MORE_COUNTS).items():
        raw = configs[name]
        family = models.family_of(raw["model_type"])
        cfg = family.Config.from_hf(raw)
        weights = params.shapes(family.PARAMS, cfg)
        assert params.count(family.PARAMS, cfg) == count, name
        assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == count, name
        assert params.nbytes(weights) == 2 * count, name

        def program(tokens: Any, weights: Any, family: Any = family, cfg: Any = cfg) -> Any:
            pos = jnp.zeros(tokens.shape, jnp.int32)
            x, _ = family.forward(cfg, tokens, weights, None, pos)
            return family.logits(cfg, x, weights)

        stacked = jax.eval_shape(partial(params.stack, period=layer_types.layer_period(cfg)), weights)
        logits = jax.eval_shape(program, tokens, stacked)
        assert (logits.shape, logits.dtype) == ((1, 8, cfg.V), jnp.float32), name


def test_init_scales_weights_by_fan_in() -> None:
    D = 32
    cfg = models.llama3.Config(V=D, D=D, F=D, L=1, N=4, K=4, H=8, eps=1e-6, rope=Rope(), context=64, tied=False)
    weights = Model.init(models.llama3, cfg, jax.random.key(0), jnp.bfloat16).weights
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("bfloat16")}
    for path, leaf in leaves.items():
        if "norm" in path:
            assert (leaf == 1).all()
        else:
            assert float(leaf.astype("float32").std()) == pytest.approx(D**-0.5, rel=0.1), path
    assert len({float(leaf.ravel()[0]) for leaf in leaves.values()}) == 10  # nine draws, all different, and 1


def refuse(raw: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="qwen3_moe"):
        models.family_of(raw["model_type"])
    with pytest.raises(ValueError, match="num_experts = 128"):
        models.qwen3.Config.from_hf(raw)


def test_mixture_of_experts_configs_are_rejected_by_name() -> None:
    refuse(MIXTURE_OF_EXPERTS)


INDEX = {  # files of index/ -> config
    "maxtext_llama3_hf_param_names_shapes": "meta-llama-Llama-3.1-8B",
    "maxtext_gemma3_hf_param_names_shapes": "google-gemma-3-4b",
    "allenai-OLMo-2-1124-7B.model.safetensors.index": "allenai-OLMo-2-1124-7B",
    "maxtext_qwen3_hf_param_names_shapes": "Qwen-Qwen3-4B",
}


def match(raw: dict[str, Any], shapes: dict[str, Any], what: str) -> None:
    """Every tensor matches exactly one row of PARAMS or an ignored prefix, and none is missing."""
    family = models.family_of(raw["model_type"])
    cfg = family.Config.from_hf(raw)
    left = dict(shapes)
    for row in params.tensors(family.PARAMS, cfg):
        found = [name for name in row.names if name in left]
        assert len(found) == 1, (what, row.path)
        shape = left.pop(found[0])
        assert shape is None or tuple(shape) == row.stored_shape, (what, row.path)
    if cfg.tied:
        left = {name: shape for name, shape in left.items() if name not in family.PARAMS["head"]}
    assert all(name.startswith(tuple(family.IGNORED_PREFIXES)) for name in left), what


@pytest.mark.parametrize("name", INDEX.values())
def test_names_and_shapes_of_checkpoints(name: str) -> None:
    raw = CONFIGS[name]
    if "text_config" in raw:
        shapes = tensor_shapes(raw["text_config"], "model.language_model.")
        shapes["model.vision_tower.vision_model.post_layernorm.weight"] = (1152,)
    else:
        shapes = tensor_shapes(raw)
    match(raw, shapes, name)


def test_published_files(shared: Path) -> None:
    """They have the sizes, counts and tensors above. Fine-tuned models have the config of their base."""
    stems = {path.stem for path in (shared / "configs").glob("*.json")} - {"param_counts", REFUSED}
    found = {stem: stem.removesuffix(".rawstyle").removesuffix("-it").removesuffix("-Instruct") for stem in stems}
    assert set(found.values()) == set(CONFIGS) == set(COUNTS)
    for stem, name in found.items():
        assert config_of(read(shared, stem)) == config_of(CONFIGS[name]), stem
    counts = read(shared, "param_counts")
    for name in set(found.values()) - {f"google-gemma-3-{size}b" for size in (4, 12, 27)}:
        assert counts[OTHER_NAMES.get(name, name)]["computed"] == COUNTS[name], name
    refuse(read(shared, REFUSED))
    for index, name in INDEX.items():
        tensors = json.loads((shared / "index" / f"{index}.json").read_text())
        match(CONFIGS[name], dict.fromkeys(tensors["weight_map"]) if "weight_map" in tensors else tensors, index)
