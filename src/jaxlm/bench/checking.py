"""The checks of the hardware matrix: by arithmetic, by the compiler, or by running the model.

For a device that is named, the decode and prefill programs are compiled whole, without the device
(bench/programs.py). Where there is no compiler for the device, or the arithmetic says that the model does not fit,
nothing is compiled. On the device at hand, the model runs: prefill and decoding are timed, and `jaxlm.verify` compares
its outputs.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import loading
from jaxlm.bench import programs
from jaxlm.bench.matrix import Device, Settings, Subject
from jaxlm.bench.records import Record
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import hardware, topology
from jaxlm.model import Model
from jaxlm.nn import params

if TYPE_CHECKING:
    from jaxlm.bench.cases import Case

ERROR_LENGTH = 300  # characters of an error that a record keeps
ROUNDS = 3  # how often each case is timed
PROMPT, GENERATED = 512, 64  # tokens of the cases
# The fraction of the memory that weights, KV caches and temporaries may take. The rest is for the runtime.
USABLE = 0.9
COUNTS = tuple(2**n for n in range(11))  # numbers of devices that `needs` tries


class Estimate(NamedTuple):
    """What a model needs on a device, by arithmetic.

    Attributes:
        memory: Bytes per device by part, and `total`.
        fits: Whether that fits.
        mesh: Axis sizes.
        needs: The fewest devices of this kind that the model fits on; None if there is no such number in COUNTS.
    """

    memory: dict[str, int]
    fits: bool
    mesh: dict[str, int]
    needs: int | None


def estimate(subject: Subject, device: Device, settings: Settings) -> Estimate:
    """The memory of weights and KV caches on one device. While rows decode, as many may be prefilled."""
    memory, sizes = _memory(subject, device, settings, device.count)
    limit = USABLE * device.spec.memory
    fits = memory["total"] <= limit
    counts = (device.count,) if device.spec.platform == "cpu" else COUNTS
    needs = next((n for n in counts if _memory(subject, device, settings, n)[0]["total"] <= limit), None)
    return Estimate(memory, fits, sizes, needs)


def _memory(subject: Subject, device: Device, settings: Settings, count: int) -> tuple[dict[str, int], dict[str, int]]:
    cfg, platform = subject.cfg, device.spec.platform
    sizes = topology.default({"N": cfg.N, "F": cfg.F}, count)
    axes = topology.factor_kv_heads(sizes, cfg.K)
    over = None if count == 1 else jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    where = programs.Setting(subject.family, cfg, over, settings.batch, None, jnp.dtype(settings.dtype))
    context = min(settings.context, cfg.context)
    chunk = programs.prefill_tokens(settings.batch, platform)
    memory = {
        "weights": programs.share(programs.weights(where)),
        "kv_cache": programs.share(programs.cache(where, context, 1)),
        "prefill_kv_cache": programs.share(programs.cache(where, context, chunk)),
    }
    return memory | {"total": sum(memory.values())}, sizes


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
    result: Record = {"memory": found.memory, "mesh": found.mesh, "needs": found.needs, "method": "arithmetic"}
    if not found.fits:
        return {**result, "status": "does not fit"}
    if not on:
        return {**result, "status": "fits", "error": reason}
    try:
        return {**result, "method": "compile", **_compiled(subject, device, settings, on, found)}
    except Exception as error:  # whatever the compiler raises
        return {**result, "method": "compile", "status": "fails", "error": short(error)}


def _compiled(subject: Subject, device: Device, settings: Settings, on: list[Any], found: Estimate) -> Record:
    """Compiles decode and prefill, and compares the compiler's account with the memory of the device."""
    dtype = jnp.dtype(settings.dtype)
    where = programs.setting(subject.family, subject.cfg, on, found.mesh, settings.batch, dtype)
    context, compiled = min(settings.context, subject.cfg.context), {}
    # While new rows are prefilled, the KV cache of those that decode exists too.
    beside = {"decode": 0, "prefill": programs.share(programs.cache(where, context, 1))}
    for name, build in (("decode", programs.decode), ("prefill", programs.prefill)):
        begin = time.perf_counter()
        program, refused = programs.compiled_or_refused(partial(build, where, context, device.spec.platform))
        if program is None:
            return {"status": "does not fit", "compiled": compiled, "error": f"{name}: {refused}"[:ERROR_LENGTH]}
        account = programs.account(program)
        compiled[name] = {
            **account._asdict(),
            "beside": beside[name],
            "total": account.total + beside[name],
            "seconds": round(time.perf_counter() - begin, 1),
        }
    peak = max(program["total"] for program in compiled.values())
    if peak > device.spec.memory:
        error = f"the compiler counts {hardware.gigabytes(peak)}, of {hardware.gigabytes(int(device.spec.memory))}"
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
    result: Record = {"memory": found.memory, "mesh": found.mesh, "needs": found.needs, "method": "arithmetic"}
    if not found.fits:
        return {**result, "status": "does not fit"}
    result["method"] = "run with random weights" if source is None else "run"
    try:
        progress("loading")
        model = random_model(subject, settings.dtype) if source is None else loading.load(source, dtype=settings.dtype)
    except MemoryError as error:
        return {**result, "status": "does not fit", "error": short(error)}
    if model.mesh is not None:
        result["mesh"] = dict(model.mesh.shape)
    try:
        result |= _timed(model, settings, progress)
        return result if source is None else {**result, **_verified(model, source, progress)}
    except Exception as error:  # whatever jax raises
        status = "does not fit" if "RESOURCE_EXHAUSTED" in str(error) else "fails"
        return {**result, "status": status, "error": short(error)}


def random_model(subject: Subject, dtype: str) -> Model:
    """The model with random weights on all devices, sharded as `load` shards them. They are drawn on their devices."""
    family, cfg = subject.family, subject.cfg
    where, root, weights = loading.placement(cfg, None, None), jax.random.key(0), {}
    draws: dict[Any, Any] = {}  # one program for each shape
    for i, row in enumerate(params.tensors(family.PARAMS, cfg)):
        scale = None if row.path.endswith("norm") else row.stored_shape[-1] ** -0.5
        if (row.letters, row.shape, scale) not in draws:
            draw = partial(_draw, row.shape, scale, family.NORM_IDENTITY, jnp.dtype(dtype))
            draws[row.letters, row.shape, scale] = jax.jit(draw, out_shardings=where(row))
        params.put(weights, row.path, draws[row.letters, row.shape, scale](jax.random.fold_in(root, i)))
    return Model(family, cfg, weights, source=f"{subject.name}, random weights")


def _draw(shape: tuple[int, ...], scale: float | None, identity: float, dtype: Any, key: jax.Array) -> jax.Array:
    if scale is None:
        return jnp.full(shape, identity, dtype)
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


def cases(context: int, batch: int) -> "list[Case]":
    """What is timed: prefill and decoding of one row, and decoding of a batch. Models with a short context have shorter
    cases."""
    from jaxlm.bench.cases import Case

    prompt, generated = min(PROMPT, context // 2), min(GENERATED, context // 2)
    decode = [Case("decode", generated, 0, rows) for rows in dict.fromkeys((1, batch))]
    return [Case("prefill", prompt, 0, 1), *decode]


def _timed(model: Model, settings: Settings, progress: Callable[[str], None]) -> Record:
    """Tokens per second of each case, and the rates of the device in the same run."""
    from jaxlm.bench import measure

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
