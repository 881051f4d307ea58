"""Embeddings of prompts: the last hidden states (after the final norm), pooled over the tokens and L2-normalized.

Several prompts share a row. Their positions start at 0, so that they do not attend to each other. There is one row for
each shard of `data`, and its length is one of few, so that few programs are compiled.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.devices import mesh
from jaxlm.inference.compilation import kept_program
from jaxlm.inference.decoding import NotFiniteError, bucket

if TYPE_CHECKING:
    from jaxlm.model import Model

Pooling = Literal["mean", "last"]
ROW = 2048  # tokens of a row that several prompts share; a longer prompt has a row of its own
PER_ROW = 128  # prompts in a row at most


def embed(
    family: Any,
    cfg: Any,
    weights: Any,
    tokens: Int[Array, "B T"],
    pos: Int[Array, "B T"],
    prompts: Int[Array, "B T"],
    pooled: Float[Array, "B T"],
) -> Float[Array, "B M D"]:
    """The embeddings of the prompts in each row. Pure.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        weights: The weights.
        tokens: [B,T] int32.
        pos: [B,T] int32, the position of each token in its prompt (-1: padding).
        prompts: [B,T] int32, the number of its prompt, ascending in each row.
        pooled: [B,T] float32, 1 for tokens whose hidden states are pooled, else 0.

    Returns:
        [B,PER_ROW,D] float32 of norm 1; zeros where there is no prompt.
    """
    x, _ = family.forward(cfg, tokens, weights, None, pos)
    x = jnp.where(pooled[..., None] > 0, x.astype(jnp.float32), 0.0)
    total = jax.vmap(partial(jax.ops.segment_sum, num_segments=PER_ROW, indices_are_sorted=True))(x, prompts)
    norm = jnp.sqrt(jnp.sum(total * total, axis=-1, keepdims=True))
    # Replicated, because the host fetches all of it. The mean is the sum but for a factor, which the norm removes.
    return mesh.constrain(total / jnp.where(norm > 0, norm, 1.0), "")


class Embedder:
    """Computes embeddings beside an engine. Its methods can be called from any thread."""

    def __init__(self, model: "Model", exclusive: Callable[[], AbstractContextManager[None]]):
        """
        Args:
            model: The model.
            exclusive: A context in which no other program of the model runs: `Engine.between_steps`.
        """
        self.model: Model = model
        self._exclusive = exclusive

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of the prompts that `run` takes together, longest prompts first.

        Args:
            lengths: Number of tokens of each prompt.
        """
        rows = rows_of(lengths)
        size = mesh.round_up_batch(1, self.model.mesh)
        return [[*chain(*rows[i : i + size])] for i in range(0, len(rows), size)]

    def run(self, prompts: Sequence[Sequence[int]], pooling: Pooling = "mean") -> np.ndarray:
        """The embeddings [n,D] float32 of n prompts: those of one batch.

        Args:
            prompts: Token ids of each prompt, which has at least one.
            pooling: "mean" of the hidden states of all tokens, or that of the "last" token.

        Raises:
            ValueError: A hidden state is NaN or Inf.
        """
        rows = rows_of([len(prompt) for prompt in prompts])
        B = mesh.round_up_batch(len(rows), self.model.mesh)
        T = bucket(max(sum(len(prompts[i]) for i in row) for row in rows))
        tokens, pos, numbers = (np.full((B, T), fill, np.int32) for fill in (0, -1, PER_ROW - 1))
        pooled = np.zeros((B, T), np.float32)
        for b, row in enumerate(rows):
            t = 0
            for number, i in enumerate(row):
                n = len(prompts[i])
                tokens[b, t : t + n], pos[b, t : t + n], numbers[b, t : t + n] = prompts[i], np.arange(n), number
                pooled[b, t if pooling == "mean" else t + n - 1 : t + n] = 1
                t += n
        arrays = [mesh.place(a, "BT", self.model.mesh or self.model.device) for a in (tokens, pos, numbers, pooled)]
        # Compiled before other programs have to wait.
        function = partial(embed, self.model.family, self.model.config)
        program = kept_program(self.model, "embeddings", function, *arrays)
        with self._exclusive():
            found = jax.device_get(program(self.model.weights, *arrays))
        out = np.zeros((len(prompts), found.shape[-1]), np.float32)
        for b, row in enumerate(rows):
            out[row] = found[b, : len(row)]
        if not np.isfinite(out).all():
            raise NotFiniteError("the hidden states of the model are NaN or Inf: use another --dtype")
        return out


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Distributes prompts over rows of ROW tokens and PER_ROW prompts, longest first."""
    rows: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not rows or used + lengths[i] > ROW or len(rows[-1]) == PER_ROW:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += lengths[i]
    return rows
