"""The training step compiled for TPU slices without a TPU (benchmarks/train_programs.py): what it gathers and scatters.

The compilations need libtpu (`pip install "jax[tpu]"`, any Linux machine) and minutes: `pytest -n 0 -m slow`.
"""

import importlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxlm.bench import hlo
from jaxlm.models import llama3
from jaxlm.nn import chunked_logits, linear

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def programs() -> Any:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("train_programs")
    sys.path.remove(BENCHMARKS)


@pytest.fixture
def tpu(programs: Any) -> Any:
    """The same, where the TPU's compiler is at hand."""
    pytest.importorskip("libtpu", reason="the TPU compiler is absent: pip install 'jax[tpu]'")
    return programs


# A scan of 32 layers that gathers two weights, one beside a loop of 16 blocks within, and scatters a gradient.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%begin (p: bf16[8,64]) -> bf16[64,64] {
  %ag.1 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %started = bf16[64,64]{1,0} custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[8,64]) -> bf16[64,64] {
  ROOT %ag.2 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[60,64], q: f32[64,64]) -> (f32[8,64], f32[8,64]) {
  %p = f32[60,64]{1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  %padded = f32[64,64]{1,0} pad(%p, %zero), padding=0_4x0_0
  %ar = (f32[64,64]{1,0}, f32[64,64]{1,0}) all-reduce(%padded, %q), channel_id=9, replica_groups=[1,8]<=[8]
  ROOT %kept = (f32[8,64]{1,0}, f32[8,64]{1,0}) tuple(%a, %b)
}

%block (p: (s32[])) -> (s32[]) {
  %step = bf16[64,64]{1,0} fusion(%p), kind=kCustom, calls=%beside
}

%blocks (p: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(16)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%layer (p: (s32[])) -> (s32[]) {
  %start = bf16[64,64]{1,0} fusion(%p), kind=kCustom, calls=%begin
  %inner = (s32[]) while(%p), condition=%blocks, body=%block
  %ag.3 = bf16[1,32,64]{2,1,0} all-gather(%p), channel_id=8, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %rs = (f32[8,64]{1,0}, f32[8,64]{1,0}) fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
}

%layers (p: (s32[])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(32)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.2), direction=LT
}

ENTRY %main (p: s32[]) -> (s32[]) {
  %scan = (s32[]) while(%p), condition=%layers, body=%layer
  ROOT %rs.1 = f32[4]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8]
}
"""


def test_collectives_count_once_a_turn_of_their_loop(programs: Any) -> None:
    found = [(one.kind, one.tensors, loops, times) for one, loops, times in programs.met(TEXT)]
    assert found == [
        ("all-gather", (("bf16", (64, 64)),), ("layer",), 32),
        ("all-gather", (("bf16", (1, 32, 64)),), ("layer",), 32),
        ("reduce-scatter", (("f32", (60, 64)), ("f32", (64, 64))), ("layer",), 32),
        ("reduce-scatter", (("f32", (8, 4)),), (), 1),
    ]


def test_estimated_cycles_count_each_turn_of_a_loop(programs: Any) -> None:
    """32 layers with 16 blocks in each."""
    text = TEXT.replace("calls=%beside", 'calls=%beside, backend_config={"estimated_cycles":"5"}')
    text = text.replace("dimensions={1}", 'dimensions={1}, backend_config={"estimated_cycles":"100"}')
    assert programs.total(text, programs.estimated_cycles) == 32 * (16 * 5 + 100)


def test_a_collective_on_one_device_is_a_fault(programs: Any) -> None:
    alone = toy(programs)._replace(over=None)
    found = programs.met(TEXT)
    assert programs.faults(programs.Case("", "", "", ""), alone, programs.exchanged(alone, [])) == []
    [fault] = programs.faults(programs.Case("", "", "", ""), alone, programs.exchanged(alone, found))
    assert "all-gather" in fault


# A scan of 4 layers with the forward kernel of splash attention; then its gradients apart, and in one kernel; another
# kernel; and a conditional.
KERNELS = """HloModule jit_step, is_scheduled=true

%layer (p: (s32[])) -> (s32[]) {
  %splash_mha_fwd_segmented_residuals.1 = (bf16[8,64,128]{2,1,0}, f32[8,64,128]{2,1,0}) custom-call(%q.q_ref), custom_call_target="tpu_custom_call"
  %f = bf16[64,64]{1,0} fusion(%p), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"100"}
}

%layers (p: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%short (p: f32[]) -> f32[] {
  %g = f32[]{:T(128)} fusion(%p), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"7"}
}

%long (p: f32[]) -> f32[] {
  %h = f32[]{:T(128)} fusion(%p), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"30"}
}

ENTRY %main (p: s32[]) -> (s32[]) {
  %scan = (s32[]) while(%p), condition=%layers, body=%layer
  %splash_mha_dq_segmented.3 = bf16[8,64,128]{2,1,0} custom-call(%q.q_ref), custom_call_target="tpu_custom_call"
  %splash_mha_dkv_segmented.4 = (bf16[8,64,128]{2,1,0}, bf16[8,64,128]{2,1,0}) custom-call(%q.q_ref), custom_call_target="tpu_custom_call"
  %splash_mha_dkv_segmented.5 = (bf16[1,8,64,128]{3,2,1,0}, bf16[8,64,128]{2,1,0}, bf16[8,64,128]{2,1,0}) custom-call(%q.q_ref), custom_call_target="tpu_custom_call"
  %other = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %c = f32[]{:T(128)} conditional(%b, %p, %p), true_computation=%short, false_computation=%long
}
"""  # noqa: E501


def test_costs_count_loops_kernels_and_the_most_expensive_branch() -> None:
    assert hlo.total(KERNELS, hlo.estimated_cycles) == 4 * 100 + 30
    assert hlo.total(KERNELS, hlo.splash_products) == 4 * 2 + 3 + 4 + 5


def toy(programs: Any) -> Any:
    """Two layers of width 64 on data=8: matrices of 4,096 numbers (q, k, v, o) and 8,192, outside of them of 32,768."""
    cfg = SimpleNamespace(L=2, D=64, F=128, V=512, N=4, K=4, H=16, tied=False, windows=(None, None))
    over = SimpleNamespace(size=8, shape={"data": 8, "model": 1}, manual_axes=())
    return programs.Setting(llama3, cfg, over, None, None, None)


LAYER, APART = Counter({4096: 4, 8192: 3}), Counter({32768: 2})
ALL = Counter({4096: 8, 8192: 6, 32768: 2})


@pytest.mark.parametrize(
    ("gathered", "scattered", "summed", "fault"),
    [
        ([(2, LAYER), (2, LAYER), (1, APART)], ALL, {}, None),
        ([(2, LAYER), (1, APART)], ALL, {}, "forward and backward"),  # kept for the backward pass
        ([(2, LAYER), (2, LAYER + LAYER), (1, APART)], ALL, {}, "forward and backward"),
        ([(1, APART + Counter({8192: 6})), (2, Counter({4096: 4}))], ALL, {}, "outside layers"),  # all layers at once
        ([(2, LAYER), (2, LAYER), (1, APART), (16, Counter({32768: 1}))], ALL, {}, "a loop within"),
        ([(2, LAYER), (2, LAYER), (1, APART)], ALL + Counter({32768: 15}), {}, "32768: 17} are scattered"),
        ([(2, LAYER), (2, LAYER), (1, APART)], Counter({4096: 8, 8192: 6}), {32768: 2}, "{32768: 2} are summed whole"),
    ],
)
def test_what_is_not_meant_is_named(
    programs: Any, gathered: list[Any], scattered: Counter[int], summed: dict[int, int], fault: str | None
) -> None:
    loops = {(f"loop {i}",): sizes for i, (_, sizes) in enumerate(gathered)}
    runs = {(f"loop {i}",): times for i, (times, _) in enumerate(gathered)}
    found = programs.Exchanged(loops, runs, Counter(), scattered, Counter(summed), Counter())
    wrong = programs.faults(programs.Case("", "", "", ""), toy(programs), found)
    assert wrong == [] if fault is None else any(fault in text for text in wrong), wrong


def test_exchanges_are_sorted(programs: Any) -> None:
    """By kind and loop; what is smaller than a matrix is left out, float32 that is gathered is noted."""
    every = (tuple(range(8)),)

    def one(kind: str, dtype: str, shape: tuple[int, ...], *loops: str) -> Any:
        return hlo.Met(hlo.Collective(kind, ((dtype, shape),), every, False), loops, 2 if loops else 1)

    found = programs.exchanged(
        toy(programs),
        [
            one("all-gather", "bf16", (1, 128, 64), "layer"),
            one("all-gather", "f32", (512, 64)),
            one("reduce-scatter", "f32", (128, 64), "layer"),
            one("all-reduce", "bf16", (64, 64), "layer"),
            one("all-reduce", "f32", (64,)),
        ],
    )
    assert found.gathered == {("layer",): Counter({8192: 1}), (): Counter({32768: 1})}
    assert found.scattered == {8192: 2}
    assert found.wide == {32768: 1}
    assert found.summed == {4096: 2}
    assert found.sent["reduce-scatter"] == 2 * 8192 * 4 * 7 // 8
    assert found.sent["all-reduce"] == 2 * (2 * 4096 * 2 + 64 * 4) * 7 // 8


def faults(tpu: Any, *args: Any, **more: Any) -> list[str]:
    case = tpu.Case("llama-3.1-8b", *args, **{"layers": 2, "length": 256, **more})
    where = tpu.setting(case)
    return tpu.faults(case, where, tpu.exchanged(where, tpu.met(tpu.compiled(case, where).as_text())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "slice_", "spec", "remat"),
    [("v5e", "2x4", "data=8", "none"), ("v5e", "4x4", "data=4,model=4", "full"), ("v6e", "2x4", "data=8", "dots")],
)
def test_weights_are_gathered_twice_and_gradients_scattered(
    tpu: Any, chip: str, slice_: str, spec: str, remat: str
) -> None:
    assert faults(tpu, chip, slice_, spec, remat=remat) == []


@pytest.mark.slow
def test_a_whole_square_of_chips_sums_whole_gradients(tpu: Any) -> None:
    """What the compiler does not do (docs/scaling.md): should this fail, it has learned it."""
    assert any("are summed whole" in text for text in faults(tpu, "v5e", "4x4", "data=16"))


@pytest.mark.slow
def test_kept_weights_and_sums_in_a_loop_are_found(tpu: Any, monkeypatch: Any) -> None:
    fake = SimpleNamespace(**{**vars(linear.jax), "checkpoint": lambda run, **how: run})
    monkeypatch.setattr(linear, "jax", fake)
    monkeypatch.setattr(chunked_logits, "CHUNK", 64)  # four chunks
    monkeypatch.setattr(chunked_logits, "_per_data_shard", lambda run, rows, weights: run(rows, weights))
    wrong = faults(tpu, "v5e", "2x4", "data=8", remat="none")
    assert any("forward and backward" in text for text in wrong)
    assert any(f"{128256 * 4096}: 3" in text for text in wrong), wrong  # of the head one a chunk, of the embedding one


@pytest.mark.slow
def test_qwen3_4b_fits_one_v6e(tpu: Any) -> None:
    """All layers, 8 rows of 512 tokens, Adafactor: with bfloat16 weights, not with float32. The compiler refuses
    a program that is larger than the chip."""
    case = tpu.Case("qwen3-4b", "v6e", "1", "", 512, 8, optimizer="adafactor")
    half = tpu.measure(replace(case, weight_dtype="bfloat16", grad_dtype="bfloat16"))
    assert half["faults"] == []
    assert half["peak"] < 26e9
    assert tpu.measure(case)["faults"] != []
