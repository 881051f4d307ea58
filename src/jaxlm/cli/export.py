"""`jaxlm export`: writes a model as a checkpoint folder, in its own or in another type."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.common import ModelFlags, note


@dataclass(frozen=True)
class Export(ModelFlags):
    """Write a model as a checkpoint folder in Hugging Face's format: weights, configuration, tokenizer.

    The folder gets its name when it is complete. Tensors are copied from file to file, so the model may be larger than
    memory.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id or folder; same as -m."""
    out: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="OUT")]] = None
    """Folder to write."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; auto keeps the type of each. Tensors that are not loaded (vision) always keep it."""
    format: str = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Format of the folder: hf, Hugging Face's."""
    force: bool = False
    """Replace a checkpoint at OUT, the whole folder."""

    def run(self) -> int:
        paths = [value for value in (self.model, self.name, self.out) if value is not None]
        if len(paths) != 2:
            print("jaxlm: pass a model and a folder to write: jaxlm export MODEL OUT (--help)", file=sys.stderr)
            return 2
        if not self.is_single_process:
            raise ValueError("export runs in a single process: start it without --num-processes or a launcher")
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import check_format, export, open_model

        name, out = paths
        check_format(self.format)  # of the folder to write: the model's own is detected
        model = open_model(replace(self.source(str(name)), format=None))
        done = export(model, out, dtype=self.dtype, force=self.force)
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0
