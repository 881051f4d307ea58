"""The weight files of a Hugging Face folder: safetensors, or PyTorch's files where there are no others.

pytorch_model.bin is a pickle. It is read as a description of tensors (torch_pickle.py), and never executed.
"""

from pathlib import Path

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.pth import read_pth
from jaxlm.checkpoint.safetensors import Tensor, read_shards

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONVERT = (
    'If the file is whole and you trust it, transformers converts its FOLDER: python -c "from transformers import '
    "AutoModelForCausalLM as M; M.from_pretrained('FOLDER').save_pretrained('out')\""
)


def read_index(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder: of model.safetensors, of the shards that its index names, or else of
    pytorch_model.bin or its shards (the order of transformers).

    Raises:
        FileNotFoundError: The folder has no weights, or lacks a shard.
        ValueError: A file is damaged, or a .bin file holds anything but a dict of floating-point tensors.
    """
    try:
        return safetensors.read_index(folder)
    except FileNotFoundError:
        if any((folder / name).exists() for name in safetensors.FILES):
            raise
        if (folder / BIN).exists():
            return _read_bin(folder / BIN)
        if (folder / BIN_INDEX).exists():
            return read_shards(folder, folder / BIN_INDEX, ".bin", _read_bin)
        raise


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        return read_pth(path)
    except ValueError as error:
        raise ValueError(f"{error}. {CONVERT}") from None
