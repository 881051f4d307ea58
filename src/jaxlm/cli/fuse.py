"""`jaxlm fuse`: a model and a LoRA adapter as one checkpoint folder."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxlm.cli.common import ModelFlags, note


@dataclass(frozen=True)
class Fuse(ModelFlags):
    """Add a LoRA adapter into the weights of its model and write the whole as a checkpoint folder.

    The base may be left out where the adapter names it. Tensors go from file to file: a model may be larger than the
    memory. The folder appears under its name when it is complete.
    """

    out: Path | None = None
    """The folder to write."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; auto keeps each one's own. What is not read (vision) keeps its own in any case."""
    format: Literal["hf", "meta"] = "hf"
    """Form of the folder: Hugging Face's, or (Llama) that of Meta's originals."""
    force: bool = False
    """Replace the checkpoint that stands at OUT, the whole folder."""

    def run(self) -> int:
        if self.out is None or (self.model is None and self.adapter is None):
            print("jaxlm: name all three: jaxlm fuse -m BASE --adapter ADAPTER --out FOLDER (--help)", file=sys.stderr)
            return 2
        if not self.alone:
            raise ValueError("fuse copies from file to file, which is one process's work: start it alone")
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import export, open_model

        # --format is the format of the folder to write.
        model = open_model(replace(self.source(), format=None), fuse=True)
        done = export(model, self.out, format=self.format, dtype=self.dtype, force=self.force)
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0
