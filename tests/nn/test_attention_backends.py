"""The kernels of accelerators against the reference, over one table of cases.

On CPU splash attention runs in interpret mode. With the compilers installed, all cases are compiled for a TPU and a GPU
without the hardware (slow: `pytest -n 0 -m slow`). On a machine with a GPU, cuDNN is compared with the reference.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.bench import gpu_targets
from jaxlm.devices import mesh, specs, topology
from jaxlm.nn import attend, attention_gpu, attention_reference, attention_tpu, kv_cache

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interpret mode, on CPU")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


@dataclass(frozen=True)
class Case:
    """Attention of T tokens a row.

    Attributes:
        rows: How the positions of a row are: plain, padded, packed, or with gaps.
        cache: Without a KV cache (None), over an empty one (0), or one that holds this number of earlier tokens.
        kernel: Whether the kernels apply; on TPU, whether these positions take splash attention.
    """

    T: int
    N: int
    K: int
    H: int
    window: int | None = None
    rows: str = "plain"
    cache: int | None = None
    dtype: str = "bfloat16"
    B: int = 2
    kernel: bool = True


CASES = {
    "full attention": Case(256, 4, 2, 64),
    "padded rows": Case(256, 4, 4, 128, rows="padded"),
    "packed rows": Case(256, 6, 1, 128, rows="packed"),
    "packed rows, window": Case(384, 8, 2, 80, window=100, rows="packed"),
    "a window of one token": Case(256, 2, 2, 96, window=1),
    "gaps": Case(256, 4, 2, 64, rows="gaps"),
    "gaps, window": Case(256, 4, 2, 64, window=70, rows="gaps", kernel=False),
    "wide heads": Case(256, 4, 1, 256, window=130),
    "long rows": Case(2048, 4, 1, 128, B=1),
    "an empty KV cache": Case(256, 4, 2, 64, rows="padded", cache=0),
    "an empty ring": Case(256, 4, 2, 128, window=100, cache=0),
    "later tokens": Case(128, 4, 2, 64, rows="padded", cache=70, kernel=False),
    "later tokens, ring": Case(128, 4, 1, 128, window=100, cache=300, kernel=False),
    "float32": Case(256, 4, 2, 64, dtype="float32", kernel=False),
    "an odd length": Case(251, 4, 2, 64, rows="packed", kernel=False),
    "float16": Case(256, 4, 2, 64, dtype="float16", kernel=False),
}


def positions(case: Case) -> np.ndarray:
    past = case.cache or 0
    pos = np.tile(np.arange(past, past + case.T, dtype=np.int32), (case.B, 1))
    third = case.T // 3
    if case.rows == "padded":
        pos[-1, -third:] = -1
    if case.rows == "packed":
        pos[0, third:] = np.arange(case.T - third)
        pos[-1, 2 * third :] = np.arange(case.T - 2 * third)
        pos[-1, -20:] = -1
    if case.rows == "gaps":
        pos[0, third:] += 30
        pos[-1, third : third + 40] = -1
    return pos


Attend = Callable[..., Any]


def arrays(case: Case) -> tuple[Any, ...]:
    """q, k, v, the gradient of the output, positions, and the KV cache."""
    random = np.random.default_rng(case.T + case.N)
    shapes = [(case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)]
    q, k, v, do = (jnp.asarray(random.standard_normal(shape), case.dtype) for shape in shapes)
    pos = positions(case)
    do = jnp.where((pos >= 0)[..., None, None], do, 0)
    if case.cache is None:
        return q, k, v, do, jnp.asarray(pos), None
    past = case.cache
    cache = kv_cache.init(case.B, 512, [case.window], K=case.K, H=case.H, dtype=case.dtype, chunk=max(case.T, past))
    if past:
        earlier = jnp.tile(jnp.arange(past, dtype=jnp.int32), (case.B, 1))
        _, [view] = kv_cache.advance(cache, earlier)
        old = [jnp.asarray(random.standard_normal((case.B, past, case.K, case.H)), case.dtype) for _ in "kv"]
        view = kv_cache.write(view, *old)
        cache = kv_cache.KVCache({str(cache.slots(0)): view.positions}, [{"k": view.k, "v": view.v}], 512, cache.chunk)
    return q, k, v, do, jnp.asarray(pos), cache


def with_gradients(backend: Any, case: Case, exact: bool = False) -> Callable[..., Any]:
    """The output of a module's functions, and the gradients by q, k and v. exact: computed in float32."""

    def run(q: Any, k: Any, v: Any, do: Any, pos: Any, cache: Any) -> Any:
        def out(q: Any, k: Any, v: Any) -> Any:
            if exact:
                q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            if cache is None:
                tokens = attention_reference.TokenPositions(pos, attention_reference.segment_ids(pos))
                return backend.causal(q, k, v, tokens, case.window, case.H**-0.5)
            _, [view] = kv_cache.advance(cache, pos)
            view = kv_cache.write(view, k, v)
            query, key = (attention_reference.TokenPositions(x, jnp.zeros_like(x)) for x in (pos, view.positions))
            return backend.over_cache(q, k, v, view.k, view.v, query, key, case.window, case.H**-0.5)

        value, pull = jax.vjp(out, q, k, v)
        return value, pull(do.astype(value.dtype))

    return jax.jit(run)


def assert_close(case: Case, got: Any, exact: Any, real: np.ndarray) -> None:
    """Probabilities, their gradients and the results are rounded to the dtype: errors are a few of its units, of the
    size of the values (gradients of keys are sums over queries)."""
    got, exact = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (got, exact))
    for a, b in zip((got[0][real], *got[1:]), (exact[0][real], *exact[1:]), strict=True):
        assert np.isfinite(a).all()
        limit = 4 * float(jnp.finfo(case.dtype).eps)
        assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max())


def in_float32(run: Attend, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
    """XLA on CPU lacks some products in half precision."""
    return run(*(x.astype(jnp.float32) for x in (q, k, v)), *rest).astype(q.dtype)


INTERPRETED = (
    "gaps",
    "packed rows, window",
    "padded rows",
    "gaps, window",
    "an empty ring",
    "later tokens, ring",
    "wide heads",
)


@on_cpu
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in INTERPRETED else [pytest.mark.slow]) for name in CASES
])  # fmt: skip
def test_splash_attention_in_interpret_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, used = CASES[name], []

    def interpreted(*args: Any) -> jax.Array:
        used.append(name)
        return splash(*args, interpret=True)

    splash = attention_tpu.splash
    monkeypatch.setattr(attention_tpu, "splash", interpreted)
    monkeypatch.setattr(attention_tpu, "BLOCKS", (128,))  # several blocks
    monkeypatch.setattr(attention_reference, "reference", partial(in_float32, attention_reference.reference))
    given = arrays(case)
    got = with_gradients(attention_tpu, case)(*given)
    exact = with_gradients(attention_reference, case, exact=True)(*given)
    assert_close(case, got, exact, positions(case) >= 0)
    whole = case.T % 128 == 0 and case.dtype == "bfloat16"
    assert bool(used) == whole  # where positions decide, both ways are traced


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_cudnn(name: str) -> None:
    case = CASES[name]
    given = arrays(case)
    got = with_gradients(attention_gpu, case)(*given)
    exact = with_gradients(attention_reference, case, exact=True)(*given)
    assert_close(case, got, exact, positions(case) >= 0)


@pytest.mark.parametrize(("pos", "only", "plain"), [
    ([0, 1, 2, -1], True, True), ([-1, 0, 1, 2], True, False), ([2, 3, 0, 1], False, False),
])  # fmt: skip
def test_what_positions_decide(pos: list[int], only: bool, plain: bool) -> None:
    """Whether prefill may read its own keys in the order of the tokens, and with cuDNN, without a mask."""
    query = jnp.array([pos], jnp.int32)
    key = jnp.where(jnp.arange(8) < (query >= 0).sum(), jnp.arange(8), -1)[None]
    tokens, slots = (attention_reference.TokenPositions(x, jnp.zeros_like(x)) for x in (query, key))
    assert bool(attention_reference.holds_only(slots, tokens)) is only
    segments = attention_reference.TokenPositions(query, attention_reference.segment_ids(query))
    assert bool(attention_gpu._plain(segments, None)) is plain


# Compiled without the hardware


def compiled(case: Case, device: Any) -> str:
    """The program of `attend` and its gradient, compiled for a device that is not here."""
    to = jax.sharding.SingleDeviceSharding(device)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), arrays(case))

    def run(q: Any, k: Any, v: Any, do: Any, pos: Any, cache: Any) -> Any:
        view = None if cache is None else kv_cache.advance(cache, pos)[1][0]
        value, pull = jax.vjp(lambda *args: attend(*args, pos, view, window=case.window)[0], q, k, v)
        return value, pull(do)

    return jax.jit(run).lower(*given).compile().as_text() or ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_tpu(name: str) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is absent: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    os.environ.update({"TPU_SKIP_MDS_QUERY": "1"})
    device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    case = CASES[name]
    text = compiled(case, device)
    assert ("tpu_custom_call" in text) == (case.T % 128 == 0 and case.dtype == "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_gpu(name: str) -> None:
    if not attention_gpu.installed():
        pytest.skip("the CUDA compiler is absent: pip install 'jax[cuda13]'")
    device = gpu_targets.devices(specs.BY_NAME["H200"], 1)[0]
    case = CASES[name]
    text = compiled(case, device)
    # Without a GPU at hand, jax takes it for one before Hopper.
    assert ("fmha" in text) == (case.T % 2 == 0 and case.H <= 128 and case.dtype != "float32")


# What does not apply


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        (attention_tpu, {"dtype": "float32"}, "float32"),
        (attention_tpu, {"T": 200}, "multiple of 128"),
        (attention_gpu, {"dtype": "float32"}, "float32"),
        (attention_gpu, {"T": 251}, "even"),
        (attention_gpu, {"H": 100}, "multiple of 8"),
        (attention_gpu, {"H": 512}, "multiple of 8"),
    ],
)
def test_a_fallback_is_reported_once(
    backend: Any, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    attention_reference.report_fallback.cache_clear()
    case = Case(**{"T": 256, "N": 4, "K": 2, "H": 64, **changes})
    shapes = [jax.ShapeDtypeStruct((2, case.T, heads, case.H), case.dtype) for heads in (4, 2, 2)]
    tokens = attention_reference.TokenPositions(*[jax.ShapeDtypeStruct((2, case.T), jnp.int32)] * 2)
    with caplog.at_level(logging.DEBUG, "jaxlm"):
        for window in (None, 7):
            jax.eval_shape(partial(backend.causal, window=window, scale=0.1), *shapes, tokens)
    assert len(caplog.records) == 1
    assert reason in caplog.text


@on_cpu
@pytest.mark.parametrize(("spec", "N", "K"), [
    ("data=2,model=4", 8, 4),
    pytest.param("model=8", 8, 2, marks=pytest.mark.slow),
    pytest.param("model=8", 8, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_splash_attention_on_a_mesh(spec: str, N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device computes its own rows and heads. Only gradients of kv heads that devices share are summed."""
    monkeypatch.setattr(attention_tpu, "splash", partial(attention_tpu.splash, interpret=True))
    case = Case(128, N, K, 64, rows="packed", window=70)
    given = arrays(case)
    expected = with_gradients(attention_reference, case, exact=True)(*given)
    over = topology.make(spec, K, jax.devices()[:8])
    with mesh.use_mesh(over):
        spread = [mesh.place(x, letters, over) for x, letters in zip(given, ("BTNH", "BTKH", "BTKH", "BTNH", "BT"))]
        run = with_gradients(attention_tpu, case)
        text = run.lower(*spread, None).compile().as_text()
        assert_close(case, run(*spread, None), expected, positions(case) >= 0)
    found = set(re.findall(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)", text))
    assert found == (set() if spec.startswith("data") else {"all-reduce"})


@on_cpu
@pytest.mark.skipif(attention_gpu.installed(), reason="cuDNN is here")
def test_a_plugin_without_cudnn_is_no_gpu_backend(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    attention_reference.report_fallback.cache_clear()
    monkeypatch.setattr(attention_gpu.importlib.util, "find_spec", lambda name: name)
    with caplog.at_level(logging.DEBUG, "jaxlm"):
        assert not attention_gpu.installed.__wrapped__()
    assert "cuDNN is not detected" in caplog.text


@pytest.mark.parametrize(("kind", "expected"), [("TPU v2", False), ("TPU v3", False), ("TPU v4", True), ("", True)])
def test_the_first_generations_of_tpu_have_no_kernel(kind: str, expected: bool, caplog: Any) -> None:
    """Splash attention multiplies by a transposed matrix, which their matrix unit cannot."""
    attention_reference.report_fallback.cache_clear()
    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    tokens = attention_reference.TokenPositions(*[jax.ShapeDtypeStruct((2, 256), jnp.int32)] * 2)
    token = attention_tpu.compiling_for.set(kind)
    try:
        traced = jax.make_jaxpr(partial(attention_tpu.causal, window=None, scale=0.1))(*shapes, tokens)
    finally:
        attention_tpu.compiling_for.reset(token)
    assert ("pallas_call" in str(traced)) is expected
