"""Prefill and decoding as users run them, timed: the programs are those of `jaxlm.stream`, seen from its caller.

A case is prefill or decoding of one length, depth and batch size. Each case is run once to compile, and then once in
every round. Jaxlm and its rivals take turns in a round, so that a busy machine is busy for all.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxlm.bench import limits, memory_use
from jaxlm.bench.cases import OURS, Case, Contestant, Row, Sample
from jaxlm.inference import generation
from jaxlm.inference.compilation import wait_for_background
from jaxlm.inference.completion import CompletionChunk
from jaxlm.inference.engine import Engine
from jaxlm.inference.memory import check_memory
from jaxlm.inference.requests import requests_for

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
        options = {**OPTIONS, "max_tokens": case.max_tokens, "seed": 0}
        requests = requests_for(self.model, case.prompts(self.model.config.V), options)
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
        requests = requests_for(self.model, prompts, {**OPTIONS, "max_tokens": 1, "seed": 0})
        engine = Engine(self.model, len(prompts), length=max(map(len, prompts)) + 1)
        try:
            engine.add(*requests_for(self.model, [ids[:depth] for ids in prompts], {**OPTIONS, "max_tokens": 1}))
            while engine.is_busy:
                engine.step()
            before, begin = engine.steps.seconds, time.perf_counter()
            engine.add(*requests)
            while engine.is_busy:
                engine.step()
            seconds = time.perf_counter() - begin - (engine.steps.seconds - before)
        finally:
            engine.close()
        return Sample(seconds, engine.steps.seconds, [seconds] * len(prompts))


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
        was_reset = who.name == OURS and memory_use.reset_peak()
        sample = who.run(case, prompts)
        if who.name == OURS and sample is not None:
            wait_for_background()
            row.compile_seconds += sample.compile_seconds
            if counted:
                row.samples.append(sample)
                row.peak_memory = max(row.peak_memory or 0, memory_use.peak(self.model.device, was_reset) or 0) or None
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
