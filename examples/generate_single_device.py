"""Generates text on one device: load, generate, print.

    python examples/generate_single_device.py
    python examples/generate_single_device.py --model meta-llama/Llama-3.2-1B --prompt "The capital of France is"

The default model is the story model that ships with jaxlm. Decoding is greedy and in float32, so that the tokens can be
compared with those of other implementations (compare_outputs.py).
"""

from pathlib import Path

import jax
import tyro

import jaxlm

STORIES = Path(__file__).parents[1] / "src" / "jaxlm" / "stories"


def main(model: str = str(STORIES), prompt: str = "Once upon a time", max_tokens: int = 32) -> list[int]:
    """Returns the tokens of the continuation.

    Args:
        model: Hub id, folder or .gguf file.
        prompt: Text to continue.
        max_tokens: Maximum number of tokens to generate.
    """
    device = jax.devices()[0]
    loaded = jaxlm.load(model, dtype="float32", device=device)
    print(f"{loaded!r} on {device}")
    completion = jaxlm.generate(loaded, prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    print(prompt + completion)
    print(f"tokens: {completion.tokens}")
    return completion.tokens


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
