"""Writes quantized weights: in the format of compressed-tensors, which transformers and vLLM read, or dequantized.

The layers' matrices are quantized. Embedding and output head are written as floating point numbers, because other tools
quantize neither. The formats (https://github.com/vllm-project/compressed-tensors, `config_groups`):

    int8          int-quantized    int8 and a scale of each output channel; inputs are rounded to 8 bits, by token
    int8-weights  pack-quantized   the same in int32 words of 4 numbers; inputs are not rounded
    int4          pack-quantized   words of 8 numbers, and a scale of each group of inputs
    fp8           float-quantized  e4m3 and a scale of each output channel; inputs are not rounded

int4 is symmetric, without the offsets that `Quantized` has: zero points in this format are integers, and transformers
5.24 cannot open files with them. Weights are fitted again to symmetric groups (nn.quantize.symmetric_scales), except
those whose groups are symmetric already. int8 weights that `Quantized` has rotated are rounded again, too. The other
formats have the values of `Quantized`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm.checkpoint.writer import Entry, LazyRows, row_slices
from jaxlm.nn import params
from jaxlm.nn.quantize import FP8_MAX, symmetric_scales
from jaxlm.nn.quantized import Quantized, is_quantized
from jaxlm.nn.quantized_cpu import BLOCK

FORMATS = {
    "int8": "int-quantized",
    "int8-weights": "pack-quantized",
    "int4": "pack-quantized",
    "fp8": "float-quantized",
}
BITS = {"int8": 8, "int8-weights": 8, "int4": 4, "fp8": 8}
EXACT = 0.01  # offsets are stored in float16: up to this fraction of a scale, they count as equal


class Form(NamedTuple):
    """How the weights of a file are quantized: a type of nn.quantize.TYPES, and of int4 the inputs of a group."""

    type: str
    size: int = 0


def form_of(leaf: Any) -> Form | None:
    """The form of a quantized weight; None if it is not quantized or its form is not one of FORMATS."""
    if not is_quantized(leaf):
        return None
    if not leaf.grouped:
        return Form("int8-weights" if leaf.kind == "int8" and not leaf.activations else leaf.kind)
    if leaf.kind != "int4" or leaf.outer_scale is not None or leaf.order is not None:
        return None
    return Form("int4", math.prod(leaf.inputs) // leaf.scale.shape[0])


class DequantizedTensor(LazyRows):
    """A quantized weight in place of an array. Rows are dequantized when they are read."""

    def __init__(self, w: Quantized):
        self.w, self.shape, self.dtype = w, w.shape, np.dtype(w.dtype)
        self.nbytes = 4 * math.prod(w.shape)
        self.spread = not w.scale.is_fully_addressable

    def read_rows(self, begin: int, count: int) -> np.ndarray:
        """Rows of the leading axis in float32 [count,...]."""
        if self.spread:
            raise ValueError("quantized weights that are sharded over several processes cannot be exported: load the "
                             "model in one process")  # fmt: skip
        # With one axis of channels, whole tiles of them are read.
        size = self.w.q.shape[-1] if self.w.tiled and self.w.scale.ndim == 2 else 1
        first, last = begin // size, -(-(begin + count) // size)
        return np.asarray(_dense_rows(self.w, first, last - first, size))[begin - first * size :][:count]


@partial(jax.jit, static_argnums=(2, 3))
def _dense_rows(w: Quantized, first: Any, tiles: int, size: int) -> jax.Array:
    def cut(name: str, a: jax.Array) -> jax.Array:
        n = 1 if name == "q" else size
        axis = 2 if name == "q" and w.grouped and not w.tiled else int(w.grouped)
        return jax.lax.dynamic_slice_in_dim(a, first * n, tiles * n, axis)

    parts = {name: cut(name, a) for name, a in w.arrays().items()}
    return Quantized(**{**vars(w), **parts, "dtype": jnp.dtype("float32")}).dense()


@dataclass(frozen=True)
class Packed:
    """A weight that is written in few bits.

    Attributes:
        value: Its values: an array or LazyRows, in the model's shape.
        width: Number of inputs.
        form: The form to write.
        quantized: The same weight, if it is quantized in this form already.
    """

    value: Any
    width: int
    form: Form
    quantized: Quantized | None = None

    def rows(self) -> Iterator[np.ndarray]:
        """Slices of output channels, [n,groups,inputs of a group] in float32. A channel is one group without groups."""
        size = self.form.size or self.width
        for part in row_slices(self.value):
            yield part.astype(np.float32).reshape(-1, self.width // size, size)

    @cached_property
    def scales(self) -> np.ndarray:
        """The scale of each group of each channel [F,g], as it is written."""
        if self.form.type == "int4":
            scale = np.concatenate([np.asarray(symmetric_scales(part)) for part in self.rows()])
            return np.where(self.is_symmetric, self._own()[0], scale)
        if self.quantized is not None and self.is_exact:
            return np.asarray(self.quantized.scale, np.float32).reshape(-1, 1)
        limit = np.float32(FP8_MAX if self.form.type == "fp8" else 127)
        most = np.concatenate([np.abs(part).max(axis=-1) for part in self.rows()])
        return np.where(most > 0, most, limit) / limit

    @cached_property
    def is_symmetric(self) -> np.ndarray:
        """Whether each group of an int4 weight has its offset -8 scale already, so that its values do not change."""
        own, offset = self._own()
        return np.abs(offset + 8 * own) <= EXACT * np.abs(own)

    @property
    def is_exact(self) -> bool:
        """Whether no value that was quantized already is rounded again."""
        if self.quantized is None or self.form.type != "int4":
            return self.quantized is None or self.quantized.rotation <= 1
        return bool(self.is_symmetric.all())

    def _own(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and offsets [F,g] for codes 0 to 15; NaN of a weight that is not quantized in this form."""
        if self.quantized is None:
            nothing = np.full((1, 1), np.nan, np.float16)
            return nothing, nothing
        scale, offset = self.quantized.flat().scales()
        offset = (0 if offset is None else offset) - self.quantized.zero * scale
        return np.asarray(scale).T.astype(np.float16), np.asarray(offset).T

    def codes(self) -> Iterator[np.ndarray]:
        """Slices of the numbers that are stored, [n,D]."""
        begin, (low, high) = 0, (-8, 7) if self.form.type == "int4" else (-127, 127)
        for part in self.rows():
            scale = self.scales[begin : begin + len(part), :, None].astype(np.float32)
            begin += len(part)
            x = (part / np.where(scale == 0, 1, scale)).reshape(len(part), -1)
            yield (
                x.astype(ml_dtypes.float8_e4m3fn)
                if self.form.type == "fp8"
                else (np.clip(np.rint(x), low, high).astype(np.int8))
            )

    def weight_bytes(self) -> Iterator[np.ndarray]:
        """The bytes of the matrix. Words begin with their low bits, and hold numbers plus half of their range."""
        for code in self.codes():
            if self.form.type == "int4":
                code = (code + 8).astype(np.uint8)
                yield (code[:, ::2] | code[:, 1::2] << 4).reshape(-1)
            else:
                flat = np.ascontiguousarray(code).reshape(-1).view(np.uint8)
                yield flat ^ np.uint8(128) if self.form.type == "int8-weights" else flat

    def scale_bytes(self) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(self.scales).reshape(-1).view(np.uint8)


def fits(row: params.TensorSpec, form: Form) -> bool:
    """Whether a weight can be written in a form: a matrix of a layer, whose rows are whole groups or words."""
    if row.letters in params.NORMS or not row.path.startswith("layers."):
        return False
    return row.stored_shape[-1] % (form.size or 32 // BITS[form.type]) == 0


def form_to_write(type: str) -> Form:
    """The form in which export quantizes to a type of nn.quantize.TYPES."""
    return Form(type, BLOCK if type == "int4" else 0)


def packed_entries(name: str, packed: Packed, shape: tuple[int, ...]) -> list[Entry]:
    """The tensors of a weight.

    Args:
        name: Its name in a checkpoint that is not quantized, `….weight`.
        packed: The weight.
        shape: Its shape in a checkpoint, [F,D].
    """
    type, (F, D) = packed.form.type, shape
    groups = D // (packed.form.size or D)
    scale = "F16" if type == "int4" else "F32"

    def entry(suffix: str, dtype: str, shape: tuple[int, ...], chunks: Callable[[], Iterable[np.ndarray]]) -> Entry:
        return Entry(f"{name}{suffix}", dtype, shape, chunks)

    scales = entry("_scale", scale, (F, groups), packed.scale_bytes)
    if FORMATS[type] != "pack-quantized":
        return [entry("", "F8_E4M3" if type == "fp8" else "I8", (F, D), packed.weight_bytes), scales]
    sizes = np.array([F, D], np.int64).view(np.uint8)
    words = entry("_packed", "I32", (F, D * BITS[type] // 32), packed.weight_bytes)
    return [words, scales, entry("_shape", "I64", (2,), lambda: [sizes])]


def quantization_config(form: Form, dense: Iterable[str], ignored_prefixes: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        form: How the weights are quantized.
        dense: Names of the layers' matrices that are not, `….weight`.
        ignored_prefixes: Prefixes of tensors that are copied as they are, such as those of a vision tower.
    """
    of_type = "float" if form.type == "fp8" else "int"
    weights: dict[str, Any] = {"num_bits": BITS[form.type], "type": of_type, "symmetric": True}
    weights |= {"strategy": "group", "group_size": form.size} if form.size else {"strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "output_activations": None}
    # transformers renames the prefixes of some models, so that names are matched by their ends.
    ends = [name.removeprefix("model.").removesuffix(".weight").replace(".", r"\.") for name in dense]
    towers = dict.fromkeys(prefix.rstrip(".").split(".")[-1] for prefix in ignored_prefixes)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[form.type],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": inputs if form.type == "int8" else None}},
        "ignore": ["lm_head", *(f"re:.*{end}$" for end in ends), *(f"re:.*{tower}.*" for tower in towers)],
        "kv_cache_scheme": None,
    }
