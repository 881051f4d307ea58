"""The checks of the hardware matrix: by arithmetic, by the compiler, or by running the model.

For a device that is named, the decode and prefill programs are compiled whole, without the device
(bench/programs.py). Where there is no compiler for the device, or the arithmetic says that the model does not fit,
nothing is compiled. On the device at hand, the model runs: prefill and decoding are timed, and `jaxlm.verify` compares
its outputs.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import loading
from jaxlm.bench import measure, plan, programs
from jaxlm.bench.cases import Case
from jaxlm.bench.matrix import Device, Settings, Subject
from jaxlm.bench.plan import Plan
from jaxlm.bench.random_model import draw
from jaxlm.bench.records import Record
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import hardware
from jaxlm.inference import roofline
from jaxlm.model import Model
from jaxlm.nn import params

ERROR_LENGTH = 300  # characters of an error that a record keeps
ROUNDS = 3  # how often each case is timed
PROMPT, GENERATED = 512, 64  # tokens of the cases


def estimate(subject: Subject, device: Device, settings: Settings) -> Plan:
    """The plan of the model on the device (bench/plan.py): memory by arithmetic, mesh, needed devices."""
    context = min(settings.context, subject.cfg.context)
    fields: dict[str, Any] = {"batch": settings.batch, "context": context, "dtype": settings.dtype}
    fields["quantize"] = settings.quantize
    return plan.plan(subject.family, subject.cfg, device.spec, device.count, **fields)


def _arithmetic(found: Plan, device: Device) -> Record:
    """The fields of a record that a plan determines."""
    memory = found.memory._asdict() | {"total": found.memory.total, "usable": found.usable}
    needs = None if device.spec.platform == "cpu" else found.needs  # CPUs do not add up
    return {"memory": memory, "mesh": found.mesh, "needs": needs, "method": "arithmetic"}


def compiler_devices(device: Device) -> tuple[list[Any], str]:
    """The devices to compile for; an empty list and the reason if there is no compiler for them."""
    if device.spec.platform == "cpu":
        return jax.devices("cpu")[:1], ""
    try:
        return programs.devices(device.spec, device.count), ""
    except ValueError as error:
        return [], str(error)


def without_running(subject: Subject, device: Device, settings: Settings, on: list[Any], reason: str) -> Record:
    """The result of a check by arithmetic and, if there are devices to compile for, by the compiler.

    Args:
        subject, device, settings: What to check.
        on, reason: As `compiler_devices` returns them.

    Returns:
        The fields of the record that hold the result. An error of the compiler is a result with status "fails".
    """
    found = estimate(subject, device, settings)
    result = _arithmetic(found, device)
    if not found.fits:
        return {**result, "status": "does not fit"}
    if not on:
        return {**result, "status": "fits", "error": reason}
    try:
        return {**result, "method": "compile", **_compiled(subject, settings, on, found)}
    except Exception as error:  # whatever the compiler raises
        return {**result, "method": "compile", "status": "fails", "error": short(error)}


def _compiled(subject: Subject, settings: Settings, on: list[Any], found: Plan) -> Record:
    """Compiles decode and prefill, and compares the compiler's account with the memory of the device.

    Prefill for TPUs is compiled with few layers, from which the account of all layers follows: a layer of it takes the
    compiler ten times as long as one of decode.
    """
    dtype = jnp.dtype(settings.dtype)
    where = programs.setting(subject.family, subject.cfg, on, found.mesh, settings.batch, dtype, settings.quantize)
    platform, compiled = found.spec.platform, {}
    options: dict[str, Any] = {"quantize": settings.quantize, "platform": platform}
    of = roofline.layout(subject.family.PARAMS, subject.cfg, found.mesh, dtype.itemsize, **options)
    # What exists while new rows are prefilled: the KV cache of those that decode, and an untied head.
    head = roofline.weight_bytes(of) - plan.weights_of_prefill(of)
    beside = {"decode": 0, "prefill": head + programs.share(programs.cache(where, found.context, 1))}
    for name, build in (("decode", programs.decode), ("prefill", programs.prefill)):
        begin = time.perf_counter()
        few = platform == "tpu" and name == "prefill"
        count = programs.of_all_layers if few else programs.whole

        def compile(part: programs.Setting, build: Any = build) -> Any:
            return build(part, found.context, platform)

        account, refused = programs.compiled_or_refused(partial(count, compile, where))
        if account is None:
            return {"status": "does not fit", "compiled": compiled, "error": f"{name}: {refused}"[:ERROR_LENGTH]}
        compiled[name] = {
            **account._asdict(),
            "layers": "few" if few else "all",
            "beside": beside[name],
            "total": account.total + beside[name],
            "seconds": round(time.perf_counter() - begin, 1),
        }
    peak = max(program["total"] for program in compiled.values())
    if peak > found.usable:
        error = f"the compiler counts {hardware.gigabytes(peak)}, of {hardware.gigabytes(found.usable)} that are usable"
        return {"status": "does not fit", "compiled": compiled, "error": error}
    return {"status": "compiles", "compiled": compiled}


def short(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:ERROR_LENGTH]


def running(
    subject: Subject,
    device: Device,
    settings: Settings,
    source: ModelSource | None,
    progress: Callable[[str], None],
) -> Record:
    """The result of loading a model on the device at hand, timing it and comparing its outputs.

    Args:
        subject, device, settings: What to check.
        source: Where the weights are. None: draw random weights, of which only the speed is measured.
        progress: Called with a description of each step.

    Returns:
        The fields of the record that hold the result. An error while the model runs is a result with status "fails".

    Raises:
        ValueError, OSError: The weights cannot be loaded, as in `loading.load`.
    """
    found = estimate(subject, device, settings._replace(batch=1, context=PROMPT + GENERATED))
    result = _arithmetic(found, device) | {"memory_of": {"batch": found.batch, "context": found.context}}
    if not found.fits:
        return {**result, "status": "does not fit"}
    result["method"] = "run with random weights" if source is None else "run"
    try:
        progress("loading")
        model = (
            draw(subject.family, subject.cfg, settings.dtype, quantize=settings.quantize, source=subject.name)
            if source is None
            else loading.load(source, dtype=settings.dtype, quantize=settings.quantize)
        )
    except MemoryError as error:
        return {**result, "status": "does not fit", "error": short(error)}
    if model.mesh is not None:
        result["mesh"] = dict(model.mesh.shape)
    try:
        result |= _timed(model, settings, progress)
        return result if source is None else {**result, **_verified(model, source, progress)}
    except Exception as error:  # whatever jax raises
        too_large = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        status = "does not fit" if too_large else "fails"
        return {**result, "status": status, "error": short(error)}


def cases(context: int, batch: int) -> list[Case]:
    """What is timed: prefill and decoding of one row, and decoding of a batch. Models with a short context have shorter
    cases."""
    prompt, generated = min(PROMPT, context // 2), min(GENERATED, context // 2)
    decode = [Case("decode", generated, 0, rows) for rows in dict.fromkeys((1, batch))]
    return [Case("prefill", prompt, 0, 1), *decode]


def _timed(model: Model, settings: Settings, progress: Callable[[str], None]) -> Record:
    """Tokens per second of each case, and the rates of the device in the same run."""
    session = measure.Session(model, cases(model.config.context, settings.batch), ROUNDS)
    session.run(lambda what, left: progress(what))
    figures = [
        {
            **row.case._asdict(),
            "name": row.case.name,
            "tokens_per_second": round(row.speed, 2),
            "deviation": round(row.deviation, 2),
            "peak_memory": row.peak_memory,
            "compile_seconds": round(row.compile_seconds, 1),
        }
        for row in session.rows.values()
    ]
    rates = {"read": round(session.rates.read), "matmul": round(session.rates.matmul)}
    return {"status": "ran", "figures": figures, "rates": rates | {"matmul_dtype": session.rates.matmul_dtype}}


def _verified(model: Model, source: ModelSource, progress: Callable[[str], None]) -> Record:
    """The result of `jaxlm.verify`. It loads the checkpoint again in float32, if there is memory for that and for a
    reference, and compares with transformers if torch is installed. Otherwise it compares the model with itself."""
    from jaxlm.verification import verify

    free = hardware.available_memory(model.device)
    needed = 4 * params.num_elements(model.weights) * (2.5 if model.device.platform == "cpu" else 1.25)
    if free is None or needed < free:
        report = verify(source, progress=progress)
    else:
        report = verify(model, "self", progress=progress)
    failed = [f"{check.against}: {check.what}" for check in report.checks if not check.passed]
    against = list(dict.fromkeys(check.against for check in report.checks))
    summary = {"against": against, "dtype": report.dtype, "checks": len(report.checks), "failed": failed}
    result: Record = {"verify": summary | {"passed": report.passed}}
    return result if report.passed else {**result, "status": "fails", "error": report.verdict()[:ERROR_LENGTH]}


def result_of(record: Record) -> Record:
    """The fields of a record that hold its result."""
    names = ("status", "memory", "mesh", "needs", "compiled", "figures", "rates", "verify", "error")
    return {name: record[name] for name in names if name in record}
