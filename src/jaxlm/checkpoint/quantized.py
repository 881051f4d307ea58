"""Quantized checkpoints: which tensors make a weight, and its way onto the devices.

config.json names the format. Whether a module is quantized follows from its tensors, so that the lists of exceptions
(modules_to_not_convert, ignore) are not needed. Bits and groups follow from shapes where they can.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxlm.checkpoint import gguf_packed
from jaxlm.checkpoint import quantized_formats as formats
from jaxlm.checkpoint.quantized_layout import Packed, Reader
from jaxlm.checkpoint.safetensors import DTYPES, Tensor
from jaxlm.models.config import QUANTIZATION, brief
from jaxlm.nn.quantized import Quantized
from jaxlm.nn.quantized_cpu import BLOCK

STORED = "stored"  # quantize= of `load` for quantized weights as they are in the files
LEAST = BLOCK // 2  # inputs of the smallest groups; those of others are a multiple of BLOCK
# Tensors of quantized modules that are not needed: scales of activations, which are computed from them, and of a KV
# cache, and a shape that follows from others.
UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "input_amax", "activation_scale", "input_scale_ub",
          "output_scale", "weight_shape", "q_scale", "k_scale", "v_scale", "prob_scale", "k_zero_point",
          "v_zero_point")  # fmt: skip
READABLE = "compressed-tensors, FP8, GPTQ and AWQ of 4 and 8 bits, MLX, or GGUF"


class Scheme(NamedTuple):
    """What config.json says of the quantization.

    Attributes:
        method: key of METHODS.
        fields: the section of config.json.
    """

    method: str
    fields: dict[str, Any]


def section(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section of config.json that describes a quantization; None if the checkpoint is not quantized."""
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, Mapping) else {}):
        for name in QUANTIZATION:
            if isinstance(fields := config.get(name), Mapping) and fields:
                return dict(fields)
    return None


def without_section(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json without that section, for weights that are not quantized."""
    found = {name: value for name, value in raw.items() if name not in QUANTIZATION}
    if isinstance(text := raw.get("text_config"), dict):
        found["text_config"] = {name: value for name, value in text.items() if name not in QUANTIZATION}
    return found


def scheme_of(raw: Mapping[str, Any]) -> Scheme | None:
    """Reads the section of config.json; None if the checkpoint is not quantized.

    Raises:
        ValueError: the format is not supported.
    """
    if (fields := section(raw)) is None:
        return None
    method = fields.get("quant_method") or ("mlx" if "group_size" in fields else "an unknown method")
    problem = REFUSALS[method](fields) if method in METHODS else ""
    if method in METHODS and not problem:
        return Scheme(method, fields)
    bits = next((f", {n} bits" for n in (4, 8) if fields.get(f"load_in_{n}bit") is True), "")
    named = raw.get("_name_or_path")
    original = f" ({named})" if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) else ""
    raise ValueError(
        f"the checkpoint is quantized ({brief(method)}{bits}), in a form that jaxlm does not read{problem}. What "
        f"loads: the original model{original}, whose name is base_model in the model card (for an adapter of it: -m "
        f"ORIGINAL --adapter ADAPTER), or one in {READABLE}"
    )


def join(
    scheme: Scheme, tensors: Mapping[str, Tensor], ignored_prefixes: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Puts a Packed in the place of the tensors of each quantized module.

    Args:
        scheme: the quantization.
        tensors: the tensors of the checkpoint by name.
        ignored_prefixes: prefixes of tensors that are not used, which stay as they are.

    Returns:
        Tensors and Packed by name of the weight, and faults (what is wrong: names), for `hf.match`.
    """
    method, faults = METHODS[scheme.method], dict[str, list[str]]()
    left = {name: t for name, t in tensors.items() if not name.startswith(tuple(ignored_prefixes))}
    kept: dict[str, Any] = {name: t for name, t in tensors.items() if name not in left}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in left.items():
        module, _, end = name.rpartition(".")
        modules.setdefault(module, {})[end] = tensor
    found = {module: spec for module, own in modules.items() if (spec := method(scheme.fields, module, own))}
    plain = Counter[str]()
    for module, own in modules.items():
        if module not in found:
            plain.update({t.dtype: t.nbytes for t in own.values() if t.dtype in DTYPES})
    dtype = plain.most_common(1)[0][0] if plain else "BF16"
    for module, own in modules.items():
        spec = found.get(module)
        rest = {end: t for end, t in own.items() if end not in UNUSED and (spec is None or end not in spec.ends)}
        kept |= {t.name: t for t in rest.values()}
        if spec is None:
            continue
        if missing := [f"{module}.{end}" for end in spec.needed if end not in own]:
            faults.setdefault("missing, which its quantized weight needs", []).extend(missing)
        if not spec.in_rows and (spec.shape[1] % BLOCK or (spec.group != LEAST and spec.group % BLOCK)):
            fault = f"of inputs or groups that are no multiple of {BLOCK} (or groups of {LEAST})"
            faults.setdefault(fault, []).append(module)
        parts = tuple(own[end] for end in spec.ends if end in own)
        name = f"{module}.weight"
        bits = 4 if spec.bits <= 4 else 8
        kept[name] = Packed(name, dtype, spec.shape, spec.encoding, parts, spec.read, bits, spec.in_rows)
    return kept, faults


class Spec(NamedTuple):
    """How a module is stored.

    Attributes:
        shape: shape of its weight [F,D].
        encoding: its type, for messages.
        ends: ends of the names of its tensors.
        needed: those of them that must be there.
        bits: bits of a number.
        group: number of inputs of a group.
        read: as in Packed.
        in_rows: as in Packed.
    """

    shape: tuple[int, ...]
    encoding: str
    ends: tuple[str, ...]
    needed: tuple[str, ...]
    bits: int
    group: int
    read: Callable[[Packed, int, int], Quantized]
    in_rows: bool = False


def _spec(shape: tuple[int, ...], scale: Tensor | None, bits: int, ends: str, optional: str, read: Any,
          encoding: str = "", groups_first: bool = False, in_rows: bool = False) -> Spec:  # fmt: skip
    """A Spec. The last axis of the scales is that of the groups, or the first."""
    of_scale = scale.shape if scale is not None and len(scale.shape) == 2 else (1, 1)
    group = shape[1] // max(of_scale[0 if groups_first else 1], 1)
    needed = tuple(ends.split())
    return Spec(shape, encoding or f"int{bits}", (*needed, *optional.split()), needed, bits, group, read, in_rows)


# Methods. Each is a function of the section of config.json, the name of a module and its tensors by the end of their
# names. It returns None for a module that is not quantized.


def _compressed_tensors(fields: dict[str, Any], module: str, own: dict[str, Tensor]) -> Spec | None:
    scheme = _group_of(fields, module)
    weights, inputs = (scheme.get(name) or {} for name in ("weights", "input_activations"))
    packed, weight = own.get("weight_packed"), own.get("weight")
    if packed is None:
        integers = inputs.get("type", "int") == "int" and inputs.get("num_bits") == 8
        block = weights.get("block_structure") if weights.get("strategy") == "block" else None
        if weight is not None and "weight_scale" in own and own["weight_scale"].dtype == "U8":
            return _microscaled(weight, own, "weight", "weight_scale", 8, "mxfp8")
        return _eight_bits(weight, own, "weight_scale", block, integers)
    if packed.dtype == "U8":
        kind = "nvfp4" if own.get("weight_scale") is not None and own["weight_scale"].dtype == "F8_E4M3" else "mxfp4"
        return _microscaled(packed, own, "weight_packed", "weight_scale", 4, kind, "weight_global_scale")
    bits = weights.get("num_bits", 4)
    shape = (packed.shape[0], packed.shape[1] * 32 // bits)
    read = Reader(formats.pack_quantized, bits=bits)
    needed = "weight_packed weight_scale" + " weight_zero_point" * (weights.get("symmetric") is False)
    return _spec(shape, own.get("weight_scale"), bits, needed, "weight_g_idx weight_zero_point", read)


def _group_of(fields: dict[str, Any], module: str) -> dict[str, Any]:
    """The entry of config_groups whose targets have a module: its name, an expression (`re:`), or else a class."""
    groups = [group for group in (fields.get("config_groups") or {}).values() if isinstance(group, dict)]
    for group in groups:
        for target in group.get("targets") or ():
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return group
    return next((group for group in groups if {"Linear", "Embedding"} & set(group.get("targets") or ())), {})


def _eight_bits(
    weight: Tensor | None, own: dict[str, Tensor], scale: str, block: Any, activations: bool
) -> Spec | None:
    """int8 or e4m3 with scales. activations: whether those of int8 are rounded too."""
    if weight is None or weight.dtype not in ("I8", "F8_E4M3") or len(weight.shape) != 2:
        return None
    channels, width = weight.shape
    of_scale = own.get(scale)
    sizes = of_scale.shape if of_scale is not None else ()
    in_rows = math.prod(sizes) in (1, channels) and not block and "weight_zero_point" not in own
    activations = activations and weight.dtype == "I8"
    read = Reader(formats.eight_bits, scale=f".{scale}", block=block, activations=activations)
    encoding = "fp8" if weight.dtype == "F8_E4M3" else "int8"
    spec = _spec((channels, width), None, 8, f"weight {scale}", "weight_zero_point", read, encoding, in_rows=in_rows)
    group = math.gcd(block[1], width) if block else width // max(sizes[1] if len(sizes) == 2 else 1, 1)
    return spec._replace(group=group)


def _microscaled(weight: Tensor, own: dict[str, Tensor], name: str, scale: str, bits: int, encoding: str,
                 optional: str = "") -> Spec:  # fmt: skip
    width = weight.nbytes * 8 // bits // weight.shape[0]
    read = Reader(formats.microscaled, weight=f".{name}", scale=f".{scale}", bits=bits)
    return _spec((weight.shape[0], width), own.get(scale), bits, f"{name} {scale}", optional, read, encoding)


def _fp8(fields: dict[str, Any], module: str, own: dict[str, Tensor]) -> Spec | None:
    return _eight_bits(own.get("weight"), own, "weight_scale_inv", fields.get("weight_block_size"), False)


def _scaled(fields: dict[str, Any], module: str, own: dict[str, Tensor]) -> Spec | None:
    return _eight_bits(own.get("weight"), own, "weight_scale", None, False)


def _gptq(fields: dict[str, Any], module: str, own: dict[str, Tensor]) -> Spec | None:
    if (words := own.get("qweight")) is None:
        return None
    bits, index = fields["bits"], own.get("g_idx")
    if index is not None and index.shape[0]:  # a module may have other bits
        bits = words.shape[0] * 32 // index.shape[0]
    shape = (words.shape[1], words.shape[0] * 32 // bits)
    first = fields.get("checkpoint_format", "gptq") == "gptq"
    read = Reader(formats.gptq, bits=bits, symmetric=fields.get("sym", True) is True, first_version=first)
    return _spec(shape, own.get("scales"), bits, "qweight qzeros scales", "g_idx", read, groups_first=True)


def _awq(fields: dict[str, Any], module: str, own: dict[str, Tensor]) -> Spec | None:
    if (words := own.get("qweight")) is None:
        return None
    bits = fields.get("bits", fields.get("w_bit", 4))
    shape = (words.shape[1] * 32 // bits, words.shape[0])
    read = Reader(formats.awq, bits=bits)
    return _spec(shape, own.get("scales"), bits, "qweight qzeros scales", "", read, groups_first=True)


def _mlx(fields: dict[str, Any], module: str, own: dict[str, Tensor]) -> Spec | None:
    weight = own.get("weight")
    if weight is None or weight.dtype != "U32":
        return None
    override = fields.get(module)
    fields = {**fields, **override} if isinstance(override, dict) else fields
    bits, mode = fields["bits"], fields.get("mode", "affine")
    if mode != "affine":
        return _microscaled(weight, own, "weight", "scales", bits, mode)
    shape = (weight.shape[0], weight.shape[1] * 32 // bits)
    return _spec(shape, own.get("scales"), bits, "weight scales biases", "", Reader(formats.mlx, bits=bits))


METHODS: dict[str, Callable[[dict[str, Any], str, dict[str, Tensor]], Spec | None]] = {
    "compressed-tensors": _compressed_tensors, "fp8": _fp8, "fbgemm_fp8": _scaled, "modelopt": _scaled, "gptq": _gptq,
    "awq": _awq, "mlx": _mlx,
}  # fmt: skip


# What is refused of a method: a function of the section of config.json to what is not supported, or "".


def _other_bits(fields: dict[str, Any], known: Collection[int]) -> str:
    bits = fields.get("bits", fields.get("w_bit", 4))
    return "" if bits in known else f": bits is {brief(bits)} (supported: {', '.join(map(str, known))})"


def _refuse_compressed_tensors(fields: dict[str, Any]) -> str:
    kinds = [fields.get("format"), *(g.get("format") for g in (fields.get("config_groups") or {}).values())]
    unknown = [kind for kind in kinds if kind is not None and kind not in COMPRESSED]
    sparse = (fields.get("sparsity_config") or {}).get("format") or "dense"
    unknown += [sparse] if sparse != "dense" else []
    unknown += ["transform_config"] if (fields.get("transform_config") or {}).get("config_groups") else []
    return f": {brief(unknown[0])}" if unknown else ""


def _refuse_gptq(fields: dict[str, Any]) -> str:
    kind = "marlin" if fields.get("is_marlin_format") else fields.get("checkpoint_format") or "gptq"
    return f": checkpoint_format is {brief(kind)}" * (kind not in ("gptq", "gptq_v2")) or _other_bits(fields, (4, 8))


def _refuse_awq(fields: dict[str, Any]) -> str:
    version = fields.get("version", "gemm")
    return f": version is {brief(version)}" * (str(version).lower() != "gemm") or _other_bits(fields, (4,))


def _refuse_mlx(fields: dict[str, Any]) -> str:
    mode = fields.get("mode", "affine")
    return f": mode is {brief(mode)}" * (mode not in MODES) or _other_bits(fields, range(2, 9))


def _refuse_fp8(fields: dict[str, Any]) -> str:
    kind = fields.get("fmt", "e4m3")
    return f": fmt is {brief(kind)}" * (kind not in ("e4m3", "float8_e4m3fn"))


def _refuse_modelopt(fields: dict[str, Any]) -> str:
    kind = fields.get("quant_algo", "FP8")
    return f": quant_algo is {brief(kind)}" * (kind != "FP8")


COMPRESSED = ("naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "nvfp4-pack-quantized",
              "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense")  # fmt: skip
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
REFUSALS: dict[str, Callable[[dict[str, Any]], str]] = {
    "compressed-tensors": _refuse_compressed_tensors, "fp8": _refuse_fp8, "fbgemm_fp8": lambda fields: "",
    "modelopt": _refuse_modelopt, "gptq": _refuse_gptq, "awq": _refuse_awq, "mlx": _refuse_mlx,
}  # fmt: skip


def packed(tensor: Any) -> Packed | None:
    """The Packed of a matched tensor of a checkpoint; None if it is not quantized."""
    return tensor if isinstance(tensor, Packed) else gguf_packed.packed(tensor)


def kept(tensor: Any, dtype: Any, quantize: str | None) -> Packed | None:
    """The Packed of a matched tensor that stays quantized with these arguments of `load`; None if it becomes an array.

    Blocks of GGUF stay only with quantize="stored": products with arrays in bfloat16 are faster (docs/performance.md,
    "GGUF").
    """
    if quantize == STORED:
        return packed(tensor)
    by_default = quantize is None and isinstance(dtype, str) and dtype == "auto"
    return tensor if by_default and isinstance(tensor, Packed) else None
