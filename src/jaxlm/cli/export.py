"""`jaxlm export`: writes a model as a Hugging Face checkpoint or as a GGUF file, optionally in another data type."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.common import ModelFlags, progress_flag
from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import note


@dataclass(frozen=True)
class WriteFlags(ModelFlags):
    """Flags for what is written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in a folder; auto keeps the type of each tensor. Tensors that are not loaded (vision)
    keep their type."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """Type of the weights in a .gguf file; q8_0 and q4_0 are quantized to 8 and 4 bits. Default: that of the model,
    bf16 if it is quantized. Norms are float32."""
    quantize: Literal["int8", "int8-weights", "int4", "fp8"] | None = None
    """Quantize the matrices of the layers in a folder, in the format of compressed-tensors, which transformers and vLLM
    read."""
    format: str = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Format of a folder: hf (Hugging Face)."""
    force: bool = False
    """Replace an existing checkpoint folder or .gguf file at OUT."""

    def write(self, name: str | None, out: Path, fuse: bool) -> int:
        """Writes the model, or the model with its adapter merged."""
        self.begin()
        from jaxlm.devices.hardware import gigabytes
        from jaxlm.exporting import check_format, export, open_model

        check_format(
            out, self.format, self.dtype, self.type, self.quantize
        )  # the format to write; that of the model is detected
        model = open_model(replace(self.source(name), format=None), fuse=fuse)
        for text in model.checkpoint.notes if model.checkpoint else ():
            note(f"{text}.")
        options = {"dtype": self.dtype, "type": self.type, "quantize": self.quantize, "force": self.force}
        done = export(model, out, **options, progress=progress_flag())
        for text in done.notes:
            note(f"{text}.")
        note(f"wrote {done.folder}: {done.tensors} tensors, {gigabytes(done.nbytes)}")
        return 0


@dataclass(frozen=True)
class Export(WriteFlags):
    """Write a model as a Hugging Face checkpoint, or as a GGUF file for llama.cpp if OUT ends in .gguf.

    Both hold weights, configuration, tokenizer and chat template. Tensors are streamed from file to file, so the model
    may be larger than memory. The folder or file appears only when it is complete.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id, folder or .gguf file; same as -m."""
    out: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="OUT")]] = None
    """Folder, or file that ends in .gguf, to write."""

    def run(self) -> int:
        paths = [value for value in (self.model, self.name, self.out) if value is not None]
        if len(paths) != 2:
            usage("pass a model and a folder or .gguf file to write: jaxlm export MODEL OUT (--help)")
        if not self.is_single_process:
            raise ValueError("export runs in a single process: start it without --num-processes or a launcher")
        name, out = paths
        return self.write(str(name), Path(out), fuse=False)
