"""The published models of the families: hub id -> what config.json on the Hugging Face hub says of the text model.

Facts from the config.json files of the repositories. tests/models/test_counts.py compares them, and the numbers of
parameters that follow, with published files. For OLMo 3 and SmolLM3 these files were not at hand: the sizes are those
of allenai/OLMo-core (olmo3_7B, olmo3_32B) and of transformers' SmolLM3Config, the rest is what others quote of the
files, and the test compares the published numbers of parameters.
"""

import difflib
from typing import Any, NamedTuple

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip


class Published(NamedTuple):
    """A published model.

    Attributes:
        id: Hub id.
        config: config.json, without fields that say nothing of the shapes.
        tuned: Whether it is instruction-tuned, rather than pretrained.
    """

    id: str
    config: dict[str, Any]
    tuned: bool

    @property
    def page(self) -> str:
        """Its page on the hub."""
        return f"https://huggingface.co/{self.id}"

    @property
    def config_page(self) -> str:
        """Its config.json on the hub."""
        return f"{self.page}/blob/main/config.json"


def _config(kind: str, D: int, F: int, L: int, N: int, K: int, V: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
            "num_attention_heads": N, "num_key_value_heads": K, "vocab_size": V, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False, "rms_norm_eps": 1e-6, **fields}  # fmt: skip


def _llama(D: int, F: int, L: int, N: int, factor: float = 0.0, **fields: Any) -> dict[str, Any]:
    scaling = {**LLAMA3_ROPE, "factor": factor} if factor else None
    common = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "rope_scaling": scaling,
              "max_position_embeddings": 131072 if factor else 8192}  # fmt: skip
    return _config("llama", D, F, L, N, 8, 128256, **common, **fields)


def _qwen(D: int, F: int, L: int, N: int, tied: bool, context: int = 40960, theta: int = 1000000) -> dict[str, Any]:
    return _config("qwen3", D, F, L, N, 8, 151936, head_dim=128, rope_theta=theta, tie_word_embeddings=tied,
                   max_position_embeddings=context, hidden_act="silu")  # fmt: skip


def _olmo(D: int, F: int, L: int, N: int, K: int, dtype: str = "float32") -> dict[str, Any]:
    common = {"rope_theta": 500000, "max_position_embeddings": 4096, "hidden_act": "silu"}
    return _config("olmo2", D, F, L, N, K, 100352, **common) | {"torch_dtype": dtype}


def _olmo3(D: int, F: int, L: int, N: int, K: int) -> dict[str, Any]:
    """Three layers of sliding-window attention, then one of full attention, whose context is extended."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
            "beta_slow": 1.0, "attention_factor": 1.2079441541679836}  # fmt: skip
    common = {"rope_theta": 500000, "rope_scaling": yarn, "sliding_window": 4096, "hidden_act": "silu"}
    return _config("olmo3", D, F, L, N, K, 100278, max_position_embeddings=65536, **common)


def _gemma(D: int, F: int, L: int, N: int, K: int, V: int = 262144, **fields: Any) -> dict[str, Any]:
    """A text model: five layers of sliding-window attention, then one of full attention."""
    common = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
              "rope_theta": 1000000, "rope_local_base_freq": 10000, "max_position_embeddings": 32768,
              "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}  # fmt: skip
    return _config("gemma3_text", D, F, L, N, K, V, **{**common, **fields})


def _vision(D: int, F: int, L: int, N: int, K: int, **fields: Any) -> dict[str, Any]:
    """A vision-language model, whose text model has rope scaling and a longer context."""
    linear = {"rope_type": "linear", "factor": 8.0}
    fields |= {"rope_scaling": linear, "sliding_window": 1024, "max_position_embeddings": 131072}
    text = _gemma(D, F, L, N, K, 262208, **fields)
    return {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1}}


LLAMA_8B, LLAMA_70B, LLAMA_405B = (4096, 14336, 32, 32), (8192, 28672, 80, 64), (16384, 53248, 126, 128)
# (config, pretrained id, instruction-tuned ids)
_FAMILIES: list[tuple[dict[str, Any], str | None, tuple[str, ...]]] = [
    (_llama(*LLAMA_8B), "meta-llama/Meta-Llama-3-8B", ("meta-llama/Meta-Llama-3-8B-Instruct",)),
    (_llama(*LLAMA_70B), "meta-llama/Meta-Llama-3-70B", ("meta-llama/Meta-Llama-3-70B-Instruct",)),
    (_llama(*LLAMA_8B, 8.0), "meta-llama/Llama-3.1-8B", ("meta-llama/Llama-3.1-8B-Instruct",)),
    (_llama(*LLAMA_70B, 8.0), "meta-llama/Llama-3.1-70B", ("meta-llama/Llama-3.1-70B-Instruct",)),
    (_llama(*LLAMA_405B, 8.0), "meta-llama/Llama-3.1-405B", ("meta-llama/Llama-3.1-405B-Instruct",)),
    (_llama(2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True), "meta-llama/Llama-3.2-1B",
     ("meta-llama/Llama-3.2-1B-Instruct",)),
    (_llama(3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True), "meta-llama/Llama-3.2-3B",
     ("meta-llama/Llama-3.2-3B-Instruct",)),
    (_llama(*LLAMA_70B, 8.0, head_dim=128), None, ("meta-llama/Llama-3.3-70B-Instruct",)),
    (_qwen(1024, 3072, 28, 16, True), None, ("Qwen/Qwen3-0.6B",)),
    (_qwen(1024, 3072, 28, 16, True, 32768), "Qwen/Qwen3-0.6B-Base", ()),
    (_qwen(2048, 6144, 28, 16, True), None, ("Qwen/Qwen3-1.7B",)),
    (_qwen(2048, 6144, 28, 16, True, 32768), "Qwen/Qwen3-1.7B-Base", ()),
    (_qwen(2560, 9728, 36, 32, True), None, ("Qwen/Qwen3-4B",)),
    (_qwen(2560, 9728, 36, 32, True, 32768), "Qwen/Qwen3-4B-Base", ()),
    (_qwen(2560, 9728, 36, 32, True, 262144, 5000000), None,
     ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507")),
    (_qwen(4096, 12288, 36, 32, False), None, ("Qwen/Qwen3-8B",)),
    (_qwen(4096, 12288, 36, 32, False, 32768), "Qwen/Qwen3-8B-Base", ()),
    (_qwen(5120, 17408, 40, 40, False), None, ("Qwen/Qwen3-14B",)),
    (_qwen(5120, 17408, 40, 40, False, 32768), "Qwen/Qwen3-14B-Base", ()),
    (_qwen(5120, 25600, 64, 64, False), None, ("Qwen/Qwen3-32B",)),
    (_olmo(2048, 8192, 16, 16, 16), "allenai/OLMo-2-0425-1B", ()),
    (_olmo(2048, 8192, 16, 16, 16, "bfloat16"), None, ("allenai/OLMo-2-0425-1B-Instruct",)),
    (_olmo(4096, 11008, 32, 32, 32), "allenai/OLMo-2-1124-7B", ()),
    (_olmo(4096, 11008, 32, 32, 32, "bfloat16"), None, ("allenai/OLMo-2-1124-7B-Instruct",)),
    (_olmo(5120, 13824, 40, 40, 40), "allenai/OLMo-2-1124-13B", ()),
    (_olmo(5120, 13824, 40, 40, 40, "bfloat16"), None, ("allenai/OLMo-2-1124-13B-Instruct",)),
    (_olmo(5120, 27648, 64, 40, 8), "allenai/OLMo-2-0325-32B", ()),
    (_olmo(5120, 27648, 64, 40, 8, "bfloat16"), None, ("allenai/OLMo-2-0325-32B-Instruct",)),
    (_olmo3(4096, 11008, 32, 32, 32), None, ("allenai/Olmo-3-7B-Instruct", "allenai/Olmo-3-7B-Think")),
    (_olmo3(5120, 27648, 64, 40, 8), None, ("allenai/Olmo-3-32B-Think", "allenai/Olmo-3.1-32B-Instruct")),
    (_config("smollm3", 2048, 11008, 36, 16, 4, 128256, hidden_act="silu", rope_theta=5000000, no_rope_layer_interval=4,
             max_position_embeddings=65536, tie_word_embeddings=True), None, ("HuggingFaceTB/SmolLM3-3B",)),
    (_gemma(640, 2048, 18, 4, 1), "google/gemma-3-270m", ("google/gemma-3-270m-it",)),
    (_gemma(1152, 6912, 26, 4, 1), "google/gemma-3-1b-pt", ("google/gemma-3-1b-it",)),
    (_vision(2560, 10240, 34, 8, 4), "google/gemma-3-4b-pt", ("google/gemma-3-4b-it",)),
    (_vision(3840, 15360, 48, 16, 8), "google/gemma-3-12b-pt", ("google/gemma-3-12b-it",)),
    (_vision(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168), "google/gemma-3-27b-pt",
     ("google/gemma-3-27b-it",)),
    # The 135M model of another family of checkpoints that the llama architecture computes.
    (_config("llama", 576, 1536, 30, 9, 3, 49152, hidden_act="silu", rope_theta=100000, max_position_embeddings=8192,
             tie_word_embeddings=True) | {"rms_norm_eps": 1e-5}, None, ("HuggingFaceTB/SmolLM2-135M-Instruct",)),
]  # fmt: skip
MODELS = {
    name: Published(name, config, tuned)
    for config, pretrained, instruct in _FAMILIES
    for name, tuned in [*([(pretrained, False)] if pretrained else []), *((name, True) for name in instruct)]
}


def find(name: str) -> Published | None:
    """The published model of a hub id, or of the part after the organization, in any case: `qwen3-4b`."""
    wanted = name.lower()
    return next((model for id, model in MODELS.items() if wanted in (id.lower(), id.lower().partition("/")[2])), None)


def suggestions(name: str) -> list[str]:
    """Hub ids that resemble a name."""
    short = {id.lower().partition("/")[2]: id for id in MODELS}
    return [short[one] for one in difflib.get_close_matches(name.lower().rpartition("/")[2], short, 3, 0.5)]
