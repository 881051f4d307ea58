"""config.json: supported fields in the formats of transformers 4 and 5; unsupported fields are errors by name."""

import logging
import math
from typing import Any

import pytest
from helpers.tiny_models import CONFIGS, FULL, SLIDING, UNIFORM

from jaxlm import models
from jaxlm.models.unsupported import REASONS
from jaxlm.nn import Rope

FAMILIES = tuple(CONFIGS)
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config(family: str, allow: tuple[str, ...] = (), without: tuple[str, ...] = (), **fields: Any) -> Any:
    hf = {name: value for name, value in {**CONFIGS[family], **fields}.items() if name not in without}
    return models.family_of(hf["model_type"]).Config.from_hf(hf, allow)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_do_not_change_the_result_are_accepted(family: str) -> None:
    plain = config(family)
    assert (plain.V, plain.D, plain.F, plain.L, plain.N, plain.K) == (199, 48, 72, 2, 4, 2)
    harmless = {
        "architectures": ["X"],
        "torch_dtype": "bfloat16",
        "transformers_version": "5",
        "use_cache": True,
        "initializer_range": 0.02,
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "_name_or_path": "x/y",
    }
    disabled = {
        "attention_bias": False,
        "mlp_bias": False,
        "made_up": None,
        "made_up_too": False,
        "sliding_windows": [],
    }
    assert config(family, **harmless, **disabled) == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("num_experts", 8),
        ("clip_qkv", 8.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("use_bidirectional_attention", True),
    ],
)
def test_unsupported_fields_are_rejected_by_name(family: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} = "):
        config(family, **{field: value})
    assert config(family, allow=(field,), **{field: value}) == config(family)
    with pytest.raises(ValueError, match="residual_multiplier = 2"):  # not the allowed one
        config(family, allow=(field,), **{field: value, "residual_multiplier": 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_fields_are_named_in_one_line(family: str, caplog: pytest.LogCaptureFixture) -> None:
    unknown = {"made_up": 3, "made_up_too": ["x"], "made_up_null": None, "made_up_off": False, "_private": 1}
    with caplog.at_level(logging.WARNING):
        assert config(family, **unknown) == config(family)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["made_up, made_up_too"]
    caplog.clear()
    assert config(family, ("made_up", "made_up_too"), **unknown) == config(family)
    assert not caplog.records


@pytest.mark.parametrize("field", ["quantization_config", "quantization", "compression_config"])
def test_the_quantization_is_not_part_of_the_config(field: str) -> None:
    """checkpoint/quantized.py reads it, or refuses it."""
    section = {"quant_method": "gptq", "bits": 4}
    assert config("llama3", **{field: section}) == config("llama3")


def test_several_faults_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"hidden_act = 'gelu' .*; attention_bias = True .*; num_experts = 8"):
        config("llama3", hidden_act="gelu", attention_bias=True, num_experts=8)


def test_unsupported_activations_are_rejected() -> None:
    for family in UNIFORM:
        assert config(family, hidden_act="silu") == config(family)
        with pytest.raises(ValueError, match=r"hidden_act = 'gelu'"):
            config(family, hidden_act="gelu")
    assert config("gemma3", hidden_activation="gelu_pytorch_tanh") == config("gemma3")
    with pytest.raises(ValueError, match=r"hidden_activation = 'gelu'"):
        config("gemma3", hidden_activation="gelu")


@pytest.mark.parametrize("family", ["llama3", "qwen3", "olmo2"])
def test_layer_types_of_full_attention_only(family: str) -> None:
    """transformers 5 writes these for a model without sliding windows."""
    written = {
        "layer_types": [FULL, FULL],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
    }
    assert config(family, **written) == config(family)
    with pytest.raises(ValueError, match="layer_types"):
        config(family, layer_types=[FULL, SLIDING])


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"smollm3"}))
def test_a_window_that_is_not_computed_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="use_sliding_window = True"):
        config(family, use_sliding_window=True)


def test_olmo3_layer_types() -> None:
    assert config("olmo3").windows == (5, None)
    assert config("olmo3", without=("layer_types", "sliding_window"), num_hidden_layers=5).windows == (
        4096, 4096, 4096, None, 4096,
    )  # fmt: skip
    with pytest.raises(ValueError, match="layer_types"):
        config("olmo3", layer_types=[SLIDING])


def test_olmo3_ropes_in_both_formats() -> None:
    """Context extension is for full attention. In the older format, the base is that of all layers."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    scaled = Rope(5e5, "yarn", 8.0, 8192, amplitude=0.1 * math.log(8) + 1)
    plain, old = config("olmo3"), config("olmo3", rope_scaling=yarn)
    assert (plain.rope, plain.local_rope) == (Rope(5e5), Rope(5e5))
    assert (old.rope, old.local_rope) == (scaled, Rope(5e5))
    other = config("olmo3", rope_theta=2e4, rope_scaling=yarn)
    assert (other.rope.theta, other.local_rope) == (2e4, Rope(2e4))
    local = {"rope_type": "default", "rope_theta": 5e5}
    assert config("olmo3", rope_parameters={FULL: {**yarn, "rope_theta": 5e5}, SLIDING: local}) == old
    # Some versions of transformers 5 wrote one section, and computed it in all layers.
    with pytest.raises(ValueError, match="sections full_attention and sliding_attention"):
        config("olmo3", rope_parameters={**yarn, "rope_theta": 5e5})


def test_layers_without_rope() -> None:
    assert config("smollm3").rotated == (True, False)
    assert config("smollm3", no_rope_layers=[0, 1, 1]).rotated == (False, True)  # transformers reads the first L
    by_interval = {"without": ("no_rope_layers",), "num_hidden_layers": 5}
    assert config("smollm3", **by_interval).rotated == (True, True, True, False, True)
    assert config("smollm3", **by_interval, no_rope_layer_interval=2).rotated == (True, False, True, False, True)
    assert config("smollm3").rope == Rope(2e6)
    assert config("smollm3", without=("num_key_value_heads",), num_attention_heads=8).K == 4
    for wrong in ([1], [1, 2], "11", [True, None]):
        with pytest.raises(ValueError, match="no_rope_layers must list 1"):
            config("smollm3", no_rope_layers=wrong)
    with pytest.raises(ValueError, match="no_rope_layer_interval is 0"):
        config("smollm3", no_rope_layer_interval=0)


def test_windows_of_smollm3() -> None:
    published = {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL, FULL]}
    assert config("smollm3", **published) == config("smollm3")
    assert config("smollm3", sliding_window=7).windows == (None, None)
    assert config("smollm3", use_sliding_window=True).windows == (None, None)
    used = {"use_sliding_window": True, "sliding_window": 7}
    assert config("smollm3", **used).windows == (None, 7)  # the layer without RoPE
    assert config("smollm3", **used, layer_types=[SLIDING, FULL]).windows == (7, None)
    with pytest.raises(ValueError, match="sliding_window is 0"):
        config("smollm3", use_sliding_window=True, sliding_window=0)
    for unused in ({}, {"sliding_window": 7}, {"use_sliding_window": True}):
        with pytest.raises(ValueError, match="layer_types with 'sliding_attention'"):
            config("smollm3", layer_types=[SLIDING, FULL], **unused)
        assert config("smollm3", ("layer_types",), layer_types=[SLIDING, FULL], **unused) == config("smollm3")


def test_gemma_layer_types() -> None:
    assert config("gemma3").windows == (5, None)
    by_pattern = config("gemma3", without=("layer_types",), num_hidden_layers=7, sliding_window_pattern=3)
    assert by_pattern.windows == (5, 5, None, 5, 5, None, 5)
    assert config("gemma3", without=("layer_types",), num_hidden_layers=7).windows == (5, 5, 5, 5, 5, None, 5)
    with pytest.raises(ValueError, match="layer_types"):
        config("gemma3", layer_types=[SLIDING, "chunked_attention"])
    with pytest.raises(ValueError, match="layer_types"):
        config("gemma3", layer_types=[SLIDING])


@pytest.mark.parametrize("family", ["llama3", "qwen3", "olmo2"])
def test_rope_in_both_formats(family: str) -> None:
    def both(rope: dict[str, Any], theta: float = 5e5) -> Rope:
        old = config(family, rope_theta=theta, rope_scaling=rope or None).rope
        older = {**rope, "type": rope["rope_type"]} if rope else {}
        older.pop("rope_type", None)
        assert config(family, rope_theta=theta, rope_scaling=older or None).rope == old
        assert config(family, rope_theta=theta, rope_scaling={**rope, **older} or None).rope == old
        new = {"rope_type": "default", **rope, "rope_theta": theta}
        assert config(family, rope_parameters=new).rope == old
        return old

    assert config(family).rope == Rope(10_000.0)
    assert config(family, rope_scaling=None, rope_parameters=None).rope == Rope(10_000.0)
    assert both({}) == Rope(5e5)
    assert both({"rope_type": "linear", "factor": 4.0}) == Rope(5e5, "linear", 4.0)
    assert both({"rope_type": "llama3", **LLAMA3_ROPE}) == Rope(5e5, "llama3", 8.0, 8192, 1.0, 4.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert both(yarn) == Rope(5e5, "yarn", 4.0, 512, amplitude=0.1 * math.log(4) + 1)
    assert both({**yarn, "attention_factor": 1.5, "beta_fast": 16, "truncate": False}) == Rope(
        5e5, "yarn", 4.0, 512, beta_fast=16, truncate=False, amplitude=1.5
    )
    both_scales = both({**yarn, "mscale": 1.2, "mscale_all_dim": 0.7}).amplitude
    assert both_scales == pytest.approx((0.12 * math.log(4) + 1) / (0.07 * math.log(4) + 1))


def test_gemma_rope_in_both_formats() -> None:
    assert (config("gemma3").rope, config("gemma3").local_rope) == (Rope(1e6), Rope(1e4))
    linear = {"rope_type": "linear", "factor": 8.0}
    old = config("gemma3", rope_theta=2e6, rope_local_base_freq=3e4, rope_scaling=linear)
    assert (old.rope, old.local_rope) == (Rope(2e6, "linear", 8.0), Rope(3e4))
    local = {"rope_type": "default", "rope_theta": 3e4}
    assert config("gemma3", rope_parameters={FULL: {**linear, "rope_theta": 2e6}, SLIDING: local}) == old
    # Defaults where a section has no theta: transformers 5 fills it in.
    sparse = config("gemma3", rope_parameters={FULL: linear, SLIDING: {"rope_type": "default"}})
    assert (sparse.rope, sparse.local_rope) == (Rope(1e6, "linear", 8.0), Rope(1e4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope'"),
        ({"rope_type": "linear"}, "rope_type 'linear' requires factor"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            "rope_type 'llama3' requires low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ({"rope_type": "linear", "factor": 2.0, "made_up": 1}, "made_up"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_ropes_are_rejected(family: str, field: str, section: dict[str, Any], message: str) -> None:
    if family in ("gemma3", "olmo3") and field == "rope_parameters":
        section = {FULL: section, SLIDING: {"rope_type": "default"}}
    with pytest.raises(ValueError, match=message):
        config(family, **{field: section})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": "199"}, "vocab_size is '199'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ],
)
def test_invalid_sizes_are_rejected(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(family, **fields)


def test_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        config("llama3", without=("hidden_size",))
    assert config("qwen3", without=("head_dim",)).H == 128  # as in an early Qwen3-8B file
    assert config("llama3", without=("num_key_value_heads",)).K == 4
    vision_language = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 34, "hidden_size": 2560}}
    sparse = models.gemma3.Config.from_hf(vision_language)
    assert (sparse.V, sparse.N, sparse.K, sparse.H, sparse.tied) == (262208, 8, 4, 256, True)


def test_unknown_model_types_are_rejected_with_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"mamba.*gemma3, gemma3_text, llama,"):
        models.family_of("mamba")
    with pytest.raises(ValueError, match="model_type"):
        models.family_of(None)


@pytest.mark.parametrize("model_type", REASONS)
def test_what_looks_like_a_supported_model_is_refused_by_name_with_a_reason(model_type: str) -> None:
    with pytest.raises(
        ValueError, match=rf"model_type '{model_type}' is not supported: .*\. .*load.*Supported: gemma3"
    ):
        models.family_of(model_type)
    assert model_type not in models.FAMILIES


def test_gemma_rope_sections_with_missing_fields() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    nulls = config("gemma3", rope_parameters={FULL: {**linear, "rope_theta": None}, SLIDING: None})
    assert (nulls.rope, nulls.local_rope) == (Rope(1e6, "linear", 8.0), Rope(1e4))
    with pytest.raises(ValueError, match="sections"):
        config("gemma3", rope_parameters={**linear, "rope_theta": 1e6})


def test_disabled_sliding_window() -> None:
    assert config("qwen3", sliding_window=4096, use_sliding_window=False) == config("qwen3")
    with pytest.raises(ValueError, match="use_sliding_window"):
        config("qwen3", sliding_window=4096, use_sliding_window=True)


def test_explicit_yarn_attention_factor_wins() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5}
    stated = config("llama3", rope_scaling={**yarn, "mscale": 1.0, "mscale_all_dim": 0.5}).rope
    assert stated == config("llama3", rope_scaling=yarn).rope
    assert stated.amplitude == 1.5
