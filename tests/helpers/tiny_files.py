"""The files of a tiny Llama with random weights, whose tokens are bytes."""

import json
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def write(folder: Path) -> None:
    """A Llama of about 0.1 M random parameters, whose tokens are bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    from jaxlm.models import llama3
    from jaxlm.nn import params

    cfg = llama3.Config.from_hf(CONFIG)
    rng = np.random.default_rng(0)
    tensors = {}
    for row in params.tensors(llama3.PARAMS, cfg):
        norm = row.path.endswith("norm")
        value = (
            np.full(row.stored_shape, llama3.NORM_IDENTITY)
            if norm
            else rng.normal(0, row.stored_shape[-1] ** -0.5, row.stored_shape)
        )
        tensors[row.names[0]] = value.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    _tokenizer().save(str(folder / "tokenizer.json"))


def _tokenizer():
    """One token a byte, a begin token before every text, an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<begin>", "<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 256)])
    return tokenizer
