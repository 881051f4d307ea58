"""Loading a checkpoint, timed, and compared with a plain reader of the same files with as many threads."""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import loading
from jaxlm.bench import memory_use
from jaxlm.checkpoint.hf import READERS
from jaxlm.nn import params

BLOCK = 8 << 20  # bytes of one read


@dataclass
class LoadSession:
    """The measurements of loading. The lists hold one value per round that is complete.

    Attributes:
        source: What `jaxlm.load` takes.
        options: Options of `jaxlm.load`: dtype, mesh.
        rounds: How often to load.
        files: The weight files.
        file_bytes: Their size.
        weight_bytes: Bytes of the loaded weights.
        load_seconds, read_seconds: Time of `jaxlm.load`, and of the plain reader.
        peak_memory: The most bytes in use during a load, above what was in use before; None where it is not known.
    """

    source: Any
    options: dict[str, Any]
    rounds: int
    files: list[Path] = field(default_factory=list)
    file_bytes: int = 0
    weight_bytes: int = 0
    load_seconds: list[float] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None

    def run(self, progress: Callable[[str, float | None], None]) -> None:
        """Loads and reads in turn. The first load, which imports and compiles, is not counted."""
        for number in range(self.rounds + 1):
            took = sum(self.load_seconds[-1:] + self.read_seconds[-1:])
            left = (self.rounds - number + 1) * took or None
            progress(f"round {number} of {self.rounds}: reading and loading" if number else "first load", left)
            read = self._read() if number else 0.0
            memory_use.reset_peak()
            before, begin = memory_use.resident(), time.perf_counter()
            model = loading.load(self.source, progress=False, **self.options)
            jax.block_until_ready(model.weights)
            seconds = time.perf_counter() - begin
            peak = memory_use.peak(model.device)
            if number:
                self.load_seconds.append(seconds)
                self.read_seconds.append(read)
                if peak is not None and before is not None and model.device.platform == "cpu":
                    self.peak_memory = max(self.peak_memory or 0, peak - before)
            elif model.checkpoint is not None:
                tensors = [tensor for _, tensor in model.checkpoint.tensors.pairs]
                parts = [part for tensor in tensors for part in getattr(tensor, "parts", (tensor,))]
                self.files = sorted({part.file for part in parts})
                self.file_bytes = sum(path.stat().st_size for path in self.files)
                self.weight_bytes = params.nbytes(model.weights)
            del model

    def _read(self) -> float:
        """Seconds of reading all files into fresh memory: the least that a load does."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            jobs = []
            for path in self.files:
                size = path.stat().st_size
                buffer = np.empty(size, np.uint8)
                jobs += [pool.submit(partial(_fill, path, buffer[at : at + BLOCK], at)) for at in range(0, size, BLOCK)]
            for job in jobs:
                job.result()
        return time.perf_counter() - begin

    @property
    def speed(self) -> float:
        """Bytes of the files per second, mean of the rounds."""
        return statistics.fmean(self.file_bytes / seconds for seconds in self.load_seconds)

    @property
    def deviation(self) -> float:
        """Standard deviation of the speed."""
        speeds = [self.file_bytes / seconds for seconds in self.load_seconds]
        return statistics.stdev(speeds) if len(speeds) > 1 else 0.0

    @property
    def read_speed(self) -> float:
        """Bytes per second of the plain reader in its best round."""
        return self.file_bytes / min(self.read_seconds)


def _fill(path: Path, out: np.ndarray, at: int) -> None:
    """Reads a part of a file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        view = memoryview(out.data)
        while view and (got := file.readinto(view)):
            view = view[got:]
    if view:
        raise OSError(f"{path} became shorter while it was read (at {at} of {os.path.getsize(path)} bytes)")
