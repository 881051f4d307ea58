"""Folders with PyTorch's .bin files alone, and folders that MLX writes: the weights are those of the safetensors."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers.checkpoint_files import GEMMA, LLAMA
from helpers.meta_writer import write_pth

import jaxlm
from jaxlm.checkpoint.weight_files import read_index

SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def write_bin(path: Path, arrays: dict[str, np.ndarray]) -> None:
    kinds = {np.dtype(kind): name for name, kind in checkpoint_files.KINDS.items()}
    write_pth(path, ((name, kinds[a.dtype], a.shape, [a.tobytes()]) for name, a in arrays.items()))


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = (jaxlm.load(folder).weights for folder in (one, other))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def folder(path: Path, raw: dict[str, Any], arrays: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A checkpoint with .bin files alone."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        write_bin(path / "pytorch_model.bin", arrays)
        return path
    names = list(arrays)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in zip(SHARDS, parts):
        write_bin(path / shard, {name: arrays[name] for name in part})
    where = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("raw", [LLAMA, GEMMA], ids=lambda raw: raw["model_type"])
def test_bin_files_give_the_weights_of_safetensors(raw: dict[str, Any], kind: str, shards: int, tmp_path: Path) -> None:
    arrays = checkpoint_files.tensors(raw, kind)
    expected = checkpoint_files.folder(tmp_path / "safetensors", raw, arrays)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}  # as transformers once stored it
    assert_equal_weights(folder(tmp_path / "bin", raw, arrays | buffers, shards), expected)


def test_safetensors_come_first(tmp_path: Path) -> None:
    arrays = checkpoint_files.tensors(LLAMA)
    both = checkpoint_files.folder(tmp_path / "both", LLAMA, arrays)
    write_bin(both / "pytorch_model.bin", {name: array + 1 for name, array in arrays.items()})
    assert {tensor.file.name for tensor in read_index(both).values()} == {"model.safetensors"}


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "bin", LLAMA, checkpoint_files.tensors(LLAMA), 2)
    (path / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=SHARDS[1]):
        jaxlm.load(path)
    index = path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../evil.bin", "b": "x.safetensors"}}))
    with pytest.raises(ValueError, match="refused"):
        jaxlm.load(path)


class Runs:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_bin_file_does_not_run_and_the_command_to_convert_it_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "bin", LLAMA, {})
    for data in (pickle.dumps({"a": Runs(tmp_path / "ran")}), b""):
        (path / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(ValueError, match=r"nothing in it was executed.*python -c .*save_pretrained\('out'\)"):
            jaxlm.load(path)
    assert not (tmp_path / "ran").exists()


# mlx_lm.convert (mlx-lm 0.32) without quantization: names are Hugging Face's. Of a vision-language Gemma it drops the
# vision tower and vision_config. It writes an index beside a single file, and drops a head that is tied.
@pytest.mark.parametrize(("raw", "vision_language"), [(LLAMA, False), (GEMMA, False), (GEMMA, True)])
def test_folders_of_mlx(raw: dict[str, Any], vision_language: bool, tmp_path: Path) -> None:
    arrays = checkpoint_files.tensors(raw, "BF16", spelling=int(vision_language))
    expected = checkpoint_files.folder(tmp_path / "hf", raw, checkpoint_files.tensors(raw, "BF16"))
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    config = {"model_type": "gemma3", "text_config": raw, "mm_tokens_per_image": 256} if vision_language else raw
    (mlx / "config.json").write_text(json.dumps(dict(sorted(config.items()))))
    checkpoint_files.write(mlx / "model.safetensors", arrays)
    where = dict.fromkeys(arrays, "model.safetensors")
    (mlx / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_equal_weights(mlx, expected)


@pytest.mark.oracle
def test_what_torch_saves(tmp_path: Path) -> None:
    """torch.save of a state_dict, as save_pretrained of transformers 4 wrote pytorch_model.bin: with a tied head."""
    import torch
    from helpers.tiny_models import CONFIGS
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**CONFIGS["llama3"], "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "safetensors")
    assert_equal_weights(tmp_path / "bin", tmp_path / "safetensors")
