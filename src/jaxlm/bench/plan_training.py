"""`jaxlm plan --train`: memory of a training step on one device, and the time that the devices need at least.

Bytes of weights, optimizer state and gradients are exact. Activations are an estimate, calibrated on programs of the
TPU compiler (docs/scaling.md has the comparison).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.bench.plan import check_context, counts, most
from jaxlm.devices import mesh
from jaxlm.devices.specs import Spec
from jaxlm.inference import roofline
from jaxlm.inference.roofline import Layout, Roof
from jaxlm.nn import chunked_logits, flops, layer_types, params

FACTORED = 128  # least size of both axes of a matrix whose second moment adafactor factors (optax)
COMPUTE = 2  # bytes of a number in the compute dtype, bfloat16


class Training(NamedTuple):
    """What a training step depends on besides the model and the mesh.

    Attributes:
        length: Tokens per row.
        rows: Rows per part of `data` and gradient accumulation step.
        accumulate: Gradient accumulation steps.
        remat: Activation checkpointing.
        optimizer: Name of the optimizer.
        weight_dtype: Of the trained weights.
        grad_dtype: Of the gradients.
        moment_dtype: Of the optimizer's moments.
    """

    length: int
    rows: int = 1
    accumulate: int = 1
    remat: str = "full"
    optimizer: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    weight_dtype: str = "float32"
    grad_dtype: str = "float32"
    moment_dtype: str = "float32"


class Overlapped(Roof):
    """Times of a training step. Collectives of weights and gradients overlap with products."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
        """The whole step: what takes the longest."""
        return max(self)


class Memory(NamedTuple):
    """Memory of training on one device at its peak, in bytes.

    Attributes:
        weights: Trained weights.
        optimizer: Optimizer state.
        gradients: Gradients.
        copies: Weights in the compute dtype: all of this device, and those that are gathered at a time.
        activations: What the backward pass needs, and the logits of a chunk.
    """

    weights: int
    optimizer: int
    gradients: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class Plan(NamedTuple):
    """What training needs and can reach.

    Attributes:
        spec: The device.
        count: Number of devices.
        mesh: Axis sizes.
        how: The step.
        memory: Of one device.
        usable: Bytes of a device that a run may take.
        step: The least time of a step. Recomputation is included.
        mfu: Model FLOPs over the peak, if a step takes no longer; without recomputation.
        tokens: Of a step.
        max_rows: The most rows per part of `data` that fit; 0 if none.
        max_length: The most tokens per row that fit, at most the model's context; 0 if none.
        needs: The least number of such devices that one row of this length fits on; None if more than 512.
    """

    spec: Spec
    count: int
    mesh: dict[str, int]
    how: Training
    memory: Memory
    usable: int
    step: Roof
    mfu: float
    tokens: int
    max_rows: int
    max_length: int
    needs: int | None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable


def shards(of: Layout, letters: str, shape: tuple[int, ...]) -> int:
    """Number of devices that a weight is sharded over in training. Norms are replicated."""
    rules = mesh.RULES if letters in params.NORMS else mesh.FSDP_RULES
    axes = [axis for group in mesh.spec(letters, shape, of.over, rules) for axis in _names(group)]
    return math.prod(of.over.shape[axis] for axis in axes)


def _names(group: Any) -> tuple[str, ...]:
    return (group,) if isinstance(group, str) else group or ()


def state_elements(of: Layout, optimizer: str) -> tuple[int, int]:
    """Elements on one device of the weights and of the optimizer's moments."""
    weights = moments = 0
    for letters, shape in stacked(of):
        local = math.prod(shape) // shards(of, letters.lstrip("L"), shape[letters.startswith("L") :])
        weights += local
        moments += _moments(optimizer, letters, shape, local)
    return weights, moments


def stacked(of: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Letters and shape of each array of the trained weights: layers are stacked by period, with a leading axis L."""
    period = layer_types.layer_period(of.cfg)
    whole = of.cfg.L // period
    for row in params.tensors(of.table, of.cfg):
        layer = row.path.split(".")[1] if row.path.startswith("layers.") else ""
        if not layer or int(layer) >= whole * period:  # outside the layers, or after the last full period
            yield row.letters, row.shape
        elif int(layer) < period:
            yield "L" + row.letters, (whole, *row.shape)


def _moments(optimizer: str, letters: str, shape: tuple[int, ...], local: int) -> int:
    """Elements of the moments of a weight, of which a device holds `local` elements."""
    if optimizer == "adafactor":  # rows and columns of the two largest axes, replicated
        small, large = sorted(shape)[-2:] if len(shape) > 1 else (0, 0)
        size = math.prod(shape)
        return size // small + size // large if small >= FACTORED else local
    plain = letters.lstrip("L")
    matrix = plain not in params.NORMS and "V" not in plain
    return local if optimizer == "lion" or (optimizer == "muon" and matrix) else 2 * local


def memory(of: Layout, how: Training) -> Memory:
    """Memory of a step on one device."""
    weight, grad, moment = (np.dtype(kind).itemsize for kind in (how.weight_dtype, how.grad_dtype, how.moment_dtype))
    weights, moments = state_elements(of, how.optimizer)
    tokens = how.rows * how.length
    saved = activations(of, how, tokens)
    return Memory(weights * weight, moments * moment, gradients(how, weights) * grad, copies(of, how, weights), saved)


def gradients(how: Training, weights: int) -> int:
    """Elements of the gradients on one device. Gradient accumulation keeps their sum beside those of a part."""
    return weights * (2 if how.accumulate > 1 else 1)


def copies(of: Layout, how: Training, weights: int) -> int:
    """Bytes of weights in the compute dtype: a copy of this device's, unless they have that dtype, and the gathered
    ones of two layers and of embedding and head."""
    own = 0 if np.dtype(how.weight_dtype).itemsize == COMPUTE else weights * COMPUTE
    if of.data == 1:
        return own
    rows = list(params.tensors(of.table, of.cfg))
    layer = sum(math.prod(row.shape) for row in rows if row.path.startswith("layers.0."))
    apart = sum(math.prod(row.shape) for row in rows if row.path in ("embed", "head"))
    return own + COMPUTE * (2 * layer + apart) // of.tensor


def activations(of: Layout, how: Training, tokens: int) -> int:
    """Bytes of what is saved for the backward pass, of one layer's backward pass, and of a chunk of logits."""
    cfg = of.cfg
    width = cfg.D
    inner = (2 * cfg.N * cfg.H + 2 * cfg.K * cfg.H + 3 * cfg.F) // of.tensor + 4 * width  # of a layer and token
    products = (cfg.N * cfg.H + 2 * cfg.K * cfg.H + 2 * cfg.F) // of.tensor + 2 * width
    saved = {"full": width, "dots": width + products, "none": width + 2 * inner}[how.remat]
    chunk = min(tokens, chunked_logits.CHUNK, chunked_logits.CHUNK_BYTES // (4 * cfg.V))
    logits = 2 * 4 * chunk * cfg.V // mesh.num_shards("V", (cfg.V,), of.over)
    return COMPUTE * tokens * (cfg.L * saved + 2 * inner) + logits


def step(of: Layout, spec: Spec, how: Training) -> tuple[Roof, float]:
    """The least time of a step, and MFU if it takes no longer."""
    tokens = how.rows * how.length * how.accumulate
    model = flops.training(of.table, of.cfg, how.length) * tokens / of.tensor
    again = {"full": 4 / 3, "dots": 1.0, "none": 1.0}[how.remat]  # the forward pass is computed twice
    weights, moments = state_elements(of, how.optimizer)
    sizes = (np.dtype(kind).itemsize for kind in (how.weight_dtype, how.grad_dtype, how.moment_dtype))
    weight, grad, moment = sizes
    nbytes = 2 * weights * weight + 2 * moments * moment + 2 * weights * grad  # read and written once
    nbytes += 3 * how.accumulate * COMPUTE * roofline.weight_bytes(of) // of.itemsize  # read three times
    gathered = roofline.weight_bytes(of) // of.itemsize * (of.data - 1) / of.data
    links = how.accumulate * gathered * (2 * COMPUTE + 4) / spec.link  # gathered twice, float32 gradients scattered
    part = how.rows * how.length * of.cfg.D * COMPUTE
    links += how.accumulate * 2 * roofline.all_reduces(of) * roofline.all_reduce(spec, of.tensor, part)
    roof = Overlapped(nbytes / spec.bandwidth, model * again / spec.flops, links)
    return roof, model / spec.flops / roof.seconds


def plan(
    family: Any,
    cfg: Any,
    spec: Spec,
    count: int,
    batch: int,
    how: Training,
    sizes: Mapping[str, int] | None = None,
) -> Plan:
    """Plans training. All devices are on `data` unless `sizes` says otherwise, as `train` has it.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        spec: The device.
        count: Number of devices.
        batch: Rows per step, of all devices and gradient accumulation steps.
        how: The step; its `rows` follow from `batch`.
        sizes: Mesh axis sizes.

    Raises:
        ValueError: The batch does not divide.
    """
    check_context(cfg, how.length)
    sizes = dict(sizes or {mesh.DATA: count, mesh.MODEL: 1})
    parts = sizes[mesh.DATA] * how.accumulate
    if batch < 1 or batch % parts:
        raise ValueError(
            f"batch {batch} is not a multiple of {parts} (data x accumulate): try {parts * max(1, -(-batch // parts))}"
        )
    how = how._replace(rows=batch // parts)
    of = roofline.layout(family.PARAMS, cfg, sizes, COMPUTE)
    usable = int(roofline.USABLE * spec.memory)

    def fits(rows: int, length: int, n: int | None = None) -> bool:
        on = of if n is None else roofline.layout(family.PARAMS, cfg, {mesh.DATA: n, mesh.MODEL: 1}, COMPUTE)
        return memory(on, how._replace(rows=rows, length=length)).total <= usable

    roof, mfu = step(of, spec, how)
    return Plan(
        spec,
        count,
        sizes,
        how,
        memory(of, how),
        usable,
        roof,
        mfu,
        batch * how.length,
        most(lambda rows: fits(rows, how.length), 1 << 16),
        most(lambda length: fits(how.rows, length), cfg.context),
        next((n for n in counts(spec) if fits(1, how.length, n)), None),
    )
