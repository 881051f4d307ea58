"""einsum on one device, in two axes a side and its own way with few rows on CPU, against plain float64 products."""

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.devices.topology import make
from jaxlm.nn import einsum, embed, linear

pytestmark = pytest.mark.smoke

SIZES = {"B": 2, "T": 3, "P": 2, "N": 5, "K": 3, "H": 7, "D": 11, "F": 13, "V": 17, "r": 2, "E": 4}
# Every product of the families and of LoRA, then other numbers of rows' axes.
PRODUCTS = [
    "BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTNH,DNH->BTD", "BTD,FD->BTF", "BTF,DF->BTD", "BTD,VD->BTV",
    "BTD,rD->BTr", "BTNH,rNH->BTr", "BTF,rF->BTr",
    "BTr,NHr->BTNH", "BTr,KHr->BTKH", "BTr,Dr->BTD", "BTr,Fr->BTF", "BTr,Vr->BTV",
    "D,VD->V", "NH,DNH->D", "TD,VD->TV", "TD,NHD->TNH", "TNH,DNH->TD", "BPTD,NHD->BPTNH", "BPTNH,DNH->BPTD",
]  # fmt: skip
# Letters that do not lie as two axes a side: a weight [in, out], summed letters in another order or in front, kept
# letters in another order or in front, a letter that all three share.
OTHERS = ["BTD,DF->BTF", "BTHN,DNH->BTD", "DBT,FD->BTF", "BTD,NHD->BTHN", "BTD,FD->FBT", "ETD,EFD->ETF"]


def drawn(spec: str, dtype: str, **sizes: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """x, w, and what weighs the result in a loss."""
    rng = np.random.default_rng(len(spec))
    x, w, y = (
        rng.normal(size=[{**SIZES, **sizes}[letter] for letter in letters])
        for letters in spec.replace("->", ",").split(",")
    )
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), y.astype(np.float32)


def exact(spec: str, *of: Any) -> np.ndarray:
    return np.einsum(spec, *(np.asarray(a).astype(np.float64) for a in of))


ROWS = [{}, {"B": 1, "T": 1, "P": 1}, {"B": 2, "T": 1, "P": 1}, {"B": 1, "T": 29}]


@cache
def computed(dtype: str, row: int) -> dict[str, Any]:
    """Every product of x and w, with its gradients, in one program: one compilation instead of 27."""
    drawings = {spec: drawn(spec, dtype, **ROWS[row]) for spec in PRODUCTS + OTHERS}

    @jax.jit
    def run(inputs: dict[str, Any]) -> Any:
        results = {}
        for spec, (x, w, weighs) in inputs.items():
            y, back = jax.vjp(lambda x, w, spec=spec: einsum(spec, x, w, dtype="float32"), x, w)
            results[spec] = y, *back(weighs)
        return results

    with jax.numpy_dtype_promotion("strict"):
        return run(drawings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", range(len(ROWS)), ids=map(str, ROWS))
@pytest.mark.parametrize("spec", PRODUCTS + OTHERS)
def test_products_and_their_gradients_equal_those_in_float64(spec: str, row: int, dtype: str) -> None:
    x, w, weighs = drawn(spec, dtype, **ROWS[row])
    inputs, out = spec.split("->")
    x_letters, w_letters = inputs.split(",")
    y, dx, dw = computed(dtype, row)[spec]
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, x.dtype, w.dtype)
    for got, want in [
        (y, exact(spec, x, w)),
        (dx, exact(f"{out},{w_letters}->{x_letters}", weighs, w)),
        (dw, exact(f"{x_letters},{out}->{w_letters}", x, weighs)),
    ]:
        # A rounding to the result's type, and float32 sums of up to 35 products.
        half = 2**-8 if got.dtype == jnp.bfloat16 else 0
        assert got.shape == want.shape
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=half, atol=3e-6 * want.std())


def dots(jaxpr: Any) -> Iterator[Any]:
    """Every product in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(part, "jaxpr", part)
                yield from dots(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize("rows", ROWS[:2], ids=str)
@pytest.mark.parametrize("spec", PRODUCTS)
def test_on_one_device_a_product_and_its_gradients_have_two_axes(spec: str, rows: dict[str, int]) -> None:
    """What makes them fast on CPU, where more axes cost a copy of the weight each time."""
    x, w, weighs = drawn(spec, "bfloat16", **rows)
    program = jax.make_jaxpr(jax.value_and_grad(lambda x, w: jnp.sum(einsum(spec, x, w) * weighs), (0, 1)))(x, w)
    found = list(dots(program.jaxpr))
    assert len(found) >= 3
    assert all(len(a.aval.shape) <= 2 for eqn in found for a in (*eqn.invars, *eqn.outvars))


def test_on_a_mesh_a_product_keeps_its_letters() -> None:
    x, w, _ = drawn("BTNH,DNH->BTD", "float32")
    with jax.set_mesh(make("data=2", 1, jax.devices()[:2])):
        found = list(dots(jax.make_jaxpr(lambda x, w: einsum("BTNH,DNH->BTD", x, w))(x, w).jaxpr))
    assert {tuple(len(a.aval.shape) for a in eqn.invars) for eqn in found} == {(4, 3)}  # in the form of each platform


@pytest.mark.parametrize(("rows", "multiplied"), [(1, 8), (5, 8), (8, 8), (9, 9), (128, 128), (129, 129)])
def test_few_rows_are_padded_to_eight_on_tpu(rows: int, multiplied: int) -> None:
    """A decoding step on TPU is the only one whose rows pass a barrier. The program is lowered, not compiled."""
    x, w = jnp.ones((rows, 1, 32), jnp.bfloat16), jnp.ones((48, 32), jnp.bfloat16)
    traced = jax.jit(lambda x, w: einsum("BTD,FD->BTF", x, w)).trace(x, w)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert re.findall(r"dot_general.*-> tensor<(\d+)x48xf32>", text) == [str(multiplied)]
    assert ("optimization_barrier" in text) == (rows <= 128)
    assert "optimization_barrier" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_padding_to_eight_rows_changes_no_value(rows: int) -> None:
    x, w, weighs = drawn("BTD,FD->BTF", "float32", B=rows, T=1)

    def value(form: Any, x: Any, w: Any) -> Any:
        return jnp.sum(form(x, w) * weighs[:, 0])

    plain, padded = (jax.value_and_grad(partial(value, form), (0, 1))(x[:, 0], w) for form in (
        partial(linear.plain_einsum, "BD,FD->BF"), linear.eight_rows))  # fmt: skip
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(padded)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_shapes_that_are_not_those_of_the_letters_are_refused(rows: int) -> None:
    """In two axes they would fit, and give wrong numbers."""
    x, w = jnp.ones((rows, 1, 5, 7)), jnp.ones((11, 5, 7))
    for other in (w.reshape(11, 7, 5), w.reshape(11, 35), w.reshape(1, 11, 5, 7)):
        with pytest.raises(ValueError, match=r"'BTNH,DNH->BTD'.*shapes"):
            einsum("BTNH,DNH->BTD", x, other)
    with pytest.raises(ValueError, match="shapes"):
        einsum("BTNH,DNH->BTD", x[0], w)


SPECS = [("BTD,NHD->BTNH", (3, 8)), ("BTNH,DNH->BTD", (24,)), ("BTF,DF->BTD", (7,)), ("BTD,VD->BTV", (97,))]


@pytest.mark.parametrize("width", [32, 4064, 4096, 6144])
@pytest.mark.parametrize(("spec", "out"), SPECS, ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_single_row_equals_the_product_in_float64(spec, out, width, dtype):
    rng = np.random.default_rng(width)
    summed = (4, width // 4) if "BTNH," in spec else (width,)
    x = jnp.asarray(rng.normal(size=(1, 1, *summed)), dtype)
    w = jnp.asarray(rng.normal(size=(*out, *summed)), dtype)
    want = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    got = einsum(spec, x, w, dtype="float32")
    assert got.shape == want.shape
    # Sums of `width` float32 products: their rounding, and nothing of the inputs' type.
    np.testing.assert_allclose(got, want, atol=2e-6 * width**0.5 * 4)


def test_a_frequent_tokens_gradient_is_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256, and 4,096 tokens would count as so many."""
    tokens = jnp.zeros((4, 1024), jnp.int32)
    total = jax.grad(lambda w: embed(tokens, w).astype(jnp.float32).sum())(jnp.ones((3, 2), jnp.bfloat16))
    assert total.dtype == jnp.bfloat16
    assert total.tolist() == [[4096.0] * 2, [0.0] * 2, [0.0] * 2]
