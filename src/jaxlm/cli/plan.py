"""`jaxlm plan`: will a model fit on devices, and how fast can they be. By arithmetic, or with the devices' compiler."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.cli.common import GenerationFlags, set_up_process
from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import note, print_json

if TYPE_CHECKING:
    from jaxlm.bench import plan, plan_training
    from jaxlm.bench.sources import Shape
    from jaxlm.devices.specs import Spec


@dataclass(frozen=True)
class Plan(GenerationFlags):
    """Show whether a model fits on devices, the best mesh, and how fast they can be. Nothing is loaded or allocated.

    Memory is arithmetic, calibrated on the compilers' accounts. Times are lower bounds, from published bandwidth and
    FLOP/s. --compile asks the compiler of the devices, which need not be here. Exits with status 1 if the model does
    not fit.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Published name (Qwen/Qwen3-4B or qwen3-4b), hub id, folder, config.json or .gguf file."""
    device: str | None = None
    """Device or slice: v5e-8, v6e, v5p-8, H100, H100-8, A100. Default: the devices of this machine."""
    chips: int | None = None
    """Number of devices, if --device does not name it."""
    batch: int | None = None
    """Sequences that are decoded together (default 8); with --train, sequences per step (default: one per device)."""
    context: int = 4096
    """Tokens per sequence."""
    train: bool = False
    """Plan training instead of generation."""
    accumulate: int = 1
    """With --train: gradient accumulation steps."""
    optimizer: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    """With --train: the optimizer."""
    remat: Literal["none", "full", "dots"] = "full"
    """With --train: activation checkpointing."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """With --train: data type of the trained weights."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """With --train: data type of the gradients."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """With --train: data type of the optimizer's moments."""
    compile: bool = False
    """Compile the programs for these devices, and compare the compiler's memory with the arithmetic."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        if (self.name is None) == (self.model is None):
            usage("pass one model: a published name, hub id, folder or config.json (jaxlm plan --help)")
        from jaxlm.bench import local, sources
        from jaxlm.devices import specs, topology

        if self.device is None:
            set_up_process()
        else:  # the devices of this machine are not used
            import jax

            jax.config.update("jax_platforms", "cpu")
        spec, count = specs.parse(self.device, self.chips) if self.device else local.devices(self.chips)
        if spec.platform == "tpu":
            specs.slice_shape(spec, count)  # an error names the slices that there are
        shape = sources.find(self.source(self.name))
        sizes = topology.parse(self.mesh) if self.mesh else None
        if self.train and self.quantize is not None:
            usage("--quantize does not apply to --train, which trains all weights (jaxlm plan --help)")
        if self.quantize == "stored":
            usage("--quantize stored needs the files of weights, which plan does not read: choose int8, int8-weights, "
                  "int4 or fp8 (jaxlm plan --help)")  # fmt: skip
        if self.train:
            found, facts = self.training(shape, spec, count, sizes)
        else:
            found, facts = self.generation(shape, spec, count, sizes)
        if self.json:
            print_json(facts, indent=2)
        else:
            from jaxlm.bench import plan_text

            print("\n".join(plan_text.lines(shape.name, found, facts)), flush=True)
        return 0 if found.fits else 1

    def generation(
        self, shape: "Shape", spec: "Spec", count: int, sizes: dict[str, int] | None
    ) -> "tuple[plan.Plan, dict[str, Any]]":
        """The plan of generation, and its facts as JSON values."""
        from jaxlm.bench import plan, plan_text

        dtype = shape.dtype if self.dtype == "auto" else self.dtype
        batch = 8 if self.batch is None else self.batch
        kv_dtype = dtype if self.kv_dtype == "auto" else self.kv_dtype
        where: dict[str, Any] = {"batch": batch, "context": self.context, "dtype": dtype, "quantize": self.quantize}
        found = plan.plan(shape.family, shape.config, spec, count, sizes=sizes, kv_dtype=kv_dtype, **where)
        facts = plan_text.facts(shape, found, dtype, kv_dtype)
        if self.compile:
            from jaxlm.bench import compiling

            types = (dtype, self.quantize)
            facts["compiled"] = compiling.generation(shape.family, shape.config, found, *types, note, kv_dtype)
        return found, facts

    def training(
        self, shape: "Shape", spec: "Spec", count: int, sizes: dict[str, int] | None
    ) -> "tuple[plan_training.Plan, dict[str, Any]]":
        """The plan of training, and its facts as JSON values."""
        from jaxlm.bench import plan, plan_text, plan_training

        names = ("accumulate", "remat", "optimizer", "weight_dtype", "grad_dtype", "moment_dtype")
        how = plan_training.Training(self.context, **{name: getattr(self, name) for name in names})
        if sizes:
            sizes = plan.check_mesh(count, sizes, {"data": count, "model": 1})
        batch = self.batch if self.batch is not None else (sizes or {"data": count})["data"] * self.accumulate
        found = plan_training.plan(shape.family, shape.config, spec, count, batch, how, sizes)
        facts = plan_text.training_facts(shape, found)
        if self.compile:
            from jaxlm.bench import compiling

            facts["compiled"] = compiling.training(shape.family, shape.config, found, note)
        return found, facts
