"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen weight plus a trainable product of two low-rank factors.

An adapter is a tree like the weights. It has a `Lora` without its weight for each adapted weight, and no entry for the
others. The adapter is trained and saved; `join` combines it with the weights.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.nn import params
from jaxlm.nn.linear import WeightForm, product
from jaxlm.nn.quantized import is_quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora(WeightForm):
    """w + scale * b a, without computing the sum (eq. 3; scale is the paper's alpha / r).

    `linear.einsum` calls `product` in place of the plain product, so that model files do not change. Training
    differentiates the adapter alone (training/step.py), so that w stays as it is.

    Instead of arrays, the leaves may be their shapes, shardings or letters.

    Attributes:
        w: The frozen weight, an array or a WeightForm; None in an adapter.
        a: Factor on the input: [r,D] for a weight [N,H,D]. Its letters are r and those that the matmul contracts.
        b: Factor on the output: [N,H,r] for a weight [N,H,D].
        key: PRNG key of the dropout on the input of a; None for no dropout.
        scale: Factor on b a.
        rate: Dropout rate.
    """

    w: Any
    a: Any
    b: Any
    key: Any = None
    scale: float = field(default=1.0, metadata={"static": True})
    rate: float = field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    def product(self, spec: str, x: Float[Array, "*x"]) -> Float[Array, "*y"]:
        """x w + scale * b (a x)."""
        of_a, of_b = factor_specs(spec)
        y = x if self.key is None else dropped(x, self.key, self.rate)
        y = product(of_a, y, self.a).astype(x.dtype)
        return product(spec, x, self.w) + self.scale * product(of_b, y, self.b)

    def letters(self, own: str) -> "Lora":
        """The letters of the fields of a weight with the letters `own`."""
        last = params.summed_letters(own)
        w, key = None if self.w is None else params.letters_of(self.w, own), None if self.key is None else ""
        return replace(self, w=w, a=f"r{last}", b=f"{own.removesuffix(last)}r", key=key)

    def merged(self) -> Float[Array, "*w"]:
        """w + scale * b a as one array in w's dtype, added in float32. A quantized w is dequantized."""
        if self.a.ndim + self.b.ndim > self.w.ndim + 2:  # layers stacked for a scan
            return jax.vmap(Lora.merged)(self)
        delta = jnp.tensordot(self.b.astype(jnp.float32), self.a.astype(jnp.float32), 1, precision="highest")
        w = replace(self.w, dtype=jnp.float32).dense() if is_quantized(self.w) else self.w.astype(jnp.float32)
        return (w + self.scale * delta).astype(self.w.dtype)


def factor_specs(spec: str) -> tuple[str, str]:
    """The specs of the products with a and with b. For `BTD,NHD->BTNH`: `BTD,rD->BTr` and `BTr,NHr->BTNH`."""
    inputs, out = spec.split("->")
    of_x, letters = inputs.split(",")
    contracted = "".join(letter for letter in letters if letter not in out)
    kept = "".join(letter for letter in letters if letter in out)
    rows = of_x.removesuffix(contracted)
    return f"{of_x},r{contracted}->{rows}r", f"{rows}r,{kept}r->{out}"


def dropped(x: Float[Array, "*x"], key: Array, rate: float) -> Float[Array, "*x"]:
    """Dropout (Srivastava et al. 2014): zeros a fraction `rate` of the elements and scales the others by
    1 / (1 - rate)."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def is_lora(leaf: Any) -> bool:
    return isinstance(leaf, Lora)


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The factor on b a: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def products(table: params.Table, cfg: Any) -> Iterator[params.TensorSpec]:
    """The weights that can be adapted: those of matmuls, not norms or the embedding."""
    return (row for row in params.tensors(table, cfg) if row.path != "embed" and row.letters not in params.NORMS)


def targets(table: params.Table, cfg: Any, names: Collection[str]) -> list[params.TensorSpec]:
    """The weights with these names.

    Args:
        table: PARAMS of the family.
        cfg: Config of the model.
        names: jaxlm's names (`q`), a checkpoint's (`q_proj`, `lm_head`), or `all-linear` for all matmuls of the layers.

    Raises:
        ValueError: A name is unknown; the message lists the known ones.
    """
    targets, unknown = [], set(names)
    for row in products(table, cfg):
        aliases = {row.path.split(".")[-1], row.names[0].removesuffix(".weight").split(".")[-1]}
        aliases |= {"all-linear"} if row.path.startswith("layers.") else set()
        if aliases & set(names):
            targets.append(row)
            unknown -= aliases
    if unknown:
        known = dict.fromkeys(row.path.split(".")[-1] for row in products(table, cfg))
        tied = " (the head is tied to the embedding)" if cfg.tied and unknown & {"head", "lm_head"} else ""
        raise ValueError(
            f"LoRA has no target {', '.join(sorted(unknown))}{tied}: choose from {', '.join(known)}, all-linear"
        )
    return targets


def init(rows: Collection[params.TensorSpec], L: int, rank: int, scale: float, key: Array) -> dict[str, Any]:
    """Creates a float32 adapter that does not change the output of the model.

    b is zero. a is uniform within 1 / sqrt(fan-in), as in PEFT.

    Args:
        rows: The weights to adapt.
        L: Number of layers of the model.
        rank: r.
        scale: Factor on b a: see `scale`.
        key: PRNG key.
    """
    adapter: dict[str, Any] = {"layers": [{} for _ in range(L)]}
    pairs = [halves(row, rank) for row in rows]
    # Factors of one shape are drawn at once: compiling a draw for each of hundreds takes half a minute.
    drawn: dict[int, Array] = {}
    for shape in dict.fromkeys(a.shape for a, _ in pairs):
        numbers = [i for i, (a, _) in enumerate(pairs) if a.shape == shape]
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.array(numbers))
        bound = math.prod(shape[1:]) ** -0.5
        draw = partial(jax.random.uniform, shape=shape, dtype=jnp.float32, minval=-bound, maxval=bound)
        drawn |= dict(zip(numbers, jax.vmap(draw)(keys)))
    for i, (row, (_, b)) in enumerate(zip(rows, pairs)):
        params.put(adapter, row.path, Lora(None, drawn[i], jnp.zeros(b.shape, jnp.float32), None, scale))
    return adapter


def halves(row: params.TensorSpec, rank: int) -> tuple[params.TensorSpec, params.TensorSpec]:
    """The TensorSpecs of the factors a and b of a weight."""
    inputs = params.summed_letters(row.letters)
    split = len(row.letters) - len(inputs)
    return (
        row._replace(letters=f"r{inputs}", shape=(rank, *row.shape[split:])),
        row._replace(letters=f"{row.letters[:split]}r", shape=(*row.shape[:split], rank)),
    )


def join(weights: Any, adapter: Any) -> Any:
    """The weights with the adapter's `Lora`s in place of the adapted weights. Both are listed, or both stacked."""
    if isinstance(adapter, Lora):
        return replace(adapter, w=weights)
    if isinstance(adapter, dict):
        return {**weights, **{name: join(weights[name], part) for name, part in adapter.items()}}
    return [join(*pair) for pair in zip(weights, adapter)] + list(weights[len(adapter) :])


def keyed(adapter: Any, key: Array, rate: float) -> Any:
    """Adds dropout to an adapter, with a different PRNG key for each adapted weight."""
    if not rate:
        return adapter
    paths, tree = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=is_lora)
    leaves = []
    for leaf_key, (path, leaf) in zip(jax.random.split(key, len(paths)), paths):
        stacked = jax.tree_util.DictKey("stacked") in path
        leaf_key = jax.random.split(leaf_key, len(leaf.a)) if stacked else leaf_key  # one per layer of the scan
        leaves.append(replace(leaf, key=leaf_key, rate=rate))
    return tree.unflatten(leaves)


def leaves(weights: Any) -> Iterator[tuple[str, Lora]]:
    """Path (`layers.3.q`) and `Lora` of every adapted weight."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_lora):
        if is_lora(leaf):
            yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def count(weights: Any) -> int:
    """Number of parameters of the adapter in a model's weights; 0 without one."""
    return sum(leaf.a.size + leaf.b.size for _, leaf in leaves(weights))


def fused(weights: Any) -> Any:
    """The weights with the adapter merged into them."""
    return jax.tree.map(lambda leaf: leaf.merged() if is_lora(leaf) else leaf, weights, is_leaf=is_lora)
