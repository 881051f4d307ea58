"""Programs compiled for TPU slices without a TPU (benchmarks/programs.py): their collectives and their memory.

Compiling needs libtpu (`pip install "jax[tpu]"`, any Linux machine) and takes minutes: `pytest -n 0 -m slow`.
"""

import importlib
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.bench import hlo
from jaxlm.bench import programs as package
from jaxlm.devices import mesh, topology
from jaxlm.inference import sampling

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def programs() -> Any:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("programs")
    sys.path.remove(BENCHMARKS)


@pytest.fixture
def tpu(programs: Any) -> Any:
    """The same; skipped without the TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler is absent: pip install 'jax[tpu]'")
    return programs


# A program with collectives in a loop, a branch, a fusion and an asynchronous call, and as start and done.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p: bf16[8,64]) -> bf16[8,64] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ar.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%async (p: f32[2]) -> f32[4] {
  %p = f32[2]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%p), replica_groups=mesh['data'=2,'model'=2,'group'=2] {'model','group'}
}

%branch (p: (f32[8], s32[8])) -> f32[8] {
  %p = (f32[8]{0}, /*index=1*/s32[8]{0}) parameter(0)
  ROOT %two = (f32[8]{0:T(128)}, s32[8]{0}) all-reduce(%x, %y), replica_groups=[4,2]<=[2,2,2]T(1,2,0), to_apply=%add
}

%body (p: (s32[])) -> (s32[]) {
  %f = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%fused
  %ag = (bf16[8,16]{1,0}, bf16[8,64]{1,0:T(8,128)}) all-gather-start(%f), replica_groups={{0,1,2,3},{4,5,6,7}}
  %done = bf16[8,64]{1,0} all-gather-done(%ag)
  ROOT %t = (s32[]) tuple(%p)
}

ENTRY %main (p: s32[]) -> (s32[]) {
  %w = (s32[]{:T(128)}, /*index=5*/f32[2]{0}) while(%p), condition=%add, body=%body
  %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%branch, %add}
  %s = ((f32[2]{0}), f32[4]{0}, u32[]{:S(2)}) async-start(%p), calls=%async
  %e = f32[4]{0} async-done(%s)
  %cp = (u8[4]{0}, u8[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  ROOT %f2 = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%fused, metadata={op_name="all-to-all(x)"}
}
"""


def test_collectives_of_every_kind_are_parsed() -> None:
    halves, pairs = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
    assert hlo.collectives(TEXT) == [
        ("all-reduce", (("bf16", (8, 64)),), halves, False),
        ("all-gather", (("bf16", (8, 64)),), halves, False),
        ("all-reduce", (("f32", (8,)), ("s32", (8,))), pairs, True),
        ("reduce-scatter", (("f32", (4,)),), halves, False),
        ("collective-permute", (("u8", (4,)),), ((0, 1), (1, 0)), False),
        ("all-reduce", (("bf16", (8, 64)),), halves, False),
    ]
    assert [one.nbytes for one in hlo.collectives(TEXT)] == [1024, 1024, 64, 16, 4, 1024]
    for notation, groups in (
        ("{}", (tuple(range(8)),)),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("something new", None),
    ):
        assert hlo.collectives(TEXT.replace("[2,4]<=[8]", notation))[0].groups == groups
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collectives("all-reduce")


# One layer of width 64, 16 rows on data=2,model=4: three all-reduces of 8 x 64, and what else is and is not expected.
SUM = ("all-reduce", (("bf16", (8, 64)),), ((0, 1, 2, 3), (4, 5, 6, 7)), False)
SMALL = ("all-reduce", (("f32", (8,)), ("s32", (8,))), SUM[2], False)
ACROSS = ((0, 4), (1, 5), (2, 6), (3, 7))
TOKENS = ("all-reduce", (("s32", (16,)),), ACROSS, False)
SCATTER = ("reduce-scatter", (("bf16", (8, 16)),), SUM[2], False)
GATHER = ("all-gather", (("bf16", (8, 64)),), SUM[2], False)


@pytest.mark.parametrize(
    ("program", "found", "fault"),
    [
        ("decode", [SUM, SUM, SUM, SMALL, TOKENS], None),
        ("decode", [SUM, SUM, SCATTER, GATHER], None),
        ("decode", [("all-reduce", SUM[1] * 3, SUM[2], False)], None),
        ("decode", [SUM, SUM], "2 sums of activations, not 3"),
        ("decode", [SUM] * 4, "4 sums of activations, not 3"),
        ("decode", [SUM, SUM, SUM, GATHER], "scattered 0 times and gathered 1 times"),
        ("decode", [SUM, SUM, SUM, SUM[:3] + (True,)], "all-reduce of bf16[8, 64]"),
        ("decode", [SUM, SUM, SUM[:2] + (ACROSS, False)], "all-reduce of bf16[8, 64] across data"),
        ("decode", [SUM, SUM, SUM[:2] + (None, False)], "all-reduce of bf16[8, 64] across data"),
        ("decode", [SUM] * 3 + [("all-gather", (("f32", (8, 512)),), SUM[2], False)], "all-gather of f32[8, 512]"),
        ("decode", [SUM] * 3 + [("all-to-all", (("s32", (4,)),), SUM[2], False)], "all-to-all of s32[4]"),
        ("prefill", [SUM, SUM, SUM, SMALL], "all-reduce of f32[8], s32[8]"),
    ],
)
def test_unexpected_collectives_are_named(
    programs: Any, monkeypatch: Any, program: str, found: list[Any], fault: str | None
) -> None:
    over = SimpleNamespace(size=8, shape={"data": 2, "model": 4})
    where = programs.Setting(None, SimpleNamespace(L=1, D=64), over, 16)
    monkeypatch.setattr(programs, "tokens", lambda case, where: 1)
    wrong = programs.faults(programs.Case("", "", "", program=program), where, [hlo.Collective(*one) for one in found])
    assert wrong == [] if fault is None else any(fault in text for text in wrong)


def result(case: Any) -> dict[str, Any]:
    """A row of the table, without compiling."""
    memory = dict.fromkeys(("weights", "cache", "temporaries", "code", "total"), 10**9)
    found = [{"count": 161, "what": "all-reduce", "bytes": 100_000, "conditional": False}]
    known = {"rows": 8, "axes": {"data": 1, "model": 8}, "memory": memory, "hbm": 32e9, "collectives": found}
    wrong = ["all-to-all of s32[4]"] if case.chip == "v6e" else []
    return {**vars(case), **known, "faults": wrong, "compile_seconds": 1.0, "jax": jax.__version__, "libtpu": "1"}


def test_an_interrupted_table_is_resumed(programs: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    done: list[str] = []

    def measure(case: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(f"{case.chip} {case.slice}")
        return result(case)

    monkeypatch.setattr(programs, "measure", measure)
    monkeypatch.setattr(programs, "TABLE", [row for row in programs.TABLE if "llama-3.1-70b" in row[2]][:3])
    monkeypatch.setattr(programs.importlib.metadata, "version", lambda name: "1")
    flags = ["--model", "llama-3.1-70b", "--program", "decode", "--out", str(tmp_path / "out"), "--markdown"]
    monkeypatch.setattr(sys, "argv", ["programs.py", *flags])
    with pytest.raises(KeyboardInterrupt):
        programs.main()
    assert done == ["v5e 4x4", "v5e 16x16"]
    done.clear()
    assert programs.main() == 1  # the third has an unexpected collective
    assert done == ["v6e 2x4"]
    lines = capsys.readouterr().out.splitlines()
    short = "llama-3.1-70b | v5e 4x4 | 1 x 8 | 8 | 1.00 | 1.00 | 1.00 |  | 3% of 32 | 161 of 100 kB |  | 1 | ok"
    assert lines[2] == f"| {short} |"
    assert lines[4].endswith("| all-to-all of s32[4] |")


def gpu(number: int, host: int) -> Any:
    return SimpleNamespace(id=number, slice_index=host, platform="gpu", device_kind="H100")


@pytest.mark.parametrize(
    ("hosts", "data", "expected"),
    [
        ((4, 4), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((4, 4), 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ((4, 4), 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ((6, 2), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_tensor_parallel_groups_are_neighbors(hosts: tuple[int, ...], data: int, expected: list[list[int]]) -> None:
    """On several GPU hosts, which jax.make_mesh rejects, tensor-parallel groups stay within a host where possible."""
    devices = [
        gpu(i, host) for host, count in enumerate(hosts) for i in range(host * hosts[0], host * hosts[0] + count)
    ]
    found = topology.arrange_devices(devices[::-1], data)
    assert [[device.id for device in group] for group in found] == expected


@pytest.mark.slow
def test_every_default_mesh_can_be_made(tpu: Any) -> None:
    """On slices of every shape, also where `model` takes a part of a side. Each tensor-parallel group is contiguous."""
    for slice_ in ("v5e:8x8", "v6e:8x16", "v6e:16x16", "v5p:4x4x4", "v5p:4x8x8"):
        chips = tpu.tpu_slice(slice_)
        for N, K, F in ((32, 8, 14336), (64, 8, 28672), (32, 16, 21504)):
            over = topology.make(topology.default({"N": N, "F": F}, len(chips)), K, chips)
            assert over.size == len(chips)
            groups = over.devices.reshape(over.shape["data"], -1)
            spans = [np.ptp([chip.coords for chip in group], axis=0) + 1 for group in groups]
            assert all(math.prod(span) == groups.shape[1] for span in spans)


def compile_case(tpu: Any, *args: Any, **more: Any) -> tuple[Any, Any, Any, list[Any]]:
    case = tpu.Case(*args, **more)
    where = tpu.setting(case)
    program = tpu.compiled(case, where)
    return case, where, program, hlo.collectives(program.as_text())


def sizes(found: list[Any], conditional: bool) -> Counter[tuple[str, int]]:
    """Counts of collectives by kind and number of elements."""
    tensors = [(one.kind, shape) for one in found if one.conditional == conditional for _, shape in one.tensors]
    return Counter((kind, math.prod(shape)) for kind, shape in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "chip", "slice_", "spec", "layers"),
    [
        ("llama-3.1-8b", "v6e", "2x4", None, 2),
        ("llama-3.1-70b", "v5e", "4x4", None, 2),  # 8 kv heads over 16
        ("qwen3-32b", "v5p", "2x2x1", None, 2),
        ("gemma-3-27b", "v6e", "4x8", "data=2,model=16", 6),
        ("llama-3.1-8b", "v6e", "16x16", None, 2),  # data=8, model=8, group=4
    ],
)
def test_decoding_has_two_all_reduces_per_layer(
    tpu: Any, model: str, chip: str, slice_: str, spec: str | None, layers: int
) -> None:
    case, where, _, found = compile_case(tpu, model, chip, slice_, spec, layers=layers)
    assert tpu.faults(case, where, found) == []
    data, rows = where.over.shape["data"], 8
    expected = Counter({("all-reduce", rows * where.cfg.D): 2 * layers + 1, ("all-reduce", rows): 3})
    if data > 1:  # whether any row is sampled, and the tokens for every process
        expected += Counter({("all-reduce", 1): 1, ("all-reduce", rows * data): 1})
    assert sizes(found, False) == expected
    assert {kind for kind, _ in sizes(found, True)} == {"all-reduce"}
    assert max(size for _, size in sizes(found, True)) == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "chip", "slice_", "spec", "layers"),
    [("llama-3.1-8b", "v5e", "4x4", "data=1,model=16", 2), ("gemma-3-27b", "v6e", "4x4", "data=2,model=8", 6)],
)
def test_prefill_has_two_all_reduces_per_layer_alone(
    tpu: Any, model: str, chip: str, slice_: str, spec: str, layers: int
) -> None:
    case, where, _, found = compile_case(tpu, model, chip, slice_, spec, "prefill", layers=layers)
    assert tpu.faults(case, where, found) == []
    activation = 8 * tpu.tokens(case, where) * where.cfg.D
    assert sizes(found, False) == Counter({("all-reduce", activation): 2 * layers + 1})
    assert not sizes(found, True)


@pytest.mark.slow
def test_logprobs_gather_candidates_and_not_logits(tpu: Any) -> None:
    """With 5 logprobs, each of the 16 devices of `model` gives 5 ids and values, which `data` then gathers."""
    case, where, _, found = compile_case(tpu, "llama-3.1-8b", "v6e", "4x8", "data=2,model=16", logprobs=5, layers=2)
    assert tpu.faults(case, where, found) == []
    gathered = Counter({key: count for key, count in sizes(found, False).items() if key[0] == "all-gather"})
    assert gathered == Counter({("all-gather", 8 * 16 * 5): 2, ("all-gather", 16 * 5): 2})
    assert not any(kind == "all-gather" for kind, _ in sizes(found, True))


@pytest.mark.slow
def test_memory_with_kv_groups(tpu: Any) -> None:
    """8 kv heads on 16 devices: each device has one head of the weights and the KV cache, and 1/16 of the rest."""
    case, where, program, _ = compile_case(tpu, "llama-3.1-8b", "v5e", "4x4", layers=2)
    used, cfg = tpu.memory(case, where, program), where.cfg
    one_head = 2 * cfg.H * 8192 * 8 * 2 * 2  # k and v, slots, rows, layers, bytes
    assert one_head <= used["cache"] <= one_head + 8192 * 8 * 4  # and the slots' positions
    shared = cfg.N * cfg.H * 2 + cfg.F * 3
    weights = cfg.V * 2 * cfg.D / 16 + 2 * (shared * cfg.D / 16 + 2 * cfg.H * cfg.D)
    assert weights * 2 <= used["weights"] <= weights * 2 + 5 * cfg.D * 2  # and the norms
    assert used["weights"] + used["cache"] <= used["arguments"] <= (used["weights"] + used["cache"]) * 1.01


@pytest.mark.slow
def test_70b_fits_16_chips_of_v5e_and_not_8(tpu: Any, monkeypatch: Any, capsys: Any) -> None:
    def run(slice_: str) -> tuple[int, dict[str, Any]]:
        flags = ["--chip", "v5e", "--slice", slice_, "--model", "llama-3.1-70b", "--program", "decode", "--json"]
        monkeypatch.setattr(sys, "argv", ["programs.py", *flags])
        return tpu.main(), json.loads(capsys.readouterr().out)

    status, row = run("4x4")
    assert (status, row["faults"]) == (0, [])
    assert 141.1e9 / 16 < row["memory"]["weights"] < row["memory"]["total"] < 16e9
    status, row = run("2x4")
    assert status == 1
    assert row["faults"][0].endswith("do not fit 16.00 GB")


def misplaced(tpu: Any, monkeypatch: Any) -> None:
    """One weight of the first layer is sharded along its inputs."""
    given = package.weights

    def weights(where: Any) -> Any:
        found = given(where)
        up = found["layers"][0]["up"]
        along = jax.sharding.PartitionSpec(None, "model")
        place = jax.sharding.NamedSharding(where.over, along)
        found["layers"][0]["up"] = jax.ShapeDtypeStruct(up.shape, up.dtype, sharding=place)
        return found

    monkeypatch.setattr(package, "weights", weights)


def whole_logits(tpu: Any, monkeypatch: Any) -> None:
    """The argmax over all logits on every device."""
    monkeypatch.setattr(sampling, "_argmax", lambda x: jnp.argmax(mesh.constrain(x, "B"), -1).astype(jnp.int32))


def batch_not_divided(tpu: Any, monkeypatch: Any) -> None:
    """Activations are replicated over `data`, while the KV cache is sharded."""
    given = mesh.constrain
    monkeypatch.setattr(mesh, "constrain", lambda x, letters: given(x, letters.replace("B", " ")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (misplaced, r"all-to-all of bf16\[4, 3584, 1024\]|all-reduce of f32\[8, 14336\]"),  # the weight, or its product
        (whole_logits, r"all-gather of f32\["),
        (batch_not_divided, "across data"),
    ],
)
def test_planted_collectives_are_found(tpu: Any, monkeypatch: Any, plant: Any, fault: str) -> None:
    plant(tpu, monkeypatch)
    spec = "data=2,model=4"
    case, where, _, found = compile_case(tpu, "llama-3.1-8b", "v6e", "2x4", spec, layers=2)
    wrong = tpu.faults(case, where, found)
    assert any(re.search(fault, text) for text in wrong), wrong
