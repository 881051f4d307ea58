"""einsum's way with a single token on CPU against the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import einsum, embed

pytestmark = pytest.mark.smoke

SPECS = [("BTD,NHD->BTNH", (3, 8)), ("BTNH,DNH->BTD", (24,)), ("BTF,DF->BTD", (7,)), ("BTD,VD->BTV", (97,))]


@pytest.mark.parametrize("width", [32, 4064, 4096, 6144])
@pytest.mark.parametrize(("spec", "out"), SPECS, ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_row_equals_the_product_in_float64(spec, out, width, dtype):
    rng = np.random.default_rng(width)
    summed = (4, width // 4) if "BTNH," in spec else (width,)
    x = jnp.asarray(rng.normal(size=(1, 1, *summed)), dtype)
    w = jnp.asarray(rng.normal(size=(*out, *summed)), dtype)
    want = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    got = einsum(spec, x, w, dtype="float32")
    assert got.shape == want.shape
    # Sums of `width` float32 products: their rounding, and nothing of the inputs' type.
    np.testing.assert_allclose(got, want, atol=2e-6 * width**0.5 * 4)


def test_a_weight_whose_last_letters_are_not_summed_is_refused():
    with pytest.raises(ValueError, match="last letters"):
        einsum("BTD,DF->BTF", jnp.ones((1, 1, 4)), jnp.ones((4, 6)))


def test_a_frequent_tokens_gradient_is_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256, and 4,096 tokens would count as so many."""
    tokens = jnp.zeros((4, 1024), jnp.int32)
    total = jax.grad(lambda w: embed(tokens, w).astype(jnp.float32).sum())(jnp.ones((3, 2), jnp.bfloat16))
    assert total.dtype == jnp.bfloat16
    assert total.tolist() == [[4096.0] * 2, [0.0] * 2, [0.0] * 2]
