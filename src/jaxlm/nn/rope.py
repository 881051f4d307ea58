"""Rotary position embedding, RoPE (Su et al. 2021, arXiv:2104.09864), and its context-extension methods.

`Rope` has the RoPE settings of a config.json. The methods are those of transformers' `rope_type`: default, linear
(position interpolation), llama3 and yarn.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Frequencies(NamedTuple):
    """Rotary frequencies of one kind of layer.

    Attributes:
        radians: Angle per position of each rotated pair [H/2] float32.
        amplitude: Factor on cos and sin; above 1 in yarn.
    """

    radians: Float[np.ndarray, " H/2"]
    amplitude: float


@dataclass(frozen=True)
class Rope:
    """RoPE settings of a config. A field that a type does not use has its default value.

    Attributes:
        theta: Base of the frequencies (`rope_theta`).
        type: One of TYPES (`rope_type`).
        factor: Context extension factor (`factor`).
        original_context: llama3, yarn: context length before the extension (`original_max_position_embeddings`).
        low_freq_factor: llama3: pairs with fewer turns in the original context are divided by `factor`.
        high_freq_factor: llama3: pairs with more turns in the original context are not changed.
        beta_fast: yarn: turns in the original context above which a pair is not changed.
        beta_slow: yarn: turns in the original context below which a pair is divided by `factor`.
        truncate: yarn: round the ends of the ramp to whole dimensions.
        amplitude: yarn: factor on cos and sin (`attention_factor`).
    """

    theta: float = 10_000.0
    type: str = "default"
    factor: float = 1.0
    original_context: int | float = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0

    def frequencies(self, H: int) -> Frequencies:
        """Rotary frequencies of heads of width H, rounded to float32 at every step as the reference codes do."""
        exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
        wavelength = (np.float64(self.theta) ** exponent).astype(np.float32)  # over 2 pi
        return Frequencies(_METHODS[self.type](self, np.float32(1) / wavelength, H), self.amplitude)


@dataclass(frozen=True)
class FixedRope:
    """Fixed rotary frequencies, used in a config instead of a `Rope`.

    Comparisons with another implementation use the frequencies of that implementation, because a difference of one unit
    in the last place changes the logits at position 9,000 by 1e-3 standard deviations.

    Attributes:
        radians: H/2 numbers, exact in float32.
        amplitude: Factor on cos and sin.
    """

    radians: tuple[float, ...]
    amplitude: float = 1.0

    def frequencies(self, H: int) -> Frequencies:
        if 2 * len(self.radians) != H:
            raise ValueError(f"{len(self.radians)} rotary frequencies do not fit heads of width {H}: pass {H // 2}")
        return Frequencies(np.array(self.radians, np.float32), self.amplitude)


def _llama3(rope: Rope, base: np.ndarray, H: int) -> np.ndarray:
    """Llama 3.1 (Meta's model card): divides low frequencies by the factor, keeps high ones, interpolates between."""
    f32 = np.float32
    turns = f32(rope.original_context) / (f32(2 * math.pi) / base)
    low, high = f32(rope.low_freq_factor), f32(rope.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), f32(0), f32(1))
    return (f32(1) - keep) * base / f32(rope.factor) + keep * base


def _yarn(rope: Rope, base: np.ndarray, H: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a linear ramp over dimensions between kept and divided frequencies."""

    def dimension(turns: float) -> float:
        return H * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    width = high - low if high != low else 0.001
    f32 = np.float32
    divide = np.clip((np.arange(H // 2, dtype=f32) - f32(low)) / f32(width), f32(0), f32(1))
    return base / f32(rope.factor) * divide + base * (f32(1) - divide)


_METHODS = {
    "default": lambda rope, base, H: base,
    "linear": lambda rope, base, H: base / np.float32(rope.factor),
    "llama3": _llama3,
    "yarn": _yarn,
}
TYPES = tuple(_METHODS)


def apply_rope(x: Float[Array, "B T N H"], pos: Int[Array, "B T"], freqs: Frequencies) -> Float[Array, "B T N H"]:
    """Rotates each head of x [B,T,N,H] by its position pos [B,T].

    Pair i is (x[i], x[i + H/2]), as in Hugging Face checkpoints. Angles are computed as elementwise float32 products. A
    matmul in reduced precision would have errors of radians at large positions.
    """
    angle = pos.astype(jnp.float32)[:, :, None, None] * freqs.radians  # [B,T,1,H/2]
    cos, sin = jnp.cos(angle) * freqs.amplitude, jnp.sin(angle) * freqs.amplitude
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
