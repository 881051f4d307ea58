"""Causal attention with grouped-query heads, sliding windows and a KV cache.

`attend` takes positions and a window; the attention mask follows from them. One rule serves training, packed rows,
padding, prefill and decoding:

    a query attends to a key when 0 <= query position - key position, and < window in a sliding-window layer,
    when the key is not padding, and when both belong to the same segment.

Each platform has a module with the same two functions, `causal` and `over_cache`, which compute the same:

    attention_reference   plain XLA, everywhere; the specification
    attention_cpu         blocks of float32 products
    attention_gpu         cuDNN's flash attention on NVIDIA GPUs
    attention_tpu         splash attention (Pallas)

Over a KV cache in 8 bits (quantized_kv.py) the kernels compute the first chunk of a prompt, and XLA the rest.

What runs on CPU is tested against a float64 twin in numpy (tests/nn/test_attention.py), the kernels against the
reference over one table of cases (tests/nn/test_attention_backends.py).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.nn import attention_cpu, attention_gpu, attention_reference, attention_tpu, kv_cache
from jaxlm.nn.attention_reference import TokenPositions, segment_ids


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pos: Int[Array, "B T"],
    cache: kv_cache.LayerCache | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], kv_cache.LayerCache | None]:
    """Causal grouped-query attention, over the KV cache if there is one.

    Args:
        q: Queries; query head n reads kv head n // (N // K).
        k: Keys, after the rotary position embedding.
        v: Values.
        pos: Position of each token in its own sequence, -1 for padding. Without a cache, a new sequence begins wherever
            pos does not exceed the position of the token before it, and packed sequences do not attend to each other.
        cache: This layer's part of the KV cache, to which k and v are written.
        window: Sliding window in tokens, including the query itself; None for full attention.
        scale: Factor on the scores; H**-0.5 by default.

    Returns:
        The attention output in q's dtype (finite but arbitrary at padding), and the updated cache.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale

    def by_platform(function: Callable[[ModuleType], Callable[..., Array]], *arrays: Any) -> Array:
        def bind(backend: ModuleType) -> Callable[..., Array]:
            return lambda *arrays: function(backend)(*arrays, window, factor)

        return jax.lax.platform_dependent(*arrays, **{at: bind(backend) for at, backend in _backends().items()})

    if cache is None:
        return by_platform(lambda backend: backend.causal, q, k, v, TokenPositions(pos, segment_ids(pos))), None
    query, key = (TokenPositions(x, jnp.zeros_like(x)) for x in (pos, cache.positions))
    cache = kv_cache.write(cache, k, v)
    return by_platform(lambda backend: backend.over_cache, q, k, v, cache.k, cache.v, query, key), cache


def _backends() -> dict[str, ModuleType]:
    """The backend for each platform for which a program may be lowered. Those whose compiler is not installed are left
    out, because tracing takes time."""
    found = {"default": attention_reference, "cpu": attention_cpu}
    if attention_gpu.installed():
        found["cuda"] = attention_gpu
    if attention_tpu.installed():
        found["tpu"] = attention_tpu
    return found
