"""What a run will take and what it will see, before it begins: memory a device, steps, tokens, and examples."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import hardware, mesh
from jaxlm.nn import params
from jaxlm.training import step
from jaxlm.training.loop import flops_a_token
from jaxlm.training.setup import Setup


class MemoryPlan(NamedTuple):
    """Bytes on one device, of what is trained, what is frozen, the optimizer's state, gradients, and all else that a
    step needs at once (activations); peak: what the compiler says of the whole program."""

    weights: int
    frozen: int
    optimizer: int
    gradients: int
    activations: int
    peak: int
    free: int | None


def plan_memory(setup: Setup, program: Any) -> MemoryPlan:
    """The plan of a run from its step's program, which is compiled and not run."""
    state, frozen, over = setup.state_like(), setup.frozen_shapes(), setup.over
    if over is not None and frozen is not None:
        places = step.weight_shardings(frozen, over, setup.family.PARAMS)
        frozen = jax.tree.map(lambda a, where: a.update(sharding=where), frozen, places)
    shape = (setup.run.batch, setup.run.length)
    where = None if over is None else mesh.sharding("BT", shape, over)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    batch = type(setup.data.batch(0))(row, row, row, jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=where))
    with mesh.use_mesh(over):
        found = program.lower(state, batch, frozen).compile().memory_analysis()
    weights, gradients = _bytes(state.weights), _bytes(state.weights)
    peak = found.argument_size_in_bytes + found.temp_size_in_bytes
    peak += found.output_size_in_bytes - found.alias_size_in_bytes
    optimizer, frozen = _bytes(state.opt_state), _bytes(frozen)
    if setup.run.samples:  # they are made by a copy of the weights, in the type of products
        cast = weights * np.dtype(jnp.dtype(setup.run.dtype)).itemsize // 4
        peak = max(peak, weights + optimizer + frozen + cast + frozen)
    rest = max(peak - weights - frozen - optimizer - gradients, 0)
    free = hardware.available_memory(jax.local_devices()[0])
    return MemoryPlan(weights, frozen, optimizer, gradients, rest, peak, free)


def _bytes(tree: Any) -> int:
    """On one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize
    return total


def describe(setup: Setup, found: MemoryPlan) -> Iterator[str]:
    """The plan in lines."""
    run, cfg, data = setup.run, setup.config, setup.data
    trained = params.num_elements(setup.state_shapes().weights)
    every = params.count(setup.family.PARAMS, cfg)
    what = f"{every:,} parameters" if run.method == "full" else f"{trained:,} of an adapter to {every:,} parameters"
    yield f"trained     {what} ({setup.family.__name__.rpartition('.')[2]}), {run.optimizer.name}, {run.dtype} products"
    yield f"data        {data.corpus}"
    if setup.valid is not None:
        yield f"validation  {setup.valid.corpus}"
    if data.note:
        yield f"            {data.note}"
    tokens = run.steps * run.batch * run.length
    yield (
        f"steps       {run.steps:,} of {run.batch} rows x {run.length} tokens: {tokens:,} tokens, "
        f"{data.epoch(run.steps):.2f} epochs; rows are {data.fill():.0%} full"
    )
    cost = flops_a_token(setup)
    yield f"work        {cost / 1e6:,.1f} MFLOP a token, {cost * tokens / 1e15:,.3f} PFLOP in all"
    over = setup.over
    yield "mesh        " + ("one device" if over is None else ", ".join(f"{n}={s}" for n, s in over.shape.items()))
    names = ("weights", "frozen", "optimizer", "gradients", "activations", "peak")
    parts = [f"{name} {hardware.gigabytes(getattr(found, name))}" for name in names if getattr(found, name)]
    yield "memory      " + ", ".join(parts) + " a device"
    if found.free is not None:
        fits = "it fits" if found.peak <= found.free else "IT DOES NOT FIT: smaller batch, more accumulate, remat full"
        yield f"            {hardware.gigabytes(found.free)} are free: {fits}"


def examples(setup: Setup, count: int, tokens: int = 160) -> Iterator[list[tuple[str, bool]]]:
    """The first rows of step 0 as pieces of text, each with whether it is learned; of a long row the part around the
    first token that is."""
    batch, decode = setup.data.batch(0), setup.tokenizer.decode
    for row in range(min(count, len(batch.tokens))):
        ids, kinds = _row(*(field[row] for field in batch))
        first = next((i for i, (learned, _) in enumerate(kinds) if learned), 0)
        start = 0 if first < tokens // 2 else first - tokens // 2
        ids, kinds = ids[start : start + tokens], kinds[start : start + tokens]
        begins = [i for i in range(len(ids)) if i == 0 or kinds[i] != kinds[i - 1]]
        # Not piece by piece: some tokenizers leave out the space at the beginning of what they decode.
        texts = [decode(ids[:end], skip_special=False) for end in [*begins, len(ids)]]
        before = [("… ", False)] if start else []
        yield before + [(texts[n + 1][len(texts[n]) :], kinds[begin][0]) for n, begin in enumerate(begins)]


def _row(tokens: Any, targets: Any, pos: Any, learned: Any) -> tuple[list[int], list[tuple[bool, int]]]:
    """A row's documents, each with its last target, which is no input: ids, and whether each is learned, and in which
    document."""
    ids, kinds = [], []
    begins = [*np.flatnonzero(pos == 0), int((pos >= 0).sum())]
    for number, (begin, end) in enumerate(pairwise(begins)):
        ids += [*tokens[begin:end].tolist(), int(targets[end - 1])]
        # A document's first token is nobody's target; each other one is the target of its left neighbor.
        kinds += [(flag, number) for flag in (False, *learned[begin:end].tolist())]
    return ids, kinds
