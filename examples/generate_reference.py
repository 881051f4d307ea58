"""Generates text with transformers on PyTorch, as a reference for the tokens of jaxlm.

    pip install torch==2.13.0 compressed-tensors
    python examples/generate_reference.py
    python examples/generate_reference.py --model meta-llama/Llama-3.2-1B --prompt "The capital of France is"

It does not use jaxlm. The default model is the story model that ships with jaxlm, which transformers can load too, with
the package compressed-tensors.
"""

from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

STORIES = Path(__file__).parents[1] / "src" / "jaxlm" / "stories"


def main(model: str = str(STORIES), prompt: str = "Once upon a time", max_tokens: int = 32) -> list[int]:
    """Returns the tokens of the continuation.

    Args:
        model: Hub id or folder.
        prompt: Text to continue.
        max_tokens: Number of tokens to generate.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    print(f"transformers: {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {loaded.dtype}")
    loaded.generation_config.eos_token_id = None  # generate max_tokens tokens, also past the end of a text
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    tokens = output[0, ids.shape[1] :].tolist()
    print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"tokens: {tokens}")
    return tokens


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
