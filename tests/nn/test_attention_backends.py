"""Attention backends against the reference, over one table of cases, on the hardware they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import attention as module

GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")

# B, T, S, N, K, H, window
CASES = [
    (1, 64, 64, 4, 4, 64, None),
    (2, 128, 256, 8, 2, 128, None),
    (3, 96, 192, 6, 1, 256, 40),
    (2, 512, 1024, 16, 8, 128, 512),
    (1, 2, 32, 4, 2, 64, 8),
]


def inputs(case, dtype):
    """Queries that continue a KV cache, with padding at the end of one row and empty slots."""
    B, T, S, N, K, H, _ = case
    rng = np.random.default_rng(sum(case[:6]))
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    past = (S - T) // 2
    query = np.tile(past + np.arange(T), (B, 1))
    query[-1, T // 2 :] = -1
    key = np.tile(np.arange(S), (B, 1))
    key[:, past + T :] = -1
    tokens = [module.TokenPositions(jnp.asarray(p, jnp.int32), jnp.zeros(p.shape, jnp.int32)) for p in (query, key)]
    return (q, k, v, *tokens), query >= 0


@GPU
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cudnn_equals_the_reference(case, dtype):
    args, real = inputs(case, dtype)
    assert module._cudnn_applies(args[0], args[1])
    window, scale = case[6], case[5] ** -0.5
    want = jax.jit(lambda *a: module.reference(*a, window, scale))(*args)
    got = jax.jit(lambda *a: module.cudnn(*a, window, scale))(*args)
    # Both round probabilities and sums to the dtype: a few units in the last place of values around 1.
    limit = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float32)[real], np.asarray(want, np.float32)[real], atol=limit)
