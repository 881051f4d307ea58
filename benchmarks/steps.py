"""Runs the steps of a benchmark in processes with time limits, and keeps every measurement in a JSON file.

    sys.exit(main(__file__, __doc__, steps, shares, calls, targets))

`main` starts the script again for each step. A crash or a hang therefore ends one step only. A step has a share of the
time; what it leaves goes to the steps after it. The JSON file is replaced after each measurement. What the steps print
goes to a log beside it.
"""

import argparse
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

GRACE = 20  # seconds that a measurement may exceed the time of its step


class Target(NamedTuple):
    """A bound on a figure of a case. meets: operator.le or operator.ge."""

    step: str
    case: str
    figure: str
    meets: Callable[[float, float], bool]
    limit: float


class Run:
    """The steps of one process.

    Attributes:
        out: The JSON file.
        dry: Whether this is a dry run, with tiny shapes on CPU.
        deadline: When the process should end, in seconds since the epoch.
    """

    def __init__(self, script: str, out: Path, dry: bool, deadline: float):
        self.script, self.out, self.dry, self.deadline = script, out, dry, deadline
        self.data: dict[str, Any] = read(out)
        self.pattern = re.compile(self.data.get("cases", ""))
        self.step: dict[str, Any] = {}

    def run_step(self, name: str, function: Callable[["Run"], None]) -> None:
        self.step = {"status": "running", "seconds": 0.0, "cases": {}}
        self.data["steps"][name] = self.step
        write(self.out, self.data)
        start = time.time()
        try:
            function(self)
            self.step["status"] = "done"
        except Exception as error:
            self.step |= {"status": "failed", "error": describe(error)}
        self.step["seconds"] = round(time.time() - start, 1)
        write(self.out, self.data)
        gc.collect()  # the frames of an error hold arrays

    def case(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Records the figures of one measurement, or its error. Cases after the deadline, and those that --cases leaves
        out, are not measured."""
        start = time.time()
        if not self.pattern.search(name):
            return
        if start > self.deadline:
            figures: dict[str, Any] = {"skipped": "the step's time was over"}
        else:
            print(name, flush=True)
            try:
                figures = measure()
            except Exception as error:
                figures = {"error": describe(error)}
            figures = {key: value if value == value else None for key, value in figures.items()}  # JSON has no NaN
            figures["case_seconds"] = round(time.time() - start, 2)
        self.step["cases"][name] = figures
        write(self.out, self.data)

    def figure(self, step: str, case: str, name: str) -> float:
        """A figure of an earlier step; NaN if it was not measured."""
        return figure(self.data, step, case, name)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one run: the median of five groups of runs. The runs of a group are dispatched without waiting."""
        import jax

        least = 0.001 if self.dry else 0.1  # seconds of a group
        jax.block_until_ready(run())  # compiles
        start = time.perf_counter()
        jax.block_until_ready(run())
        count = max(1, int(least / (time.perf_counter() - start)))
        groups = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(count):
                result = run()
            jax.block_until_ready(result)
            groups.append((time.perf_counter() - start) / count)
        return statistics.median(groups)

    def call(self, name: str, *arguments: str) -> dict[str, Any]:
        """The figures of one of the script's `calls`, from a fresh process that must end by the deadline."""
        command = start_command(self.script, self.out, self.dry, "--call", name, *arguments)
        left = max(5.0, self.deadline - time.time())
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=left)
        if done.returncode:
            raise RuntimeError(f"{name} ended with exit code {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(path: Path, data: Any) -> None:
    """Replaces the file in one operation, so that it is complete whenever the process ends."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)


def describe(error: BaseException) -> dict[str, Any]:
    frames = traceback.format_tb(error.__traceback__)[-3:]
    return {"type": type(error).__name__, "message": str(error)[:2000], "traceback": [frame[:300] for frame in frames]}


def figure(data: Mapping[str, Any], step: str, case: str, name: str) -> float:
    value = data["steps"].get(step, {}).get("cases", {}).get(case, {}).get(name)
    return float("nan") if value is None else value


def start_command(script: str, out: Path, dry: bool, *more: str) -> list[str]:
    return [sys.executable, script, "--out", str(out), *(["--dry-run"] if dry else []), *more]


def run_process(command: Sequence[str], seconds: float, log: Any) -> str:
    """Runs a command. Kills it and its children after some seconds. Returns how it failed; an empty text if it did
    not."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
        return f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return "killed: its time was over"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_tests(file: str) -> dict[str, Any]:
    """The results of a test file of this repository, in a fresh process. tests/conftest.py is not loaded, because it
    makes the CPU the default device."""
    root = Path(__file__).parents[1]
    options = ("no:cacheprovider", "--noconftest", "-o", "addopts=", "-o", "filterwarnings=", "--import-mode=importlib")
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", *options, file]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])}
    if not counts:
        raise RuntimeError(f"pytest ended with exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    failures = re.findall(r"^(?:FAILED|ERROR) .*|^E  .*", done.stdout, re.MULTILINE)[:20]
    return {**counts, "passed_share": counts.get("passed", 0) / sum(counts.values()), "failures": failures}


def run_all(script: str, out: Path, dry: bool, shares: Mapping[str, float], end: float) -> None:
    """Runs each step in a process of its own. A dry run has one process for all steps: most of its time is starting."""
    log, names = out.with_suffix(".log"), list(shares)
    for group in [names] if dry else [[name] for name in names]:
        left = end - time.time()
        later = sum(shares[name] for name in names[names.index(group[0]) :])
        seconds = left * sum(shares[name] for name in group) / later
        more = ("--child", ",".join(group), "--deadline", str(time.time() + seconds))
        with log.open("a") as file:
            limit = min(left, seconds + GRACE)
            fault = run_process(start_command(script, out, dry, *more), limit, file) if left > 1 else ""
        data = read(out)
        for name in group:
            step = data["steps"].setdefault(name, {"status": "not started", "seconds": 0.0, "cases": {}})
            if step["status"] in ("running", "not started") and fault:
                step |= {"status": fault, "log": log.read_text(errors="replace")[-2000:]}
            print(f"{name}: {step['status']}, {step['seconds']} s", file=sys.stderr, flush=True)
        write(out, data)


def report(data: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Prints all figures, and last the targets."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    figures = Table("step", "case", "figures", title=f"{data['machine']['device']}, jax {data['machine']['jax']}")
    for name, step in data["steps"].items():
        if step["status"] != "done":
            figures.add_row(name, "", f"{step['status']} {_short(step.get('error', ''))}")
        for case, values in step["cases"].items():
            figures.add_row(
                name, case, ", ".join(f"{key} {_short(values[key])}" for key in values if _plain(values, key))
            )
    console.print(figures)
    title = "Targets (a dry run: the figures mean nothing)" if data["dry_run"] else "Targets"
    table = Table("step", "case", "figure", "target", "measured", "met", title=title)
    for target in targets:
        measured = figure(data, target.step, target.case, target.figure)
        known = measured == measured  # not NaN
        met = "yes" if target.meets(measured, target.limit) else "no" if known else "not measured"
        sign = "at most" if target.meets(0, 1) else "at least"
        row = (
            target.step,
            target.case,
            target.figure,
            f"{sign} {target.limit:g}",
            _short(measured) if known else "",
            met,
        )
        table.add_row(*row)
    console.print(table)


def _plain(values: Mapping[str, Any], key: str) -> bool:
    return key in ("error", "skipped") or (isinstance(values[key], int | float | str) and key != "case_seconds")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['type']}: {value['message'][:100]}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(
    script: str,
    description: str | None,
    steps: Mapping[str, Callable[[Run], None]],
    shares: Mapping[str, float],
    calls: Mapping[str, Callable[..., dict[str, Any]]],
    targets: Sequence[Target],
) -> int:
    """The command line of such a benchmark.

    Args:
        script: The file of the benchmark.
        description: Its docstring.
        steps: The steps in their order.
        shares: The share of each step of the time.
        calls: Functions for processes of their own (`Run.call`). "machine" is required: it describes the machine, and
            returns its "platform", which must be "gpu" except in a dry run.
        targets: The targets of the table at the end.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for all steps together")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file; an older one is replaced")
    parser.add_argument("--steps", default=",".join(steps), help="only these, separated by commas")
    parser.add_argument("--cases", default="", help="only cases whose names match this regular expression")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # run these steps in this process
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)  # print the figures of one call
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    out, end = args.out.resolve(), time.time() + 60 * args.minutes - 5  # the tables are printed in the last seconds
    if args.call:
        print(json.dumps(calls[args.call[0]](Run(script, out, args.dry_run, args.deadline), *args.call[1:])))
        return 0
    if args.child:
        run = Run(script, out, args.dry_run, args.deadline)
        for name in args.child.split(","):
            run.run_step(name, steps[name])
        return 0
    chosen = args.steps.split(",")
    if unknown := set(chosen) - set(steps):
        parser.error(f"there is no step {', '.join(sorted(unknown))}: the steps are {', '.join(steps)}")
    data: dict[str, Any] = {"dry_run": args.dry_run, "minutes": args.minutes, "cases": args.cases}
    data |= {"started": time.strftime("%Y-%m-%d %H:%M"), "steps": {}}
    write(out, data)
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    data["machine"] = Run(script, out, args.dry_run, end).call("machine")  # jax starts in other processes only
    write(out, data)
    print(json.dumps(data["machine"]), file=sys.stderr, flush=True)
    if data["machine"]["platform"] != "gpu" and not args.dry_run:
        print("jax finds no GPU here. --dry-run runs every step with tiny shapes on CPU", file=sys.stderr)
        return 1
    run_all(script, out, args.dry_run, {name: shares[name] for name in steps if name in chosen}, end)
    report(read(out), targets)
    return 0
