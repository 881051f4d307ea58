"""The tables of config fields (models/config_fields.py): complete for transformers' classes, each entry effective."""

import dataclasses
from typing import Any

import pytest
from helpers.tiny_models import CONFIGS

from jaxlm import models
from jaxlm.models.config_fields import BOOKKEEPING, COMPANIONS, MATHEMATICS, SCALES, is_bookkeeping

# Classes of transformers 5.24 for decoder-only language models, except old ones with names of their own for sizes
# (GPT-2, BLOOM, OPT). A field of theirs may stand in the config.json of a model derived from one of them.
CLASSES = """
afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam bitnet cohere cohere2 cohere2_moe
cohere_compass_text cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory dots1 dots3_note
dots3_note_text exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3
gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant
gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt_oss granite granite_swa granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
hyperclovax inkling2_loop_text inkling2_text inkling_text internlm3 iquestcoder jais2 jetmoe kimi_linear kolibri1
laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax
minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama modernbert-decoder
moss_transcribe_diarize nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3
phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
qwen4_exp qwen4_exp_text sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu zaya
""".split()  # noqa: SIM905
# What `Config.from_hf` of the families reads.
READ = set(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps max_position_embeddings tie_word_embeddings rope_theta rope_scaling rope_parameters
    original_max_position_embeddings
    """.split()  # noqa: SIM905
)


def from_hf(family: str, allow: tuple[str, ...] = (), **fields: Any) -> Any:
    hf = {**CONFIGS[family], **fields}
    return models.family_of(hf["model_type"]).Config.from_hf(hf, allow)


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_field_of_a_class_of_transformers_is_in_a_table(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    unknown = {name for name in names - READ - MATHEMATICS.keys() if not is_bookkeeping(name)}
    assert not unknown, f"classify them in models/config_fields.py: {sorted(unknown)}"


def test_the_tables_have_no_field_in_common() -> None:
    assert not MATHEMATICS.keys() & (BOOKKEEPING | COMPANIONS | READ)
    assert not BOOKKEEPING & COMPANIONS
    assert SCALES.keys() <= MATHEMATICS.keys()


def active(name: str) -> Any:
    """A value of a field of MATHEMATICS that changes the output."""
    if name in ("layer_types", "mlp_layer_types"):
        return ["another", "another"]
    if name == "no_rope_layers":
        return [1, 0]
    return next(value for value in (True, 7, False) if value not in MATHEMATICS[name].neutral)


@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_field_of_mathematics_is_refused_unless_it_is_neutral(name: str) -> None:
    plain = from_hf("llama3")
    neutral = [None, [], *MATHEMATICS[name].neutral, *([SCALES[name](plain.H)] if name in SCALES else [])]
    for value in neutral if name != "hidden_act" else ["silu", None]:  # Llama reads hidden_act
        assert from_hf("llama3", **{name: value}) == plain, value
    with pytest.raises(ValueError, match=f"{name} = "):
        from_hf("llama3", **{name: active(name)})
    assert from_hf("llama3", (name,), **{name: active(name)}) == plain


def test_a_list_is_neutral_if_all_of_it_is() -> None:
    for name, neutral, other in (("no_rope_layers", 1, 0), ("ssm_multipliers", 1.0, 0.5), ("gating", False, True)):
        assert from_hf("qwen3", **{name: [neutral, neutral]}) == from_hf("qwen3")
        with pytest.raises(ValueError, match=f"{name} = "):
            from_hf("qwen3", **{name: [neutral, other]})


def test_the_scale_of_attention_is_that_of_the_head_width() -> None:
    assert from_hf("llama3", query_pre_attn_scalar=12, attention_multiplier=12**-0.5) == from_hf("llama3")
    for fields in ({"query_pre_attn_scalar": 16}, {"attention_multiplier": 0.25}):
        with pytest.raises(ValueError, match=r"= .*does not compute"):
            from_hf("llama3", **fields)


def test_a_field_says_what_it_needs() -> None:
    with pytest.raises(
        ValueError, match=r"num_experts = 8 \(jaxlm does not compute experts \(mixture of experts\) here"
    ):
        from_hf("llama3", num_experts=8)
