"""Published configs: parameter counts, tensor names and shapes, and the forward pass traced at full size.

Nothing is allocated: `params` and jax.eval_shape work on shapes.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import Model, models
from jaxlm.nn import Rope, params

# Files of configs/ -> keys of param_counts.json.
KEYS = {
    "meta-llama-Meta-Llama-3-8B": ["meta-llama-Meta-Llama-3-8B", "meta-llama-Meta-Llama-3-8B-Instruct"],
    "meta-llama-Llama-3.1-8B": ["meta-llama-Llama-3.1-8B", "meta-llama-Llama-3.1-8B-Instruct"],
    "meta-llama-Llama-3.2-1B": ["meta-llama-Llama-3.2-1B", "meta-llama-Llama-3.2-1B-Instruct"],
    "meta-llama-Llama-3.2-3B": ["meta-llama-Llama-3.2-3B", "meta-llama-Llama-3.2-3B-Instruct"],
    "meta-llama-Llama-3.1-70B / 3.3-70B": ["meta-llama-Llama-3.1-70B-Instruct", "meta-llama-Llama-3.3-70B-Instruct"],
    "google-gemma-3-270m": ["google-gemma-3-270m"],
    "google-gemma-3-1b": ["google-gemma-3-1b-it"],
    **{f"Qwen-Qwen3-{size}": [f"Qwen-Qwen3-{size}"] for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
    "allenai-OLMo-2-0425-1B": ["allenai-OLMo-2-0425-1B"],
    "allenai-OLMo-2-1124-7B": ["allenai-OLMo-2-1124-7B", "allenai-OLMo-2-1124-7B-Instruct"],
    "allenai-OLMo-2-1124-13B": ["allenai-OLMo-2-1124-13B"],
    "allenai-OLMo-2-0325-32B": ["allenai-OLMo-2-0325-32B"],
}
# Language models of the vision-language Gemmas: keras-hub's presets count 262,144 rows of the embedding, the hub's
# checkpoints have 262,208.
LANGUAGE_MODELS = {
    "google-gemma-3-4b-it": 3_880_099_328 + 64 * 2560,
    "google-gemma-3-4b-it.rawstyle": 3_880_099_328 + 64 * 2560,
    "google-gemma-3-12b-it": 11_765_788_416 + 64 * 3840,
    "google-gemma-3-27b-it": 27_009_002_240 + 64 * 5376,
    "google-gemma-3-27b-it.rawstyle": 27_009_002_240 + 64 * 5376,
}
REFUSED = "Qwen-Qwen3-30B-A3B"


def read(shared: Path, stem: str) -> dict[str, Any]:
    return json.loads((shared / "configs" / f"{stem}.json").read_text())


def expected_counts(shared: Path) -> dict[str, int]:
    computed = read(shared, "param_counts")
    counts = {stem: computed[key]["computed"] for key, stems in KEYS.items() for stem in stems}
    return counts | LANGUAGE_MODELS


def test_every_config_is_counted(shared: Path) -> None:
    stems = {path.stem for path in (shared / "configs").glob("*.json")} - {"param_counts"}
    assert stems == {*expected_counts(shared), REFUSED}


def test_counts_and_shapes_at_full_size(shared: Path) -> None:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    for stem, count in expected_counts(shared).items():
        raw = read(shared, stem)
        family = models.family_of(raw["model_type"])
        cfg = family.Config.from_hf(raw)
        weights = params.shapes(family.PARAMS, cfg)
        assert params.count(family.PARAMS, cfg) == count, stem
        assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == count, stem
        assert params.nbytes(weights) == 2 * count

        def program(tokens: Any, weights: Any, family: Any = family, cfg: Any = cfg) -> Any:
            pos = jnp.zeros(tokens.shape, jnp.int32)
            x, _ = family.forward(cfg, tokens, weights, None, pos)
            return family.logits(cfg, x, weights)

        stacked = jax.eval_shape(partial(params.stack, period=len(params.period(cfg.windows))), weights)
        logits = jax.eval_shape(program, tokens, stacked)
        assert (logits.shape, logits.dtype) == ((1, 8, cfg.V), jnp.float32), stem


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


def test_mixture_of_experts_configs_are_rejected_by_name(shared: Path) -> None:
    raw = read(shared, REFUSED)
    with pytest.raises(ValueError, match="qwen3_moe"):
        models.family_of(raw["model_type"])
    with pytest.raises(ValueError, match="num_experts = 128"):
        models.qwen3.Config.from_hf(raw)


INDEX = {  # files of index/ -> config
    "maxtext_llama3_hf_param_names_shapes": "meta-llama-Llama-3.1-8B",
    "maxtext_gemma3_hf_param_names_shapes": "google-gemma-3-4b-it",
    "allenai-OLMo-2-1124-7B.model.safetensors.index": "allenai-OLMo-2-1124-7B",
    "maxtext_qwen3_hf_param_names_shapes": "Qwen-Qwen3-4B",
}


@pytest.mark.parametrize("index", INDEX)
def test_names_and_shapes_of_published_checkpoints(shared: Path, index: str) -> None:
    """Every tensor matches exactly one row of PARAMS or an ignored prefix, and none is missing."""
    tensors = json.loads((shared / "index" / f"{index}.json").read_text())
    shapes = dict.fromkeys(tensors["weight_map"]) if "weight_map" in tensors else tensors
    raw = read(shared, INDEX[index])
    family = models.family_of(raw["model_type"])
    cfg = family.Config.from_hf(raw)
    left = dict(shapes)
    for row in params.tensors(family.PARAMS, cfg):
        found = [name for name in row.names if name in left]
        assert len(found) == 1, row.path
        shape = left.pop(found[0])
        assert shape is None or tuple(shape) == row.stored_shape, row.path
    if cfg.tied:
        left = {name: shape for name, shape in left.items() if name not in family.PARAMS["head"]}
    assert all(name.startswith(tuple(family.IGNORED_PREFIXES)) for name in left)
