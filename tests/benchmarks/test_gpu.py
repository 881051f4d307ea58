"""benchmarks/gpu.py without a GPU: its dry run, and what happens to steps that fail, crash or take too long."""

import importlib
import json
import operator
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxlm.bench import hlo

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Any:
    """The modules of the benchmark."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("gpu", "steps")})
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def run(modules: Any, tmp_path: Path) -> Any:
    """A run without measurements."""
    (tmp_path / "gpu.json").write_text('{"steps": {}}')
    return modules.steps.Run("gpu.py", tmp_path / "gpu.json", True, time.time() + 60)


def dry_run(out: Path, *options: str) -> tuple[Any, str]:
    """The JSON file of a dry run, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")), done.stdout


def test_a_dry_run_of_one_step(tmp_path: Path) -> None:
    """The slow tier runs all steps."""
    found, printed = dry_run(
        tmp_path / "gpu.json", "--steps", "decode_small", "--cases", "qwen3-0.6b, 1 x 96, 16 steps"
    )
    (step,) = found["steps"].values()
    assert step["status"] == "done"
    assert step["cases"]
    assert all(figures["ms_per_step"] > 0 for figures in step["cases"].values())
    assert "dry run: the figures mean nothing" in printed


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    return dry_run(tmp_path_factory.mktemp("gpu") / "gpu.json")


@pytest.mark.slow
def test_every_step_of_a_dry_run_is_done(dry: Any, modules: Any) -> None:
    steps = dry[0]["steps"]
    assert list(steps) == list(modules.gpu.SHARES)
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(steps, "done")
    failed = {
        (name, case): figures["error"]["message"]
        for name, step in steps.items()
        for case, figures in step["cases"].items()
        if "error" in figures and "cuDNN" not in case  # cuDNN is on GPUs only
    }
    assert failed == {}
    assert all(step["cases"] for step in steps.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "case", "figures"),
    [
        ("correctness", "gemma-3-27b, float32", ["logits_error", "equal_tokens"]),
        ("correctness", "gemma-3-27b, bfloat16, cudnn", ["error_ratio"]),
        ("correctness", "tests/nn/test_attention_backends.py", ["passed_share"]),
        ("ceilings", "copy", ["rate"]),
        ("decode_8b", "1 x 96", ["ms_per_step", "tokens_per_second", "fraction", "compile_seconds"]),
        ("decode_8b", "1 x 96, no command buffers", ["fraction"]),
        ("kernels", "1 x 96", ["of_a_layer", "of_a_step"]),
        ("kernels", "1 x 96, four layers, argmax", ["ms_per_step"]),
        ("products", "8 rows, joined q, k, v, cuBLASLt", ["gb_per_second"]),
        ("decode_attention", "2 x 64, XLA, [B,S,K,H]", ["gb_per_second", "difference"]),
        ("prefill", "32 tokens, without cuDNN", ["tokens_per_second", "fraction_of_matmul"]),
        ("decode_small", "qwen3-0.6b, 1 x 96, 16 steps", ["fraction"]),
        ("first_token", "warm", ["first_token_seconds"]),
    ],
)
def test_figures_of_a_dry_run(dry: Any, step: str, case: str, figures: list[str]) -> None:
    found = dry[0]["steps"][step]["cases"][case]
    assert [name for name in figures if not isinstance(found[name], float)] == []


@pytest.mark.slow
def test_both_layouts_of_attention_agree(dry: Any) -> None:
    cases = dry[0]["steps"]["decode_attention"]["cases"]
    assert cases["2 x 64, XLA, [B,S,K,H]"]["difference"] < 1e-5


@pytest.mark.slow
def test_targets_are_printed(dry: Any) -> None:
    assert "dry run: the figures mean nothing" in dry[1]
    assert "1 x 8192" in dry[1]
    assert "not measured" in dry[1]


def test_targets_name_cases_of_a_run_on_a_gpu(modules: Any) -> None:
    decoded = {f"{rows} x {depth}" for rows, depth in modules.gpu.DECODE[False]}
    assert {target.case for target in modules.gpu.TARGETS if target.step == "decode_8b"} <= decoded
    assert {target.step for target in modules.gpu.TARGETS} <= set(modules.gpu.SHARES)


def test_an_error_ends_one_case_only(run: Any) -> None:
    def step(run: Any) -> None:
        run.case("bad", lambda: 1 / 0)
        run.case("good", lambda: {"figure": 1.5, "unknown": float("nan")})

    run.run_step("both", step)
    found = json.loads(run.out.read_text())["steps"]["both"]
    assert found["status"] == "done"
    assert found["cases"]["bad"]["error"]["type"] == "ZeroDivisionError"
    assert found["cases"]["good"]["figure"] == 1.5
    assert found["cases"]["good"]["unknown"] is None


@pytest.mark.slow
def test_an_error_outside_of_the_cases_keeps_them(run: Any) -> None:
    def step(run: Any) -> None:
        run.case("good", lambda: {"figure": 1})
        raise ValueError("no memory")

    run.run_step("bad", step)
    found = json.loads(run.out.read_text())["steps"]["bad"]
    assert (found["status"], found["error"]["message"], found["cases"]["good"]["figure"]) == ("failed", "no memory", 1)


@pytest.mark.slow
def test_only_cases_that_match_are_measured(run: Any) -> None:
    run.out.write_text('{"steps": {}, "cases": "^1 x"}')
    again = type(run)("gpu.py", run.out, True, run.deadline)
    again.run_step("step", lambda run: [run.case(name, dict) for name in ("1 x 128", "1 x 8192", "64 x 128")])
    assert list(json.loads(run.out.read_text())["steps"]["step"]["cases"]) == ["1 x 128", "1 x 8192"]


@pytest.mark.slow
def test_nothing_is_measured_after_the_deadline(run: Any) -> None:
    run.deadline = time.time() - 1
    run.run_step("late", lambda run: run.case("case", lambda: pytest.fail("it was measured")))
    assert "skipped" in json.loads(run.out.read_text())["steps"]["late"]["cases"]["case"]


@pytest.mark.slow
def test_a_case_is_in_the_file_before_the_next_begins(run: Any) -> None:
    def step(run: Any) -> None:
        run.case("first", lambda: {"figure": 1})
        run.case("second", lambda: json.loads(run.out.read_text())["steps"]["step"]["cases"])

    run.run_step("step", step)
    assert run.step["cases"]["second"]["first"]["figure"] == 1


SCRIPT = """
import os, sys, time
import steps as module
module.GRACE = 0
def crash(run):
    run.case("before", lambda: {"figure": 1})
    os.abort()
def hang(run):
    run.case("before", lambda: {"figure": 2})
    time.sleep(600)
def good(run):
    run.case("case", lambda: {"figure": 3})
steps = {"crash": crash, "hang": hang, "good": good}
machine = lambda run: {"platform": "gpu", "device": "none", "jax": "none"}
sys.exit(module.main(__file__, "", steps, {"crash": 1, "hang": 1, "good": 8}, {"machine": machine}, []))
"""


def test_steps_that_crash_or_hang_keep_their_cases(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent / 'src'}"}
    command = [sys.executable, "script.py", "--out", "out.json", "--minutes", "0.7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert "exit code -6" in steps["crash"]["status"]
    assert "killed" in steps["hang"]["status"]
    assert steps["good"]["status"] == "done"
    figures = [steps[name]["cases"]["before"]["figure"] for name in ("crash", "hang")]
    assert [*figures, steps["good"]["cases"]["case"]["figure"]] == [1, 2, 3]


def test_without_a_gpu_only_a_dry_run_starts(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no GPU" in done.stderr


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "jaxtyping.py").write_text("raise ModuleNotFoundError(\"No module named 'jaxtyping'\")")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{BENCHMARKS.parent / 'src'}"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No module named 'jaxtyping'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("meets", "measured", "met"), [(operator.ge, 0.8, "yes"), (operator.ge, 0.79, "no")])
def test_a_target_is_met_at_its_limit(modules: Any, capsys: Any, meets: Any, measured: float, met: str) -> None:
    data = {"machine": {"device": "", "jax": ""}, "dry_run": False, "steps": {"step": {"status": "done", "cases": {}}}}
    data["steps"]["step"]["cases"]["case"] = {"fraction": measured}
    modules.steps.report(data, [modules.steps.Target("step", "case", "fraction", meets, 0.8)])
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.strip("│ ").split("│")[-1].strip() == met


def test_kernels_of_a_profile(modules: Any, monkeypatch: Any) -> None:
    """A profile of a GPU: kernels are the events of its streams, and launches of command buffers are on the host."""

    def line(name: str, *events: tuple[str, float]) -> Any:
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=n, duration_ns=us * 1e3) for n, us in events])

    gpu = [line("Stream #1(Compute)", ("gemm", 5), ("norm", 1), ("gemm", 7)), line("XLA Ops", ("fusion", 13))]
    host = [line("python", ("cuGraphLaunch", 2), ("wait", 9))]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=gpu), SimpleNamespace(name="/host:CPU", lines=host)]
    found = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=planes))
    monkeypatch.setattr(modules.gpu.jax.profiler, "ProfileData", found)
    figures = modules.gpu.gpu_operations.profile(lambda: None)
    assert (figures["kernels"], figures["us"], figures["graph_launches"]) == (3, 13, 1)
    assert figures["top"][0] == {"kernel": "gemm", "count": 2, "us": 12}


TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %n = bf16[8]{0} negate(%p)
}

%command_buffer (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %f = bf16[8]{0} fusion(%p), kind=kLoop, calls=%fused
  %c = bf16[8]{0} copy(%f)
  ROOT %g = (bf16[8]{0}, s8[16]{0}) custom-call(%c), custom_call_target="__cublas$gemm"
}

%body (p: (s32[])) -> (s32[]) {
  %f = bf16[8]{0} fusion(%p), kind=kCustom, calls=%fused, backend_config={"kind":"__triton_gemm"}
  ROOT %t = (s32[]) tuple(%p)
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %one = bf16[] constant(1)
  %a = bf16[8]{0} call(%p), to_apply=%command_buffer
  %b = bf16[8]{0} call(%a), to_apply=%command_buffer
  %w = (s32[]) while(%b), condition=%fused, body=%body
  %start = (bf16[8]{0}, bf16[8]{0}, u32[]) copy-start(%b)
  %done = bf16[8]{0} copy-done(%start)
  %i = bf16[8]{0} conditional(%p, %b, %b), true_computation=%command_buffer, false_computation=%fused
  ROOT %r = bf16[8]{0} bitcast(%done)
}
"""


def test_kernels_of_a_compiled_program(modules: Any) -> None:
    assert hlo.kernels(TEXT) == {
        "fusion kLoop": 2,
        "copy": 2,
        "custom-call __cublas$gemm": 2,
        "fusion kCustom": 1,
        "copy-start": 1,
        "conditional": 1,
    }
