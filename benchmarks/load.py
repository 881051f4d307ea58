"""Loading a checkpoint: peak resident memory compared with the weights, speed compared with a plain read of the files.

    python benchmarks/load.py [--format hf] [--layers 28] [--vocabulary 151936] [--folder DIR]

Writes checkpoints with random weights into a temporary folder, or uses those that an earlier run left in --folder: the
shape of Qwen3-0.6B (1.2 GB in bfloat16, 2.4 GB in float32), or with --format meta a Llama of that width in two shards
of Meta's format (1.3 GB and 2.6 GB). Each is loaded in a fresh process on the CPU.

Memory is the increase over the peak after `import jaxlm, jax`. The bound is 1.1 x weights + 400 MB.

Speeds are bytes of the files per second, the best of three, in turn with plain reads. "warm": the files are in the page
cache. "cold": they are dropped from it before each load (the host of a virtual machine may still cache them). "read"
fills one buffer again and again. "into fresh memory" keeps what it reads, which is the least that a loader does (a
conversion to a wider type touches twice as much).

Exit status 1 if a bound is exceeded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BOUND = 1.1, 400e6  # x weights, + bytes
CASES = (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32"))
STORED = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
BUFFER = 8 << 20


def shape(layers: int, vocabulary: int) -> dict:
    """The config.json of a Qwen3 with the width of the 0.6B."""
    return {
        "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip


def make(folder: Path, dtype: str, layers: int, vocabulary: int, shard: int = 256 << 20) -> None:
    """Writes a sharded checkpoint of random weights."""
    import ml_dtypes
    import numpy as np

    from jaxlm.models import qwen3
    from jaxlm.nn import params

    folder.mkdir(parents=True, exist_ok=True)
    raw = shape(layers, vocabulary)
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


def child(folder: Path, dtype: str, speed: bool) -> dict[str, float]:
    """Loads once and, if `speed`, measures speeds. Runs in a process that has done nothing else."""
    import jax

    import jaxlm
    from jaxlm.nn import params

    jaxlm.load  # noqa: B018  the package is lazy: this is its import
    before, sampler = status(), Sampler()
    sampler.start()
    began = time.perf_counter()
    model = jaxlm.load(folder, dtype=dtype, progress=False)
    jax.block_until_ready(model.weights)
    first = time.perf_counter() - began
    after = status()
    sampler.done.set()
    sampler.join()
    peak = {name: max(sampler.peak[name], after[name]) - before[name] for name in sampler.peak}
    result = {"weights": params.nbytes(model.weights), "peak": after["VmHWM"] - before["VmHWM"], "first": first, **peak}
    if speed:
        del model
        result |= speeds(folder, dtype)
    return result


def speeds(folder: Path, dtype: str, repeats: int = 3) -> dict[str, float]:
    """Bytes of the files per second for loads and plain reads, in turn. The best of each."""
    import numpy as np

    import jaxlm

    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth"))
    total = sum(path.stat().st_size for path in files)

    def read(buffers) -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(next(buffers)):
                    pass

    def again():
        buffer = np.empty(BUFFER, np.uint8)
        while True:
            yield buffer

    def fresh():
        kept = []
        while True:
            kept.append(np.empty(BUFFER, np.uint8))
            yield kept[-1]

    jobs = {
        "load": lambda: jaxlm.load(folder, dtype=dtype, progress=False),
        "read": lambda: read(again()),
        "fresh": lambda: read(fresh()),
    }
    best: dict[str, float] = {}
    for state in ("cold", "warm"):
        for name in list(jobs) * repeats:
            if state == "cold":
                drop(files)
            began = time.perf_counter()
            jobs[name]()
            key, speed = f"{name} {state}", total / (time.perf_counter() - began)
            best[key] = max(best.get(key, 0), speed)
    return best


def drop(files: list[Path]) -> None:
    """Drops files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, dtype: str, speed: bool = True) -> dict[str, float]:
    """`child` in a fresh process on the CPU."""
    command = [sys.executable, __file__, "--child", str(folder), dtype, "--speed" if speed else "--no-speed"]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def report(stored: str, dtype: str, r: dict[str, float]) -> bool:
    factor, constant = BOUND
    bound = factor * r["weights"] + constant
    verdict = f"bound {bound / 1e9:.2f} GB: {'ok' if r['peak'] <= bound else 'EXCEEDED'}"
    print(f"\n{stored} -> {dtype}: weights {r['weights'] / 1e9:.2f} GB")
    print(
        f"  peak {r['peak'] / 1e9:.2f} GB = {r['peak'] / r['weights']:.3f} x weights "
        f"(anonymous {r['RssAnon'] / 1e9:.2f}, file-backed {r['RssFile'] / 1e9:.3f}); {verdict}"
    )
    for state in ("warm", "cold"):
        load, read, fresh = (r[f"{name} {state}"] / 1e9 for name in ("load", "read", "fresh"))
        print(
            f"  {state}: load {load:.2f} GB/s; read {read:.2f} GB/s, ratio {load / read:.2f}; "
            f"read into fresh memory {fresh:.2f} GB/s, ratio {load / fresh:.2f}"
        )
    return r["peak"] <= bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("hf", "meta"), default="hf")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(Path(args.child[0]), args.child[1], args.speed)))
        return 0
    kept = True
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        for stored, dtype in CASES:
            write, last = (make, "config.json") if args.format == "hf" else (make_meta, "params.json")
            folder = root / f"{args.format}-{stored}-{args.layers}-{args.vocabulary}"
            if not (folder / last).exists():
                write(folder, stored, args.layers, args.vocabulary)
            kept &= report(stored, dtype, measure(folder, dtype))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
