"""Loading into shards and exporting from them: the memory of each of two processes compared with its shard.

    python benchmarks/load_shards.py [--format hf] [--layers 28] [--vocabulary 151936] [--folder DIR]

Two processes of four virtual CPU devices each load one checkpoint (those of benchmarks/load.py) over `model=8`, then
export it. A process's shard is what its devices hold, with replicas counted once. The bound for its peak resident
memory, above that after the import, is 1.1 x shard + 400 MB, for loading and for the export after it. "read" is the
number of bytes that the process read from files. Exit status 1 if a bound is exceeded.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from load import BOUND, make, make_meta, status

DEVICES = 4


def child(folder: Path, out: Path, port: int, index: int) -> dict[str, float]:
    import jax

    import jaxlm
    from jaxlm.devices import distributed

    jaxlm.load, jaxlm.export  # noqa: B018  the package is lazy: this is its import
    distributed.start(f"127.0.0.1:{port}", 2, index)
    distributed.gather("here")
    before, read = status()["VmHWM"], asked()
    model = jaxlm.load(folder, mesh={"model": 2 * DEVICES}, progress=False)
    jax.block_until_ready(model.weights)
    leaves = jax.tree.leaves(model.weights)
    result: dict[str, float] = {
        "weights": sum(leaf.nbytes for leaf in leaves),
        "share": sum(share(leaf) for leaf in leaves),
        "read": asked() - read,
        "load": status()["VmHWM"] - before,
    }
    jaxlm.export(model, out, progress=False)
    return result | {"export": status()["VmHWM"] - before}


def share(leaf) -> int:
    """Bytes of an array's distinct shards on this process's devices."""
    return sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())


def asked() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def run(folder: Path, out: Path) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    started = []
    for index in range(2):
        file = out.with_name(f"{out.name}-{index}.json")
        command = [sys.executable, __file__, "--child", *map(str, (folder, out, port, index, file))]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        started.append((file, subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)))
    failed = [process.wait() for _, process in started]
    if any(failed):
        raise SystemExit(f"the processes exited with {failed}")
    return [json.loads(file.read_text()) for file, _ in started]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("hf", "meta"), default="hf")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, out, port, index, file = args.child
        Path(file).write_text(json.dumps(child(Path(folder), Path(out), int(port), int(index))))
        return 0
    kept = True
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        write, last = (make, "config.json") if args.format == "hf" else (make_meta, "params.json")
        folder = root / f"{args.format}-bfloat16-{args.layers}-{args.vocabulary}"
        if not (folder / last).exists():
            write(folder, "bfloat16", args.layers, args.vocabulary)
        for index, r in enumerate(run(folder, Path(temporary) / "out")):
            bound = BOUND[0] * r["share"] + BOUND[1]
            weights, part, read = (r[name] / 1e9 for name in ("weights", "share", "read"))
            print(f"process {index}: weights {weights:.2f} GB, shard {part:.2f}, read {read:.2f}")
            for what in ("load", "export"):
                verdict = "ok" if r[what] <= bound else "EXCEEDED"
                print(f"  peak of {what} {r[what] / 1e9:.2f} GB; bound {bound / 1e9:.2f} GB: {verdict}")
                kept &= r[what] <= bound
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
