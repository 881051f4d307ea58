"""The inputs of every model (probes) and its answers.

RoPE is relative, so a long offset alone tests nothing: one row has positions near 0 and past 9,000, and for every
sliding window one row crosses its edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

T = 64  # tokens per row
FAR = 9000  # past 8,192: there Llama 3.1's angles with and without scaling differ by full turns
GREEDY = 64  # tokens of greedy text
MARGIN = 16  # tokens on each side of a window's edge

TEXTS = (
    "Once upon a time there was a brown fox.",
    "  Leading spaces,\ttabs,\n\n\nnewlines   and trailing  ",
    "naïve café, Straße, Ελληνικά, русский, العربية, עברית, हिन्दी, 中文字符, 日本語, 한국어",
    "👩‍👩‍👧 emoji 🏳️‍🌈, combining é ñ, zero\u200bwidth, ﬁ ligature, ½ ² ™",
    "def f(x):\n    return {'a': [1, 2.5e-3, None], \"b\": x ** 2}  # comment\n",
    "3.14159 1,000,000 0x1F 2026-11-21 10:00:00 1234567890123456789",
    "don't can't I'LL we've JOHN'S camelCase snake_case kebab-case https://example.org/a?b=c&d=%20",
    "in between: <s></s><|endoftext|><|im_start|><bos>[INST]<unused1>, not all of them special",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!! ........ ________ --------",
    "",
)
CHATS = (
    ({"role": "user", "content": "Why is the sky blue?"},),
    (
        {"role": "user", "content": "Hello  "},
        {"role": "assistant", "content": "Hi!\nWhat now?"},
        {"role": "user", "content": "Two\n\nlines, and ünïcödé 🙂"},
    ),
)


@dataclass(frozen=True)
class Probes:
    """The inputs.

    Attributes:
        tokens, pos: [B,T] int32.
        indices: [P] int32, the columns at which answers are recorded.
        prompt: token ids that greedy text continues.
        steps: number of tokens of greedy text.
    """

    tokens: np.ndarray
    pos: np.ndarray
    indices: np.ndarray
    prompt: list[int]
    steps: int


@dataclass
class Trace:
    """A model's answers. All numbers are float32.

    Attributes:
        name: of the model or reference.
        dtype: type of its weights.
        radians, amplitude: rotary frequencies [H/2] and scale of each RoPE of the config (`rope`, `local_rope`).
        hidden: the residual stream [B,P,D] before the first layer and after each, the last one normed.
        logits: [B,P,V].
        greedy: token ids of greedy text.
        gaps: at each of these, the difference of the two largest logits.
        ids, chats: token ids of TEXTS and CHATS; None without a tokenizer or a chat template.
        used: the frequencies that the answers were computed with, if they are not `radians`.
    """

    name: str
    dtype: str
    radians: dict[str, np.ndarray]
    amplitude: dict[str, float]
    hidden: list[np.ndarray]
    logits: np.ndarray
    greedy: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ids: list[list[int]] | None = None
    chats: list[list[int]] | None = None
    used: dict[str, np.ndarray] | None = None


def positions(context: int, windows: Sequence[int | None], far: int = FAR) -> np.ndarray:
    """Positions [B,T]: from 0 on; 0 to T/2 and then from `far`; 0 to T/2 and then across the edge of each window."""
    length = min(T, context)
    near, half = np.arange(length, dtype=np.int32), length // 2
    begins = [min(far, context - (length - half))]
    begins += [window - MARGIN for window in sorted({window for window in windows if window is not None})]
    rows = [near]
    for begin in begins:
        # A jump must go forward and stay within the context; without it the row equals the first one.
        if half <= begin and begin + length - half <= context:
            rows.append(np.concatenate([near[:half], begin + np.arange(length - half, dtype=np.int32)]))
    return np.stack(rows)


def probes_for(config: Any, tokenizer: Any) -> Probes:
    """The probes of an architecture. Tokens are random ids of the vocabulary with a fixed seed, 0 and 1 included."""
    pos = positions(config.context, config.windows)
    rng = np.random.RandomState(0)
    tokens = rng.randint(0, config.V, pos.shape).astype(np.int32)
    tokens[:, pos.shape[1] // 3] = 0
    tokens[:, pos.shape[1] // 2] = min(1, config.V - 1)
    indices = np.unique(np.linspace(0, pos.shape[1] - 1, 16).astype(np.int32))
    prompt = tokenizer.encode(TEXTS[0])[:8] if tokenizer is not None else []
    prompt = prompt or tokens[0, :8].tolist()
    return Probes(tokens, pos, indices, prompt, min(GREEDY, config.context - len(prompt)))
