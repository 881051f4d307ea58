"""Writing GGUF files: the metadata of a model, and its tensors, slice by slice.

The names of keys and tensors are those that gguf_models.py reads. Source: docs/gguf.md in ggml-org/ggml;
convert_hf_to_gguf.py in ggml-org/llama.cpp.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxlm import models
from jaxlm.checkpoint.gguf import ALIGNMENT
from jaxlm.checkpoint.gguf_models import (
    ARCHITECTURES,
    FIELDS,
    HEADS_IN_PAIRS,
    ROPE_FACTORS,
    SCALING,
    SIZES,
    WITH_WINDOWS,
    YARN,
    Architecture,
    hf_config,
)
from jaxlm.checkpoint.gguf_types import BY_NAME, QUANTIZABLE, TYPES, quantize
from jaxlm.checkpoint.meta import in_pairs
from jaxlm.checkpoint.safetensors import DTYPES
from jaxlm.checkpoint.writer import converted, counted, is_spread, row_slices
from jaxlm.nn import params
from jaxlm.nn.rope import Rope

# Type as users name it: type of GGUF.
CHOICES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
# Type of most tensors: general.file_type (llama_ftype in llama.h).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
NUMBERS = {block.name: number for number, block in TYPES.items()}
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h
# One full-attention layer in so many, without the key attention.sliding_window_pattern.
PERIODS = {"gemma3": 6, "olmo2": 4}


class Entry(NamedTuple):
    """A tensor to write: name, type in gguf_types.BY_NAME, shape, and a function that yields its bytes in chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]
    spread: bool = False  # over several processes: all of them must call `chunks`

    @property
    def nbytes(self) -> int:
        block = BY_NAME[self.dtype]
        return math.prod(self.shape) // block.elements * block.nbytes


# Metadata


def architecture_of(family: Any) -> str:
    """The name in GGUF of a family's architecture. ValueError if there is none."""
    for name, architecture in [*ARCHITECTURES.items(), *WITH_WINDOWS.items()]:
        if models.FAMILIES.get(architecture.model_type) is family:
            return name
    raise ValueError(
        f"{family.__name__} has no architecture in GGUF (there are: {', '.join(ARCHITECTURES)}): export to a folder"
    )


def model_metadata(name: str, family: Any, cfg: Any) -> dict[str, Any]:
    """The metadata of an architecture.

    Args:
        name: the architecture in GGUF.
        family: the family.
        cfg: its Config.

    Raises:
        ValueError: GGUF has no keys for a value of the config.
    """
    own = {key: getattr(cfg, SIZES[field]) for key, field in FIELDS.items() if field in SIZES}
    own |= {
        "attention.value_length": cfg.H,
        "rope.dimension_count": cfg.H,
        "rope.freq_base": float(cfg.rope.theta),
        "vocab_size": cfg.V,
    }
    own |= _rope_scaling(cfg.rope)
    if name == "gemma3":
        own["rope.freq_base_swa"] = float(cfg.local_rope.theta)
    if any(cfg.windows) and name in PERIODS:
        own |= _windows(cfg, PERIODS[name])
    metadata = {"general.architecture": name, **{f"{name}.{key}": value for key, value in own.items()}}
    read = family.Config.from_hf(hf_config(_as_read(metadata), cfg.V, cfg.tied, rope_factors(cfg)))
    if differ := [field for field in vars(cfg) if getattr(cfg, field) != getattr(read, field)]:
        values = "; ".join(f"{field} is {getattr(cfg, field)}, not {getattr(read, field)}" for field in differ)
        raise ValueError(f"GGUF has no keys for a value of this config ({values}): export to a folder")
    return metadata


def _as_read(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as a reader has them: numbers are float32."""
    return {key: float(str(np.float32(v))) if isinstance(v, float) else v for key, v in metadata.items()}


def _rope_scaling(rope: Rope) -> dict[str, Any]:
    if rope.type in ("default", "llama3"):  # llama3: rope_factors
        return {}
    scaling: dict[str, Any] = {"type": rope.type, "factor": float(rope.factor)}
    if rope.type == "yarn":
        scaling |= {"original_context_length": int(rope.original_context)}
        scaling |= {key: float(getattr(rope, field)) for key, field in YARN.items()}
    return {SCALING + key: value for key, value in scaling.items()}


def rope_factors(cfg: Any) -> np.ndarray | None:
    """The numbers by which rotary frequencies are divided [H/2] float32, for rope_type llama3; else None."""
    if cfg.rope.type != "llama3":
        return None
    return Rope(cfg.rope.theta).frequencies(cfg.H).radians / cfg.rope.frequencies(cfg.H).radians


def _windows(cfg: Any, default: int) -> dict[str, Any]:
    """The sliding window, and the period of layers with full attention if it is not the default."""
    found = {"attention.sliding_window": next(filter(None, cfg.windows))}
    period = cfg.windows.index(None) + 1 if None in cfg.windows else cfg.L + 1
    return found if period == default else found | {"attention.sliding_window_pattern": period}


def type_metadata(entries: Iterable[Entry]) -> dict[str, Any]:
    """general.file_type, which is the type that most bytes have."""
    kinds: dict[str, int] = {}
    for entry in entries:
        kinds[entry.dtype] = kinds.get(entry.dtype, 0) + entry.nbytes
    most = max(kinds, key=kinds.__getitem__)
    quantized = {"general.quantization_version": QUANTIZATION_VERSION} if set(kinds) & set(QUANTIZABLE) else {}
    return {"general.file_type": FILE_TYPES[most], **quantized}


# Tensors


def entries(name: str, family: Any, cfg: Any, leaves: Mapping[str, Any], types: str | Mapping[str, str]) -> list[Entry]:
    """The tensors of a model.

    Args:
        name: the architecture in GGUF.
        family: the family.
        cfg: its Config.
        leaves: weight by path (`layers.3.q`): jax.Array or LazyRows, in the model's shape.
        types: one of CHOICES, or the type in GGUF by path. Tensors of one axis are F32 in any case, as llama.cpp
            expects them.

    Raises:
        ValueError: the rows of a tensor cannot be divided into blocks of its type.
    """
    architecture = ARCHITECTURES[name]
    table = architecture.table(family.PARAMS)
    found = []
    if (factors := rope_factors(cfg)) is not None:
        found.append(Entry(ROPE_FACTORS, "F32", factors.shape, lambda: [factors.view(np.uint8)]))
    for row in params.tensors(table, cfg):
        dtype = _type(row.path, types, cfg.tied) if isinstance(types, str) else types[row.path]
        dtype, width = dtype if len(row.stored_shape) > 1 else "F32", math.prod(row.stored_shape[-1:])
        if width % BY_NAME[dtype].elements:
            raise ValueError(
                f"{row.path} has rows of {width} elements, which are not whole blocks of "
                f"{BY_NAME[dtype].elements}: choose a type without blocks, such as f16"
            )
        leaf = leaves[row.path]
        chunks = partial(_encoded, leaf, row, dtype, architecture, 1.0 - family.NORM_IDENTITY)
        found.append(Entry(row.names[0], dtype, row.stored_shape, chunks, is_spread(leaf)))
    return found


def _type(path: str, choice: str, tied: bool) -> str:
    """The type in GGUF of a weight for one of CHOICES. Logits suffer most from rounding, so what gives them is Q8_0 in
    a file of Q4_0 (llama.cpp's own quantization takes Q6_K there)."""
    is_head = path == ("embed" if tied else "head")
    return "Q8_0" if choice == "q4_0" and is_head else CHOICES[choice]


def _encoded(
    value: Any, row: params.TensorSpec, dtype: str, architecture: Architecture, shift: float
) -> Iterator[np.ndarray]:
    """The bytes of a weight in a type of GGUF, slice by slice. `shift` is added to norms."""
    name = row.path.rpartition(".")[2]
    turned = architecture.in_pairs and name in HEADS_IN_PAIRS
    for part in row_slices(value):
        if turned:
            part = in_pairs(part, part.shape[1])
        if shift and name.endswith("norm"):
            part = part.astype(np.float32) + np.float32(shift)
        yield _in_type(row.path, part.reshape(-1, row.stored_shape[-1]), dtype)


def _in_type(name: str, part: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in DTYPES:
        return np.ascontiguousarray(converted(name, part, DTYPES[dtype])).reshape(-1).view(np.uint8)
    try:
        return quantize(dtype, part.astype(np.float32)).reshape(-1)
    except ValueError as error:
        raise ValueError(f"{name} has {error}: choose another type, such as f32") from None


# The file


def check_target(out: Path, sources: Iterable[Path], force: bool) -> None:
    """FileExistsError for a file that must not be replaced.

    Args:
        out: the file to write, with links resolved.
        sources: folders and files that are read while `out` is written, with links resolved.
        force: allow to replace a GGUF file. Nothing else is replaced.
    """
    if out in sources:
        raise FileExistsError(f"{out} is a file that this model was loaded from: choose another name")
    if not out.exists():
        return
    if not out.is_file():
        raise FileExistsError(f"{out} is not a file: choose another name")
    with open(out, "rb") as file:
        if file.read(4) != b"GGUF":
            raise FileExistsError(f"{out} exists and is not a GGUF file: choose another name")
    if not force:
        raise FileExistsError(f"{out} exists already: --force (force=True) replaces it")


def header(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    """The header of a file, padded: version 3, metadata, and the place of every tensor."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        kind, data = _value(value)
        out += _text(key) + struct.pack("<I", kind) + data
    at = 0
    for entry in entries:
        axes = len(entry.shape)
        out += _text(entry.name) + struct.pack(f"<I{axes}Q", axes, *entry.shape[::-1])
        out += struct.pack("<IQ", NUMBERS[entry.dtype], at)
        at += entry.nbytes + -entry.nbytes % ALIGNMENT
    return bytes(out) + b"\0" * (-len(out) % ALIGNMENT)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """The number of a value's type, and its bytes: uint32, float32, bool, text, or an array of texts or numbers."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    if isinstance(value, np.ndarray):
        kind = {"int32": 5, "float32": 6}[value.dtype.name]
        return 9, struct.pack("<IQ", kind, len(value)) + value.tobytes()
    return 9, struct.pack("<IQ", 8, len(value)) + b"".join(map(_text, value))


def write(
    file: IO[bytes], metadata: Mapping[str, Any], entries: Sequence[Entry], advance: Callable[[int], None]
) -> None:
    """Writes a GGUF file. `advance` is called with the number of bytes of tensors, as they are written."""
    file.write(header(metadata, entries))
    for entry in entries:
        written = sum(file.write(part.data) for part in counted(entry.chunks(), advance))
        if written != entry.nbytes:  # the entry's shape is wrong; every later tensor would be displaced
            raise AssertionError(f"{entry.name} has {written} bytes instead of {entry.nbytes}")
        file.write(b"\0" * (-written % ALIGNMENT))
