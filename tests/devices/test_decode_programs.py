"""The decode program compiled for one TPU v6e: copies, temporaries, traffic and the predicted fraction of its limit.

Compiling needs libtpu (`pip install "jax[tpu]"`, any Linux machine) and takes minutes: `pytest -n 0 -m slow`.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.nn import kv_cache

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def programs() -> Any:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("decode_programs")
    sys.path.remove(BENCHMARKS)


@pytest.fixture
def tpu(programs: Any) -> Any:
    """The same; skipped without the TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler is absent: pip install 'jax[tpu]'")
    return programs


# A program of two steps over a layer of 64 bytes of keys: a product, a transpose of the keys, and a prefetch.
TEXT = """HloModule jit_step

%turn (p: bf16[4,8]) -> bf16[8,4] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %t = bf16[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %n = s32[] constant(2)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %d = f32[8]{0} fusion(%p), kind=kOutput, calls=%other, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[]) tuple(%p)
}

ENTRY %main (p: bf16[4,8]) -> (s32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %k = bf16[8,4]{1,0} fusion(%p), kind=kLoop, calls=%turn, backend_config={"estimated_cycles":"40"}
  %small = bf16[4]{0} copy(%p)
  %s = (bf16[8,4]{1,0:S(1)}, bf16[8,4]{1,0}, u32[]) copy-start(%k)
  ROOT %w = (s32[]) while(%p), condition=%condition, body=%body
}
"""


def test_the_account_of_a_program(programs: Any) -> None:
    class Program:
        def as_text(self) -> str:
            return TEXT

        def memory_analysis(self) -> Any:
            return type("Memory", (), {"temp_size_in_bytes": 7})

    found = programs.account(Program(), nbytes=64, steps=2)
    assert found == programs.Account(cycles=(40 + 2 * 100) / 2, temporaries=7, copies=64, kernels=(3 + 2) / 2)


# Rows, context, dtype of the KV cache, predicted fraction of the floor.
LIMITS = [
    (1, 2048, "bfloat16", 0.85),
    (8, 2048, "bfloat16", 0.85),
    (64, 512, "bfloat16", 0.77),
    (8, 2048, "int8", 0.85),
    (8, 2048, "fp8", 0.85),
]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "context", "kv_dtype", "fraction"), LIMITS)
def test_the_kv_cache_is_not_copied_and_the_step_is_near_its_limit(
    rows: int, context: int, kv_dtype: str, fraction: float, tpu: Any
) -> None:
    found = tpu.measure(tpu.Case("llama-3.1-8b", rows, context, kv_dtype=kv_dtype))
    assert found["copies"] == 0
    assert found["temporaries"] < 0.2e9
    assert found["fraction"] > fraction


@pytest.mark.slow
def test_writing_the_whole_cache_costs_time(tpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault."""

    def put(old: jax.Array, new: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
        written = jnp.arange(old.shape[axis]) == index  # [B,S]
        written = jnp.expand_dims(written, [i for i in range(1, old.ndim) if i != axis])
        return jnp.where(written, new.astype(old.dtype), old)

    monkeypatch.setattr(kv_cache, "put", put)
    found = tpu.measure(tpu.Case("llama-3.1-8b", 8, 2048))
    assert found["fraction"] < 0.8
