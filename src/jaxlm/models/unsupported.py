"""Architectures that resemble a supported one and are not: why `jaxlm.load` refuses each model_type.

Source: the configuration and model classes of transformers 5.24 (models/*), and for nemotron-nas, deci, minicpm,
internlm2 and baichuan the code in the repositories of the models.
"""

_LLAMA = "Models with model_type llama load"
_QWEN3 = "Qwen3 models load (model_type qwen3)"
_OLMO2 = "OLMo 2 and 3 load (model_type olmo2 and olmo3)"
_GEMMA3 = "Gemma 3 models load (model_type gemma3 or gemma3_text)"
_EXPERTS = "its MLPs are experts (mixture of experts). Dense models load, such as Qwen3-8B"
_WINDOWS = (
    "it may have sliding windows. If sliding_window is null in its config.json, its layers are Llama's, and a copy "
    "loads whose config.json has model_type llama"
)

REASONS = {
    "mistral": _WINDOWS,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "glm4_moe": _EXPERTS,
    "ernie4_5_moe": _EXPERTS,
    "dbrx": _EXPERTS,
    "nemotron-nas": "its layers differ in width, and some have no attention (block_configs). "
    f"{_LLAMA}, such as Llama-3.1-Nemotron-70B-Instruct",
    "deci": f"its layers differ in the number of key/value heads. {_LLAMA}",
    "nemotron": f"its norms are LayerNorm, and its activation is a squared ReLU. {_LLAMA}",
    "nemotron_h": f"it has state space layers. {_LLAMA}",
    "qwen2": f"its queries, keys and values have biases. {_QWEN3}",
    "qwen2_vl": f"it reads images, and its queries, keys and values have biases. {_QWEN3}",
    "qwen2_5_vl": f"it reads images, and its queries, keys and values have biases. {_QWEN3}",
    "qwen3_vl": f"it reads images, and its RoPE has three axes. {_QWEN3}",
    "gemma": f"it has no norms on queries, keys and outputs. {_GEMMA3}",
    "gemma2": f"it has soft capping of attention scores and logits. {_GEMMA3}",
    "gemma3n": f"it has embeddings of each layer, and layers that share keys and values. {_GEMMA3}",
    "gemma3n_text": f"it has embeddings of each layer, and layers that share keys and values. {_GEMMA3}",
    "gemma4": f"it has heads of two widths, and layers that share keys and values. {_GEMMA3}",
    "gemma4_text": f"it has heads of two widths, and layers that share keys and values. {_GEMMA3}",
    "olmo": f"its norms are LayerNorm without weights, and some models clip queries, keys and values. {_OLMO2}",
    "phi": f"its norms are LayerNorm, its RoPE rotates a part of each head, attention and MLP are parallel. {_LLAMA}",
    "phi3": f"its query, key and value weights are one tensor, and some models have RoPE type longrope. {_LLAMA}",
    "granite": f"it has factors on embeddings, residuals, attention and logits. {_LLAMA}",
    "cohere": f"its norms are LayerNorm, attention and MLP are parallel, and its logits have a factor. {_LLAMA}",
    "cohere2": f"its norms are LayerNorm, attention and MLP are parallel, and it has sliding windows. {_LLAMA}",
    "stablelm": f"its norms are LayerNorm, and its RoPE rotates a part of each head. {_LLAMA}",
    "starcoder2": f"its norms are LayerNorm, its weights have biases, and it has sliding windows. {_LLAMA}",
    "exaone4": f"it has sliding windows, and norms on queries, keys and outputs. {_LLAMA}",
    "glm": f"its RoPE rotates a part of each head, in neighboring pairs. {_LLAMA}",
    "glm4": f"its RoPE rotates a part of each head, in neighboring pairs. {_LLAMA}",
    "minicpm": f"it has factors on embeddings, residuals and logits. {_LLAMA}",
    "minicpm3": f"it has latent attention, and factors on embeddings, residuals and logits. {_LLAMA}",
    "internlm2": f"its query, key and value weights are one tensor. {_LLAMA}",
    "baichuan": f"its query, key and value weights are one tensor. {_LLAMA}",
    "arcee": f"its MLP has no gate, and its activation is a squared ReLU. {_LLAMA}",
    "bitnet": f"its weights have three values, and it has more norms. {_LLAMA}",
}
