"""FLOPs of a forward pass and bytes of a decoding step, against counts by hand, by brute force, and by XLA."""

import jax
import jax.numpy as jnp
import pytest
from helpers.tiny_models import FAMILIES, tiny

from jaxlm import models
from jaxlm.bench import published
from jaxlm.nn import flops, params


def family_and_config(name: str):
    model = published.find(name)
    assert model is not None
    raw = model.config.get("text_config") or model.config
    family = models.family_of(raw["model_type"])
    return family, family.Config.from_hf(raw)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("depth", [0, 2, 3, 9])
@pytest.mark.parametrize("T", [1, 4, 12])
def test_attended_pairs_by_brute_force(T, depth, window) -> None:
    pairs = sum(
        query >= key and (window is None or query - key < window)
        for query in range(depth, depth + T)
        for key in range(depth + T)
    )
    assert flops.attended_pairs(T, depth, window) == pairs


def test_forward_of_qwen3_8b_by_hand() -> None:
    """Per layer: q and o 4096 x 4096, k and v 4096 x 1024, three matrices 4096 x 12288. Head: 151936 x 4096. Norms are
    less than 1e-4 of this."""
    family, cfg = family_and_config("qwen3-8b")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    whole = 2 * 36 * layer * 1000 + 2 * 151936 * 4096 + 36 * 4 * 32 * 128 * (1000 * 1001 / 2)
    assert flops.forward(family.PARAMS, cfg, 1000) == pytest.approx(whole, rel=1e-4)
    step = 2 * 36 * layer + 2 * 151936 * 4096 + 36 * 4 * 32 * 128 * 4097
    assert flops.forward(family.PARAMS, cfg, 1, 4096) == pytest.approx(step, rel=1e-4)


def test_decode_bytes_of_qwen3_8b_by_hand() -> None:
    """8,190,735,360 parameters, of which the embedding is not read; 147,456 bytes of keys and values per token."""
    family, cfg = family_and_config("qwen3-8b")
    shapes = params.shapes(family.PARAMS, cfg)
    weights = 2 * (8_190_735_360 - 151936 * 4096)
    assert flops.decode_bytes(shapes, cfg, 1, 0, 2) == weights
    assert flops.decode_bytes(shapes, cfg, 4, 1000, 2) == weights + 4 * 1000 * 147_456


def test_decode_bytes_of_gemma_3_1b_by_hand() -> None:
    """The embedding is the head and is read. 4 of 26 layers keep all tokens, the others the last 512."""
    family, cfg = family_and_config("gemma-3-1b-it")
    shapes = params.shapes(family.PARAMS, cfg)
    per_token_and_layer = 2 * 1 * 256 * 2  # one kv head of width 256, keys and values, bfloat16
    cache = per_token_and_layer * (4 * 4096 + 22 * 512)
    assert flops.decode_bytes(shapes, cfg, 3, 4096, 2) == 2 * params.count(family.PARAMS, cfg) + 3 * cache


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_what_xla_counts(name) -> None:
    """XLA counts the masked half of the scores too, and elementwise operations: few beside wide matrices."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4000, "head_dim": 128}
    model = tiny(name, **{key: value for key, value in sizes.items() if key != "head_dim" or name != "olmo2"})
    family, cfg, T = model.family, model.config, 16

    def last_logits(weights, tokens):
        x, _ = family.forward(cfg, tokens, weights, None, jnp.arange(T)[None])
        return family.logits(cfg, x[:, -1:], weights)

    shapes = params.shapes(family.PARAMS, cfg, jnp.float32)
    lowered = jax.jit(last_logits).lower(shapes, jax.ShapeDtypeStruct((1, T), jnp.int32))
    analysis = lowered.cost_analysis()
    assert analysis["flops"] == pytest.approx(flops.forward(family.PARAMS, cfg, T), rel=0.02)
