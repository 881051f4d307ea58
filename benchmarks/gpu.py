"""Decoding, prefill and attention on one NVIDIA GPU: all figures of docs/performance.md for GPUs, in one run.

    PYTHONPATH=src python benchmarks/gpu.py [--minutes 10] [--out gpu.json] [--steps decode_8b] [--cases REGEX]
    PYTHONPATH=src python benchmarks/gpu.py --dry-run        # every step with tiny shapes on CPU

It needs jax with CUDA, numpy, jaxtyping and rich, but no network and no checkpoint: weights are random and made on the
GPU. Where packages can be installed, `pip install -e '.[cuda]'` brings everything. pytest, and torch with CUDA and
transformers, are used if they are installed.

Each step runs in a process of its own and has a share of the time (benchmarks/steps.py). The JSON file is written after
each measurement, so that an interrupted run keeps what it has. A fraction needs the copy bandwidth: a run of some steps
or cases should include ceilings and copy.

    floor of a decoding step = (bytes of weights read + rows x bytes of the KV cache at the depth) / copy bandwidth
    fraction = floor / time of a step

An untied embedding is not counted, because one row of it is read per token. The depth is the number of tokens in the KV
cache of a row, averaged over the steps that are timed. The copy bandwidth counts bytes read and bytes written.
"""

import dataclasses
import operator
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

try:
    import gpu_operations
    import jax
    import jax.numpy as jnp
    import numpy as np
    from common import QWEN3_06B
    from published import MODELS
    from steps import Run, Target, main, run_tests

    import jaxlm
    from jaxlm import models
    from jaxlm.bench.hlo import kernels as kernels_of
    from jaxlm.devices import hardware
    from jaxlm.inference import compilation, decoding
    from jaxlm.inference.memory import kv_bytes
    from jaxlm.inference.prefill import new_rows, no_hidden_state
    from jaxlm.inference.requests import Request
    from jaxlm.inference.sampling_params import SamplingParams
    from jaxlm.nn import attention_gpu, flops
except ModuleNotFoundError as error:
    sys.exit(f"{error}. This benchmark needs jax, numpy, jaxtyping, rich, and jaxlm itself: set PYTHONPATH=src")

SHARES = {  # of the time, for the functions of these names, in the order in which they run
    "correctness": 60,
    "ceilings": 15,
    "decode_8b": 240,
    "kernels": 45,
    "products": 50,
    "decode_attention": 40,
    "prefill": 60,
    "decode_small": 50,
    "first_token": 40,
    "transformers": 55,
}
FAMILIES = ("llama-3.2-1b", "qwen3-14b", "gemma-3-27b")  # with a few small layers, for the step "correctness"
ATTENTION_TESTS = "tests/nn/test_attention_backends.py"
TARGETS = [
    *(Target("correctness", f"{name}, float32", "logits_error", operator.le, 1e-4) for name in FAMILIES),
    *(Target("correctness", f"{name}, float32", "equal_tokens", operator.ge, 1) for name in FAMILIES),
    *(Target("correctness", f"{name}, bfloat16, cudnn", "error_ratio", operator.le, 2) for name in FAMILIES),
    Target("correctness", ATTENTION_TESTS, "passed_share", operator.ge, 1),
    *(Target("decode_8b", f"1 x {depth}", "fraction", operator.ge, 0.80) for depth in (128, 2048, 8192)),
    Target("decode_8b", "64 x 2048", "fraction", operator.ge, 0.75),
]
# (rows, depth) and others, the most important first, and what a dry run measures instead.
DECODE = [(1, 2048), (64, 2048), (1, 128), (1, 8192), (8, 2048), (64, 512)], [(1, 96), (2, 96)]
DECODE_SMALL = [(1, 2048), (64, 2048)], [(1, 96)]
ATTENTION = [(1, 2048), (64, 2048), (8, 2048), (1, 8192), (8, 8192), (64, 8192)], [(2, 64)]
PREFILL = [2048, 512, 8192], [32]  # tokens
STEPS = [1, 16, 64], []  # per dispatch, besides the default
STREAM = 128, 16  # tokens of the prompt, and as many new ones
TIMED = 64  # decoding steps that are timed together
GREEDY = SamplingParams(temperature=0).resolve({})
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 512}  # fmt: skip
SMALL = {**TINY, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
GEMMA = {"sliding_window": 33, "sliding_window_pattern": 2}  # one layer with a window, and one without


def shape(run: Run, name: str, **fields: int) -> dict[str, Any]:
    """The config.json of a shape."""
    return {**(QWEN3_06B if name == "qwen3-0.6b" else MODELS[name]), **(TINY if run.dry else {}), **fields}


def random_model(hf: dict[str, Any], dtype: str = "bfloat16") -> jaxlm.Model:
    """A model with random weights, made on the device."""
    family = models.family_of(hf["model_type"])
    model = jaxlm.Model.init(family, family.Config.from_hf(hf), jax.random.key(0), dtype)
    return dataclasses.replace(model, weights=jax.device_put(model.weights, jax.devices()[0]))


@contextmanager
def replaced(table: Any, name: str, value: Any) -> Iterator[None]:
    """Changes one of the library's tables for the programs that are compiled inside."""
    before = getattr(table, name)
    setattr(table, name, value)
    compilation.clear_executables()
    try:
        yield
    finally:
        setattr(table, name, before)
        compilation.clear_executables()


def compiler_options(**options: Any) -> Any:
    platform = jax.default_backend()
    before = hardware.COMPILER_OPTIONS.get(platform, {})
    return replaced(hardware, "COMPILER_OPTIONS", {platform: {**before, **options}})


# Correctness


def correctness(run: Run) -> None:
    """float32 logits and greedy tokens on GPU compared with CPU. bfloat16 logits with cuDNN's attention, compared
    with float32: their error as a multiple of the error of plain XLA."""
    run.case(ATTENTION_TESTS, partial(run_tests, ATTENTION_TESTS))
    for name in FAMILIES[2:] if run.dry else FAMILIES:
        small = (TINY if run.dry else SMALL) | (GEMMA if name.startswith("gemma") else {})
        model = random_model({**MODELS[name], **small}, "float32")
        run.case(f"{name}, float32", partial(compare_with_cpu, model))
        run.case(f"{name}, bfloat16, cudnn", partial(compare_backend, model))


def compare_with_cpu(model: jaxlm.Model) -> dict[str, Any]:
    tokens = random_tokens(model)
    how: Any = {"max_tokens": 32, "temperature": 0, "ignore_eos": True}
    logits, texts = prefill_logits(model, tokens), jaxlm.generate(model, tokens.tolist(), **how)
    with jax.default_device(jax.devices("cpu")[0]):
        twin = dataclasses.replace(model, weights=jax.device_put(model.weights, jax.devices("cpu")[0]))
        exact, expected = prefill_logits(twin, tokens), jaxlm.generate(twin, tokens.tolist(), **how)
    return {
        "logits_error": float(np.abs(logits - exact).max() / exact.std()),
        "equal_tokens": float(np.mean([a == b for x, y in zip(texts, expected) for a, b in zip(x.tokens, y.tokens)])),
    }


def compare_backend(model: jaxlm.Model) -> dict[str, Any]:
    tokens = random_tokens(model)
    half = dataclasses.replace(model, weights=jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.weights))
    same = dataclasses.replace(model, weights=jax.tree.map(lambda w: w.astype(jnp.float32), half.weights))
    exact = prefill_logits(same, tokens)
    with_backend = prefill_logits(half, tokens)
    with replaced(attention_gpu, "installed", lambda: False):
        reference = prefill_logits(half, tokens)
    errors = [float(np.sqrt(np.mean((x - exact) ** 2)) / exact.std()) for x in (with_backend, reference)]
    return {
        "logits_error": errors[0],
        "reference_error": errors[1],
        "error_ratio": errors[0] / errors[1],
        "differs_from_reference": bool((with_backend != reference).any()),  # False: the backend was not used
    }


def random_tokens(model: jaxlm.Model) -> np.ndarray:
    return np.random.default_rng(0).integers(model.config.V, size=(2, 64), dtype=np.int32)


def prefill_logits(model: jaxlm.Model, tokens: np.ndarray) -> np.ndarray:
    """Logits of prompts, computed with a KV cache. It is traced anew at each call, for the attention backends."""
    kv = model.init_kv(len(tokens), 2 * tokens.shape[1], chunk=tokens.shape[1])

    def forward(weights: Any, kv: Any) -> jax.Array:
        pos = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x, _ = model.family.forward(model.config, jnp.asarray(tokens), weights, kv, pos)
        return model.family.logits(model.config, x, weights)

    return np.asarray(jax.jit(forward)(model.weights, kv))


# Speed


def ceilings(run: Run) -> None:
    gpu_operations.ceilings(run)


def products(run: Run) -> None:
    gpu_operations.products(run, models.family_of("llama").Config.from_hf(shape(run, "llama-3.1-8b")))


def decode_attention(run: Run) -> None:
    K, N, H = (2, 4, 16) if run.dry else (8, 32, 128)
    gpu_operations.decode_attention(run, K, N, H, ATTENTION[run.dry])


def decode_8b(run: Run) -> None:
    """Decoding steps of the shape of Llama-3.1-8B, as the engine runs them, and variants of two cases."""
    model = random_model(shape(run, "llama-3.1-8b"))
    default = hardware.STEPS["gpu"]
    for rows, depth in DECODE[run.dry]:
        run.case(f"{rows} x {depth}", partial(decode, run, model, rows, depth, default))
    (rows, depth), (more_rows, _) = DECODE[run.dry][:2]
    for steps in STEPS[run.dry]:
        run.case(f"1 x {depth}, {steps} steps", partial(decode, run, model, rows, depth, steps))
    for name, options in {
        "no command buffers": {"xla_gpu_enable_command_buffer": ""},
        "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    }.items():
        with compiler_options(**options):
            run.case(f"1 x {depth}, {name}", partial(decode, run, model, rows, depth, default))
    longer = decoding.bucket(depth + 1)
    run.case(f"1 x {depth}, stream", partial(streamed, run, model))
    run.case(
        f"{more_rows} x {depth}, {longer} slots", partial(decode, run, model, more_rows, depth, default, slots=longer)
    )
    for steps in STEPS[run.dry]:
        run.case(f"{more_rows} x {depth}, {steps} steps", partial(decode, run, model, more_rows, depth, steps))


def decode_small(run: Run) -> None:
    for name in ("llama-3.2-1b", "qwen3-0.6b")[run.dry :]:
        model = random_model(shape(run, name))
        for rows, depth in DECODE_SMALL[run.dry]:
            for steps in (16,) if run.dry else (hardware.STEPS["gpu"], 16):
                case = partial(decode, run, model, rows, depth, steps)
                run.case(f"{name}, {rows} x {depth}, {steps} steps", case)


def decode(run: Run, model: jaxlm.Model, rows: int, depth: int, steps: int, slots: int | None = None) -> dict[str, Any]:
    """Times the last TIMED decoding steps up to a depth."""
    compilation.clear_executables()  # compiles also what an earlier case has compiled
    compiled, start = compilation.CompiledSteps(model), depth - TIMED
    state = full_state(model, rows, start, slots or decoding.bucket(depth))
    used = (model.device.memory_stats() or {}).get("bytes_in_use")

    def programs(state: decoding.State, count: int) -> tuple[decoding.State, float]:
        """Runs programs from the same depth. Returns the state, and the seconds that they took."""
        pos = jax.device_put(np.full(rows, start, np.int32), model.device)
        state = jax.block_until_ready(state._replace(pos=pos))
        begin = time.perf_counter()
        for _ in range(count):
            state, output = compiled.step(None, steps, state)
        tokens = np.asarray(output.tokens)
        if (tokens < 0).any():
            raise ValueError("the logits are not finite")
        return state, time.perf_counter() - begin

    state, _ = programs(state, 1)  # compiles
    seconds, groups = [], max(1, TIMED // steps)
    for _ in range(5):
        state, took = programs(state, groups)
        seconds.append(took / groups / steps)
    step, spread = statistics.median(seconds), max(seconds) / min(seconds)
    weights = flops.multiplied(model.family.PARAMS, model.config) * model.dtype.itemsize
    floor = weights + rows * kv_bytes(model, depth - TIMED // 2)
    program = list(compilation.executables(model.family, model.config).values())[-1]
    stats = model.device.memory_stats() or {}
    return {
        "rows": rows,
        "depth": depth,
        "slots": state.kv.length,
        "steps_per_dispatch": steps,
        "ms_per_step": step * 1e3,
        "slowest_over_fastest": spread,
        "tokens_per_second": rows / step,
        "floor_bytes": floor,
        "fraction": floor / run.figure("ceilings", "copy", "rate") / step,
        "compile_seconds": compiled.seconds,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "bytes_in_use": used,
        "peak_bytes_of_process": stats.get("peak_bytes_in_use"),
    }


def full_state(model: jaxlm.Model, rows: int, tokens: int, slots: int) -> decoding.State:
    """The decoding state of rows with `tokens` tokens in a KV cache of random keys and values."""
    kv, key = model.init_kv(rows, slots, chunk=1), jax.random.key(0)
    draw = jax.jit(lambda i, a: jax.random.normal(jax.random.fold_in(key, i), a.shape, a.dtype), donate_argnums=1)
    layers = [{"k": draw(2 * i, layer["k"]), "v": draw(2 * i + 1, layer["v"])} for i, layer in enumerate(kv.layers)]
    at = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))
    kv = dataclasses.replace(kv, positions={str(slots): jnp.where(at < tokens, at, -1)}, layers=layers)
    requests = [Request([0] * (tokens + 1), GREEDY, 1, None, key=key)] * rows
    state = new_rows(model, requests, full=False)._replace(kv=kv)
    return jax.device_put(state, model.device)


def streamed(run: Run, model: jaxlm.Model) -> dict[str, Any]:
    """jaxlm.stream, which also runs the host's part of generation."""
    length = STREAM[run.dry]
    prompt, how = list(range(length)), {"max_tokens": length, "temperature": 0, "ignore_eos": True}
    list(jaxlm.stream(model, prompt, **how))  # compiles
    *_, last = jaxlm.stream(model, prompt, **how)
    return {"tokens_per_second": last.tokens_per_second, "first_token_ms": last.first_token_seconds * 1e3}


def kernels(run: Run) -> None:
    """Kernels of one decoding step, counted in the compiled text: those of a layer (four layers less two), of the rest
    and of all layers. The texts are kept beside the JSON file. The kernels that four layers run are profiled. Steps of
    four layers are timed with the library's sampling, with argmax in its place, and without command buffers."""
    whole = MODELS["llama-3.1-8b"]["num_hidden_layers"]

    def compiled(layers: int, rows: int, depth: int) -> tuple[Any, Any, decoding.State]:
        model = random_model(shape(run, "llama-3.1-8b", num_hidden_layers=layers))
        state = full_state(model, rows, depth - TIMED, decoding.bucket(depth))
        step = partial(decoding.step, model.family, model.config, None, (), 1)
        program = compilation.compile_program(step, (1,), (model.weights, state))
        run.out.with_suffix(f".{layers}-layers-{rows}-rows.hlo.txt").write_text(program.as_text())
        return program, model.weights, state

    def count(rows: int, depth: int) -> dict[str, Any]:
        few, more = (kernels_of(compiled(layers, rows, depth)[0].as_text()) for layers in (2, 4))
        layer = {kind: (more[kind] - few[kind]) / 2 for kind in more | few if more[kind] != few[kind]}
        rest = few.total() - 2 * sum(layer.values())
        total = rest + whole * sum(layer.values())
        return {"of_a_layer": sum(layer.values()), "of_the_rest": rest, "of_a_step": total, "kinds_of_a_layer": layer}

    def profile(rows: int, depth: int) -> dict[str, Any]:
        program, weights, state = compiled(4, rows, depth)
        state, _ = program(weights, state)  # loads the kernels
        return gpu_operations.profile(lambda: jax.block_until_ready(program(weights, state)))

    for rows, depth in DECODE[run.dry][: 1 if run.dry else 2]:
        run.case(f"{rows} x {depth}", partial(count, rows, depth))
        run.case(f"{rows} x {depth}, profile", partial(profile, rows, depth))
        four = partial(decode, run, random_model(shape(run, "llama-3.1-8b", num_hidden_layers=4)), rows, depth, 1)
        run.case(f"{rows} x {depth}, four layers", four)
        with replaced(decoding, "sample_token", largest_logit):
            run.case(f"{rows} x {depth}, four layers, argmax", four)
        with compiler_options(xla_gpu_enable_command_buffer=""):
            run.case(f"{rows} x {depth}, four layers, no command buffers", four)


def largest_logit(
    family: Any, cfg: Any, k: int | None, processors: Any, weights: Any, state: decoding.State, x: jax.Array
) -> Any:
    """`decoding.sample_token` without sampling parameters."""
    token = jnp.argmax(family.logits(cfg, x[:, None], weights)[:, 0], axis=-1).astype(jnp.int32)
    return state._replace(token=token, pos=state.pos + 1), decoding.StepOutput(token[None], None)


def prefill(run: Run) -> None:
    """Prefill of the shape of Llama-3.1-8B by the engine's program, with cuDNN's attention and without. FLOPs are those
    of the products, and of attention to earlier tokens only."""
    model = random_model(shape(run, "llama-3.1-8b"))
    cfg, table = model.config, model.family.PARAMS

    def measure(length: int) -> dict[str, Any]:
        compiled, chunk = compilation.CompiledSteps(model), hardware.CHUNK["gpu"]

        def prompt() -> jax.Array:
            kv = model.init_kv(1, decoding.bucket(length), chunk=chunk)
            last, ids = no_hidden_state(model, 1), [[7 * i % cfg.V for i in range(length)]]
            for tokens, pos in decoding.chunks(ids, [0], decoding.chunk_sizes("gpu", 1)):
                kv, last = compiled.prefill(kv, last, *jax.device_put((tokens, pos), model.device))
            return last

        seconds = run.seconds(prompt)
        work = length * (flops.training(table, cfg, length) / 3 - 2 * cfg.V * cfg.D)  # forward, without the logits
        texts = [program.as_text() for program in compilation.executables(model.family, cfg).values()]
        return {
            "ms": seconds * 1e3,
            "tokens_per_second": length / seconds,
            "tflops": work / seconds / 1e12,
            "fraction_of_matmul": work / seconds / run.figure("ceilings", "matmul", "rate"),
            "uses_cudnn": any("fmha" in text for text in texts),
            "compile_seconds": compiled.seconds,
        }

    for length in PREFILL[run.dry]:
        for name, installed in {"default": attention_gpu.installed, "without cuDNN": lambda: False}.items():
            with replaced(attention_gpu, "installed", installed):
                run.case(f"{length} tokens, {name}", partial(measure, length))


def first_token(run: Run) -> None:
    """From a loaded model of the shape of Llama-3.2-1B to the first token of 32, in fresh processes that share a
    compilation cache on disk. The first process finds it empty."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            run.case(name, partial(run.call, "first_token_process", folder))


def first_token_process(run: Run, folder: str) -> dict[str, Any]:
    jaxlm.use_compilation_cache(folder)
    model = random_model(shape(run, "llama-3.2-1b"))
    jax.block_until_ready(model.weights)
    start, times = time.perf_counter(), []
    for _ in jaxlm.stream(model, list(range(32)), max_tokens=32, temperature=0, ignore_eos=True):
        times.append(time.perf_counter() - start)
    return {"first_token_seconds": times[0], "32_tokens_seconds": times[-1]}


def transformers(run: Run) -> None:
    """transformers with a static cache, one row at the depth of the steps above, eager and with torch.compile."""
    cases = [("llama-3.1-8b", "eager"), ("llama-3.1-8b", "compiled"), ("llama-3.2-1b", "compiled")]
    for name, how in [("llama-3.2-1b", "eager")] if run.dry else cases:
        run.case(f"{name}, {how}", partial(run.call, "transformers_process", name, how))


def transformers_process(run: Run, name: str, how: str) -> dict[str, Any]:
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        return {"skipped": str(error)}
    if not (torch.cuda.is_available() or run.dry):
        return {"skipped": f"torch {torch.__version__} has no CUDA"}
    hf, device = shape(run, name), "cpu" if run.dry else "cuda"
    config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, times = torch.ones((1, DECODE[run.dry][0][1] - TIMED), dtype=torch.long, device=device), []

    def watch(*_: Any, **__: Any) -> torch.Tensor:
        """A stopping criterion that stops nothing: it records the time of each token."""
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(1, dtype=torch.bool, device=device)

    options = {"max_new_tokens": TIMED, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "disable_compile": how == "eager", "stopping_criteria": [watch]}
    begin, start = time.perf_counter(), 0
    for _ in range(2):  # the first compiles
        start = len(times)
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    ms = statistics.median((later - earlier) * 1e3 for earlier, later in pairwise(times[start:]))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "ms_per_step": ms,
        "tokens_per_second": 1e3 / ms,
        "first_call_seconds": times[start - 1] - begin,
        **versions,
    }


def machine(run: Run) -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "python": sys.version.split()[0], "cuda": device.client.platform_version}
    return {"platform": device.platform, "device": device.device_kind, **versions}


if __name__ == "__main__":
    steps = {name: globals()[name] for name in SHARES}
    calls = {call.__name__: call for call in (machine, first_token_process, transformers_process)}
    sys.exit(main(__file__, __doc__, steps, SHARES, calls, TARGETS))
