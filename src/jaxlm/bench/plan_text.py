"""A plan as JSON values and as lines of text."""

from collections.abc import Iterator
from typing import Any

from jaxlm.bench import plan, plan_training
from jaxlm.bench.sources import Shape
from jaxlm.devices import specs
from jaxlm.devices.hardware import gigabytes
from jaxlm.inference.roofline import Roof

LABELS = {
    "weights": "weights",
    "cache": "KV cache",
    "new_cache": "KV cache of new prompts",
    "temporaries": "temporaries (estimated)",
    "programs": "programs (estimated)",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "copies": "weights in bfloat16 for products",
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


def facts(shape: Shape, found: plan.Plan, dtype: str) -> dict[str, Any]:
    """A plan of generation as JSON values. Bytes are of one device, times in seconds."""
    return {
        **common(shape, found),
        "dtype": dtype,
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
    kind = facts.get("dtype") or f"{found.how.optimizer}, weights {found.how.weight_dtype}"  # type: ignore[union-attr]
    yield f"{name} on {devices}, {kind}, mesh {plan.text(found.mesh)}"
    yield ""
    yield f"memory of one device ({gigabytes(int(spec.memory))}, of which {gigabytes(found.usable)} can be used)"
    for field, nbytes in memory._asdict().items():
        if nbytes:
            yield f"  {LABELS[field]:34}{gigabytes(nbytes):>10}"
    yield f"  {'total':34}{gigabytes(memory.total):>10}  {memory.total / spec.memory:.0%} of the memory"
    yield ""
    yield from generation_lines(found) if isinstance(found, plan.Plan) else training_lines(found)
    yield f"  {'':14}Times are lower bounds, from {gigabytes(int(spec.bandwidth))}/s and {spec.flops / 1e12:,.4g} TFLOP/s ({spec.source})"
    yield from compiled_lines(facts.get("compiled"))
    if not found.fits:
        yield ""
        yield f"DOES NOT FIT. {advice(found)}"


def generation_lines(found: plan.Plan) -> Iterator[str]:
    step, prompt = found.decode, found.prefill
    yield f"  {'decode':14}{_time(step.seconds)} a step of {_rows(found.batch)} with {found.context:,} tokens, at least ({step.bound})"
    yield f"  {'':14}{1 / step.seconds:,.0f} tokens/s of one sequence, {found.tokens_per_second:,.0f} of all, at most"
    yield f"  {'prefill':14}{_time(prompt.seconds)} for {_rows(found.batch)} of {found.context:,} tokens, at least ({prompt.bound})"
    yield f"  {'largest':14}batch {found.max_batch:,} with {found.context:,} tokens; {found.max_context:,} tokens with batch {found.batch:,}"


def training_lines(found: plan_training.Plan) -> Iterator[str]:
    how = found.how
    parts = f"{how.accumulate} x " if how.accumulate > 1 else ""
    yield f"  {'step':14}{_time(found.step.seconds)} for {found.tokens:,} tokens ({parts}{how.rows} x {how.length:,} per part of data), at least ({found.step.bound})"
    yield f"  {'':14}{found.tokens / found.step.seconds:,.0f} tokens/s and MFU {found.mfu:.0%}, at most"
    yield f"  {'largest':14}{_rows(found.max_rows)} of {how.length:,} tokens per part of data; {found.max_length:,} tokens with {_rows(how.rows)}"


def compiled_lines(compiled: dict[str, Any] | None) -> Iterator[str]:
    for name, program in (compiled or {}).items():
        if "refused" in program:
            yield f"  {name:14}the compiler refuses it: {program['refused']}"
            continue
        ratio = program["predicted"] / program["total"] - 1
        yield f"  {name + ' compiled':20}{gigabytes(program['total'])} of one device; arithmetic {gigabytes(program['predicted'])} ({ratio:+.1%})"
        if program.get("seconds"):
            yield f"  {'':20}{_time(program['seconds'])} by the compiler's estimate"


def advice(found: plan.Plan | plan_training.Plan) -> str:
    """What would fit, in words."""
    ways = []
    if isinstance(found, plan.Plan):
        if found.max_batch:
            ways.append(f"batch {found.max_batch:,}")
        if found.max_context:
            ways.append(f"context {found.max_context:,}")
    else:
        if found.max_rows:
            ways.append(f"{_rows(found.max_rows)} per part of data")
        if found.max_length:
            ways.append(f"rows of {found.max_length:,} tokens")
    if found.needs and found.needs > found.count:
        ways.append(specs.slice_name(found.spec, found.needs))
    if not ways:
        return f"No number of {found.spec.name} up to {plan.COUNTS[-1]} holds it: use a device with more memory"
    return f"What fits: {', '.join(ways)}"


def _rows(count: int) -> str:
    return f"{count:,} sequence{'s' * (count != 1)}"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
