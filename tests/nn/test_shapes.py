"""The shapes that jaxlm.nn annotates are checked at run time in the tests (tests/conftest.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jaxlm.nn import Rope, apply_rope, attend, kv_cache, rms_norm
from jaxlm.nn.chunked_logits import target_logits

FREQS = Rope().frequencies(8)


def advance(pos: jax.Array) -> Any:
    return kv_cache.advance(kv_cache.init(2, 8, [None], 2, 8, jnp.float32, None), pos)


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


Q, KV, POS = shape(2, 4, 6, 8), shape(2, 4, 3, 8), shape(2, 4, dtype=jnp.int32)


def test_right_shapes_pass() -> None:
    out, _ = jax.eval_shape(attend, Q, KV, KV, POS)
    assert out.shape == Q.shape


@pytest.mark.parametrize(
    ("function", "args", "parameter"),
    [
        (attend, (shape(2, 4, 48), KV, KV, POS), "q"),  # rank 3: heads not split
        (attend, (Q, KV, shape(2, 4, 1, 8), POS), "v"),  # another number of kv heads than k
        (attend, (Q, KV, KV, shape(4, dtype=jnp.int32)), "pos"),  # no batch axis
        (attend, (Q, KV, KV, shape(2, 4)), "pos"),  # float positions
        (lambda x, pos: apply_rope(x, pos, FREQS), (Q, shape(2, 5, dtype=jnp.int32)), "pos"),  # another length
        (advance, (shape(4, dtype=jnp.int32),), "pos"),
        (lambda x, w: rms_norm(x, w, 1e-6), (shape(2, 4, 48, dtype=jnp.int32), shape(48)), "x"),
        (target_logits, (shape(2, 4, 9), shape(2, 5, dtype=jnp.int32)), "targets"),
    ],
)
def test_wrong_shapes_are_errors(function: Callable[..., Any], args: tuple[Any, ...], parameter: str) -> None:
    with pytest.raises(TypeCheckError, match=f"'{parameter}'"):
        jax.eval_shape(function, *args)
