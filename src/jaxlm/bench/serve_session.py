"""Servers under the same loads, in turns."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxlm.bench.serve_load import Load, Measured, Prompt, find_model, run_load
from jaxlm.bench.serve_prompts import Prompts

REQUESTS = 4  # per client, by default
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
    """

    servers: Sequence[Server]
    kinds: Sequence[Prompts]
    loads: Sequence[Load]
    rounds: int
    requests: int | None = None
    seconds: float = 60.0
    measured: dict[tuple[ServeCase, str], list[Measured]] = field(default_factory=dict)
    load_averages: list[float] = field(default_factory=list)

    def count(self, load: Load) -> int:
        """The number of requests of a load."""
        return self.requests or max(FEWEST, REQUESTS * (load.clients or 0))

    def run(self, progress: Progress) -> None:
        """Measures everything. In each round, each load runs with all servers. The first one changes from load to load.

        Raises:
            ValueError: A server cannot be reached, or fails at the first request.
        """
        models = {server.name: find_model(server.url) for server in self.servers}
        for server in self.servers:
            progress(f"warm-up: {server.name}", None)
            self._warm_up(server, models[server.name])
        pairs = [(kind, load) for kind in self.kinds for load in self.loads]
        number, took = WARM_UP * len(self.kinds), 0.0
        for done in range(self.rounds):
            self.load_averages.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"))
            begin = time.perf_counter()
            for turn, (kind, load) in enumerate(pairs):
                requests = [kind.request(number + i) for i in range(self.count(load))]
                number += len(requests)  # no request is sent twice to a server
                for server in self.servers if (done + turn) % 2 == 0 else self.servers[::-1]:
                    left = took * (self.rounds - done) - (time.perf_counter() - begin) if took else None
                    progress(f"round {done + 1} of {self.rounds}: {kind.name}, {load.name}, {server.name}", left)
                    self._measure(ServeCase(kind.name, load), server, models[server.name], requests, seed=number)
            took = time.perf_counter() - begin

    def _measure(self, case: ServeCase, server: Server, model: str, requests: Sequence[Prompt], seed: int) -> None:
        measured = Measured()
        try:
            run_load(server.url, model, case.load, requests, self.seconds, measured, seed)
        finally:
            rounds = self.measured.setdefault((case, server.name), [])
            if measured.is_complete or (measured.answers and not rounds):
                rounds.append(measured)

    def _warm_up(self, server: Server, model: str) -> None:
        """Two requests of each kind. The first failure is an error of the user's."""
        for i, kind in enumerate(self.kinds):
            measured = Measured()
            requests = [kind.request(WARM_UP * i + n) for n in range(2)]
            run_load(server.url, model, Load(clients=1), requests, self.seconds, measured)
            for answer in measured.answers:
                if answer.error:
                    raise ValueError(f"{server.name} fails at a first request of {kind.name}: {answer.error}")
