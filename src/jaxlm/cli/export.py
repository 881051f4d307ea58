"""`jaxlm export`: writes a model as a Hugging Face checkpoint, optionally in another data type."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.common import ModelFlags, note
from jaxlm.cli.errors import usage


@dataclass(frozen=True)
class Export(ModelFlags):
    """Write a model as a Hugging Face checkpoint: weights, configuration, tokenizer.

    Tensors are streamed from file to file, so the model may be larger than memory. The folder appears only when it is
    complete.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id, folder or .gguf file; same as -m."""
    out: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="OUT")]] = None
    """Folder to write."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the written weights; auto keeps the type of each tensor. Tensors that are not loaded (vision) keep
    their type."""
    format: str = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Format to write: hf (Hugging Face)."""
    force: bool = False
    """Replace an existing checkpoint folder at OUT."""

    def run(self) -> int:
        paths = [value for value in (self.model, self.name, self.out) if value is not None]
        if len(paths) != 2:
            usage("pass a model and a folder to write: jaxlm export MODEL OUT (--help)")
        if not self.is_single_process:
            raise ValueError("export runs in a single process: start it without --num-processes or a launcher")
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import check_format, export, open_model

        name, out = paths
        check_format(self.format)  # the format to write; that of the model is detected
        model = open_model(replace(self.source(str(name)), format=None))
        done = export(model, out, dtype=self.dtype, force=self.force)
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0
