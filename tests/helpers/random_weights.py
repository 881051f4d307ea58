"""Weights for tests that differ from the ones a model would be initialized with where that hides faults.

At the usual initialization attention scores have a deviation of 0.03 and every norm weight is neutral: a wrong rotary
factor or a forgotten norm then moves no logit. Here scores have a deviation above 1 and norm weights are spread.
Values depend on the seed and the name alone, and are uniform draws of a frozen generator: the same bits everywhere.
"""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...], seed: int = 0, neutral: float = 1.0) -> np.ndarray:
    """The float32 values of the tensor that a Hugging Face checkpoint calls `name`; neutral: of norm weights."""
    generator = np.random.RandomState(zlib.crc32(f"{seed} {name.replace('language_model.', '')}".encode()))
    unit = (generator.random_sample(shape) - 0.5) * 12**0.5  # deviation 1
    if "norm" in name:
        return (neutral + 0.2 + 0.35 * unit).astype(np.float32)
    if "embed_tokens" in name or "lm_head" in name:  # Gemma, whose norms are neutral at 0, multiplies by sqrt(D)
        return (unit * (0.5 if neutral else shape[-1] ** -0.5)).astype(np.float32)
    scale = 1.3 if "q_proj" in name or "k_proj" in name else 1.0
    return (unit * scale * shape[-1] ** -0.5).astype(np.float32)
