"""Servers under the same loads, in turns."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxlm.bench.serve_load import Load, Measured, Prompt, find_model, run_load
from jaxlm.bench.serve_prompts import Prompts

REQUESTS = 2  # per client, by default
FEWEST = 16  # requests of a load, by default
WARM_UP = 1000  # numbers of the requests of the warm-up begin at multiples of it
Progress = Callable[[str, float | None], None]  # what runs now, and seconds that are left, if they are known


class ServeCase(NamedTuple):
    """What is measured: prompts of a kind under a load."""

    prompts: str
    load: Load


class Server(NamedTuple):
    """A server that runs.

    Attributes:
        name: Its name in the tables.
        url: The base URL.
    """

    name: str
    url: str


@dataclass
class ServeSession:
    """The measurements. `measured` holds what there is so far, also after an interrupt.

    Attributes:
        servers: The servers, which take turns. The others are compared with the first one.
        kinds: The prompts.
        loads: The loads.
        rounds: How often to measure each load.
        requests: Requests of a load. Default: `REQUESTS` per client, but at least `FEWEST`.
        seconds: How long a load may send requests.
        measured: Of each case and server, by round.
        load_averages: Of the machine, at the begin of each round.
        models: Names of the models, by server.
        took: Seconds of the last round.
    """

    servers: Sequence[Server]
    kinds: Sequence[Prompts]
    loads: Sequence[Load]
    rounds: int
    requests: int | None = None
    seconds: float = 60.0
    measured: dict[tuple[ServeCase, str], list[Measured]] = field(default_factory=dict)
    load_averages: list[float] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    took: float | None = None

    def count(self, load: Load) -> int:
        """The number of requests of a load."""
        return self.requests or max(FEWEST, REQUESTS * (load.clients or 0))

    def run(self, progress: Progress) -> None:
        """Measures everything.

        Raises:
            ValueError: A server cannot be reached, or fails at the first request.
        """
        self.warm_up(progress)
        for number in range(self.rounds):
            self.run_round(number, progress)

    def warm_up(self, progress: Progress) -> None:
        """Two requests of each kind to each server. The first failure is an error of the user's.

        Raises:
            ValueError: As in `run`.
        """
        self.models = {server.name: find_model(server.url) for server in self.servers}
        for server in self.servers:
            progress(f"warm-up: {server.name}", None)
            for i, kind in enumerate(self.kinds):
                measured = Measured()
                requests = [kind.request(WARM_UP * i + n) for n in range(2)]
                run_load(server.url, self.models[server.name], Load(clients=1), requests, self.seconds, measured)
                for answer in measured.answers:
                    if answer.error:
                        raise ValueError(f"{server.name} fails at a first request of {kind.name}: {answer.error}")

    @property
    def cases(self) -> list[tuple[Prompts, Load]]:
        """What a round measures."""
        return [*itertools.product(self.kinds, self.loads)]

    def run_round(self, number: int, progress: Progress) -> None:
        """Runs each case. The first server changes from case to case."""
        begin = time.perf_counter()
        self.load_averages.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"))
        for turn in range(len(self.cases)):
            left = self.took and max(0.0, self.took * (self.rounds - number) - (time.perf_counter() - begin))
            self.run_case(number, turn, progress, left)
        self.took = time.perf_counter() - begin

    def run_case(self, number: int, turn: int, progress: Progress, left: float | None = None) -> None:
        """Runs a case of a round with all servers.

        Args:
            number: The round.
            turn: The index of the case.
            progress: Called with what runs.
            left: Seconds until all is measured, for `progress`.
        """
        counts = [self.count(load) for _, load in self.cases]
        # No request is sent twice to a server.
        first = WARM_UP * len(self.kinds) + number * sum(counts) + sum(counts[:turn])
        kind, load = self.cases[turn]
        requests = [kind.request(first + i) for i in range(counts[turn])]
        for server in self.servers if (number + turn) % 2 == 0 else self.servers[::-1]:
            progress(f"round {number + 1} of {self.rounds}: {kind.name}, {load.name}, {server.name}", left)
            self._measure(ServeCase(kind.name, load), server, requests, seed=first)

    def _measure(self, case: ServeCase, server: Server, requests: Sequence[Prompt], seed: int) -> None:
        measured = Measured()
        try:
            run_load(server.url, self.models[server.name], case.load, requests, self.seconds, measured, seed)
        finally:
            rounds = self.measured.setdefault((case, server.name), [])
            if measured.is_complete or (measured.answers and not rounds):
                rounds.append(measured)
