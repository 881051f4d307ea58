"""Published files (checkpoints, tokenizers, configs, chat templates): their folder, ../shared/data or what JAXLM_SHARED
names, and their names."""

import os
from pathlib import Path

SHARED = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[3] / "shared" / "data")
TOKENIZERS = ["tokenizers/llama3", "tokenizers/qwen3", "tokenizers/olmo2", "checkpoints/stories260K"]
LLAMA = ["Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.2-3B", "Llama-3.3-70B"]
# Template -> tokenizer and the token that ends a turn.
TEMPLATES = {
    **{f"meta-llama-{version}-Instruct": ("llama3", "<|eot_id|>") for version in LLAMA},
    "Qwen-Qwen3-0.6B": ("qwen3", "<|im_end|>"),
    "Qwen3.maxtext-tokenizer_config": ("qwen3", "<|im_end|>"),
    "Qwen-Qwen2.5-7B-Instruct": ("qwen3", "<|im_end|>"),
    "allenai-OLMo-2-Instruct.reconstructed": ("olmo2", "<|endoftext|>"),
    "tulu.open-instruct": ("olmo2", "<|endoftext|>"),
}
