"""config.json as different tools write it: what they add changes nothing, and loads without a word."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.published_configs import CONFIGS

from jaxlm import models
from jaxlm.bench.published import LLAMA3_ROPE
from jaxlm.nn import Rope

BASES = {
    "llama": CONFIGS["meta-llama-Llama-3.1-8B"],
    "qwen3": CONFIGS["Qwen-Qwen3-8B"],
    "olmo2": CONFIGS["allenai-OLMo-2-1124-7B"],
    "gemma3_text": CONFIGS["google-gemma-3-1b"],
    "gemma3": CONFIGS["google-gemma-3-4b"],
}
# tool -> (source, fields that it adds)
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers 5": (
        "PreTrainedConfig.to_dict of 5.24",
        {
            "transformers_version": "5.24.0", "architectures": ["X"], "output_hidden_states": False,
            "return_dict": True, "dtype": "bfloat16", "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
            "problem_type": None, "_name_or_path": "", "output_attentions": False,
        },
    ),
    "transformers 4": (
        "PretrainedConfig.to_dict of 4.4x",
        {
            "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
            "torch_dtype": "bfloat16", "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
            "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
            "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
            "finetuning_task": None, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
            "tokenizer_class": None, "prefix": None, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 3],
            "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
            "_attn_implementation_autoset": True, "_commit_hash": "0" * 40,
        },
    ),
    "generation defaults": (
        "PretrainedConfig of 4 wrote these into config.json; GenerationConfig._get_default_generation_params of 5",
        {
            "max_length": 4096, "min_length": 0, "do_sample": True, "early_stopping": False, "num_beams": 1,
            "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 0.6, "top_k": 50, "top_p": 0.9,
            "typical_p": 1.0, "repetition_penalty": 1.1, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
            "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
            "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    ),
    "unsloth": (
        "unsloth's Llama-3.2-1B-Instruct and gemma-3-12b-it on the hub",
        {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "pad_token_id": 128004, "_name_or_path": "unsloth/x"},
    ),
    "axolotl": ("models trained with axolotl", {"_name_or_path": "/workspace/base", "use_cache": False}),
    "TRL": ("SFTTrainer's output", {"_name_or_path": "org/base", "neftune_noise_alpha": 5, "use_cache": False}),
    "MLX": ("mlx_lm.utils.save_config: of a model in float types", {"quantization": None, "eos_token_id": [1, 106]}),
    "transformers.js": (
        "onnx-community's models",
        {"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    ),
    "nanotron": (
        "HuggingFaceTB's SmolLM2-135M",
        {"is_llama_config": True, "rope_interleaved": False, "unk_token_id": 0, "pretraining_tp": 1},
    ),
    "optimum": ("optimum's exports", {"export_model_type": None, "torchscript": False, "attn_implementation": "sdpa"}),
    "DeepSpeed-Chat": ("its actor models", {"end_token_id": 2, "dropout": 0.0, "_flash_attn_2_enabled": True}),
    "OpenLLaMA": ("openlm-research's models", {"max_sequence_length": 2048, "tokenizer_class": "LlamaTokenizer"}),
    "remote code": (
        "repositories with a copy of the code",
        {"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}},
    ),
    "classification": ("a fine-tuned base", {"num_labels": 2, "problem_type": None, "classifier_dropout": 0.1}),
    "a name": ("before 4.0", {"name_or_path": "org/base", "_model_name_or_path": "org/base"}),
    "neutral values": (
        "configs of Granite, Cohere, Gemma 2, Falcon and Mixtral with what Llama has",
        {
            "residual_multiplier": 1.0, "embedding_multiplier": 1, "logits_scaling": 1.0, "logit_scale": 1.0,
            "final_logit_softcapping": None, "attn_logit_softcapping": None, "clip_qkv": None, "use_qk_norm": False,
            "partial_rotary_factor": 1.0, "rotary_pct": 1.0, "num_experts": 0, "num_local_experts": None,
            "qk_layernorm": False, "alibi": False, "use_parallel_residual": False, "norm_type": "rmsnorm",
            "is_causal": True, "num_experts_per_tok": 2, "attention_bias": False, "mlp_bias": False,
            "router_aux_loss_coef": 0.001, "output_router_logits": False,
        },
    ),
    "text_config: null": ("transformers.js, and merges of vision-language models", {"text_config": None}),
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> Any:
    return models.family_of(hf["model_type"]).Config.from_hf(hf)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tool", TOOLS)
def test_fields_of_tools_change_nothing(base: str, tool: str, caplog: pytest.LogCaptureFixture) -> None:
    fields = TOOLS[tool][1]
    if base == "gemma3":
        fields = {name: value for name, value in fields.items() if name != "text_config"}
    with caplog.at_level(logging.WARNING):
        assert from_hf({**BASES[base], **fields}) == from_hf(BASES[base])
    assert not caplog.records


@pytest.mark.parametrize("tool", TOOLS)
def test_fields_in_a_text_config_change_nothing(tool: str, caplog: pytest.LogCaptureFixture) -> None:
    text = {**BASES["gemma3"]["text_config"], **TOOLS[tool][1]}
    with caplog.at_level(logging.WARNING):
        assert from_hf({**BASES["gemma3"], "text_config": text}) == from_hf(BASES["gemma3"])
    assert not caplog.records


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("diff", [True, False])
def test_what_transformers_writes(base: str, diff: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With every default (to_dict), and with the fields that differ from the defaults alone (config.json)."""
    from transformers import AutoConfig

    fields = dict(BASES[base])
    written = AutoConfig.for_model(fields.pop("model_type"), **fields).to_json_string(use_diff=diff)
    with caplog.at_level(logging.WARNING, logger="jaxlm"):
        assert from_hf(json.loads(written)) == from_hf(BASES[base])
    assert not caplog.records


# Qwen3's sliding window that no layer has.
@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},  # Qwen3 in transformers 4
        {"sliding_window": 4096, "max_window_layers": 28},  # Qwen3Config: use_sliding_window is false by default
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36},  # 36 layers
        {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 36},
        {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
         "layer_types": ["full_attention"] * 36},  # as transformers 5 writes it
    ],
)  # fmt: skip
def test_a_sliding_window_that_no_layer_has(fields: dict[str, Any]) -> None:
    assert from_hf({**BASES["qwen3"], **fields}) == from_hf(BASES["qwen3"])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"use_sliding_window": False, "layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types"),
    ],
)
def test_a_sliding_window_that_a_layer_has(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = .*sliding windows|{name} = .*several kinds"):
        from_hf({**BASES["qwen3"], **fields})


# Published models of a supported architecture: their config.json apart from what Llama or Qwen3 have.
LLAMA2 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "hidden_act": "silu",
          "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
MODELS: dict[str, tuple[dict[str, Any], Rope]] = {
    "Llama 2": ({"pretraining_tp": 1, "rope_scaling": None, "_name_or_path": "x"}, Rope(1e4)),
    "TinyLlama 1.1B": ({"rope_theta": 10000.0, "max_position_embeddings": 2048}, Rope(1e4)),
    "SmolLM2": ({**TOOLS["nanotron"][1], "rope_theta": 100000, "head_dim": 128}, Rope(1e5)),
    "CodeLlama": ({"rope_theta": 1000000, "max_position_embeddings": 16384}, Rope(1e6)),
    "Yi": ({"rope_theta": 5000000.0, "pad_token_id": 0}, Rope(5e6)),
    "DeepSeek Coder": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, Rope(1e4, "linear", 4.0)),
    "DeepSeek-R1-Distill-Llama": (
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "max_position_embeddings": 131072},
        Rope(5e5, "llama3", 8.0, 8192, 1.0, 4.0),
    ),
    "Llama-3.1-Nemotron-70B-Instruct-HF": (
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "eos_token_id": [128001, 128008, 128009]},
        Rope(5e5, "llama3", 8.0, 8192, 1.0, 4.0),
    ),
    "Yarn-Llama-2": (
        {"rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}},
        Rope(1e4, "yarn", 16.0, 4096, amplitude=1.2772588722239782),
    ),
    "RoPE of transformers 5": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
    "both spellings": (
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": None}}, Rope(5e5),
    ),
    "context beside the RoPE": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 1024},
        Rope(1e4, "yarn", 4.0, 1024, amplitude=1.138629436111989),
    ),
    "a factor of 1": ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, Rope(1e4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_llama_s_architecture(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, rope = MODELS[name]
    with caplog.at_level(logging.WARNING):
        assert from_hf({**LLAMA2, **fields}).rope == rope
    assert not caplog.records


def test_the_attn_factor_of_deepseek_r1_0528_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """transformers does not read it, and vLLM multiplies its attention factor by it, to exactly 1."""
    fields = {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False}
    rope = {**YARN, "attn_factor": 0.8782488562869419}
    with caplog.at_level(logging.WARNING):
        config = from_hf({**BASES["qwen3"], **fields, "rope_scaling": rope})
    assert config == from_hf({**BASES["qwen3"], "rope_scaling": YARN})
    [line] = [record.getMessage() for record in caplog.records]
    assert "attn_factor" in line
    assert line.endswith('"attention_factor": 1')


def published() -> list[str]:
    from helpers.published import SHARED

    return sorted(path.stem for path in (SHARED / "configs").glob("*.json") if path.stem != "param_counts")


@pytest.mark.parametrize("name", published() or [""])
def test_published_files(name: str, shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = json.loads((shared / "configs" / f"{name}.json").read_text())
    if "A3B" in name:
        with pytest.raises(ValueError, match=r"'qwen3_moe'.*experts.*Qwen3-8B"):
            from_hf(hf)
        return
    with caplog.at_level(logging.WARNING):
        assert from_hf(hf).V > 100_000
    assert not caplog.records
