"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways in which checkpoints stretch it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """The numbers of a config's rope section; fields that a type does not use keep their default."""

    theta: float = 10_000.0
    type: str = "default"
    factor: float = 1.0
    original_context: int = 0  # llama3, yarn: the context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    amplitude: float = 1.0  # yarn: what cos and sin are multiplied by


class Frequencies(NamedTuple):
    """radians [H/2] float32 a position, and the amplitude of the rotated vectors."""

    radians: np.ndarray
    amplitude: float


def frequencies(rope: Rope, H: int) -> Frequencies:
    """The angular step of each rotated pair. float32 step by step, as the checkpoints' authors computed it."""
    exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    wavelength = (np.float64(rope.theta) ** exponent).astype(np.float32)  # over 2 pi
    return Frequencies(_STRETCH[rope.type](rope, np.float32(1) / wavelength, H), rope.amplitude)


def _llama3(rope: Rope, base: np.ndarray, H: int) -> np.ndarray:
    """Llama 3.1: slow pairs are divided by the factor, fast ones kept, those between blended (Meta's model card)."""
    f32 = np.float32
    turns = f32(rope.original_context) / (f32(2 * math.pi) / base)
    low, high = f32(rope.low_freq_factor), f32(rope.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), f32(0), f32(1))
    return (f32(1) - keep) * base / f32(rope.factor) + keep * base


def _yarn(rope: Rope, base: np.ndarray, H: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over dimensions between kept and divided frequencies."""

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


_STRETCH = {
    "default": lambda rope, base, H: base,
    "linear": lambda rope, base, H: base / np.float32(rope.factor),
    "llama3": _llama3,
    "yarn": _yarn,
}
TYPES = tuple(_STRETCH)


def apply_rope(x: jax.Array, pos: jax.Array, freqs: Frequencies) -> jax.Array:
    """Rotates each head of x [B,T,N,H] by its position [B,T]; pair i is (x[i], x[i + H/2]), Hugging Face's order.

    Angles are float32 elementwise products: a reduced-precision product would be wrong by radians at long positions.
    """
    angle = pos.astype(jnp.float32)[:, :, None, None] * freqs.radians  # [B,T,1,H/2]
    cos, sin = jnp.cos(angle) * freqs.amplitude, jnp.sin(angle) * freqs.amplitude
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
