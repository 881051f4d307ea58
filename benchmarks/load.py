"""Loading a checkpoint: peak resident memory compared with the weights, speed compared with a plain reader.

    python benchmarks/load.py [--format hf] [--layers 28] [--vocabulary 151936] [--width 1024] [--one-file]
                              [--folder DIR]

Writes checkpoints with random weights into a temporary folder, or uses those that an earlier run left in --folder: the
shape of Qwen3-0.6B (1.2 GB in bfloat16, 2.4 GB in float32), or with --format meta a Llama of that width in two shards
of Meta's format (1.3 GB and 2.6 GB). Each is loaded in a fresh process on the CPU.

Memory is the increase over the peak after `import jaxlm, jax`. The bound is 1.1 x weights + 400 MB.

Speeds are bytes of the files per second. A load is compared with the fastest plain reader of the same files in the same
process, in turn: as many threads, 8 MB at a time, into fresh memory that begins at a huge page (one buffer per file).
This is the least that a loader of new arrays does. A conversion to a wider type touches twice as much memory.

"warm": the files are in the page cache. "cold": they are dropped from it before each turn (the host of a virtual
machine may still cache them). "first": the files are warm, and each turn is a new process that has loaded a tiny model,
so that imports do not count. Two ratios: of the best turns, and the median of those of the rounds. On a virtual machine
fresh memory may cost ten times as much in one turn as in the next.

Exit status 1 if a bound is exceeded.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

BOUND = 1.1, 400e6  # x weights, + bytes
CASES = (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32"))
ROUNDS = {"warm": 9, "cold": 4, "first": 4}
STORED = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
BLOCK, HUGE_PAGE = 8 << 20, 2 << 20


def shape(layers: int, vocabulary: int, width: int = 1024) -> dict:
    """The config.json of a Qwen3 with the heads of the 0.6B, which has a width of 1024."""
    return {
        "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip


def make(folder: Path, dtype: str, layers: int, vocabulary: int, shard: int = 256 << 20, width: int = 1024) -> None:
    """Writes a sharded checkpoint of random weights."""
    import ml_dtypes
    import numpy as np

    from jaxlm.models import qwen3
    from jaxlm.nn import params

    folder.mkdir(parents=True, exist_ok=True)
    raw = shape(layers, vocabulary, width)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    block = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(kind).tobytes()
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for row in params.tensors(qwen3.PARAMS, qwen3.Config.from_hf(raw)):
        entry = row.names[0], row.stored_shape, int(np.prod(row.stored_shape)) * kind.itemsize
        if shards[-1] and sum(n for _, _, n in shards[-1]) + entry[2] > shard:
            shards.append([])
        shards[-1].append(entry)
    where = {}
    for i, tensors in enumerate(shards):
        header, at = {}, 0
        for name, stored, nbytes in tensors:
            header[name] = {"dtype": STORED[dtype], "shape": stored, "data_offsets": [at, at + nbytes]}
            where[name] = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            at += nbytes
        text = json.dumps(header).encode()
        with open(folder / where[tensors[0][0]], "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for left in range(at, 0, -len(block)):
                file.write(block[:left])
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(raw))


def make_meta(folder: Path, dtype: str, layers: int, vocabulary: int, shards: int = 2) -> None:
    """Writes a checkpoint of random weights in Meta's original format."""
    import ml_dtypes
    import numpy as np

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from helpers.meta_writer import write_pth

    from jaxlm.checkpoint import meta
    from jaxlm.models import llama3
    from jaxlm.nn import params

    folder.mkdir(parents=True, exist_ok=True)
    raw = {"dim": 1024, "n_layers": layers, "n_heads": 16, "n_kv_heads": 8, "vocab_size": vocabulary,
           "ffn_dim_multiplier": 1.1, "multiple_of": 256, "rope_theta": 5e5, "use_scaled_rope": False}  # fmt: skip
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    block = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(kind).tobytes()
    table = {path: (llama3.PARAMS[path][0], name) for path, name in meta.NAMES.items()}
    rows = list(params.tensors(table, llama3.Config.from_hf(meta.hf_config(raw))))

    def part(row):
        rest = list(row.stored_shape)
        if len(rest) > 1:
            rest[row.path.endswith((".o", ".down"))] //= shards
        # A head of the embedding's bytes would be tied to it.
        data, left = block[kind.itemsize * (row.path == "head") :], int(np.prod(rest)) * kind.itemsize
        chunks = [data[: left - begin] for begin in range(0, left, len(data))]
        return row.names[0], STORED[dtype], tuple(rest), chunks

    for i in range(shards):
        write_pth(folder / f"consolidated.{i:02}.pth", map(part, rows))
    (folder / "params.json").write_text(json.dumps(raw))


# The fresh process


def status() -> dict[str, int]:
    """This process's memory in bytes: VmHWM (the peak), RssAnon, RssFile, …"""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith("kB"))
    return {name[:-1]: int(value) * 1024 for name, value, _ in fields}


class Sampler(threading.Thread):
    """Samples the peaks of RssAnon and RssFile. The kernel records only the peak of their sum."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            now = status()
            self.peak = {name: max(value, now[name]) for name, value in self.peak.items()}


def memory(folder: Path, dtype: str, quantize: str | None = None) -> dict[str, float]:
    """The memory of a load. Runs in a process that has done nothing else."""
    import jax

    import jaxlm
    from jaxlm.nn import params

    jaxlm.load  # noqa: B018  the package is lazy: this is its import
    before, sampler = status(), Sampler()
    sampler.start()
    model = jaxlm.load(folder, dtype=dtype, quantize=quantize, progress=False)
    jax.block_until_ready(model.weights)
    after = status()
    sampler.done.set()
    sampler.join()
    peak = {name: max(sampler.peak[name], after[name]) - before[name] for name in sampler.peak}
    return {"weights": params.nbytes(model.weights), "peak": after["VmHWM"] - before["VmHWM"], **peak}


def load(folder: Path, dtype: str) -> None:
    import jaxlm

    jaxlm.load(folder, dtype=dtype, progress=False)


def read(folder: Path, dtype: str) -> None:
    """The plain reader. Its memory is free again when it returns, as that of `load`."""
    import numpy as np

    from jaxlm.checkpoint.hf import READERS

    def fill(file: int, out: np.ndarray, at: int) -> None:
        while out.nbytes:
            got = os.preadv(file, [out.data], at)
            at, out = at + got, out[got:]

    pieces = []
    for path in weight_files(folder):
        file, size = os.open(path, os.O_RDONLY), path.stat().st_size
        pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(pages, np.uint8)
        out = raw[-raw.ctypes.data % HUGE_PAGE :][:size]
        pieces += [(file, out[begin : begin + BLOCK], begin) for begin in range(0, size, BLOCK)]
    with ThreadPoolExecutor(READERS) as pool:
        for future in [pool.submit(fill, *piece) for piece in pieces]:
            future.result()
    for file in {file for file, *_ in pieces}:
        os.close(file)


JOBS = {"load": load, "read": read}


def turn(job: str, folder: Path, dtype: str) -> float:
    """Seconds of one job."""
    began = time.perf_counter()
    JOBS[job](folder, dtype)
    return time.perf_counter() - began


def warm_up() -> None:
    """Imports and starts what a first load does: loads a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "bfloat16", layers=1, vocabulary=64, width=64)
        load(Path(folder), "auto")


def first(job: str, folder: Path, dtype: str) -> float:
    warm_up()
    return turn(job, folder, dtype)


def speeds(folder: Path, dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a load and of a plain read for each round, warm and cold. They take turns in being the first."""
    warm_up()
    turn("load", folder, dtype)
    found: dict[str, list[tuple[float, float]]] = {"warm": [], "cold": []}
    for state, rounds in found.items():
        for i in range(ROUNDS[state]):
            seconds = {}
            for job in list(JOBS)[:: 1 if i % 2 else -1]:
                if state == "cold":
                    drop(weight_files(folder))
                seconds[job] = turn(job, folder, dtype)
            rounds.append((seconds["load"], seconds["read"]))
    return found


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth"))


def drop(files: list[Path]) -> None:
    """Drops files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fresh(function: str, *args: object) -> Any:
    """The result of a function of this file in a fresh process on the CPU."""
    command = [sys.executable, __file__, "--child", function, *map(str, args)]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def child(function: str, *args: str) -> Any:
    if function == "first":
        return first(args[0], Path(args[1]), args[2])
    return {"memory": memory, "speeds": speeds}[function](Path(args[0]), *args[1:])


def report_memory(stored: str, dtype: str, r: dict[str, float]) -> bool:
    factor, constant = BOUND
    bound = factor * r["weights"] + constant
    verdict = f"bound {bound / 1e9:.2f} GB: {'ok' if r['peak'] <= bound else 'EXCEEDED'}"
    print(f"\n{stored} -> {dtype}: weights {r['weights'] / 1e9:.2f} GB")
    print(
        f"  peak {r['peak'] / 1e9:.2f} GB = {r['peak'] / r['weights']:.3f} x weights "
        f"(anonymous {r['RssAnon'] / 1e9:.2f}, file-backed {r['RssFile'] / 1e9:.3f}); {verdict}",
        flush=True,
    )
    return r["peak"] <= bound


def report_speeds(folder: Path, dtype: str) -> None:
    total = sum(path.stat().st_size for path in weight_files(folder)) / 1e9
    found = fresh("speeds", folder, dtype)
    found["first"] = [tuple(fresh("first", job, folder, dtype) for job in JOBS) for _ in range(ROUNDS["first"])]
    for state, rounds in found.items():
        load, read = map(min, zip(*rounds))
        ratio = statistics.median(b / a for a, b in rounds)
        print(
            f"  {state}: load {total / load:.2f} GB/s, plain reader {total / read:.2f} GB/s; ratio of the best "
            f"{read / load:.2f}, median ratio {ratio:.2f} ({len(rounds)} rounds)",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("hf", "meta"), default="hf")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=1024, help="with --format hf")
    parser.add_argument("--one-file", action="store_true", help="with --format hf: no shards")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return 0
    kept = True
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        for stored, dtype in CASES:
            write, last = (make, "config.json") if args.format == "hf" else (make_meta, "params.json")
            folder = root / f"{args.format}-{stored}-{args.layers}-{args.vocabulary}"
            if args.format == "hf":
                write = partial(make, shard=1 << 50 if args.one_file else 256 << 20, width=args.width)
                more = ("-one" * args.one_file) + (f"-{args.width}" if args.width != 1024 else "")
                folder = folder.with_name(folder.name + more)
            if not (folder / last).exists():
                write(folder, stored, args.layers, args.vocabulary)
            kept &= report_memory(stored, dtype, fresh("memory", folder, dtype))
            report_speeds(folder, dtype)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
