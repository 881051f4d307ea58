"""Products with quantized weights in the forms for TPU and GPU, computed on CPU, and the memory of compiled programs.

The programs for TPU and GPU need their compilers (`pip install "jax[tpu]"`, `pip install "jax[cuda13]"`, any Linux
machine): `pytest -n 0 -m slow`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.bench import gpu_targets, hlo, programs
from jaxlm.devices import specs
from jaxlm.nn import linear
from jaxlm.nn import quantized_accelerator as accelerator
from jaxlm.nn.quantize import TYPES, e4m3, quantize
from jaxlm.nn.quantized import Quantized

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def weights() -> dict[str, tuple[Quantized, np.ndarray]]:
    """Weights of 96 channels and 256 inputs without rotations, as accelerators hold them, and their values in float64:
    those that quantize.py makes and those of other tools' files."""
    bits = jax.random.randint(KEY, (8, 32, 96), -128, 128)
    scale = jax.random.uniform(KEY, (16, 96), jnp.float32)
    options: dict[str, Any] = {"grouped": True, "inputs": (256,), "dtype": jnp.float32}

    def made(w: Any) -> dict[str, Any]:
        found = {name: replace(quantize(w, name, 1, platform="tpu"), rotation=0) for name in TYPES}
        codes = bits[:, :16].astype(jnp.uint8)
        found["8 bits in groups of 16"] = Quantized(bits.astype(jnp.int8), scale, kind="int8", **options)
        found["4 bits in groups of 16"] = Quantized(codes, scale, kind="int4", zero=8, **options)
        found["4 bits in groups of 128"] = Quantized(codes, scale[:2], scale[2:4], kind="int4", zero=8, **options)
        found["MXFP4"] = Quantized(codes, scale[:8], kind="mxfp4", **options)
        return {name: (w, w.dense()) for name, w in found.items()}

    found = jax.jit(made)(jax.random.normal(KEY, (96, 256), jnp.float32))
    return {name: (w, np.asarray(dense, np.float64)) for name, (w, dense) in found.items()}


def errors(weights: Any, rows: int, names: Any) -> dict[Any, float]:
    """The largest error of each product, in standard deviations of the exact result. Each is a program of its own: XLA
    computes some products wrongly only if they are alone (quantized_accelerator.by_blocks)."""
    x = jax.random.normal(KEY, (rows, 256), jnp.float32)
    found = {}
    for name in names:
        w, dense = weights[name]
        exact = np.asarray(x, np.float64) @ dense.T
        for product in (accelerator.on_tpu, accelerator.on_gpu):
            found[name, product.__name__] = np.abs(jax.jit(product)(x, w) - exact).max() / exact.std()
    return found


@pytest.mark.parametrize("rows", [1, 9])
def test_the_products_of_few_rows_are_those_of_the_dequantized_weight(rows: int, weights: Any) -> None:
    found = errors(weights, rows, weights)
    assert max(found.values()) < 1e-5, found


def test_the_products_of_many_rows(weights: Any) -> None:
    """With int8, the input is rounded to 8 bits: 1 / 254 of its largest value at most. Groups are as with nine rows."""
    found = errors(weights, linear.MAX_DECODE_ROWS + 1, [name for name, (w, _) in weights.items() if not w.grouped])
    for (name, product), error in found.items():
        assert 1e-3 < error < 0.06 if name == "int8" else error < 1e-5, (name, product)


def test_more_channels_than_a_part_has(monkeypatch: pytest.MonkeyPatch, weights: Any) -> None:
    """The last part overlaps the one before."""
    monkeypatch.setattr(accelerator, "CHANNELS", 40)
    x, (w, dense) = jax.random.normal(KEY, (9, 256), jnp.float32), weights["int4"]
    np.testing.assert_allclose(jax.jit(accelerator.by_channels)(x, w), x @ dense.T, atol=1e-3)


def test_e4m3_is_rounded_as_ml_dtypes_rounds() -> None:
    exact = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.unique(exact[np.isfinite(exact)])
    halfway = (exact[1:] + exact[:-1]) / 2
    drawn = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 0.02
    x = np.concatenate([exact, halfway, np.nextafter(halfway, 448), np.nextafter(halfway, -448), drawn])
    np.testing.assert_array_equal(jax.jit(e4m3)(jnp.asarray(x)), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


SHAPE = (8192, 4096)  # of a weight: 67 MB as bfloat16
LARGE = (32768, 4096)  # 268 MB: more than the VMEM of a TPU, whose arrays are not among the temporaries
ROWS = (1, 8, 256)


def temporaries(product: Callable[..., Any], name: str, rows: int, device: Any, shape: Any = SHAPE) -> int:
    """Bytes of temporary arrays of a compiled product."""
    make = partial(quantize, type=name, inputs=1, platform=device.platform)
    made = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    args = jax.ShapeDtypeStruct((rows, shape[1]), jnp.bfloat16), made
    one = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), args)
    return jax.jit(product).lower(*placed).compile().memory_analysis().temp_size_in_bytes


def product_of(x: Any, w: Any) -> Any:
    return w.product("BD,FD->BF", x)


def forming_the_weight(x: Any, w: Any) -> Any:
    """The planted fault."""
    return linear.plain_einsum("BD,FD->BF", x, jax.lax.optimization_barrier(w.dense()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", TYPES)
def test_no_program_for_cpu_forms_the_float_weight(name: str, rows: int) -> None:
    whole = 2 * SHAPE[0] * SHAPE[1]
    results = 4 * rows * (SHAPE[0] + SHAPE[1])
    assert temporaries(product_of, name, rows, jax.devices()[0]) < whole / 2 + 2 * results


def test_a_formed_weight_is_seen() -> None:
    assert temporaries(forming_the_weight, "int8", 1, jax.devices()[0]) >= 2 * SHAPE[0] * SHAPE[1]


def accelerators() -> dict[str, Any]:
    """Devices to compile for, by name, whose compiler is here."""
    found = {}
    if importlib.util.find_spec("libtpu") is not None:
        found = {chip: programs.tpu_slice(f"{chip}:2x2")[0] for chip in ("v5e", "v6e")}
    if importlib.util.find_spec("jax_cuda13_plugin") is not None:
        found["H200"] = gpu_targets.devices(specs.BY_NAME["H200"], 1)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_no_program_for_tpu_or_gpu_forms_the_float_weight(name: str) -> None:
    devices = accelerators()
    if not devices:
        pytest.skip("no compiler for TPU or GPU: pip install 'jax[tpu]' or 'jax[cuda13]'")
    for device, one in devices.items():
        for rows in ROWS:
            results = 4 * rows * (LARGE[0] + LARGE[1])
            found = temporaries(product_of, name, rows, one, LARGE)
            assert found < LARGE[0] * LARGE[1] + 2 * results, (device, rows)
        assert temporaries(forming_the_weight, name, 1, one, LARGE) >= 2 * LARGE[0] * LARGE[1], device


@pytest.mark.slow
def test_looking_up_one_row_copies_no_table_on_tpu() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is absent: pip install 'jax[tpu]'")
    one = jax.sharding.SingleDeviceSharding(programs.tpu_slice("v6e:2x2")[0])
    made = jax.eval_shape(partial(quantize, type="int8", inputs=1), jax.ShapeDtypeStruct((128256, 4096), jnp.bfloat16))
    args = made, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), args)
    program = jax.jit(lambda w, index: w.rows(index)).lower(*placed).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1e6
    assert hlo.total(program.as_text(), hlo.estimated_cycles) < 100_000
