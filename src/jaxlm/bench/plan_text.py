"""A plan as JSON values and as lines of text."""

from collections.abc import Iterator
from typing import Any

from jaxlm.bench import plan, plan_training
from jaxlm.bench.sources import Shape
from jaxlm.devices import specs
from jaxlm.devices.hardware import gigabytes
from jaxlm.inference import decoding, roofline
from jaxlm.inference.roofline import Roof

GPU_DEFAULT = 0.75  # the part of a GPU's memory that jax takes by default
LABELS = {
    "weights": "weights",
    "cache": "KV cache",
    "new_cache": "KV cache of new prompts",
    "temporaries": "temporaries (estimated)",
    "programs": "programs (estimated)",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "copies": "bfloat16 copy of the weights",
    "activations": "activations (estimated)",
}


def roof_facts(roof: Roof) -> dict[str, Any]:
    return {**roof._asdict(), "seconds": roof.seconds, "bound": roof.bound}


def common(shape: Shape, found: plan.Plan | plan_training.Plan) -> dict[str, Any]:
    spec = found.spec
    return {
        "model": shape.name,
        "family": shape.family.__name__.rpartition(".")[2],
        "device": {**spec._asdict(), "slice": specs.slice_name(spec, found.count), "count": found.count},
        "mesh": found.mesh,
        "memory": {**found.memory._asdict(), "total": found.memory.total, "usable": found.usable},
        "fits": found.fits,
        "needs": found.needs,
    }


def facts(shape: Shape, found: plan.Plan, dtype: str, kv_dtype: str) -> dict[str, Any]:
    """A plan of generation as JSON values. Bytes are of one device, times in seconds."""
    return {
        **common(shape, found),
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "quantize": found.quantize,
        "quantize_that_fits": found.smaller,
        "batch": found.batch,
        "context": found.context,
        "decode": roof_facts(found.decode),
        "prefill": roof_facts(found.prefill),
        "tokens_per_second": found.tokens_per_second,
        "max_batch": found.max_batch,
        "max_context": found.max_context,
    }


def training_facts(shape: Shape, found: plan_training.Plan) -> dict[str, Any]:
    """A plan of training as JSON values. Bytes are of one device, times in seconds."""
    return {
        **common(shape, found),
        **found.how._asdict(),
        "tokens": found.tokens,
        "step": roof_facts(found.step),
        "mfu": found.mfu,
        "tokens_per_second": found.tokens / found.step.seconds,
        "max_rows": found.max_rows,
        "max_length": found.max_length,
    }


def lines(name: str, found: plan.Plan | plan_training.Plan, facts: dict[str, Any]) -> Iterator[str]:
    """The text of a plan."""
    spec, memory = found.spec, found.memory
    devices = f"{found.count} x {spec.name}" if found.count > 1 else spec.name
    if isinstance(found, plan.Plan):
        kind = facts["dtype"] if found.quantize is None else f"weights {found.quantize}, activations {facts['dtype']}"
        kind += "" if facts["kv_dtype"] == facts["dtype"] else f", KV cache {facts['kv_dtype']}"
    else:
        kind = f"{found.how.optimizer}, weights {found.how.weight_dtype}"
    yield f"{name} on {devices}, {kind}, mesh {plan.text(found.mesh)}"
    slots = {}
    if isinstance(found, plan.Plan) and (length := decoding.bucket(found.context)) != found.context:
        slots = {"cache": f" of {length:,} slots"}  # programs have few lengths
    yield ""
    yield f"memory of one device ({gigabytes(int(spec.memory))}, of which {gigabytes(found.usable)} can be used)"
    for field, nbytes in memory._asdict().items():
        if nbytes:
            yield f"  {LABELS[field] + slots.get(field, ''):34}{gigabytes(nbytes):>10}"
    yield f"  {'total':34}{gigabytes(memory.total):>10}  {memory.total / spec.memory:.0%} of the memory"
    if spec.platform == "gpu" and GPU_DEFAULT * spec.memory < memory.total <= found.usable:
        setting = f"XLA_CLIENT_MEM_FRACTION={roofline.USABLE}"
        yield f"  jax takes {GPU_DEFAULT:.0%} of a GPU's memory by default: set {setting}"
    yield ""
    for label, text in generation_lines(found) if isinstance(found, plan.Plan) else training_lines(found):
        yield f"  {label:14}{text}"
    rates = f"{spec.bandwidth / 1e9:,.4g} GB/s and {spec.flops / 1e12:,.4g} TFLOP/s"
    yield f"  {'':14}(lower bounds, from {rates}: {spec.source})"
    for label, text in compiled_lines(facts.get("compiled")):
        yield f"  {label:14}{text}"
    if not found.fits:
        yield ""
        yield f"Does not fit. {advice(found)}"


def generation_lines(found: plan.Plan) -> Iterator[tuple[str, str]]:
    step, rows = found.decode, _rows(found.batch)
    yield "decode", f"{_time(step.seconds)} a step of {rows} with {found.context:,} tokens, limited by {step.bound}"
    yield "", f"{1 / step.seconds:,.0f} tokens/s of one sequence, {found.tokens_per_second:,.0f} in total"
    prompt = found.prefill
    yield "prefill", f"{_time(prompt.seconds)} for {rows} of {found.context:,} tokens, limited by {prompt.bound}"
    if found.fits:
        yield "largest", f"batch {found.max_batch:,} with {found.context:,} tokens each"
        yield "", f"{found.max_context:,} tokens each with batch {found.batch:,}"


def training_lines(found: plan_training.Plan) -> Iterator[tuple[str, str]]:
    how = found.how
    parts = f"{how.accumulate} x " if how.accumulate > 1 else ""
    each = f"{parts}{_rows(how.rows)} of {how.length:,} tokens per data-parallel replica"
    yield "step", f"{_time(found.step.seconds)} for {found.tokens:,} tokens ({each}), limited by {found.step.bound}"
    yield "", f"{found.tokens / found.step.seconds:,.0f} tokens/s, MFU {found.mfu:.0%}"
    if found.fits:
        yield "largest", f"{_rows(found.max_rows)} of {how.length:,} tokens per data-parallel replica"
        yield "", f"{found.max_length:,} tokens each with {_rows(how.rows)} per data-parallel replica"


def compiled_lines(compiled: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    for name, program in (compiled or {}).items():
        label = "compiled"
        if "refused" in program:
            yield label, f"{name}: the compiler refuses it: {program['refused']}"
            continue
        ratio, total = program["predicted"] / program["total"] - 1, gigabytes(program["total"])
        yield (
            label,
            f"{name}: {total} of one device; the arithmetic says {gigabytes(program['predicted'])} ({ratio:+.1%})",
        )
        if program.get("seconds"):
            yield "", f"{_time(program['seconds'])} a step by the compiler's estimate"


def advice(found: plan.Plan | plan_training.Plan) -> str:
    """What would fit, in words."""
    ways = []
    if isinstance(found, plan.Plan):
        for name, nbytes in found.smaller.items():
            ways.append(f"--quantize {name} (weights {gigabytes(nbytes)})")
        if found.max_batch:
            ways.append(f"batch {found.max_batch:,}")
        if found.max_context:
            ways.append(f"context {found.max_context:,}")
    else:
        if found.max_rows:
            ways.append(f"{_rows(found.max_rows)} per data-parallel replica")
        if found.max_length:
            ways.append(f"rows of {found.max_length:,} tokens")
    if found.needs and found.needs > found.count:
        ways.append(specs.slice_name(found.spec, found.needs))
    elif found.needs:
        ways.append(f"another mesh: {specs.slice_name(found.spec, found.needs)} without --mesh")
    if not ways:
        return f"No number of {found.spec.name} up to {plan.MOST} holds it: use a device with more memory"
    return f"Any one of these fits: {'; or '.join(ways)}"


def _rows(count: int) -> str:
    return f"{count:,} sequence{'s' * (count != 1)}"


def _time(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
