"""`jaxlm plan`: what a model needs on devices that may not be here, and how fast they can be. Arithmetic alone.

Memory of weights and KV caches is exact. Temporaries and the size of programs are estimates, calibrated on programs of
the TPU and CUDA compilers (docs/scaling.md has the comparison). Times are the roofline's: no program is faster.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.devices import mesh, specs, topology
from jaxlm.devices.specs import Spec
from jaxlm.inference import decoding, roofline
from jaxlm.inference.roofline import Layout, Roof
from jaxlm.nn import params
from jaxlm.nn.quantized_kv import dtype_of

MOST = 512  # devices that `needs` tries
SMALLER = ("int8", "int4")  # types that are proposed; the others need as much memory as int8


class Memory(NamedTuple):
    """Memory of generation on one device at its peak, in bytes.

    Attributes:
        weights: Weights.
        cache: KV cache of the rows that are decoded.
        new_cache: KV cache of new prompts, which exists beside it.
        temporaries: Of the program that needs more.
        programs: Machine code of both programs.
    """

    weights: int
    cache: int
    new_cache: int
    temporaries: int
    programs: int

    @property
    def total(self) -> int:
        return sum(self)


class Plan(NamedTuple):
    """What generation needs and can reach.

    Attributes:
        spec: The device.
        count: Number of devices.
        mesh: Axis sizes.
        batch: Rows that are decoded together.
        context: Tokens per row.
        memory: Of one device.
        usable: Bytes of a device that a model may take.
        decode: A decode step of all rows with full KV caches.
        prefill: Prefill of all rows.
        max_batch: The most rows of this context that fit; 0 if none.
        max_context: The longest context of this batch that fits, at most that of the model; 0 if none.
        needs: The least number of such devices that this batch and context fit on; None if more than 512.
        quantize: The type of quantized weights; None if they are not quantized.
        smaller: Types of quantized weights that would fit, each with the bytes of the weights on one device, if weights
            that are not quantized do not fit.
    """

    spec: Spec
    count: int
    mesh: dict[str, int]
    batch: int
    context: int
    memory: Memory
    usable: int
    decode: Roof
    prefill: Roof
    max_batch: int
    max_context: int
    needs: int | None
    quantize: str | None
    smaller: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.batch / self.decode.seconds


def plan(
    family: Any,
    cfg: Any,
    spec: Spec,
    count: int = 1,
    *,
    batch: int = 8,
    context: int = 4096,
    dtype: Any = "bfloat16",
    quantize: str | None = None,
    sizes: Mapping[str, int] | None = None,
    kv_dtype: Any = None,
) -> Plan:
    """Plans generation.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        spec: The device.
        count: Number of devices.
        batch: Rows that are decoded together.
        context: Tokens per row.
        dtype: Of weights and activations.
        quantize: The type of quantized weights, as in `jaxlm.load`.
        sizes: Mesh axis sizes. Default: those with the shortest decode step.
        kv_dtype: Of the KV cache (nn/quantized_kv.py: DTYPES). Default: that of the activations.

    Raises:
        ValueError: A mesh that does not match the devices or the model, or a batch or context below 1.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"batch {batch} and context {context}: both are at least 1")
    check_context(cfg, context)
    table, itemsize = family.PARAMS, np.dtype(dtype).itemsize
    kv_dtype = dtype_of(kv_dtype or dtype)
    best = roofline.best_mesh(table, cfg, spec, count, batch, context, itemsize, kv_dtype=kv_dtype, quantize=quantize)
    sizes = check_mesh(count, sizes, best) if sizes else best
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "platform": spec.platform}
    of = roofline.layout(table, cfg, sizes, itemsize, quantize=quantize, **options)
    usable = int(roofline.USABLE * spec.memory)

    def fit(rows: int, length: int, on: Layout = of) -> bool:
        return memory(on, spec, rows, length).total <= usable

    def smaller() -> dict[str, int]:
        if quantize is not None or fit(batch, context):
            return {}
        found = {name: roofline.layout(table, cfg, sizes, itemsize, quantize=name, **options) for name in SMALLER}
        return {name: roofline.weight_bytes(on) for name, on in found.items() if fit(batch, context, on)}

    def fits_on(n: int) -> bool:
        on = roofline.layout(table, cfg, least_memory(cfg, n), itemsize, quantize=quantize, **options)
        return fit(batch, context, on)

    return Plan(
        spec,
        count,
        dict(sizes),
        batch,
        context,
        memory(of, spec, batch, context),
        usable,
        roofline.decode(of, spec, batch, context),
        roofline.prefill(of, spec, batch, context),
        of.data * most(lambda rows: fit(rows * of.data, context), 1 << 20),
        most(lambda length: fit(batch, length), cfg.context),
        next((n for n in counts(spec) if fits_on(n)), None),
        quantize,
        smaller(),
    )


def check_context(cfg: Any, length: int) -> None:
    """Raises ValueError for rows that are longer than the model's context."""
    if length > cfg.context:
        raise ValueError(f"context {length:,} exceeds that of the model, {cfg.context:,} tokens")


def counts(spec: Spec) -> list[int]:
    """Numbers of devices up to MOST that there are: sizes of TPU slices, powers of two for GPUs."""
    if spec.platform == "tpu":
        return [count for count in specs.slice_shapes(spec) if count <= MOST]
    return [1 << power for power in range(MOST.bit_length())]


def check_mesh(count: int, sizes: Mapping[str, int], best: Mapping[str, int]) -> dict[str, int]:
    """The axis sizes, if they match the number of devices; otherwise ValueError, with the best mesh."""
    found = {mesh.DATA: sizes.get(mesh.DATA, 1), mesh.MODEL: sizes.get(mesh.MODEL, 1)}
    proposal = text(best)
    if found[mesh.DATA] * found[mesh.MODEL] != count:
        raise ValueError(
            f"mesh {text(found)} needs {found['data'] * found['model']} devices, not {count}: try {proposal}"
        )
    return found


def text(sizes: Mapping[str, int]) -> str:
    """data=2,model=4"""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def least_memory(cfg: Any, count: int) -> dict[str, int]:
    """The mesh that needs the least memory per device for few rows: as much tensor parallelism as divides."""
    return topology.default({"N": cfg.N, "F": cfg.F}, count)


def most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to a limit that fits, by bisection; 0 if none does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def memory(of: Layout, spec: Spec, rows: int, context: int) -> Memory:
    """Memory at the peak: while new prompts for all rows are prefilled."""
    length, new = decoding.bucket(context), roofline.prefill_rows(rows, of.data)
    chunk = roofline.prefill_tokens(new, spec.platform)
    return Memory(
        roofline.weight_bytes(of),
        roofline.cache_bytes(of, rows, length),
        roofline.cache_bytes(of, new, length, chunk),
        max(
            roofline.temporaries(of, spec.platform, rows, length, "decode"),
            roofline.temporaries(of, spec.platform, new, length, "prefill"),
        ),
        code(of, spec, rows, "decode") + code(of, spec, new, "prefill"),
    )


def program_memory(of: Layout, spec: Spec, rows: int, context: int, program: str) -> int:
    """Bytes of one program on one device, as a compiler counts them: arguments, temporaries and machine code."""
    length = decoding.bucket(context)
    chunk = 1 if program == "decode" else roofline.prefill_tokens(rows, spec.platform)
    held = roofline.weight_bytes(of) if program == "decode" else weights_of_prefill(of)
    kept = roofline.cache_bytes(of, rows, length, chunk)
    return held + kept + roofline.temporaries(of, spec.platform, rows, length, program) + code(of, spec, rows, program)


def weights_of_prefill(of: Layout) -> int:
    """Bytes of the weights that prefill takes: all but an untied head."""
    heads = [row for row in params.tensors(of.table, of.cfg) if row.path == "head"]
    return roofline.weight_bytes(of) - sum(roofline.row_bytes(of, row) for row in heads)


def code(of: Layout, spec: Spec, rows: int, program: str) -> int:
    """Bytes of a program's machine code on one device, an estimate. Small on GPUs.

    Layers are unrolled. On TPU, the code of a layer of prefill grows with the rows of a device, and that of decoding
    with the weights.
    """
    if spec.platform != "tpu":
        return 0
    if program == "prefill":
        return of.cfg.L * (800_000 + 900_000 * -(-rows // of.data))
    return of.cfg.L * min(2_000_000, 550_000 + roofline.weight_bytes(of) // of.cfg.L // 40)
