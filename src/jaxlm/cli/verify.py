"""`jaxlm verify`: compares a model with reference implementations and with itself."""

import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxlm.cli.common import ModelFlags
from jaxlm.cli.errors import refuse_quantize, usage
from jaxlm.cli.terminal import console, note, print_json

if TYPE_CHECKING:
    from jaxlm.verification import Report


def on_virtual_devices(mesh: str) -> None:
    """Splits the CPU into as many virtual devices as the mesh needs. This does not change the results."""
    import jax

    from jaxlm.devices.topology import parse

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", math.prod(parse(mesh).values()))


@dataclass(frozen=True)
class Verify(ModelFlags):
    """Compare the outputs of a model with transformers, Meta's code or a recording of either.

    Also checks that jaxlm's own code paths agree: KV cache, batches, sharding.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id, folder or .gguf file."""
    against: str | None = None
    """References, separated by commas: transformers, meta, self, or a file written by --record. Default: transformers
    if torch is installed, else self."""
    record: str | None = None
    """File to write the outputs of the first reference to, for use on machines without torch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Data type of jaxlm's weights. Use float32 to check the implementation."""
    report: str | None = None
    """Folder to write a Markdown report to, with a plot of the error per layer."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> int:
        if (self.name is None) == (self.model is None):
            usage("pass one model: a hub id or a folder (jaxlm verify --help)")
        refuse_quantize(self.quantize, "verify")
        name = str(self.name or self.model)
        if not self.is_single_process:
            raise ValueError("verify runs in a single process: start it without --num-processes or a launcher")
        self.begin()
        if self.mesh is not None:
            on_virtual_devices(self.mesh)
        if self.report is not None:
            from jaxlm.verification.report import require_plots

            require_plots()  # fails before the long computation
            if Path(self.report).exists() and not Path(self.report).is_dir():
                raise FileExistsError(f"--report {self.report} is a file: pass a folder")
        if self.against is None and importlib.util.find_spec("torch") is None:
            note("PyTorch is not installed: the model is compared with itself only, not with transformers. "
                 "pip install torch, or compare with a recording (--against FILE)")  # fmt: skip
        import jaxlm

        report = jaxlm.verify(
            self.source(name), self.against, record=self.record, dtype=self.dtype, mesh=self.mesh, progress=note
        )
        if self.json:
            print_json(report.json(), indent=2)
        else:
            self.show(report)
        if self.record:
            note(f"recorded in {self.record}: compare on another machine with --against {self.record}")
        if self.report is not None:
            note(f"report: {report.save(self.report)}")
        return 0 if report.passed else 1

    def show(self, report: "Report") -> None:
        rich_console = console(highlight=False, width=None if sys.stdout.isatty() else 140)
        rich_console.print(report.table())
        if len(report.tokens) > 2 or len({tuple(ids) for ids in report.tokens.values()}) > 1:
            rich_console.print(report.token_table())
        rich_console.print(report.verdict(), markup=False, style=None if report.passed else "bold red")
