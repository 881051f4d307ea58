"""Which models fit on which devices, by arithmetic: no compiler, no device. The tables of docs/scaling.md.

    python benchmarks/fits.py

A device holds its shard of the weights (bfloat16) and of the KV cache. A row of S tokens takes 2 K H S values per layer
(the window instead of S for a sliding layer), divided by the number of devices that kv heads are sharded over. While
rows decode, new ones are prefilled into a cache of their own. So in the worst case every row has two caches. A tenth of
the memory is left for temporaries, programs and the runtime.
"""

import math
from collections.abc import Iterable

import jax
from published import MODELS

from jaxlm import models
from jaxlm.bench.programs import Setting, cache, share, weights
from jaxlm.devices import mesh, topology
from jaxlm.devices.specs import BY_NAME
from jaxlm.nn import params

ORDER = ("llama-3.1-8b", "qwen3-14b", "gemma-3-27b", "qwen3-32b", "llama-3.1-70b")
COUNTS = {
    "v5e": (8, 16, 64, 256),
    "v6e": (4, 8, 16, 64, 256),
    "v5p": (4, 8, 64, 256),
    "H100": (1, 8, 16),
    "H200": (1, 8),
}
CONTEXT, LEFT = 8192, 0.9


def setting(name: str, count: int, wide: int | None = None) -> Setting:
    """`count` devices, `wide` of them on `model`. The default is the default mesh."""
    family = models.family_of(MODELS[name]["model_type"])
    cfg = family.Config.from_hf(MODELS[name])
    sizes = {mesh.DATA: count // wide, mesh.MODEL: wide} if wide else topology.default({"N": cfg.N, "F": cfg.F}, count)
    axes = topology.factor_kv_heads(sizes, cfg.K)
    return Setting(family, cfg, jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes)), axes[mesh.DATA])


def cell(name: str, chip: str, count: int, wide: int | None = None) -> str:
    """GB of weights per device, and the number of rows of CONTEXT tokens that fit on all devices."""
    where = setting(name, count, wide)
    held, row = share(weights(where)), share(cache(where, CONTEXT, 1))
    rows = math.floor((LEFT * BY_NAME[chip].memory - held) / (2 * row)) * where.batch
    return f"{held / 1e9:.1f} / {rows:,}" if rows > 0 else f"{held / 1e9:.1f} / none"


def table(first: str, heads: Iterable[object], rows: Iterable[tuple[str, Iterable[str]]]) -> None:
    heads = [first, *map(str, heads)]
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def sizes(name: str) -> list[str]:
    where = setting(name, 1)
    row, double = (share(cache(where, S, 1)) for S in (CONTEXT, 2 * CONTEXT))
    count, held = params.count(where.family.PARAMS, where.cfg), share(weights(where))
    return [f"{count:,}", f"{held / 1e9:.1f}", f"{row / 1e9:.2f}", f"{(double - row) / CONTEXT / 1e3:.0f}"]


def main() -> None:
    heads = ("parameters", "weights, GB", "KV cache of 8,192 tokens, GB", "KV cache per further token, kB")
    table("", heads, ((name, sizes(name)) for name in ORDER))
    for chip, counts in COUNTS.items():
        rows = ((name, [cell(name, chip, count) for count in counts]) for name in ORDER)
        table(f"{chip}, {BY_NAME[chip].memory / 1e9:.0f} GB", counts, rows)
    rows = ((name, [cell(name, "v6e", 64), cell(name, "v6e", 64, 8)]) for name in ORDER)
    table("64 of v6e", ("default", "data=8,model=8"), rows)


if __name__ == "__main__":
    main()
