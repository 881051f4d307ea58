"""Runs every program that an engine can need, on rows of padding, so that no later request waits for a compiler."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxlm.devices import hardware
from jaxlm.inference import decoding, sampling
from jaxlm.inference.prefill import DEFAULT_PARAMS, Prefill
from jaxlm.inference.requests import Request
from jaxlm.inference.scheduler import Scheduler, top_logprobs

Progress = Callable[[int, int], None]


def run_all(scheduler: Scheduler, full: bool, constraints: bool, progress: Progress | None) -> None:
    """Compiles the programs of an idle scheduler.

    Args:
        scheduler: The scheduler.
        full: Also those for requests with penalties, a logit bias or log-probabilities.
        constraints: Also those for requests with a constraint.
        progress: Called with the number of groups of programs that are done, and with that of all. None: a bar.
    """
    variants = [False, True] if full else [False]
    rows = [1 << n for n in range((scheduler.max_joining - 1).bit_length() + 1)]
    groups = [partial(_prefill, scheduler, n, length, variants, constraints) for n in rows for length in
              scheduler.lengths.prefill]  # fmt: skip
    groups += [partial(_decode, scheduler, length, variants, constraints) for length in scheduler.lengths.decode]
    with tqdm(total=len(groups), desc="compiling", disable=progress is not None or None) as bar:  # None: no terminal
        for number, group in enumerate(groups, 1):
            group()
            bar.update()
            if progress is not None:
                progress(number, len(groups))


def _prefill(scheduler: Scheduler, rows: int, length: int, variants: list[bool], constraints: bool) -> None:
    """Programs of prompts in a KV cache of this length, and those that insert them."""
    steps, model, place = scheduler.steps, scheduler.model, scheduler.place
    for full in variants:
        requests = [Request([0], DEFAULT_PARAMS, 1, None, key=sampling.request_key(0, [0])) for _ in range(rows)]
        joining = Prefill(steps, requests, [length], full, scheduler.rings)
        steps.expect()
        rows = len(joining.padded)
        for size in dict.fromkeys(decoding.chunk_sizes(model.device.platform, rows)):
            shape = (rows, min(joining.kv.chunk, size))
            tokens, pos = place(np.zeros(shape, np.int32), "BT"), place(np.full(shape, -1, np.int32), "BT")
            joining.kv, joining.last = steps.prefill(joining.kv, joining.last, tokens, pos, joining.part.adapter)
        if constraints:
            part, last = jax.tree.map(lambda a: a.copy(), (joining.part, joining.last))
            steps.sample_token(joining.k, part, last, all_allowed(scheduler, rows))
        joining.sample()
        dropped = joining.rows([scheduler.slots] * rows, scheduler.slots)
        for slots in scheduler.lengths.decode:
            state = scheduler.empty_state(slots, full)
            state = steps.insert(state, dropped, joining.part._replace(kv=joining.kv))
            if scheduler.prefix_cache:
                none = place(np.zeros(rows, np.int32), "")
                joining.kv = steps.take(joining.kv, state.kv, none, none)


def _decode(scheduler: Scheduler, length: int, variants: list[bool], constraints: bool) -> None:
    """Programs of the batch with a KV cache of this length."""
    steps = scheduler.steps
    for full in variants:
        state: Any = scheduler.empty_state(length, full)
        state = steps.release(state, scheduler.place(np.zeros(scheduler.slots, np.bool_), "B"))
        k = top_logprobs(full)
        state, _ = steps.step(k, hardware.STEPS[scheduler.model.device.platform], state)
        if constraints:
            state, x = steps.forward_step(state)
            state, _ = steps.sample_token(k, state, x, all_allowed(scheduler, scheduler.slots))
    kv = steps.clear(state.kv, scheduler.place(np.int32(0), ""))
    for longer in [n for n in scheduler.lengths.decode if n > length][:1]:
        steps.resize_cache(scheduler.empty_cache(longer), kv)


def all_allowed(scheduler: Scheduler, rows: int) -> jax.Array:
    """A mask that allows every token."""
    words = -(-scheduler.model.config.V // 32)
    return scheduler.place(np.full((rows, words), 0xFFFFFFFF, np.uint32), "B")
