"""Single operations on a GPU for benchmarks/gpu.py: memory and matmul rates, products with the weights of one layer,
attention of one query per row, and the kernels of a profile."""

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from steps import Run

from jaxlm.nn import attention_reference, linear


def number_of_copies(run: Run, nbytes: int) -> int:
    """How many arrays of a size one program reads, so that they are not found in the GPU's cache."""
    return 2 if run.dry else min(64, max(2, (1 << 30) // nbytes))


def ceilings(run: Run) -> None:
    """Bytes or FLOPs per second. copy: bytes read and bytes written, by the faster of a copy and x + 1. read: a maximum
    over rows. matmul: a square bfloat16 product."""
    nbytes, n = (1 << 20, 64) if run.dry else (4 << 30, 8192)
    x = jax.random.bits(jax.random.key(0), (64, nbytes // 256), jnp.uint32)
    copies = [jax.jit(jnp.copy), jax.jit(lambda x: x + 1)]
    run.case("copy", lambda: {"rate": max(2 * x.nbytes / run.seconds(partial(f, x)) for f in copies)})
    largest = jax.jit(lambda x: jnp.max(x, axis=1))
    run.case("read", lambda: {"rate": x.nbytes / run.seconds(partial(largest, x))})
    a, b = jax.random.normal(jax.random.key(1), (2, n, n), jnp.bfloat16)
    run.case("matmul", lambda: {"rate": 2 * n**3 / run.seconds(partial(jax.jit(jnp.matmul), a, b))})


def products(run: Run, cfg: Any) -> None:
    """Products with the weights of one layer, GB/s of the weight. Joined: q, k and v, or gate and up, as one weight."""
    weights = {
        "q, o": (cfg.N * cfg.H, cfg.D),
        "k, v": (cfg.K * cfg.H, cfg.D),
        "gate, up": (cfg.F, cfg.D),
        "down": (cfg.D, cfg.F),
        "joined q, k, v": ((cfg.N + 2 * cfg.K) * cfg.H, cfg.D),
        "joined gate, up": (2 * cfg.F, cfg.D),
        "head": (cfg.V, cfg.D),
    }
    cublaslt = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}
    forms: dict[str, tuple[Callable[..., jax.Array], dict[str, Any]]] = {
        "default": (matmul, {}),
        "sum": (sum_of_products, {}),
        "cuBLASLt": (matmul, cublaslt),
    }

    @cache
    def copies(out: int, width: int) -> list[jax.Array]:
        count = number_of_copies(run, 2 * out * width)
        return [jax.random.normal(jax.random.key(i), (out, width), jnp.bfloat16) for i in range(count)]

    def measure(form: Callable[..., jax.Array], options: dict[str, Any], rows: int, size: tuple[int, int]) -> Any:
        ws = copies(*size)
        xs = [jax.random.normal(jax.random.key(i), (rows, size[1]), jnp.bfloat16) for i in range(len(ws))]
        program = chained(form, options)
        seconds = run.seconds(partial(program, xs, ws)) / len(ws)
        rate = ws[0].nbytes / seconds
        return {
            "us": seconds * 1e6,
            "gb_per_second": rate / 1e9,
            "fraction_of_copy": rate / run.figure("ceilings", "copy", "rate"),
        }

    for rows in (8,) if run.dry else (1, 8, 64):
        for name, size in weights.items():
            for form, (function, options) in forms.items():
                if rows <= 8 or form != "sum":
                    case = partial(measure, function, options, rows, size)
                    run.case(f"{rows} rows, {name}, {form}", case)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return linear.multiply("BD,FD->BF", x, w).astype(x.dtype)


def sum_of_products(x: jax.Array, w: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) * x[:, None].astype(jnp.float32)).sum(-1).astype(x.dtype)


def chained(form: Callable[..., jax.Array], options: dict[str, Any]) -> Any:
    """A program that applies a form to one pair of arguments after another. Inputs differ, so that XLA does not join
    products, and each input waits for the result before it."""

    def program(xs: list[Any], ws: list[Any]) -> list[jax.Array]:
        results: list[jax.Array] = []
        for x, w in zip(xs, ws):
            if results:
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(form(x, w))
        return results

    return jax.jit(program, compiler_options=options)


def decode_attention(run: Run, K: int, N: int, H: int, shapes: list[tuple[int, int]]) -> None:
    """Attention of one query per row at shapes (rows, depth), GB/s of keys and values. difference: from [B,K,S,H]."""
    forms = {
        "XLA, [B,K,S,H]": (xla_bksh, "BKSH"),
        "XLA, [B,S,K,H]": (xla_bskh, "BSKH"),
        "cuDNN, [B,K,S,H]": (cudnn_bksh, "BKSH"),
        "cuDNN, [B,S,K,H]": (cudnn_bskh, "BSKH"),
    }

    def measure(form: Callable[..., jax.Array], letters: str, B: int, S: int) -> dict[str, Any]:
        nbytes = 2 * B * K * S * H * 2
        count = number_of_copies(run, nbytes)
        draw = partial(jax.random.normal, dtype=jnp.float32 if run.dry else jnp.bfloat16)  # CPUs lack such products
        qs = [draw(jax.random.key(i), (B, 1, N, H)) for i in range(count)]
        kvs = [draw(jax.random.key(i), (2, B, K, S, H)) for i in range(count)]
        want = xla_bksh(qs[0], kvs[0])
        if letters == "BSKH":
            kvs = [kv.swapaxes(2, 3) for kv in kvs]
        got = jax.jit(form)(qs[0], kvs[0])
        seconds = run.seconds(partial(chained(form, {}), qs, kvs)) / count
        rate = nbytes / seconds
        return {
            "us": seconds * 1e6,
            "gb_per_second": rate / 1e9,
            "fraction_of_copy": rate / run.figure("ceilings", "copy", "rate"),
            "difference": float(jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()),
        }

    for B, S in shapes:
        for name, (form, letters) in forms.items():
            run.case(f"{B} x {S}, {name}", partial(measure, form, letters, B, S))


def xla_bskh(q: jax.Array, kv: jax.Array) -> jax.Array:
    (B, S), H = kv.shape[1:3], q.shape[-1]
    at = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    key = attention_reference.TokenPositions(at, jnp.zeros_like(at))
    query = attention_reference.TokenPositions(at[:, -1:], jnp.zeros_like(at[:, -1:]))
    return attention_reference.reference(q, kv[0], kv[1], query, key, None, H**-0.5)


def xla_bksh(q: jax.Array, kv: jax.Array) -> jax.Array:
    B, _, N, H = q.shape
    K, f32 = kv.shape[2], jnp.float32
    grouped = q.reshape(B, K, N // K, H)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, kv[0], preferred_element_type=f32) * H**-0.5
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGS,BKSH->BKGH", probs, kv[1], preferred_element_type=f32)
    return out.reshape(B, 1, N, H).astype(q.dtype)


def cudnn_bskh(q: jax.Array, kv: jax.Array) -> jax.Array:
    lengths = jnp.full(q.shape[0], kv.shape[2], jnp.int32)
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q, kv[0], kv[1], key_value_seq_lengths=lengths)


def cudnn_bksh(q: jax.Array, kv: jax.Array) -> jax.Array:
    return cudnn_bskh(q, kv.swapaxes(2, 3))


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """The kernels that the GPU ran: how many, and those that took most of the time. graph_launches: launches of command
    buffers."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    counts, total, graphs = Counter[str](), Counter[str](), 0
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                graphs += "GraphLaunch" in event.name
                if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                    counts[event.name] += 1
                    total[event.name] += event.duration_ns / 1e3
    top = [{"kernel": name[:100], "count": counts[name], "us": round(us, 1)} for name, us in total.most_common(15)]
    return {"kernels": counts.total(), "us": round(sum(total.values()), 1), "graph_launches": graphs, "top": top}
