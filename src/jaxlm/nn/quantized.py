"""Quantized weights: integers or 8-bit floating point numbers, with scales. Their products never form the whole float
weight.

A weight is scale * (q - zero) + offset. It has one of two layouts:

- channels: q has the shape of the weight, and each output channel has a scale (LLM.int8(), arXiv:2208.07339).
- groups: the inputs of a channel are divided into groups of consecutive ones (GPTQ, arXiv:2210.17323, section 4). Each
  group of each channel has a scale, and sometimes an offset. q is transposed, in blocks of BLOCK inputs, so that the
  channels are the last axes: many are multiplied at once. For a CPU, q is also in tiles of channels (`tile`): the bytes
  that it reads for a block of inputs are then consecutive.

quantize.py makes such weights from arrays.

With `activations`, products also round their inputs to 8 bits. With channels, they have a scale for each token: integer
products are twice as fast as bfloat16 on CPU. Single rows with jax before 0.12, and up to 128 rows on accelerators, are
not rounded. With groups of int4, a few rows are rounded on CPU, with a scale for each block of inputs. When a product
is differentiated, its input is not rounded: gradients are those through the dequantized weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxlm.devices import mesh
from jaxlm.devices.hardware import jax_before
from jaxlm.nn import quantized_accelerator as accelerator
from jaxlm.nn import quantized_cpu as cpu
from jaxlm.nn.linear import MAX_SINGLE_ROWS, WeightForm, plain_einsum
from jaxlm.nn.quantized_cpu import BLOCK


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(WeightForm):
    """A weight in few bits: scale * (q - zero) + offset.

    Instead of arrays, the leaves may be their shapes, shardings or letters. In the shapes here the weight is [F,D];
    output channels may have several axes ([N,H,D]).

    Attributes:
        q: channels: [F,D] int8 or float8_e4m3fn. groups: [I,S,F] int8 or uint8, where I is the number of inputs /
            BLOCK and S is BLOCK. Of 4 bits S is BLOCK/2: byte i holds input i of the block in its low bits and input
            i + BLOCK/2 in its high bits. In tiles of t channels: [I,F/t,S,t].
        scale: channels: [F]. groups: [g,F] for g groups.
        offset: [g,F], or None.
        outer_scale: [h,F], or None: a factor on the scales of g / h groups each, as in GGUF's K-quants.
        outer_offset: [h,F], or None: a factor on the offsets.
        order: [D] int32, or None: the order of the inputs in q, for groups whose inputs are not consecutive (GPTQ's
            act-order).
        kind: "int8" (8-bit integers), "fp8" (e4m3), "int4" (4-bit integers, 0 to 15) or "mxfp4" (e2m1, times 2).
        inputs: Sizes of the input axes of the weight, which are its last.
        zero: Subtracted from q.
        dtype: dtype of the represented weight, and of activations.
        activations: Whether products also round their inputs to 8 bits.
        rotation: Inputs that q has rotated together (`rotated`); 0 or 1 for none. Only in the layout channels.
    """

    q: Any
    scale: Any
    offset: Any = None
    outer_scale: Any = None
    outer_offset: Any = None
    order: Any = None
    kind: str = field(default="int8", metadata={"static": True})
    grouped: bool = field(default=False, metadata={"static": True})
    inputs: tuple[int, ...] = field(default=(), metadata={"static": True})
    zero: int = field(default=0, metadata={"static": True})
    dtype: Any = field(default=jnp.bfloat16, metadata={"static": True})
    activations: bool = field(default=False, metadata={"static": True})
    rotation: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.scale.shape[self.grouped :], *self.inputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def arrays(self) -> dict[str, Any]:
        """The fields with an axis of output channels, by name."""
        names = ("q", "scale", "offset", "outer_scale", "outer_offset")
        return {name: a for name in names if (a := getattr(self, name)) is not None}

    @property
    def tiled(self) -> bool:
        """Whether q is in tiles of channels."""
        return self.grouped and self.q.ndim == self.scale.ndim + 2

    def letters(self, own: str) -> "Quantized":
        """The letters of the fields of a weight with the letters `own`. The axis of groups has the first letter of the
        inputs, so that it is sharded like them."""
        kept, inputs = own[: -len(self.inputs)], own[-len(self.inputs) :]
        if not self.grouped:
            return replace(self, q=own, scale=kept)
        names = {"q": f"{inputs[0]}{'' if self.tiled else ' '}{kept}", "scale": f"{inputs[0]}{kept}", "order": ""}
        names |= dict.fromkeys(("offset", "outer_scale", "outer_offset"), names["scale"])
        return replace(self, **{name: letters for name, letters in names.items() if getattr(self, name) is not None})

    def product(self, spec: str, x: Float[Array, "*x"]) -> Float[Array, "*y"]:
        """The product with the weight, in float32. The inputs of the weight are the last axes of x."""
        if mesh.active():
            return jax.checkpoint(_on_mesh, static_argnums=0, prevent_cse=False)(spec, x, self)
        kept = self.shape[: -len(self.inputs)]
        rows = x.shape[: x.ndim - len(self.inputs)]
        y = _product(x.reshape(math.prod(rows), math.prod(self.inputs)), self.flat())
        return y.reshape(*rows, *kept)

    def flat(self) -> "Quantized":
        """The weight with one axis of output channels and one of inputs."""
        channels = math.prod(self.shape[: -len(self.inputs)])
        if not self.grouped:
            q, scale = self.q.reshape(channels, -1), self.scale.reshape(channels)
            return replace(self, q=q, scale=scale, inputs=(q.shape[1],))
        arrays = self.arrays()
        q = arrays.pop("q")
        flat = {name: a.reshape(a.shape[0], channels) for name, a in arrays.items()}
        sizes = (-1, *q.shape[-2:]) if self.tiled else (q.shape[1], channels)
        return replace(self, q=q.reshape(q.shape[0], *sizes), **flat, inputs=(math.prod(self.inputs),))

    def dense(self) -> Float[Array, "*w"]:
        """The whole weight as an array in `dtype`."""
        flat = self.flat()
        if not self.grouped:
            w = rotated(flat.q.astype(jnp.float32) * flat.scale.astype(jnp.float32)[:, None], self.rotation)
        else:
            w = flat.values(jnp.float32).T
            w = w if flat.order is None else jnp.zeros_like(w).at[:, flat.order].set(w)
        return w.astype(self.dtype).reshape(self.shape)

    def rows(self, index: Any) -> Float[Array, "*index D"]:
        """Rows of a weight [V,D] in `dtype`, such as the embeddings of tokens."""
        if self.grouped:
            i, size = jnp.clip(jnp.ravel(index), 0, self.shape[0] - 1), self.q.shape[-1]
            taken = {name: a[:, i] for name, a in self.arrays().items() if name != "q"}
            q = self.q[:, i // size, :, i % size].transpose(1, 2, 0) if self.tiled else self.q[:, :, i]  # [I,S,rows]
            return replace(self, q=q, **taken).dense().reshape(*jnp.shape(index), -1)
        index = jnp.asarray(index)
        count = index.size
        # A single row is looked up with others: on TPU, XLA would copy the whole table to another layout at each step.
        several = jnp.pad(index.reshape(-1), (0, 7)) if count == 1 else index.reshape(-1)
        w = self.q[several].astype(jnp.float32) * self.scale[several].astype(jnp.float32)[:, None]
        return rotated(w[:count], self.rotation).reshape(*index.shape, -1).astype(self.dtype)

    def scales(self) -> tuple[Float[Array, "g F"], Any]:
        """Scales and offsets of the groups in float32; None without offsets."""

        def whole(a: Any, factor: Any) -> Any:
            if a is None or factor is None:
                return a if a is None else a.astype(jnp.float32)
            a = a.astype(jnp.float32).reshape(factor.shape[0], -1, *a.shape[1:]) * factor.astype(jnp.float32)[:, None]
            return a.reshape(-1, *a.shape[2:])

        return whole(self.scale, self.outer_scale), whole(self.offset, self.outer_offset)

    def values(self, dtype: Any) -> Float[Array, "D F"]:
        """The values of a flat weight in groups, transposed, in the order of q."""
        q = untiled(self).q
        if self.kind in ("int4", "mxfp4"):
            q = jnp.concatenate([cpu.codes(q & 15, self.kind), cpu.codes(q >> 4, self.kind)], axis=1)
        scale, offset = self.scales()
        q = q.reshape(len(scale), -1, q.shape[-1]).astype(jnp.float32)
        q = q + (cpu.center(self.kind) - self.zero) if cpu.center(self.kind) != self.zero else q
        w = q * scale[:, None] if offset is None else q * scale[:, None] + offset[:, None]
        return w.astype(dtype).reshape(-1, q.shape[-1])

    def parts(self, blocks: int) -> tuple[int, int, Callable[[Any, Any], Array]]:
        """A division of a flat weight in groups into parts of whole groups and about this number of blocks.

        Returns:
            The number of parts, their number of inputs, and a function from the number of a part and a dtype to its
            values [inputs,F].
        """
        outer = self.scale if self.outer_scale is None else self.outer_scale
        least = max(1, self.q.shape[0] // outer.shape[0])  # blocks of a group, or of groups with one factor
        sizes = [n for n in range(least, max(blocks, least) + 1, least) if self.q.shape[0] % n == 0]
        size = sizes[-1]
        count = self.q.shape[0] // size

        def values(i: Any, dtype: Any) -> Array:
            def cut(a: Any) -> Any:
                n = a.shape[0] // count
                return jax.lax.dynamic_slice_in_dim(a, i * n, n)

            return replace(self, **{name: cut(a) for name, a in self.arrays().items()}).values(dtype)

        return count, size * BLOCK, values


def tile(channels: int, platform: str = "cpu") -> int:
    """Channels of a tile: a power of two that divides the last axis of channels. 0 on accelerators: no tiles."""
    return math.gcd(channels, BLOCK) if platform == "cpu" else 0


def tiled(w: Quantized) -> Quantized:
    """A flat weight in groups with q in tiles, [I,F/t,S,t]."""
    size = tile(w.scale.shape[-1])
    return w if w.tiled else replace(w, q=w.q.reshape(*w.q.shape[:2], -1, size).swapaxes(1, 2))


def untiled(w: Quantized) -> Quantized:
    """A flat weight in groups with q as [I,S,F]."""
    return replace(w, q=w.q.swapaxes(1, 2).reshape(w.q.shape[0], w.q.shape[2], -1)) if w.tiled else w


def rotated(x: Float[Array, "*B D"], size: int) -> Float[Array, "*B D"]:
    """Each `size` consecutive numbers of the last axis, multiplied with a normalized Hadamard matrix.

    A few channels of activations are much larger than the others. Rotated, they are spread over `size` numbers, so that
    rounding to 8 bits loses less. The product of rotated inputs and rotated weights is that of both without a rotation
    (QuaRot, arXiv:2404.00456). The matrix is its own inverse. size: a power of 4, so that its elements are exact.
    Few rows are returned in float32.
    """
    if size <= 1:
        return x
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    matrix, parts = jnp.asarray(signs / math.sqrt(size), x.dtype), x.reshape(-1, size)
    product = partial(plain_einsum, "BD,DF->BF")
    if x.size // x.shape[-1] > MAX_SINGLE_ROWS:
        return product(parts, matrix).astype(x.dtype).reshape(x.shape)
    return jax.lax.platform_dependent(parts, matrix, cpu=_rotated_on_cpu, default=product).reshape(x.shape)


def _rotated_on_cpu(x: Float[Array, "B D"], w: Float[Array, "D F"]) -> Float[Array, "B F"]:
    """A few rows of x times a small w, in float32. With jax 0.10 it is a sum: as a product, or in bfloat16, it makes
    the products that follow 3 times as slow. With newer versions the sum takes as long as a fifth of the product that
    follows, and a product takes almost no time."""
    x, w = jax.lax.optimization_barrier(x.astype(jnp.float32)), w.astype(jnp.float32)
    y = (x[:, :, None] * w).sum(axis=1) if jax_before(0, 11) else plain_einsum("BD,DF->BF", x, w)
    return jax.lax.optimization_barrier(y)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def without_rounding(weights: Any) -> Any:
    """Weights whose products do not round their inputs, in training too where no gradient flows to an input: the
    embedding before the first layer."""
    return jax.tree.map(
        lambda w: replace(w, activations=False) if is_quantized(w) else w, weights, is_leaf=is_quantized
    )


def _product(x: Float[Array, "B D"], w: Quantized) -> Float[Array, "B F"]:
    if w.order is not None:
        x, w = x[:, w.order], replace(w, order=None)
    return _differentiable(rotated(x, w.rotation), w)


@jax.custom_vjp
def _differentiable(x: Float[Array, "B D"], w: Quantized) -> Float[Array, "B F"]:
    on_tpu, on_gpu = (_untiled_first(product) for product in (accelerator.on_tpu, accelerator.on_gpu))
    return jax.lax.platform_dependent(x, w, cpu=_on_cpu, tpu=on_tpu, default=on_gpu)


def _differentiable_forward(x: Array, w: Quantized) -> tuple[Array, tuple[Array, Quantized]]:
    return _differentiable(x, replace(w, activations=False)), (x[:0], w)


def _differentiable_backward(residuals: tuple[Array, Quantized], y: Array) -> tuple[Array, Any]:
    like, w = residuals
    y = y.astype(like.dtype)
    x = jax.lax.platform_dependent(y, w, cpu=_transposed_on_cpu, default=accelerator.transposed).astype(like.dtype)
    return x, None  # zero: the weight is frozen


_differentiable.defvjp(_differentiable_forward, _differentiable_backward)


def _on_cpu(x: Float[Array, "B D"], w: Quantized) -> Float[Array, "B F"]:
    if w.grouped:
        return cpu.grouped_rows(x, tiled(w)) if x.shape[0] <= cpu.MAX_ROWS else cpu.by_blocks(x, w)
    if not (w.activations and w.kind == "int8"):
        y = cpu.float_channels(x, w.q)
    elif x.shape[0] > 1:
        y = cpu.integer_channels(x, w.q)
    else:
        y = cpu.float_channels(x, w.q) if jax_before(0, 12) else cpu.integer_row(x[0], w.q)[None]
    return y * w.scale.astype(jnp.float32)


def _untiled_first(product: Callable[[Array, Any], Array]) -> Callable[[Array, Quantized], Array]:
    return lambda x, w: product(x.astype(w.dtype), untiled(w))


def _transposed_on_cpu(y: Float[Array, "B F"], w: Quantized) -> Float[Array, "B D"]:
    if w.grouped:
        return cpu.from_blocks(y, w)
    return cpu.from_channels((y.astype(jnp.float32) * w.scale.astype(jnp.float32)).astype(y.dtype), w.q)


def _on_mesh(spec: str, x: Float[Array, "*x"], w: Quantized) -> Float[Array, "*y"]:
    """The product on each device's part of x and of the weight, and an all-reduce of sharded inputs."""
    of_x, own = spec.split("->")[0].split(",")
    inputs, out = own[-len(w.inputs) :], spec.split("->")[1]
    if w.order is not None:  # the inputs of a group may be on any device
        flat = x.reshape(*x.shape[: x.ndim - len(w.inputs)], -1)[..., w.order]
        x, w = flat.reshape(x.shape), replace(w, order=None)
    names = w.letters(own)
    arrays, tree = jax.tree.flatten(w)
    first = _first_axes(inputs, w, arrays)

    def part(letters: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Inputs are sharded over `first`, if at all; channels in groups as the tiles of q are."""
        last, tiles = own[-len(w.inputs) - 1], w.q.shape[-3] if w.tiled else 0
        counts = [tiles if tiles and letter == last else n for letter, n in zip(letters.ljust(len(shape)), shape)]
        axes = list(mesh.traced_spec(letters.replace(inputs[0], " "), counts))
        axes += [None] * (len(shape) - len(axes))
        if inputs[0] in letters:
            axes[letters.index(inputs[0])] = first or None
        return PartitionSpec(*axes)

    def local(x: Array, *parts: Array) -> Array:
        here = replace(jax.tree.unflatten(tree, parts), inputs=x.shape[-len(inputs) :])
        rows = x.shape[: -len(inputs)]
        y = _product(x.reshape(math.prod(rows), -1), here.flat()).reshape(*rows, *here.shape[: -len(inputs)])
        return jax.lax.psum(y, first) if first else y

    in_specs = (part(of_x, x.shape), *map(part, jax.tree.leaves(names), [a.shape for a in arrays]))
    shape = (*x.shape[: -len(inputs)], *w.shape[: -len(inputs)])
    axes = set(jax.sharding.get_abstract_mesh().axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.shard_map(
        local, in_specs=in_specs, out_specs=part(out, shape), axis_names=axes, check_vma=False
    )(x, *arrays)  # fmt: skip


def _first_axes(inputs: str, w: Quantized, arrays: list[Any]) -> tuple[str, ...]:
    """The mesh axes of the first input axis, if they divide it and the groups; otherwise none."""
    axes = next(iter(mesh.traced_spec(inputs, w.inputs)), None)
    axes = (axes,) if isinstance(axes, str) else axes or ()
    size = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    if w.grouped:
        return axes if all(a.shape[0] % size == 0 for a in arrays) else ()
    return axes if math.prod(w.inputs) // size % max(w.rotation, 1) == 0 else ()
