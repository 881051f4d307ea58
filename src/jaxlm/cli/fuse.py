"""`jaxlm fuse`: merges a LoRA adapter into its base model and writes one checkpoint folder."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxlm.cli.common import ModelFlags, note


@dataclass(frozen=True)
class Fuse(ModelFlags):
    """Merge a LoRA adapter into the weights of its base model and write a checkpoint folder in Hugging Face's format.

    The base may be left out if the adapter names it. Tensors are copied from file to file, so the model may be larger
    than memory. The folder gets its name when it is complete.
    """

    out: Path | None = None
    """Folder to write."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; auto keeps the type of each. Tensors that are not loaded (vision) always keep it."""
    format: str = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Format of the folder: hf, Hugging Face's."""
    force: bool = False
    """Replace a checkpoint at OUT, the whole folder."""

    def run(self) -> int:
        if self.out is None or (self.model is None and self.adapter is None):
            print("jaxlm: pass all three: jaxlm fuse -m BASE --adapter ADAPTER --out FOLDER (--help)", file=sys.stderr)
            return 2
        if not self.is_single_process:
            raise ValueError("fuse runs in a single process: start it without --num-processes or a launcher")
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import check_format, export, open_model

        check_format(self.format)  # of the folder to write: the model's own is detected
        model = open_model(replace(self.source(), format=None), fuse=True)
        done = export(model, self.out, dtype=self.dtype, force=self.force)
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0
