"""`jaxlm fuse`: merges a LoRA adapter into its base model and writes one checkpoint folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxlm.cli.common import ModelFlags, note
from jaxlm.cli.errors import usage


@dataclass(frozen=True)
class Fuse(ModelFlags):
    """Merge a LoRA adapter into the weights of its base model and write a Hugging Face checkpoint.

    -m may be omitted if the adapter's config names the base model. Tensors are streamed from file to file, so the model
    may be larger than memory. The folder appears only when it is complete.
    """

    out: Path | None = None
    """Folder to write."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the written weights; auto keeps the type of each tensor. Tensors that are not loaded (vision) keep
    their type."""
    format: str = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Format to write: hf (Hugging Face)."""
    force: bool = False
    """Replace an existing checkpoint folder at OUT."""

    def run(self) -> int:
        if self.out is None or (self.model is None and self.adapter is None):
            usage("pass an adapter and a folder: jaxlm fuse -m BASE --adapter ADAPTER --out FOLDER (--help)")
        if not self.is_single_process:
            raise ValueError("fuse runs in a single process: start it without --num-processes or a launcher")
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import check_format, export, open_model

        check_format(self.format)  # the format to write; that of the model is detected
        model = open_model(replace(self.source(), format=None), fuse=True)
        for text in model.checkpoint.notes if model.checkpoint else ():
            note(f"{text}.")
        done = export(model, self.out, dtype=self.dtype, force=self.force)
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0
