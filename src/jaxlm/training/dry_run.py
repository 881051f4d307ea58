"""The dry run: memory per device, steps, tokens, FLOPs and examples of a run, without training."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import hardware, mesh
from jaxlm.nn import params, quantize
from jaxlm.nn.quantized import without_rounding
from jaxlm.training import loaders, step
from jaxlm.training.loop import flops_per_token
from jaxlm.training.setup import Setup, period


class MemoryPlan(NamedTuple):
    """Memory of a run on one device, in bytes.

    Attributes:
        weights: Trained weights.
        frozen: Frozen base weights of an adapter.
        optimizer: Optimizer state.
        gradients: Gradients.
        activations: The rest of the peak, mostly activations.
        peak: Peak memory of the compiled step, as reported by the compiler.
        free: Free memory of the device; None if unknown.
    """

    weights: int
    frozen: int
    optimizer: int
    gradients: int
    activations: int
    peak: int
    free: int | None


def plan_memory(setup: Setup, jitted_step: Any) -> MemoryPlan:
    """Returns the memory of a run. The step is compiled, not run.

    Args:
        setup: The run.
        jitted_step: Its step (loop.jit_step).
    """
    run, state, frozen = setup.run, setup.state, _frozen_shapes(setup)
    shape = (run.batch, run.length)
    sharding = None if setup.mesh is None else mesh.sharding("BT", shape, setup.mesh)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    kind: Any = type(setup.data.batch(0))
    batch = kind(row, row, row, jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding))
    with mesh.use_mesh(setup.mesh):
        compiled = jitted_step.lower(state, batch, frozen).compile().memory_analysis()
    weights = _bytes_per_device(state.weights)
    gradients = weights * jnp.dtype(run.grad_dtype).itemsize // jnp.dtype(run.weight_dtype).itemsize
    optimizer, base = _bytes_per_device(state.opt_state), _bytes_per_device(frozen)
    peak = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    peak += compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    if run.samples:  # generated with a copy of the weights in the compute dtype
        cast = weights * jnp.dtype(run.dtype).itemsize // jnp.dtype(run.weight_dtype).itemsize
        peak = max(peak, weights + optimizer + base + cast + base)
    rest = max(peak - weights - base - optimizer - gradients, 0)
    free = hardware.available_memory(jax.local_devices()[0])
    return MemoryPlan(weights, base, optimizer, gradients, rest, peak, free)


def _frozen_shapes(setup: Setup) -> Any:
    """Returns the shapes of an adapter's frozen base weights, with shardings on a mesh; None if all weights are
    trained."""
    if setup.run.method == "full":
        return None
    sizes = (setup.family.PARAMS, setup.config, jnp.dtype(setup.run.dtype))
    weights = params.shapes(*sizes)
    if setup.run.quantize:
        weights = without_rounding(quantize.shapes(*sizes, setup.run.quantize, jax.default_backend()))
    shapes = jax.eval_shape(partial(params.stack, period=period(setup.config)), weights)
    if setup.mesh is None:
        return shapes
    shardings = step.weight_shardings(shapes, setup.mesh, setup.family.PARAMS)
    return jax.tree.map(lambda a, sharding: a.update(sharding=sharding), shapes, shardings)


def _bytes_per_device(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize
    return total


def describe(setup: Setup, plan: MemoryPlan) -> Iterator[str]:
    """Yields the lines of the dry run."""
    run, cfg, data = setup.run, setup.config, setup.data
    total = params.count(setup.family.PARAMS, cfg)
    what = f"{total:,} parameters"
    if run.method == "lora":
        what = f"{params.num_elements(setup.state.weights):,} parameters of an adapter, {total:,} of its base"
    yield f"trained     {what} ({setup.family.__name__.rpartition('.')[2]}), {run.optimizer.name}, {run.dtype} compute"
    types = {"weights": run.weight_dtype, "gradients": run.grad_dtype, "moments": run.optimizer.moment_dtype}
    yield f"types       {', '.join(f'{name} {dtype}' for name, dtype in types.items())}"
    for note in setup.notes:
        yield f"            {note}"
    for i, line in enumerate(loaders.describe(run, data)):
        yield f"{'' if i else 'data':<12}{line}"
    for name, loader in setup.valid.items():
        yield f"validation  {name and f'{name}: '}{loader.describe()[0]}"
    tokens = run.steps * run.batch * run.length
    yield (
        f"steps       {run.steps:,} of {run.batch} x {run.length} tokens: {tokens:,} tokens, "
        f"{data.describe_epochs(run.steps)}; rows are {data.fill():.0%} full"
    )
    cost = flops_per_token(setup)
    yield f"work        {cost / 1e6:,.1f} MFLOPs per token, {cost * tokens / 1e15:,.3f} PFLOPs in total"
    sizes = "one device" if setup.mesh is None else ", ".join(f"{n}={s}" for n, s in setup.mesh.shape.items())
    yield f"mesh        {sizes}"
    names = ("weights", "frozen", "optimizer", "gradients", "activations", "peak")
    parts = [f"{name} {hardware.gigabytes(getattr(plan, name))}" for name in names if getattr(plan, name)]
    yield f"memory      {', '.join(parts)} per device"
    if plan.free is not None:
        fits = (
            "the run fits"
            if plan.peak <= plan.free
            else "THE RUN DOES NOT FIT: use a smaller batch, more accumulate, remat full, or bfloat16 as weight_dtype, "
            "grad_dtype and optimizer.moment_dtype"
        )
        yield f"            {hardware.gigabytes(plan.free)} available: {fits}"


def examples(setup: Setup, count: int, tokens: int = 160) -> Iterator[list[tuple[str, bool]]]:
    """Yields the first rows of the first batch as pieces of text, each with whether it is in the loss mask.

    Args:
        setup: The run.
        count: Number of rows at most.
        tokens: Tokens per row at most; of a longer row the part around the first token in the loss mask.
    """
    batch, decode = setup.data.batch(0), setup.tokenizer.decode
    for row in range(min(count, len(batch.tokens))):
        ids, kinds = _row(*(field[row] for field in batch))
        first = next((i for i, (trained_on, _) in enumerate(kinds) if trained_on), 0)
        start = 0 if first < tokens // 2 else first - tokens // 2
        ids, kinds = ids[start : start + tokens], kinds[start : start + tokens]
        begins = [i for i in range(len(ids)) if i == 0 or kinds[i] != kinds[i - 1]]
        # Prefixes are decoded, because some tokenizers drop a space at the beginning of a decoded text.
        texts = [decode(ids[:end], skip_special=False) for end in [*begins, len(ids)]]
        before = [("… ", False)] if start else []
        yield before + [(texts[n + 1][len(texts[n]) :], kinds[begin][0]) for n, begin in enumerate(begins)]


def _row(tokens: Any, targets: Any, pos: Any, loss_mask: Any) -> tuple[list[int], list[tuple[bool, int]]]:
    """Returns the ids of a row's documents, each with its last target (which is not an input). Also returns, for each
    id, whether it is in the loss mask, and the index of its document."""
    ids, kinds = [], []
    begins = [*np.flatnonzero(pos == 0), int((pos >= 0).sum())]
    for number, (begin, end) in enumerate(pairwise(begins)):
        ids += [*tokens[begin:end].tolist(), int(targets[end - 1])]
        # The first token of a document is not a target. Each other token is the target of the previous one.
        kinds += [(flag, number) for flag in (False, *loss_mask[begin:end].tolist())]
    return ids, kinds
