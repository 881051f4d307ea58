"""What is timed, and what was measured: cases, samples and rows. Without jax, for the processes of rivals too."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

OURS = "jaxlm"


class Case(NamedTuple):
    """What is timed.

    Attributes:
        kind: "prefill" or "decode".
        tokens: Tokens per row: of the prompt, or generated.
        depth: Tokens per row that are in the KV cache before.
        batch: Rows.
    """

    kind: str
    tokens: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        """The name that llama-bench gives it: pp512, tg128, tg128 @ d4096."""
        return f"{'pp' if self.kind == 'prefill' else 'tg'}{self.tokens}" + f" @ d{self.depth}" * bool(self.depth)

    @property
    def prompt_tokens(self) -> int:
        """Tokens per row before the first generated one. Decoding begins behind at least one token."""
        return self.depth + self.tokens if self.kind == "prefill" else max(self.depth, 1)

    @property
    def max_tokens(self) -> int:
        """Generated tokens per row. The first one belongs to prefill, so decoding has one more."""
        return 1 if self.kind == "prefill" else self.tokens + 1

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Random token ids, the same in every run and for every rival."""
        rng = np.random.default_rng(0)
        return rng.integers(0, vocabulary, (self.batch, self.prompt_tokens)).tolist()


class Sample(NamedTuple):
    """One run of a case.

    Attributes:
        seconds: Time of the prefill up to the first token, or of the decoding steps after it.
        compile_seconds: Time spent compiling, not part of `seconds`.
        first_token: Seconds until the first token of each row; empty for decoding.
        intervals: Seconds between the tokens of a row, of all rows; empty for prefill.
    """

    seconds: float
    compile_seconds: float = 0.0
    first_token: Sequence[float] = ()
    intervals: Sequence[float] = ()


class Contestant(Protocol):
    """What runs a case: jaxlm, or a rival."""

    name: str

    def run(self, case: Case, prompts: list[list[int]]) -> Sample | None:
        """Runs a case. None: it cannot run this case."""
        ...

    def close(self) -> None:
        """Frees what it holds. It does not run again."""
        ...


@dataclass
class Row:
    """The measurements of a case.

    Attributes:
        case: The case.
        samples: Of jaxlm, one per round.
        compile_seconds: Time that jaxlm took to compile the programs of the case, or to read them from the cache.
        peak_memory: The most bytes in use during a run of jaxlm; None where it is not known.
        rivals: Seconds of each round by contestant ("transformers bfloat16").
    """

    case: Case
    samples: list[Sample] = field(default_factory=list)
    compile_seconds: float = 0.0
    peak_memory: int | None = None
    rivals: dict[str, list[float]] = field(default_factory=dict)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of all rows together, in each round."""
        return [self._speed(sample.seconds) for sample in self.samples]

    def _speed(self, seconds: float) -> float:
        return self.case.batch * self.case.tokens / seconds

    @property
    def speed(self) -> float:
        """The mean of `speeds`."""
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        """The standard deviation of `speeds`; 0 for a single round."""
        return statistics.stdev(self.speeds) if len(self.samples) > 1 else 0.0

    def milliseconds(self, what: str, percentile: float) -> float | None:
        """A percentile of `first_token` or `intervals`, over all rounds and rows."""
        seconds = [value for sample in self.samples for value in getattr(sample, what)]
        return float(np.percentile(seconds, percentile)) * 1e3 if seconds else None

    def rival(self, name: str) -> tuple[str, float] | None:
        """The fastest contestant of a rival, and its mean tokens per second: of those that ran in the most rounds."""
        most = max((len(seconds) for who, seconds in self.rivals.items() if is_of(who, name)), default=0)
        means = {
            who: statistics.fmean(map(self._speed, seconds))
            for who, seconds in self.rivals.items()
            if 0 < len(seconds) == most and is_of(who, name)
        }
        best = max(means, key=means.__getitem__, default=None)
        return None if best is None else (best, means[best])


def is_of(contestant: str, rival: str) -> bool:
    """Whether a contestant, such as "transformers bfloat16", belongs to a rival."""
    return contestant.split()[0] == rival
