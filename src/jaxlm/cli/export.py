"""`jaxlm export`: a model as a checkpoint folder, in its own or in another type."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.common import ModelFlags, note


@dataclass(frozen=True)
class Export(ModelFlags):
    """Write a model as a checkpoint folder: weights, configuration, tokenizer.

    The folder appears under its name when it is complete. Tensors go from file to file: a model may be larger than the
    memory.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id or folder; as -m."""
    out: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="OUT")]] = None
    """The folder to write."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; auto keeps each one's own. What is not read (vision) keeps its own in any case."""
    format: Literal["hf", "meta"] = "hf"
    """Form of the folder: Hugging Face's, or (Llama) that of Meta's originals."""
    force: bool = False
    """Replace the checkpoint that stands at OUT, the whole folder."""

    def run(self) -> int:
        given = [value for value in (self.model, self.name, self.out) if value is not None]
        if len(given) != 2:
            print("jaxlm: name a model and the folder to write: jaxlm export MODEL OUT (--help)", file=sys.stderr)
            return 2
        if not self.alone:
            raise ValueError("export copies from file to file, which is one process's work: start it alone")
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import export, open_model

        name, out = given
        # --format is the format of the folder to write.
        model = open_model(replace(self.source(str(name)), format=None))
        done = export(model, out, format=self.format, dtype=self.dtype, force=self.force)
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0
