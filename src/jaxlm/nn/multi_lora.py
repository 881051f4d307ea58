"""Several LoRA adapters of one base in one batch: each row of the batch uses one of them, or none.

The adapters' factors are concatenated along their ranks: a [R,D] and b [N,H,R], where R is the sum of the ranks. A
product computes a x for all R, sets the ranks of other adapters to zero, and multiplies with b. The cost grows with R,
not with the number of adapters, and the ranks need not be equal. (S-LoRA, Sheng et al. 2023, arXiv:2311.03285, gathers
the factors of each row instead, which pays off with many more adapters than rows.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.nn import lora, params
from jaxlm.nn.linear import WeightForm, product

BASE = -1  # the index of rows without an adapter


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MultiLora(WeightForm):
    """A weight with the low-rank factors of several adapters.

    Attributes:
        w: The frozen weight, an array or a WeightForm.
        a: Factors on the input, concatenated: [R,D] for a weight [N,H,D].
        b: Factors on the output, concatenated: [N,H,R].
        adapter: Index of the adapter of each row, [B] int32; BASE for none. None: no row has an adapter.
        ranks: Rank of each adapter; 0 if it does not adapt this weight.
        scales: Factor on b a of each adapter.
    """

    w: Any
    a: Any
    b: Any
    adapter: Any = None
    ranks: tuple[int, ...] = field(default=(), metadata={"static": True})
    scales: tuple[float, ...] = field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    def product(self, spec: str, x: Float[Array, "*x"]) -> Float[Array, "*y"]:
        """x w + scale * b (a x) with the adapter of each row. The first letter of the spec is that of the rows."""
        y = product(spec, x, self.w)
        if self.adapter is None:
            return y
        of_a, of_b = lora.factor_specs(spec)
        h = product(of_a, x, self.a).astype(x.dtype)
        h = jnp.where(_per_row(self._is_used(), h.ndim), h, jnp.zeros((), h.dtype))
        scale = jnp.asarray(self.scales, jnp.float32)[self.adapter]
        return y + _per_row(scale[:, None], y.ndim) * product(of_b, h, self.b)

    def letters(self, own: str) -> "MultiLora":
        """The letters of the fields of a weight with the letters `own`."""
        last = params.summed_letters(own)
        adapter = None if self.adapter is None else "B"
        w = params.letters_of(self.w, own)
        return replace(self, w=w, a=f"r{last}", b=f"{own.removesuffix(last)}r", adapter=adapter)

    def _is_used(self) -> Bool[Array, "B R"]:
        """Whether a row uses the adapter that a rank belongs to."""
        owner = np.repeat(np.arange(len(self.ranks), dtype=np.int32), self.ranks)
        return self.adapter[:, None] == owner


def _per_row(x: Array, ndim: int) -> Array:
    """An array [B,n] as [B,1,…,n]."""
    return x.reshape(x.shape[0], *(1,) * (ndim - 2), x.shape[1])


def combine(base: Any, adapted: Sequence[Any]) -> Any:
    """The weights of a base with several adapters.

    Args:
        base: The weights without an adapter.
        adapted: The same weights with each adapter (nn.lora.join).
    """

    leaves, tree = jax.tree.flatten(base, is_leaf=_is_form)
    groups = [*zip(*(tree.flatten_up_to(each) for each in adapted))]  # of each weight, one for each adapter
    factors = [([leaf.a for leaf in group if lora.is_lora(leaf)], [leaf.b for leaf in group if lora.is_lora(leaf)])
               for group in groups]  # fmt: skip
    factors = [pair for pair in factors if pair[0]]
    shardings = [(a[0].sharding, b[0].sharding) for a, b in factors]
    joined = iter(jax.jit(_concatenated, out_shardings=shardings)(factors))

    def with_factors(w: Any, group: Sequence[Any]) -> Any:
        if not any(map(lora.is_lora, group)):
            return w
        ranks = tuple(leaf.a.shape[0] if lora.is_lora(leaf) else 0 for leaf in group)
        scales = tuple(leaf.scale if lora.is_lora(leaf) else 0.0 for leaf in group)
        a, b = next(joined)
        return MultiLora(w, a, b, None, ranks, scales)

    return tree.unflatten([with_factors(*each) for each in zip(leaves, groups)])


def _concatenated(factors: list[tuple[list[Array], list[Array]]]) -> list[tuple[Array, Array]]:
    return [(jnp.concatenate(a), jnp.concatenate(b, axis=-1)) for a, b in factors]


def _is_form(leaf: Any) -> bool:
    return isinstance(leaf, WeightForm)


def for_rows(weights: Any, adapter: Int[Array, " B"] | None) -> Any:
    """The weights for a batch whose rows use these adapters. Weights without adapters are returned unchanged."""

    def with_rows(leaf: Any) -> Any:
        return replace(leaf, adapter=adapter) if isinstance(leaf, MultiLora) else leaf

    return jax.tree.map(with_rows, weights, is_leaf=_is_form)
