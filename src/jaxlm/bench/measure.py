"""Prefill and decoding as users run them, timed: the programs are those of `jaxlm.stream`, seen from its caller.

A case is prefill or decoding of one length, depth and batch size. Each case is run once to compile, and then once in
every round. Jaxlm and its rivals take turns in a round, so that a busy machine is busy for all.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from jaxlm.bench import limits, memory_use
from jaxlm.bench.cases import OURS, Case, Contestant, Row, Sample
from jaxlm.devices import mesh
from jaxlm.inference import decoding, engine, generation
from jaxlm.inference.decoding import CompiledSteps
from jaxlm.inference.generation import CompletionChunk
from jaxlm.inference.memory import check_memory

if TYPE_CHECKING:
    from jaxlm.model import Model

OPTIONS: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Jaxlm:
    """Runs cases with a model."""

    name = OURS

    def __init__(self, model: "Model"):
        # Token ids go in and come out, as in llama-bench. With a tokenizer, a chunk may wait for the end of a letter.
        self.model: Model = replace(model, tokenizer=None)

    def close(self) -> None:
        """Nothing to free: the model belongs to the caller."""

    def check(self, case: Case) -> None:
        """Raises MemoryError or ValueError if the case does not fit in memory or in the context."""
        options = generation.resolve(self.model, {**OPTIONS, "max_tokens": case.max_tokens, "seed": 0})
        requests = generation.requests_for(self.model, case.prompts(self.model.config.V), options, {})
        check_memory(self.model, requests, case.batch)

    def run(self, case: Case, prompts: list[list[int]]) -> Sample:
        if case.kind == "prefill" and case.depth:
            return self._prefill_behind(case.depth, prompts)
        begin = time.perf_counter()
        arrivals: list[list[float]] = [[] for _ in prompts]
        compile_seconds = 0.0
        for chunk in self._stream(case, prompts):
            arrivals[chunk.index].append(time.perf_counter())
            compile_seconds = max(compile_seconds, chunk.compile_seconds)
        if case.kind == "prefill":
            first = [times[0] - begin - compile_seconds for times in arrivals]
            return Sample(max(first), compile_seconds, first)
        intervals = [later - earlier for times in arrivals for earlier, later in itertools.pairwise(times)]
        seconds = max(times[-1] for times in arrivals) - max(times[0] for times in arrivals)
        return Sample(seconds, compile_seconds, intervals=intervals)

    def _stream(self, case: Case, prompts: list[list[int]]) -> Iterator[CompletionChunk]:
        return generation.stream(self.model, prompts, max_tokens=case.max_tokens, batch_size=case.batch, **OPTIONS)

    def _prefill_behind(self, depth: int, prompts: list[list[int]]) -> Sample:
        """Prefill of the tokens after the first `depth` ones, which are in the KV cache: what a turn of a Conversation
        does (inference/conversation.py), for several rows."""
        model, steps = self.model, CompiledSteps(self.model)
        options = generation.resolve(model, {**OPTIONS, "max_tokens": 1, "seed": 0})
        requests = generation.requests_for(model, prompts, options, {})
        rows = mesh.round_up_batch(1 << (len(prompts) - 1).bit_length(), model.mesh)
        requests += [requests[-1]] * (rows - len(prompts))
        ids = [request.ids for request in requests]
        lengths = engine.cache_lengths(requests, len(prompts), model.config.context).prefill
        length = next(length for length in lengths if length >= len(ids[0]))
        kv = model.init_kv(rows, length, chunk=decoding.chunk_sizes(model.device.platform, rows)[0])
        state = engine.new_rows(model, requests, None, engine.optional(requests))
        last = engine.no_hidden_state(model, rows)
        then = partial(steps.sample_token, None, *decoding.shapes((state, last)))
        try:
            kv, last = engine.extend(steps, kv, last, [row[:depth] for row in ids], 0, then)
            jax.block_until_ready((kv, last))
            before, begin = steps.seconds, time.perf_counter()
            kv, last = engine.extend(steps, kv, last, [row[depth:] for row in ids], depth, then)
            _, output = steps.sample_token(None, state, last)
            jax.device_get(output)
            seconds = time.perf_counter() - begin - (steps.seconds - before)
        finally:
            steps.cancel()
        return Sample(seconds, steps.seconds, [seconds] * len(prompts))


def wait_for_compilation() -> None:
    """Waits for programs that are compiled in the background. They would slow down what is measured next."""
    for thread in threading.enumerate():
        if thread.name.startswith("jaxlm-compile"):
            thread.join()


Progress = Callable[[str, float | None], None]  # what runs now, and seconds that are left, if they are known


@dataclass
class Session:
    """The measurements of a model. `rows` and `rates` hold what was measured so far, also after an interrupt.

    Attributes:
        model: The model.
        cases: What to measure.
        rounds: How often to measure each case.
        rivals: The contestants besides jaxlm.
        rows: The measurements by case.
        rates: The rates of the device, measured in every round.
    """

    model: "Model"
    cases: Sequence[Case]
    rounds: int
    rivals: Sequence[Contestant] = ()
    rows: dict[Case, Row] = field(default_factory=dict)
    rates: limits.Rates = field(default_factory=limits.Rates)

    def run(self, progress: Progress) -> None:
        """Measures everything.

        Raises:
            ValueError: A case does not fit in the context of the model.
            MemoryError: A case does not fit in memory. Raised before anything runs.
        """
        ours = Jaxlm(self.model)
        for case in self.cases:
            ours.check(case)
        self.rates.devices = limits.devices_of(self.model)
        contestants: list[Contestant] = [ours, *self.rivals]
        took = {(case, who.name): 0.0 for case in self.cases for who in contestants}
        for number in range(self.rounds + 1):  # in round 0, everything is compiled and nothing is counted
            if number:
                progress(f"round {number} of {self.rounds}: memory and matmul rates", None)
                self.rates.measure(self.model.device, self.model.dtype)
            for case in self.cases:
                row = self.rows.setdefault(case, Row(case))
                for who in contestants:
                    left = (self.rounds - number + 1) * sum(took.values()) if number else None
                    stage = f"round {number} of {self.rounds}" if number else "warm-up"
                    progress(f"{stage}: {case.name}, batch {case.batch}, {who.name}", left)
                    begin, compiled = time.perf_counter(), row.compile_seconds
                    self._measure(who, case, row, counted=number > 0)
                    took[case, who.name] = time.perf_counter() - begin - (row.compile_seconds - compiled)
            if number == 1:
                contestants = self._fastest(contestants)
                took = {key: seconds for key, seconds in took.items() if key[1] in {who.name for who in contestants}}

    def _measure(self, who: Contestant, case: Case, row: Row, counted: bool) -> None:
        """Runs a case with a contestant, and adds the result to the row."""
        prompts = case.prompts(self.model.config.V)
        if who.name == OURS:
            memory_use.reset_peak()
        sample = who.run(case, prompts)
        if who.name == OURS and sample is not None:
            wait_for_compilation()
            row.compile_seconds += sample.compile_seconds
            if counted:
                row.samples.append(sample)
                row.peak_memory = max(row.peak_memory or 0, memory_use.peak(self.model.device) or 0) or None
        elif counted and sample is not None:
            row.rivals.setdefault(who.name, []).append(sample.seconds)

    def _fastest(self, contestants: list[Contestant]) -> list[Contestant]:
        """The contestants that are the fastest of their rival in some case of the first round. Closes the others."""
        names = {who.name.split()[0] for who in self.rivals}
        best = {found[0] for row in self.rows.values() for name in names if (found := row.rival(name)) is not None}
        for who in contestants:
            if who.name != OURS and who.name not in best:
                who.close()
        return [who for who in contestants if who.name == OURS or who.name in best]
