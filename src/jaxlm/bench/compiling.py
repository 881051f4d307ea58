"""The programs of a plan, compiled for its devices without them, beside the plan's arithmetic."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.bench import hlo, plan, plan_training, programs
from jaxlm.devices import hardware
from jaxlm.inference import roofline
from jaxlm.nn.quantized_kv import dtype_of

# The TPU compiler has no estimate for kernels. Splash attention is assumed to reach this fraction of the peak: what a
# video model on TPU 7x, most of whose work is attention, reaches as a whole with its own variant of the kernel
# (github.com/AI-Hypercomputer/maxdiffusion, pull request 487).
SPLASH_RATE = 0.4


def generation(
    family: Any,
    cfg: Any,
    found: plan.Plan,
    dtype: Any,
    quantize: str | None,
    progress: Callable[[str], None],
    kv_dtype: Any = None,
) -> dict[str, dict[str, Any]]:
    """Compiles decode and prefill of all layers.

    Returns:
        For each program its account, `total` and `predicted` bytes of one device, and `seconds` of a decode step by the
        TPU compiler's estimate. "refused" with the reason, if the compiler finds that it does not fit.
    """
    on = programs.devices(found.spec, found.count)
    where = programs.setting(family, cfg, on, found.mesh, found.batch, jax.numpy.dtype(dtype), quantize)
    where = where._replace(kv_dtype=dtype_of(kv_dtype or dtype))
    itemsize = jax.numpy.dtype(dtype).itemsize
    options: dict[str, Any] = {"kv_dtype": where.kv_dtype, "quantize": quantize, "platform": found.spec.platform}
    of = roofline.layout(family.PARAMS, cfg, found.mesh, itemsize, **options)
    facts = {}
    for name, run in (("decode", programs.decode), ("prefill", programs.prefill)):
        progress(f"compiling {name} of {cfg.L} layers for {found.count} x {found.spec.name} …")
        predicted = plan.program_memory(of, found.spec, found.batch, found.context, name)
        program, reason = programs.compiled_or_refused(lambda run=run: run(where, found.context, found.spec.platform))
        facts[name] = _facts(program, reason, predicted)
        if name == "decode" and program is not None and found.spec.clock:
            cycles = hlo.total(program.as_text(), hlo.estimated_cycles)
            facts[name]["seconds"] = cycles / found.spec.clock / hardware.STEPS["tpu"]
    return facts


def training(
    family: Any, cfg: Any, found: plan_training.Plan, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Compiles the training step of all layers. Returns its facts, as `generation` does."""
    on = programs.devices(found.spec, found.count)
    where = programs.setting(family, cfg, on, found.mesh, found.how.rows, jax.numpy.bfloat16)
    progress(f"compiling a training step of {cfg.L} layers for {found.count} x {found.spec.name} …")
    program, reason = programs.compiled_or_refused(lambda: programs.train(where, found.how))
    facts = _facts(program, reason, found.memory.total)
    if program is not None and found.spec.clock:
        text, how = program.as_text(), found.how
        heads = cfg.N // (found.count // found.mesh["data"])
        # Causal: half of the scores.
        products = hlo.total(text, hlo.splash_products) * how.rows * heads * cfg.H * how.length**2
        facts["seconds"] = hlo.total(text, hlo.estimated_cycles) / found.spec.clock
        facts["seconds"] += products / (SPLASH_RATE * found.spec.flops)
    return {"training": facts}


def _facts(program: Any, reason: str, predicted: int) -> dict[str, Any]:
    if program is None:
        return {"refused": reason, "predicted": predicted}
    account = programs.account(program)
    return {**account._asdict(), "total": account.total, "predicted": predicted}
