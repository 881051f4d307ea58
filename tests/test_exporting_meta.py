"""Checkpoints in Meta's format, exported in Hugging Face's: every tensor byte for byte, with a tokenizer."""

import base64
import hashlib
import json

import jax
import pytest
from helpers import checkpoint_files, meta_files
from helpers.tiny_models import tiny

import jaxlm
from jaxlm import exporting
from jaxlm.checkpoint import hf, safetensors
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.source import ModelSource
from jaxlm.models import llama3
from jaxlm.processing.tokenizer import Tokenizer

RAW = meta_files.RAW
TIED = {**RAW, "tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Slices so small that every tensor has several."""
    monkeypatch.setattr(files, "SLICE", 100)
    monkeypatch.setattr(safetensors, "SLICE", 24)
    monkeypatch.setattr(hf, "SLICE", 100)


def open_model(folder):
    return exporting.open_model(ModelSource(folder))


def digests(folder):
    """Type, shape and sha256 of every tensor in a folder."""
    return {
        name: (tensor.dtype, tensor.shape, hashlib.sha256(b"".join(map(bytes, safetensors.chunks(tensor)))).hexdigest())
        for name, tensor in safetensors.read_index(folder).items()
    }


@pytest.mark.parametrize("read", [jaxlm.load, open_model])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("raw", [RAW, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", checkpoint_files.KINDS)
def test_every_tensor_of_metas_format(kind, raw, shards, read, tmp_path):
    folder = checkpoint_files.folder(tmp_path / "hf", raw, meta_files.weights(raw, kind), shards=2)
    jaxlm.export(read(meta_files.convert(folder, tmp_path / "meta", shards)), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(folder)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == safetensors.DTYPES[kind].name
    assert llama3.Config.from_hf(config) == llama3.Config.from_hf(raw)


def test_another_type(tmp_path):
    jaxlm.export(jaxlm.load(meta_files.folder(tmp_path / "meta", 2)), tmp_path / "out", dtype="bfloat16")
    loaded, expected = jaxlm.load(tmp_path / "out"), jaxlm.load(tmp_path / "meta", dtype="bfloat16")
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), loaded.weights, expected.weights)
    assert jax.tree.all(same)


def test_metas_format_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Meta's format"):
        jaxlm.export(tiny("llama3"), tmp_path / "out", format="meta")
    assert not list(tmp_path.iterdir())


# The tokenizer


@pytest.fixture
def with_tiktoken(tmp_path):
    """A folder in Meta's format with a tiktoken tokenizer.model: the 256 bytes and one pair."""
    raw = {**RAW, "vocab_size": 600}
    arrays = meta_files.renamed(meta_files.weights(raw), raw)
    folder = meta_files.write(tmp_path / "meta", [arrays], {**meta_files.PARAMS, "vocab_size": 600})
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [bytes([i]) for i in order + [i for i in range(256) if i not in order]] + [b"ab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return folder


def assert_same_tokenizer(folder, model):
    exported = jaxlm.load(folder)
    for text in ("ab abba, naïve", "<|eot_id|>x"):
        assert exported.tokenizer.encode(text) == model.tokenizer.encode(text)
    chat = [{"role": "user", "content": "ab"}]
    assert exported.tokenizer.chat(chat) == model.tokenizer.chat(chat)
    assert exported.tokenizer.stop_ids == model.tokenizer.stop_ids
    assert exported.tokenizer.bos_id == model.tokenizer.bos_id


def test_metas_tokenizer_is_saved_for_transformers(with_tiktoken, tmp_path):
    model = jaxlm.load(with_tiktoken)
    jaxlm.export(model, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "tokenizer.model" not in names
    assert_same_tokenizer(tmp_path / "out", model)


def test_metas_tokenizer_from_another_folder(with_tiktoken, tmp_path):
    elsewhere = tmp_path / "elsewhere.model"
    (with_tiktoken / "tokenizer.model").rename(elsewhere)
    model = jaxlm.load(with_tiktoken, tokenizer=elsewhere)
    jaxlm.export(model, tmp_path / "out")
    assert_same_tokenizer(tmp_path / "out", model)


def test_a_tokenizer_json_from_another_folder_is_copied(tmp_path):
    vocabulary = meta_files.tokenizer(tmp_path / "vocabulary")
    folder = checkpoint_files.folder(tmp_path / "in", RAW, meta_files.weights())
    jaxlm.export(jaxlm.load(folder, tokenizer=vocabulary / "tokenizer.json"), tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.model").exists()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (vocabulary / "tokenizer.json").read_bytes()
    assert jaxlm.load(tmp_path / "out").tokenizer.encode("a b") == [0, 1]


def test_a_tokenizer_without_files_is_saved(tmp_path):
    tokenizer = Tokenizer.load(meta_files.tokenizer(tmp_path / "vocabulary"))
    loaded = jaxlm.load(checkpoint_files.folder(tmp_path / "in", RAW, meta_files.weights()))
    model = jaxlm.Model(family=loaded.family, config=loaded.config, weights=loaded.weights, tokenizer=tokenizer)
    jaxlm.export(model, tmp_path / "out", config=RAW)
    assert jaxlm.load(tmp_path / "out").tokenizer.encode("a b") == [0, 1]
