"""Generates text with Meta's PyTorch code of Llama 3, from the weights of a jaxlm model.

    pip install torch==2.13.0 tiktoken pydantic pillow && pip install --no-deps llama-models==0.3.0 fairscale==0.4.13
    python examples/generate_meta.py
    python examples/generate_meta.py --model meta-llama/Llama-3.1-8B --prompt "The capital of France is"

The weights are converted in memory: `model.weights` is a plain tree of arrays, so this takes a function of twenty
lines. It works for Llama 3 and 3.1, but not for 3.2, whose RoPE has another factor than the one in Meta's code
(`jaxlm verify --against meta` patches it).
"""

from pathlib import Path
from typing import Any

import fairscale.nn.model_parallel.initialize as parallel
import numpy as np
import torch
import torch.distributed
import tyro
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer

import jaxlm

STORIES = Path(__file__).parents[1] / "src" / "jaxlm" / "stories"
# Meta's names of the weights of a layer.
LAYER = {
    "attn_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}


def main(model: str = str(STORIES), prompt: str = "Once upon a time", max_tokens: int = 32) -> list[int]:
    """Returns the tokens of the continuation.

    Args:
        model: Hub id, folder or .gguf file of a Llama 3 or 3.1.
        prompt: Text to continue.
        max_tokens: Number of tokens to generate.
    """
    source = jaxlm.load(model, dtype="float32")
    ids = source.tokenizer.encode(prompt)
    one_process()
    transformer = Transformer(model_args(source.config, len(ids) + max_tokens)).eval()
    transformer.load_state_dict(state_dict(source))
    print(f"Meta's Transformer: {sum(w.numel() for w in transformer.parameters()):,} parameters, from {source!r}")

    # Meta's forward keeps a KV cache, and takes the position of the first of the new tokens.
    tokens, new, position = [], ids, 0
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = transformer(torch.tensor([new]), position)
            position += len(new)
            new = [int(logits[0, -1].argmax())]
            tokens += new
    torch.distributed.destroy_process_group()
    print(prompt + source.tokenizer.decode(tokens))
    print(f"tokens: {tokens}")
    return tokens


def one_process() -> None:
    """Meta's layers are made for several processes. This is one process without a network port."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel.initialize_model_parallel(1)


def model_args(config: Any, length: int) -> ModelArgs:
    """Meta's configuration. It has no MLP width: int(8 D / 3) times a factor, rounded up to a multiple of F, is F."""
    if config.rope.type not in ("default", "llama3") or config.rope.factor not in (1.0, 8.0):
        raise SystemExit("Meta's code fixes the factor of RoPE at 8: use a model of Llama 3 or 3.1.")
    return ModelArgs(
        dim=config.D,
        n_layers=config.L,
        n_heads=config.N,
        n_kv_heads=config.K,
        vocab_size=config.V,
        multiple_of=config.F,
        ffn_dim_multiplier=min(1.0, config.F / int(8 * config.D / 3)),
        norm_eps=config.eps,
        rope_theta=config.rope.theta,
        use_scaled_rope=config.rope.type == "llama3",
        max_batch_size=1,
        max_seq_len=length,
    )


def state_dict(model: jaxlm.Model) -> dict[str, torch.Tensor]:
    """The weights under Meta's names, as matrices [outputs, inputs]."""
    weights, config = model.weights, model.config
    arrays = {
        "tok_embeddings": weights["embed"],
        "norm": weights["norm"],
        "output": weights["embed"] if config.tied else weights["head"],
    }
    for i, layer in enumerate(weights["layers"]):
        for name, theirs in LAYER.items():
            w = layer[name]
            if name in ("q", "k"):  # [heads,H,D]
                w = in_pairs(np.asarray(w))
            if w.ndim == 3:  # [heads,H,D], or [D,heads,H] of o
                w = w.reshape(config.D, -1) if name == "o" else w.reshape(-1, config.D)
            arrays[f"layers.{i}.{theirs}"] = w
    return {f"{name}.weight": torch.from_numpy(np.array(w)) for name, w in arrays.items()}


def in_pairs(w: np.ndarray) -> np.ndarray:
    """Rows of q or k [heads,H,D] in Meta's order.

    RoPE rotates pairs of rows. Hugging Face pairs row i of a head with row i + H/2, Meta row 2 i with row 2 i + 1.
    """
    heads, H, D = w.shape
    return w.reshape(heads, 2, H // 2, D).swapaxes(1, 2).reshape(heads, H, D)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
