"""`jaxlm fuse`: merges a LoRA adapter into its base model and writes one checkpoint folder or GGUF file."""

from dataclasses import dataclass
from pathlib import Path

from jaxlm.cli.errors import usage
from jaxlm.cli.export import WriteFlags


@dataclass(frozen=True)
class Fuse(WriteFlags):
    """Merge a LoRA adapter into the weights of its base model, and write a Hugging Face checkpoint, or a GGUF file for
    llama.cpp if OUT ends in .gguf.

    -m may be omitted if the adapter's config names the base model. Tensors are streamed from file to file, so the model
    may be larger than memory. The folder or file appears only when it is complete.
    """

    out: Path | None = None
    """Folder, or file that ends in .gguf, to write."""

    def run(self) -> int:
        if self.out is None or (self.model is None and self.adapter is None):
            usage("pass an adapter and a folder or .gguf file: jaxlm fuse -m BASE --adapter ADAPTER --out OUT (--help)")
        if not self.is_single_process:
            raise ValueError("fuse runs in a single process: start it without --num-processes or a launcher")
        return self.write(None, self.out, fuse=True)
