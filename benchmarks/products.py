"""Products of activations and weights on one device: the letters as they are, two axes, rows one by one, and others.

    python benchmarks/products.py [--rows 1,2,4,8,64,128] [--forms letters,two] [--dtype bfloat16] [--seconds 4]

Weights of Qwen3-0.6B's shape, several of each, so that they are not found in the processor's cache. Forms alternate run
by run. Milliseconds of one product: the best run's time, and the least CPU time of all threads, which depends less on
what else the machine does.
"""

import argparse
import resource
import time
from collections.abc import Callable

import jax

from jaxlm.devices import hardware
from jaxlm.nn import linear

WEIGHTS = {  # spec, letters that are kept, letters that are summed, how many weights
    "q": ("BTD,NHD->BTNH", (16, 128), (1024,), 8),
    "o": ("BTNH,DNH->BTD", (1024,), (16, 128), 8),
    "gate": ("BTD,FD->BTF", (3072,), (1024,), 8),
    "down": ("BTF,DF->BTD", (1024,), (3072,), 8),
    "head": ("BTD,VD->BTV", (151936,), (1024,), 1),
}


def flat(form: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[str, jax.Array, jax.Array], jax.Array]:
    """A form of x [B,D], w [F,D] -> [B,F] for any of the specs: all results are as many numbers a row."""

    def run(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
        y = form(x.reshape(len(x), -1), w.reshape(-1, x[0].size))
        return y.reshape(len(x), 1, *w.shape[: len(spec.split("->")[1]) - 2])

    return run


FORMS = {
    "letters": linear.plain_einsum,
    "two": flat(lambda x, w: linear.plain_einsum("BD,FD->BF", x, w)),
    "one by one": flat(linear._few_rows),
    "left": flat(lambda x, w: linear.plain_einsum("FD,BD->FB", w, x).T),
}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,2,4,8,64,128")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=4, help="for each line of the table")
    args = parser.parse_args()
    forms = args.forms.split(",")
    print(f"jax {jax.__version__}, {args.dtype}, {jax.devices()[0].device_kind}: ms, CPU ms")
    print(f"| | rows | {' | '.join(forms)} |\n" + "| --- " * (len(forms) + 2) + "|")
    for name in args.weights.split(","):
        spec, kept, summed, count = WEIGHTS[name]
        ws = [jax.random.normal(jax.random.key(i), (*kept, *summed), args.dtype) for i in range(count)]
        for rows in map(int, args.rows.split(",")):
            x = jax.random.normal(jax.random.key(count), (rows, 1, *summed), args.dtype)
            best = measure({form: compiled(FORMS[form], spec, x, ws) for form in forms}, x, ws, args.seconds)
            cells = " | ".join(f"{wall:.2f}, {used:.2f}" for wall, used in best.values())
            print(f"| {name} | {rows} | {cells} |", flush=True)


def compiled(form: Callable[..., jax.Array], spec: str, x: jax.Array, ws: list[jax.Array]) -> Callable[..., jax.Array]:
    """A program of one product after another: each waits for the last one's result."""

    def run(x: jax.Array, ws: list[jax.Array]) -> list[jax.Array]:
        found = []
        for w in ws:
            found.append(form(spec, x, w))
            x, _ = jax.lax.optimization_barrier((x, found[-1]))
        return found

    options = hardware.COMPILER_OPTIONS.get(jax.default_backend())
    return jax.jit(run, compiler_options=options).lower(x, ws).compile()


def measure(programs: dict[str, Callable[..., jax.Array]], x: jax.Array, ws: list[jax.Array], seconds: float) -> dict:
    best = {form: (float("inf"), float("inf")) for form in programs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 4 or time.perf_counter() < end:
        rounds += 1
        for form, program in programs.items():
            start, before = time.perf_counter(), cpu()
            jax.block_until_ready(program(x, ws))
            took = (time.perf_counter() - start, cpu() - before)
            if rounds > 1:
                best[form] = tuple(min(a, b * 1e3 / len(ws)) for a, b in zip(best[form], took))
    return best


if __name__ == "__main__":
    main()
