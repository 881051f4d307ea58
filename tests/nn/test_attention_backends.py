"""Backends of attention against the reference, over one table of cases. They run where their hardware is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import attention as module

GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: run tests/ops on one")

# B, T, S, N, K, H, window
CASES = [
    (1, 64, 64, 4, 4, 64, None),
    (2, 128, 256, 8, 2, 128, None),
    (3, 96, 192, 6, 1, 256, 40),
    (2, 512, 1024, 16, 8, 128, 512),
    (1, 2, 32, 4, 2, 64, 8),
]


def inputs(case, dtype):
    """Queries that continue what is cached, with padding at the end of one row and empty slots."""
    B, T, S, N, K, H, _ = case
    rng = np.random.default_rng(sum(case[:6]))
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    past = (S - T) // 2
    pos = np.tile(past + np.arange(T), (B, 1))
    pos[-1, T // 2 :] = -1
    at = np.tile(np.arange(S), (B, 1))
    at[:, past + T :] = -1
    places = [module.TokenPositions(jnp.asarray(p, jnp.int32), jnp.zeros(p.shape, jnp.int32)) for p in (pos, at)]
    return (q, k, v, *places), pos >= 0


@GPU
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cudnn_equals_the_reference(case, dtype):
    args, real = inputs(case, dtype)
    assert module._cudnn_applies(args[0], args[1])
    window, scale = case[6], case[5] ** -0.5
    want = jax.jit(lambda *a: module.reference(*a, window, scale))(*args)
    got = jax.jit(lambda *a: module.cudnn(*a, window, scale))(*args)
    # Both round their probabilities and sums to the type: a few units in its last place of values around 1.
    limit = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float32)[real], np.asarray(want, np.float32)[real], atol=limit)
