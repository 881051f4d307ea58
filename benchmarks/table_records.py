"""The records of jaxlm for the tables of docs/performance.md: `python benchmarks/tables.py --measure`.

Programs for TPU slices are compiled without a TPU. Their time is the compiler's estimate (what it is worth:
docs/performance.md) and that of the collectives, whose bytes are divided by the specified bandwidth of the links. For
GPUs the roofline is computed: no program runs faster.
"""

import datetime
import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import train_programs
from decode_programs import account
from tables import RECORDS, UNITS, Record, family_and_config, records

from jaxlm.bench import hlo, programs
from jaxlm.devices import hardware, specs
from jaxlm.inference import roofline
from jaxlm.nn import flops, params
from jaxlm.version import __version__


@dataclass(frozen=True)
class Case:
    """One row of jaxlm.

    Attributes:
        options: Of benchmarks/train_programs.py, for a compiled training step.
    """

    table: str
    kind: str
    chip: str
    chips: int
    model: str
    batch: int
    sequence: int
    tp: int = 1
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What --measure takes, and the last part of the record's command."""
        where = specs.slice_name(specs.BY_NAME[self.chip], self.chips)
        return f"{self.kind}/{self.table}/{where}/{self.model}/{self.batch}x{self.sequence}"


SMALL = (("optimizer", "adafactor"), ("weight_dtype", "bfloat16"), ("grad_dtype", "bfloat16"))  # fits 32 GB
CASES = (
    Case("training", "predicted", "v6e", 1, "Qwen3-4B", 8, 512, options=SMALL),
    Case("training", "predicted", "v6e", 8, "Qwen3-8B", 128, 512),
    Case("training", "predicted", "v6e", 8, "Llama-3.1-8B", 8, 8192),
    Case("training", "roofline", "H100", 8, "Llama-2-7B", 16, 4096),
    Case("training", "roofline", "H100", 8, "Llama-3.1-8B", 16, 8192),
    Case("training", "roofline", "H200", 8, "Llama-3.1-8B", 16, 8192),
    Case("sampling", "predicted", "v6e", 8, "Qwen3-32B", 1, 512, 8),
    Case("sampling", "predicted", "v6e", 8, "Qwen3-32B", 512, 512, 8),
    Case("sampling", "predicted", "v6e", 8, "Qwen3-32B", 128, 4096, 8),
    Case("sampling", "roofline", "H100", 1, "Llama-3.2-1B", 1, 160),
    Case("sampling", "roofline", "H100", 1, "Llama-3.1-8B", 1, 2048),
    Case("sampling", "roofline", "H200", 1, "Llama-3.1-8B", 1, 2048),
    Case("sampling", "roofline", "H200", 1, "Llama-3.1-8B", 8, 160),
    Case("sampling", "roofline", "H200", 1, "Llama-3.1-8B", 64, 2048),
)


def compiled_training(case: Case) -> tuple[str, dict[str, float]]:
    """A training step of FSDP, by the compiler's estimate (benchmarks/train_programs.py)."""
    options: dict[str, Any] = dict(case.options)
    on = ("1", "") if case.chips == 1 else ("2x4", f"data={case.chips}")
    program = train_programs.Case(
        case.model.lower(), case.chip, *on, case.sequence, case.batch // case.chips, **options
    )
    found = train_programs.measure(program)
    if not found.get("predicted_seconds") or found["peak"] > found["hbm"]:
        raise ValueError(f"{case.name} does not fit: {'; '.join(found['faults'])}")
    compute, sent = found["predicted_seconds"], sum(found["sent"].values()) / ring(case.chip)
    state = {"weights": program.weight_dtype, "gradients": program.grad_dtype, "moments": program.moment_dtype}
    run = f"`--optimizer.name {program.optimizer} --remat {program.remat}`, " + ", ".join(
        f"{dtype} {name}" for name, dtype in state.items()
    )
    return run, {"step_time": max(compute, sent), "compute_time": compute, "collective_time": sent,
                 "peak_memory": found["peak"]}  # fmt: skip


def ring(chip: str) -> float:
    """Bytes/s that a device sends in a ring: on a 2x4 slice of TPUs two of its four links belong to the ring."""
    spec = specs.BY_NAME[chip]
    return spec.link / 2 if spec.platform == "tpu" else spec.link


def compiled_sampling(case: Case) -> tuple[str, dict[str, float]]:
    """A decode step with tensor parallelism. Two programs with few layers are compiled; the whole model follows from
    their difference."""
    spec, steps = specs.BY_NAME[case.chip], hardware.STEPS["tpu"]
    family, whole = family_and_config(case.model)
    L, period = whole.L, max(2, len(params.period(whole.windows)))
    found = []
    for layers in (period, 2 * period):
        cfg = family_and_config(case.model, layers)[1]
        sizes = {"data": case.chips // case.tp, "model": case.tp}
        where = programs.setting(family, cfg, programs.devices(spec, case.chips), sizes, case.batch, jnp.bfloat16)
        program = programs.decode(where, case.sequence, "tpu")
        # A loop counts once, which is one step. Branches are those of sampling, with small values a row.
        always = [one for one in hlo.collectives(program.as_text()) if not one.conditional]
        sent = sum(collective_seconds(one, case.chip, case.chips) for one in always)
        memory = programs.account(program).total
        found.append((account(program, 1, steps).cycles / spec.clock, sent, memory))
    compute, sent, memory = (one + (L - period) * (two - one) / period for one, two in zip(*found))
    if memory > spec.memory:
        raise ValueError(f"{case.name} does not fit: {memory / 1e9:.1f} GB of {spec.memory / 1e9:.0f}")
    values = {"step_time": compute + sent, "compute_time": compute, "collective_time": sent, "peak_memory": memory}
    return f"the decode program, model={case.tp}, {steps} steps a call", values


def collective_seconds(one: hlo.Collective, chip: str, devices: int) -> float:
    """The time of one collective in a ring: its bytes, and a hop from each device to the next."""
    size = len(one.groups[0]) if one.groups else devices
    sent = (2 if one.kind == "all-reduce" else 1) * one.nbytes * (size - 1) / size
    return sent / ring(chip) + size * roofline.HOP


def training_roofline(case: Case) -> tuple[str, dict[str, float]]:
    """The limit of FSDP with activation checkpointing: matrix products at the peak, and collectives beside them."""
    family, cfg = family_and_config(case.model)
    table = family.PARAMS
    spec = specs.BY_NAME[case.chip]
    tokens = case.batch * case.sequence / case.chips
    recomputed = 4 / 3  # of 3 parts forward and backward, the forward part runs twice
    compute = recomputed * tokens * flops.training(table, cfg, case.sequence) / spec.flops
    # bfloat16 weights are gathered forward and backward, float32 gradients are scattered.
    sent = (2 + 2 + 4) * params.count(table, cfg) * (case.chips - 1) / case.chips / spec.link
    values = {"step_time": max(compute, sent), "compute_time": compute, "collective_time": sent}
    return "FSDP, `--remat full`: all products at the specified peak, collectives beside them", values


def sampling_roofline(case: Case) -> tuple[str, dict[str, float]]:
    """The limit of a decode step (`jaxlm.inference.roofline`)."""
    family, cfg = family_and_config(case.model)
    sizes = {"data": case.chips // case.tp, "model": case.tp}
    of = roofline.layout(family.PARAMS, cfg, sizes)
    found = roofline.decode(of, specs.BY_NAME[case.chip], case.batch, case.sequence)
    values = {"step_time": found.seconds, "compute_time": found.compute, "collective_time": found.links}
    return "`jaxlm.inference.roofline`: weights and KV cache read at the specified bandwidth", values


MEASURES = {
    ("training", "predicted"): compiled_training,
    ("sampling", "predicted"): compiled_sampling,
    ("training", "roofline"): training_roofline,
    ("sampling", "roofline"): sampling_roofline,
}


def measure(case: Case) -> Record:
    """Makes the record of a case."""
    run, values = MEASURES[case.table, case.kind](case)
    record = {name: kept for name, kept in asdict(case).items() if name != "options"}
    figures = [{"name": name, "value": amount, "unit": UNITS[name][0]} for name, amount in values.items()]
    return {**record, "library": "jaxlm", "precision": "bfloat16", "values": figures, "run": run,
            "command": f"python benchmarks/tables.py --measure {case.name}",
            "date": datetime.date.today().isoformat(), "versions": versions(case.kind)}  # fmt: skip


def versions(kind: str) -> dict[str, str]:
    """The versions that a figure depends on."""
    names = ("jax", "libtpu") if kind == "predicted" else ()
    return {"jaxlm": __version__, **{name: importlib.metadata.version(name) for name in names}}


def measure_all(text: str) -> None:
    """Appends the records of the cases whose name contains a text, where there is none of these versions.

    Raises:
        ValueError: No name contains it, or a program does not fit.
    """
    jax.config.update("jax_platforms", "cpu")  # do not look for a TPU
    cases = [case for case in CASES if text in case.name]
    if not cases:
        raise ValueError(f"no case has {text!r} in its name; there are {', '.join(case.name for case in CASES)}")
    known = {(one["command"].split()[-1], str(one["versions"])) for one in records() if "command" in one}
    for case in cases:
        if (case.name, str(versions(case.kind))) in known:
            continue
        print(case.name, file=sys.stderr, flush=True)
        record = measure(case)
        with (RECORDS / "jaxlm.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
