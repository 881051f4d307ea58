"""Loading a checkpoint, timed, and compared with a plain reader of the same files with as many threads."""

import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import loading
from jaxlm.bench import memory_use
from jaxlm.checkpoint.hf import READERS
from jaxlm.loading import resolving
from jaxlm.nn import params

BLOCK = 8 << 20  # bytes of one read


@dataclass
class LoadSession:
    """The measurements of loading. The lists hold one value per round that is complete.

    Attributes:
        source: What `jaxlm.load` takes.
        options: Options of `jaxlm.load`: dtype, mesh, quantize.
        rounds: How often to load.
        files: Number of weight files.
        file_bytes: Their size.
        weight_bytes: Bytes of the loaded weights.
        load_seconds, read_seconds: Time of `jaxlm.load` without imports, and of the plain reader.
        peak_memory: The most bytes in use during a load, above what was in use before; None where it is not known.
        took: Time of the last process.
    """

    source: Any
    options: dict[str, Any]
    rounds: int
    files: int = 0
    file_bytes: int = 0
    weight_bytes: int = 0
    load_seconds: list[float] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    took: float = 0.0

    def run(self, progress: Callable[[str, float | None], None]) -> None:
        """Reads and loads, each round in a fresh process. Round 0 brings the files into the page cache and does not
        count.

        Raises:
            ValueError: A load fails; the message has the reason.
            OSError: The model does not exist, or cannot be downloaded.
        """
        resolving.resolve(self.source)  # downloads it
        for number in range(self.rounds + 1):
            left = (self.rounds - number + 1) * self.took or None
            progress(f"round {number} of {self.rounds}: a fresh process reads and loads", left)
            begin = time.perf_counter()
            found = in_fresh_process(self.source, self.options)
            self.took = time.perf_counter() - begin
            self.files, self.file_bytes, self.weight_bytes = found["files"], found["file_bytes"], found["weight_bytes"]
            if number:
                self.load_seconds.append(found["load"])
                self.read_seconds.append(found["read"])
                self.peak_memory = max(self.peak_memory or 0, found["memory"] or 0) or None

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


def in_fresh_process(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What `load_once` returns in a process that has loaded nothing. Raises ValueError with its last line of stderr."""
    # In a session of its own, so that Ctrl-C reaches this process alone.
    with subprocess.Popen([sys.executable, "-m", "jaxlm.bench.load_time"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:  # fmt: skip
        try:
            out, errors = child.communicate(pickle.dumps((source, options)))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if lines else f"loading ended with status {child.returncode}")
    return json.loads(out.splitlines()[-1])


def load_once(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Reads and loads once: seconds, bytes and memory."""
    resolved = resolving.resolve(source)  # imports what a load imports
    tensors = [tensor for _, tensor in resolved.checkpoint.tensors.pairs]
    files = sorted({part.file for tensor in tensors for part in getattr(tensor, "parts", (tensor,))})
    device = jax.local_devices()[0]
    jax.block_until_ready(jax.device_put(np.zeros(1), device))
    read = read_files(files)
    memory_use.reset_peak()
    before, begin = memory_use.resident(), time.perf_counter()
    model = loading.load(source, progress=False, **options)
    jax.block_until_ready(model.weights)
    seconds = time.perf_counter() - begin
    peak = memory_use.peak(device) if device.platform == "cpu" else None
    return {
        "load": seconds, "read": read, "files": len(files), "weight_bytes": params.nbytes(model.weights),
        "file_bytes": sum(path.stat().st_size for path in files),
        "memory": None if peak is None or before is None else peak - before,
    }  # fmt: skip


def read_files(files: list[Path]) -> float:
    """Seconds of reading all files into fresh memory: the least that a load does."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        jobs = []
        for path in files:
            buffer = np.empty(path.stat().st_size, np.uint8)
            for at in range(0, buffer.size, BLOCK):
                jobs.append(pool.submit(_fill, path, buffer[at : at + BLOCK], at))
        for job in jobs:
            job.result()
    return time.perf_counter() - begin


def _fill(path: Path, out: np.ndarray, at: int) -> None:
    """Reads a part of a file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        view = memoryview(out.data)
        while view and (got := file.readinto(view)):
            view = view[got:]
    if view:
        raise OSError(f"{path} became shorter while it was read (at {at} of {os.path.getsize(path)} bytes)")


if __name__ == "__main__":
    print(json.dumps(load_once(*pickle.load(sys.stdin.buffer))))
