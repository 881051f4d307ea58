"""LoRA (Hu et al. 2021, arXiv:2106.09685): a weight that stays as it is, and beside it a product of two thin ones.

An adapter is a tree like the weights, with a `Lora` that lacks its weight at each place that is adapted and nothing at
the others. It is what is trained and what a file holds; `join` makes it one with the weights.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import params
from jaxlm.nn.linear import WeightForm, product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora(WeightForm):
    """w + scale * b a, which is never formed (eq. 3; scale is its alpha / r).

    For w of the letters NHD, a is [r,D] and b [N,H,r]: a has the letters that the product sums, b the others. With a
    key, the part `rate` of the elements that a sees is dropped.
    """

    w: Any
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    rate: float = field(default=0.0, metadata={"static": True})

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        inputs, out = spec.split("->")
        seen, letters = inputs.split(",")
        summed = "".join(letter for letter in letters if letter not in out)
        kept = "".join(letter for letter in letters if letter in out)
        rows = seen.removesuffix(summed)
        y = x if self.key is None else dropped(x, self.key, self.rate)
        y = product(f"{seen},r{summed}->{rows}r", y, self.a).astype(x.dtype)
        return product(spec, x, self.w) + self.scale * product(f"{rows}r,{kept}r->{out}", y, self.b)

    def merged(self) -> jax.Array:
        """The array that does the same, in w's dtype; the sum is made in float32."""
        if self.a.ndim + self.b.ndim > self.w.ndim + 2:  # layers stacked for a scan
            return jax.vmap(Lora.merged)(self)
        thick = jnp.tensordot(self.b.astype(jnp.float32), self.a.astype(jnp.float32), 1, precision="highest")
        return (self.w.astype(jnp.float32) + self.scale * thick).astype(self.w.dtype)


def dropped(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x with the part `rate` of its elements 0 and the others larger by as much (Srivastava et al. 2014)."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def is_lora(leaf: Any) -> bool:
    return isinstance(leaf, Lora)


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) so that high ranks learn too (rsLoRA, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def products(table: params.Table, cfg: Any) -> Iterator[params.TensorSpec]:
    """The weights that can be adapted: those that are multiplied by, not looked up in."""
    return (row for row in params.tensors(table, cfg) if row.path != "embed" and row.letters not in params.NORMS)


def targets(table: params.Table, cfg: Any, names: Collection[str]) -> list[params.TensorSpec]:
    """The weights of these names: ours (`q`), a checkpoint's (`q_proj`, `lm_head`), or `all-linear` for every product
    of the layers. ValueError for a name that is none, with those that are."""
    found, left = [], set(names)
    for row in products(table, cfg):
        known = {row.path.split(".")[-1], row.names[0].removesuffix(".weight").split(".")[-1]}
        known |= {"all-linear"} if row.path.startswith("layers.") else set()
        if known & set(names):
            found.append(row)
            left -= known
    if left:
        some = dict.fromkeys(row.path.split(".")[-1] for row in products(table, cfg))
        tied = " (the head is tied to the embedding)" if cfg.tied and left & {"head", "lm_head"} else ""
        raise ValueError(
            f"LoRA has no target {', '.join(sorted(left))}{tied}: choose from {', '.join(some)}, all-linear"
        )
    return found


def init(rows: Collection[params.TensorSpec], L: int, rank: int, scale: float, key: jax.Array) -> dict[str, Any]:
    """An adapter of these weights in a model of L layers that changes nothing yet: a is uniform within PEFT's bound of
    1 / sqrt(inputs), b zero. float32."""
    adapter: dict[str, Any] = {"layers": [{} for _ in range(L)]}
    for i, row in enumerate(rows):
        half_a, half_b = halves(row, rank)
        bound = math.prod(half_a.shape[1:]) ** -0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), half_a.shape, jnp.float32, -bound, bound)
        params.put(adapter, row.path, Lora(None, a, jnp.zeros(half_b.shape, jnp.float32), None, scale))
    return adapter


def halves(row: params.TensorSpec, rank: int) -> tuple[params.TensorSpec, params.TensorSpec]:
    """a and b beside a weight: its row with their letters and shapes."""
    inputs = params.summed_letters(row.letters)
    split = len(row.letters) - len(inputs)
    return (
        row._replace(letters=f"r{inputs}", shape=(rank, *row.shape[split:])),
        row._replace(letters=f"{row.letters[:split]}r", shape=(*row.shape[:split], rank)),
    )


def join(weights: Any, adapter: Any) -> Any:
    """The weights with an adapter's leaves in their places; both are listed, or both stacked."""
    if isinstance(adapter, Lora):
        return replace(adapter, w=weights)
    if isinstance(adapter, dict):
        return {**weights, **{name: join(weights[name], part) for name, part in adapter.items()}}
    return [join(*pair) for pair in zip(weights, adapter)] + list(weights[len(adapter) :])


def keyed(adapter: Any, key: jax.Array, rate: float) -> Any:
    """An adapter that drops elements of its inputs, other ones at each place."""
    if not rate:
        return adapter
    found, tree = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=is_lora)
    made = []
    for own, (path, leaf) in zip(jax.random.split(key, len(found)), found):
        stacked = jax.tree_util.DictKey("stacked") in path
        own = jax.random.split(own, len(leaf.a)) if stacked else own  # one for each layer of the scan
        made.append(replace(leaf, key=own, rate=rate))
    return tree.unflatten(made)


def leaves(weights: Any) -> Iterator[tuple[str, Lora]]:
    """Path (`layers.3.q`) and leaf of every adapted weight."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_lora):
        if is_lora(leaf):
            yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def count(weights: Any) -> int:
    """Parameters of the adapter in a model's weights, 0 where there is none."""
    return sum(leaf.a.size + leaf.b.size for _, leaf in leaves(weights))


def fused(weights: Any) -> Any:
    """The weights with every adapter added in."""
    return jax.tree.map(lambda leaf: leaf.merged() if is_lora(leaf) else leaf, weights, is_leaf=is_lora)
