"""The fields of config.json that jaxlm does not compute, and those that change nothing.

`Fields` (config.py) looks up what a model file does not read. A field of MATHEMATICS at another value than a neutral
one is refused by name. The fields of COMPANIONS and BOOKKEEPING load in silence. Any other field loads with one line
that names it.

The names and the neutral values are those of the configuration classes of transformers 5.24
(models/*/configuration_*.py), and of transformers 4 for what 5 no longer writes. The comment of a group names classes
that have its fields. tests/models/test_config_fields.py compares the tables with the installed version.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field that changes the output of some model.

    Attributes:
        needs: What a model file has to compute for it.
        neutral: The values that change nothing, besides null and empty lists. A list is neutral if all of it is.
    """

    needs: str
    neutral: tuple[Any, ...]


OFF = (False, 0, "")


def _fields(needs: str, names: str, neutral: tuple[Any, ...] = OFF) -> dict[str, Field]:
    return dict.fromkeys(names.split(), Field(needs, neutral))


MATHEMATICS: dict[str, Field] = {
    # Llama, Qwen2Moe, StableLm, SeedOss, Starcoder2, Falcon, PhiMoE, Phi (attn_bias: MPT's attn_config)
    **_fields(
        "biases",
        "attention_bias mlp_bias qkv_bias use_qkv_bias attention_out_bias use_bias bias lm_head_bias add_bias_linear "
        "attn_bias o_bias head_bias norm_bias projectors_bias mlp_includes_bias",
    ),
    # Gemma2, Gemma3n, RecurrentGemma, xLSTM, Laguna
    **_fields(
        "soft capping",
        "attn_logit_softcapping final_logit_softcapping attn_softcap final_logit_softcap logits_soft_cap "
        "output_logit_soft_cap moe_router_logit_softcapping",
    ),
    # Granite, FalconH1, Cohere, MiniCPM3, MiMoV2, MiniMax
    **_fields(
        "factors on embeddings, residuals, attention or logits",
        "embedding_multiplier residual_multiplier logits_scaling logit_scale key_multiplier "
        "lm_head_multiplier attention_in_multiplier attention_out_multiplier mlp_multipliers ssm_multipliers "
        "ssm_in_multiplier ssm_out_multiplier attention_value_scale full_attn_alpha_factor full_attn_beta_factor "
        "linear_attn_alpha_factor linear_attn_beta_factor mlp_alpha_factor mlp_beta_factor embedding_scale",
        neutral=(1,),
    ),
    **_fields("factors on embeddings or residuals", "scale_emb scale_depth dim_model_base scale_embedding mup_enabled"),
    # Gemma2, Granite, Llama4: the scale of attention scores. SCALES has the neutral values.
    **_fields(
        "another scale of attention scores",
        "query_pre_attn_scalar attention_multiplier attention_scale softmax_scale",
        neutral=(),
    ),
    **_fields("a scale of attention scores that depends on the position", "attn_temperature_tuning"),
    # GPT2
    **_fields("another scale of attention scores", "scale_attn_by_inverse_layer_idx"),
    **_fields("another scale of attention scores", "scale_attn_weights", neutral=(True,)),
    # Olmo, Cohere, Phi, StableLm, Persimmon, Llama4
    **_fields("clipped queries, keys and values", "clip_qkv"),
    **_fields("norms of queries and keys", "use_qk_norm qk_layernorm qk_layer_norms qk_norm"),
    # HyperCLOVAX, StableLm, GPTNeoX, Falcon, Bloom, OPT, DiffLlama
    **_fields(
        "norms in other places, or attention and MLP in parallel",
        "use_post_norm use_sandwich_norm use_parallel_residual parallel_attn new_decoder_architecture "
        "num_ln_in_parallel_attn apply_residual_connection_post_layernorm",
    ),
    **_fields("norms in other places", "do_layer_norm_before", neutral=(True,)),
    # Nemotron, Starcoder2, Falcon, Cohere, MPT
    **_fields("LayerNorm", "layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps", neutral=()),
    **_fields(
        "another norm than RMSNorm",
        "norm_type normalization_type normalization norm_function",
        neutral=("rms_norm", "rmsnorm", "RMSNorm", "rms"),
    ),
    # Gemma2, Falcon, GPT2, NemotronH, GptOss: a model file reads its own field of these
    **_fields(
        "another activation",
        "hidden_act hidden_activation activation_function activation mlp_hidden_act afn",
        neutral=("silu", "swish", "swiglu"),
    ),
    **_fields("another activation", "swiglu_limit swiglu_alpha activation_sparsity_pattern"),
    # Phi, GPTNeoX, GPTJ, DeepseekV3, Falcon, MPT, SmolLM3, GraniteSWA, and Gemma3's second RoPE
    **_fields("RoPE on a part of each head", "partial_rotary_factor rotary_pct rotary_percent", neutral=(1,)),
    **_fields("RoPE on a part of each head", "rotary_dim rotary_ndims", neutral=()),
    **_fields("RoPE on neighboring pairs", "rope_interleave rope_interleaved rope_traditional use_rope_interleave"),
    **_fields("several RoPEs", "rope_local_base_freq layer_rope_theta compress_rope_theta local_rope_theta", ()),
    **_fields("positions without RoPE", "alibi use_alibi no_rope_layer_interval"),
    **_fields("layers without RoPE", "no_rope_layers", neutral=(1,)),
    **_fields("other position embeddings", "position_embedding_type", neutral=("rope", "rotary")),
    # Mistral, Qwen2, Cohere2, Doge, Llama4, GPTNeo. `Fields` passes sliding windows that no layer has.
    **_fields(
        "sliding windows",
        "sliding_window use_sliding_window sliding_window_size attention_window_size window_size attention_chunk_size "
        "keep_window_size local_attention attn_window",
    ),
    **_fields("sliding windows", "global_attn_every_n_layers", neutral=(1,)),
    **_fields("layers of several kinds", "layer_types", neutral=("full_attention", "attention")),
    **_fields("attention to later tokens", "use_bidirectional_attention prefix_lm"),
    **_fields("attention to later tokens", "is_causal causal", neutral=(True,)),
    # Falcon, Gemma3n, Gemma4, DeepseekV2, MiMoV2: heads and layers of other sizes. SCALES: v_head_dim
    **_fields("value heads of another width", "v_head_dim", neutral=()),
    **_fields("latent attention", "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim o_lora_rank"),
    **_fields("keys and values shared by heads or layers", "multi_query num_kv_shared_layers attention_k_eq_v"),
    **_fields(
        "layers that differ in size",
        "block_configs per_layer_config num_attention_heads_per_layer use_double_wide_mlp block_auto_adjust_ff_dim "
        "pruned_heads",
    ),  # block_configs: nemotron-nas
    **_fields(
        "numbers that this architecture has under another name",
        "num_kv_heads ffn_hidden_size intermediate_size_mlp rotary_emb_base",
        neutral=(),
    ),
    **_fields(
        "embeddings of each layer, or residuals of several streams",
        "hidden_size_per_layer_input altup_num_inputs laurel_rank hc_mult",
    ),
    **_fields("gates on attention", "gating use_attention_gate"),
    # Mixtral, Qwen2Moe, DeepseekV2, Ernie4_5_Moe, Gemma4, Llama4
    **_fields(
        "experts (mixture of experts)",
        "num_experts num_local_experts n_routed_experts moe_num_experts n_shared_experts num_shared_experts "
        "moe_num_shared_experts shared_expert_intermediate_size shared_intermediate_size moe_layers is_moe "
        "enable_moe_block top_k_experts ffn_config",
    ),
    **_fields("experts (mixture of experts)", "mlp_layer_types", neutral=("dense",)),
    # FalconH1, Jamba, Lfm2, MiniMax, RecurrentGemma, Qwen3Next
    **_fields(
        "state space, convolution or linear attention layers",
        "mamba_d_state mamba_d_conv mamba_d_ssm mamba_expand mamba_n_heads conv_L_cache full_attn_idxs state_size "
        "ssm_state_size lru_width block_types layers_block_type linear_num_key_heads linear_num_value_heads "
        "linear_conv_kernel_dim index_topk",
    ),
    # Parts that one or two recent architectures have: DeepseekV4, NemotronH, LongcatFlash, Zaya, Kimi and others
    **_fields(
        "a part of another architecture",
        "H_cycles L_cycles attn_layer_indices backbone_hidden_size cca_time0 cca_time1 compress_rates conv_kernel "
        "conv_kernel_size d_rel gated_norm_rank hc_count hc_lowrank hc_magnitude heads_per_ngram index_head_dim "
        "index_n_heads index_block_size index_topk_blocks indexer_budget indexer_types indexer_n_heads kda_lower_bound "
        "kda_safe_gate layer_group_size learnable_sink_init linear_head_dim linear_num_heads linear_key_head_dim "
        "linear_value_head_dim local_layer_ids log_scaling_n_floor log_scaling_alpha loop_num_passes mamba_num_heads "
        "mlp_gate_softcap mlp_up_softcap ngram_size n_layers_per_attn_res_block n_recurrent_loops num_centroids "
        "o_groups output_gate_type ple_embed_dim ple_layer_ids pooling qk_l2_clip_threshold rel_extent "
        "rel_l2_clip_threshold swa_head_dim swa_num_attention_heads swa_num_key_value_heads router_hidden_size "
        "use_ordered_embeddings short_conv_kernel_size num_layers_per_stack",
    ),
    **_fields("a factor on logits", "logits_mup_width_multiplier", neutral=(1,)),
    **_fields("biases", "decoder_bias projector_bias"),
    **_fields("another vocabulary for the output", "output_vocab_size unpadded_vocab_size", neutral=()),
    **_fields("experts (mixture of experts)", "zero_expert_num shared_experts_intermediate_size shared_expert_sink "
              "moe_latent_size moe_shared_expert_intermediate_size expert_ffn_hidden_size use_expert_bias"),
    # Gemma3, Llava, T5: an outer configuration
    **_fields(
        "images, sound, or an encoder",
        "text_config vision_config audio_config encoder_config decoder_config is_encoder_decoder add_cross_attention",
    ),
}  # fmt: skip

# Fields whose neutral value follows from the head width H: name -> function of H.
SCALES: dict[str, Callable[[int], float]] = {
    "query_pre_attn_scalar": lambda H: H,
    "attention_multiplier": lambda H: H**-0.5,
    "attention_scale": lambda H: H**-0.5,
    "softmax_scale": lambda H: H**-0.5,
    "v_head_dim": lambda H: H,
    "rotary_dim": lambda H: H,
    "rotary_ndims": lambda H: H,
}

# Fields that act only beside one of MATHEMATICS: of experts, windows, state space layers, soft positions and others.
COMPANIONS = frozenset(
    """
    num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers first_k_dense_replace
    routed_scaling_factor route_scale n_group topk_group topk_method moe_topk moe_k moe_layer_start_index
    moe_layer_end_index moe_layer_interval moe_norm_min moe_apply_router_weight_on_input moe_routed_scaling_factor
    interleave_moe_layer_step num_dense_layers router_jitter_noise input_jitter_noise router_aux_loss_coef
    output_router_logits scoring_func
    max_window_layers sliding_window_pattern floor_scale attn_scale lambda_std_dev block_size
    mamba_chunk_size mamba_conv_bias mamba_d_head mamba_n_groups mamba_norm_before_gate mamba_proj_bias mamba_rms_norm
    time_step_limit conv_bias block_ffn_dim_multiplier block_multiple_of
    altup_active_idx altup_coef_clip altup_correct_scale vocab_size_per_layer_input
    L_bp_cycles audio_chunk_size audio_merge_size audio_soft_tokens_per_image vision_soft_tokens_per_image
    image_seq_length centroid_intermediate_top_k chain_hidden_post_norm chunk_size classifier_activation
    dense_intermediate_size enable_moe_fp32_combine expand expert_selection_fn hc_eps hc_sinkhorn_iters
    index_local_blocks indexer_compress_ratio indexer_head_dim indexer_kv_heads kv_channels linear_a_log_max
    linear_a_log_min linear_allow_neg_eigval linear_dt_init_floor linear_dt_max linear_dt_min loop_gate_rank
    loop_layer_index_end loop_layer_index_start make_ngram_vocab_size_divisible_by mamba_head_dim mamba_hidden_act
    mamba_ssm_cache_dtype mixer_rms_eps moe_shared_expert_overlap n_groups n_input_layers n_output_layers
    n_recurrent_layers ngpt_alpha_init ngram_vocab_size_base ple_conv_kernel_size prefix_dense_intermediate_size
    prefix_dense_sliding_window_pattern projector_hidden_act qk_head_dim recurrent_kv_cache_mode
    rescale_prenorm_residual reorder_and_upcast_attn residual_in_fp32 rms_norm_eps_moe_gate router_scaling_factor
    shared_expert_combination_strategy split_ngram_parts time_step_floor time_step_init_scheme time_step_max
    time_step_min time_step_rank time_step_scale use_associative_scan use_conv_bias use_mamba_kernels use_mambapy
    """.split()  # noqa: SIM905 (a list takes ninety lines)
)

# Fields that do not change the logits: who wrote the file and how, training, the form of outputs, and defaults of
# generation, which transformers 5 ignores here (generation_config.json has those that apply).
BOOKKEEPING = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype name_or_path use_cache cache_implementation auto_map
    is_llama_config tokenizer_class tokenizer_file transformers.js_config attn_implementation use_flash_attention
    use_flash_attention_2 use_flash_attn flash_attn base_model_name_or_path model_max_length max_sequence_length
    max_seq_len max_seq_length seq_length n_positions n_ctx quantization quantization_config compression_config
    pretraining_tp tp_plan base_model_tp_plan chunk_size_feed_forward gradient_checkpointing torchscript use_bfloat16
    tf_legacy_loss initializer_range initializer_factor embedding_initializer_range init_std attention_dropout dropout
    hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop residual_dropout
    embedding_dropout classifier_dropout classifier_bias neftune_noise_alpha
    id2label label2id num_labels problem_type task_specific_params finetuning_task is_decoder tie_encoder_decoder
    cross_attention_hidden_size prefix return_dict output_hidden_states output_attentions output_scores output_logits
    tie_last_hidden_states num_logits_to_keep num_layers seed aux_loss_coef z_loss_coefficient mlp_dropout
    initializer_cutoff_factor mtp_hidden_states_first mtp_layer_types mtp_layers_block_type mtp_local_layer_ids
    mtp_loss_scaling_factor mtp_mlp_layer_types num_mtp_layers num_nextn_predict_layers mm_tokens_per_image
    return_dict_in_generate max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences renormalize_logits remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens penalty_alpha guidance_scale num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    """.split()  # noqa: SIM905
)
# Bookkeeping too: private fields, ids of tokens, and what unsloth writes.
BOOKKEEPING_PREFIXES = ("_", "unsloth_")
BOOKKEEPING_SUFFIXES = ("_token_id", "_token_ids", "_token_index")


def is_neutral(name: str, value: Any, H: int | None) -> bool:
    """Whether a field of MATHEMATICS has a value that changes nothing, for heads of width H (None: unknown)."""
    neutral = (None, *MATHEMATICS[name].neutral)
    if isinstance(value, list):
        return all(item in neutral for item in value)
    if H is not None and name in SCALES and isinstance(value, int | float):
        return math.isclose(value, SCALES[name](H), rel_tol=1e-6)
    return value in (*neutral, {})


def is_bookkeeping(name: str) -> bool:
    """Whether a field does not change the logits."""
    return (
        name in BOOKKEEPING
        or name in COMPANIONS
        or name.startswith(BOOKKEEPING_PREFIXES)
        or name.endswith(BOOKKEEPING_SUFFIXES)
    )
