"""The form of Meta's originals: written from a Hugging Face folder, read again, and back, byte for byte."""

import base64
import hashlib
import json
import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers import meta_files as original
from helpers.tiny_models import from_config, tiny

import jaxlm
from jaxlm.checkpoint import hf, safetensors
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.meta import NAMES
from jaxlm.checkpoint.meta_params import params_of
from jaxlm.checkpoint.pth import read_pth, write_pth
from jaxlm.exporting import open_model
from jaxlm.models import llama3
from jaxlm.processing.tokenizer import Tokenizer

LLAMA = {
    **checkpoint_files.LLAMA, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
TIED = {**LLAMA, "tie_word_embeddings": True}
SCALED = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PARAMS = {
    "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 24, "ffn_dim_multiplier": 0.43,
    "multiple_of": 4, "norm_eps": 1e-5, "rope_theta": 10000.0, "use_scaled_rope": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Slices so small that every tensor has several."""
    monkeypatch.setattr(files, "SLICE", 100)
    monkeypatch.setattr(safetensors, "SLICE", 24)
    monkeypatch.setattr(hf, "SLICE", 100)


def digests(tensors):
    return {
        name: (tensor.dtype, tensor.shape, hashlib.sha256(b"".join(map(bytes, safetensors.chunks(tensor)))).hexdigest())
        for name, tensor in tensors.items()
    }


def hf_digests(folder):
    return digests(safetensors.read_index(folder))


def meta_digests(folder):
    return digests(read_pth(folder / "consolidated.00.pth"))


def array(tensor):
    kind = safetensors.DTYPES[tensor.dtype]
    return np.frombuffer(b"".join(map(bytes, safetensors.chunks(tensor))), kind).reshape(tensor.shape)


def divided(folder, whole, count):
    """The tensors of a folder in Meta's form, in `count` shards as Meta's training cuts them."""
    folder.mkdir()
    (folder / "params.json").write_bytes((whole / "params.json").read_bytes())
    for i in range(count):
        tensors = []
        for name, tensor in read_pth(whole / "consolidated.00.pth").items():
            value = array(tensor)
            if value.ndim == 2:
                value = np.split(value, count, axis=int(name.split(".")[-2] in ("wo", "w2")))[i]
            tensors.append((name, tensor.dtype, value.shape, [value.tobytes()]))
        write_pth(folder / f"consolidated.{i:02}.pth", tensors)
    return folder


# Tensors


@pytest.mark.parametrize("read", [jaxlm.load, open_model])
@pytest.mark.parametrize("raw", [LLAMA, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", checkpoint_files.KINDS)
def test_there_and_back(kind, raw, read, tmp_path):
    folder = checkpoint_files.folder(tmp_path / "hf", raw, checkpoint_files.tensors(raw, kind), shards=2)
    done = jaxlm.export(read(folder), tmp_path / "meta", format="meta")
    original = read_pth(tmp_path / "meta/consolidated.00.pth")
    assert json.loads((tmp_path / "meta/params.json").read_text()) == PARAMS
    assert sorted(path.name for path in (tmp_path / "meta").iterdir()) == ["consolidated.00.pth", "params.json"]
    assert len(original) == done.tensors == 3 + 9 * 2
    assert "output.weight" in original  # in this form a tied head is stored

    jaxlm.export(read(tmp_path / "meta"), tmp_path / "back")
    assert hf_digests(tmp_path / "back") == hf_digests(folder)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["dtype"] == safetensors.DTYPES[kind].name
    assert llama3.Config.from_hf(config) == llama3.Config.from_hf(raw)


def test_rows_of_queries_and_keys_are_ordered_by_pairs(tmp_path):
    arrays = checkpoint_files.tensors(LLAMA)
    jaxlm.export(jaxlm.load(checkpoint_files.folder(tmp_path / "hf", LLAMA, arrays)), tmp_path / "meta", format="meta")
    original = {name: array(t) for name, t in read_pth(tmp_path / "meta/consolidated.00.pth").items()}
    for ours, theirs in (("q_proj", "wq"), ("k_proj", "wk")):
        halves = arrays[f"model.layers.1.self_attn.{ours}.weight"]
        pairs = original[f"layers.1.attention.{theirs}.weight"]
        for row in range(len(pairs)):
            head, i = divmod(row, 4)
            assert np.array_equal(pairs[row], halves[4 * head + i // 2 + 2 * (i % 2)])
    assert np.array_equal(original["layers.0.attention.wv.weight"], arrays["model.layers.0.self_attn.v_proj.weight"])
    assert np.array_equal(original["layers.0.feed_forward.w3.weight"], arrays["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("read", [jaxlm.load, open_model])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_from_shards(kind, read, tmp_path):
    """What was cut for two processes comes out whole, and params.json as it was, letter for letter."""
    folder = checkpoint_files.folder(tmp_path / "hf", LLAMA, checkpoint_files.tensors(LLAMA, kind))
    jaxlm.export(jaxlm.load(folder), tmp_path / "meta", format="meta")
    (tmp_path / "meta/params.json").write_text(json.dumps({**PARAMS, "vocab_size": -1}) + "\n\n")
    shards = divided(tmp_path / "shards", tmp_path / "meta", 2)
    jaxlm.export(read(shards), tmp_path / "hf again")
    assert hf_digests(tmp_path / "hf again") == hf_digests(folder)
    jaxlm.export(read(shards), tmp_path / "meta again", format="meta")
    assert meta_digests(tmp_path / "meta again") == meta_digests(tmp_path / "meta")
    assert (tmp_path / "meta again/params.json").read_bytes() == (tmp_path / "meta/params.json").read_bytes()


def test_another_type(tmp_path):
    folder = checkpoint_files.folder(tmp_path / "hf", LLAMA, checkpoint_files.tensors(LLAMA))
    jaxlm.export(jaxlm.load(folder), tmp_path / "meta", format="meta", dtype="bfloat16")
    loaded, expected = jaxlm.load(tmp_path / "meta"), jaxlm.load(folder, dtype="bfloat16")
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), loaded.weights, expected.weights)
    assert jax.tree.all(same)
    assert loaded.dtype == "bfloat16"


def test_random_weights_need_no_config(tmp_path):
    jaxlm.export(from_config(LLAMA), tmp_path / "meta", format="meta")
    assert jaxlm.load(tmp_path / "meta").config == llama3.Config.from_hf(LLAMA)


# params.json


@pytest.mark.parametrize(("ours", "theirs"), [
    ("Meta-Llama-3-8B", "llama3_8b"), ("Llama-3.1-8B", "llama3_1_8b"), ("Llama-3.1-70B-Instruct", "llama3_1_70b"),
    ("Llama-3.2-1B", "llama3_2_1b"), ("Llama-3.2-3B", "llama3_2_3b"),
])  # fmt: skip
def test_the_published_ones(ours, theirs, shared):
    config = json.loads((shared / f"configs/meta-llama-{ours}.json").read_text())
    published = json.loads((shared / f"configs/meta_params/{theirs}.params.json").read_text())
    assert params_of(llama3.Config.from_hf(config)) == published


def test_every_width_is_said_exactly():
    random = np.random.default_rng(0)
    shapes = [(D, F) for D in (2, 6, 48, 64, 288) for F in range(1, 600)]
    shapes += [(8192, 28672), (16384, 53248), (4096, 11008), (5120, 13824), (6656, 17920)]
    shapes += zip(random.integers(1, 20_000, 2000).tolist(), random.integers(1, 80_000, 2000).tolist())
    config = llama3.Config.from_hf(LLAMA)
    for D, F in shapes:
        told = params_of(llama3.Config(**{**vars(config), "D": D, "F": F}))
        width = int(told["ffn_dim_multiplier"] * int(2 * (4 * D) / 3))  # Meta's formula
        multiple = told["multiple_of"]
        assert multiple * ((width + multiple - 1) // multiple) == F, (D, F)


@pytest.mark.parametrize(("fields", "message"), [
    ({"head_dim": 6}, r"\(H is 4 there and 6 here\): --format hf can"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, r"\(rope is Rope\(.*'default'.* and Rope\(.*'linear'"),
    ({"rope_scaling": {**SCALED, "high_freq_factor": 5.0}}, r"high_freq_factor=4.0.* there and .*high_freq_factor=5.0"),
])  # fmt: skip
def test_what_it_cannot_say(fields, message, tmp_path):
    with pytest.raises(ValueError, match=r"params.json cannot say what random weights is .*" + message):
        jaxlm.export(from_config({**LLAMA, **fields}), tmp_path / "meta", format="meta")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3"])
def test_other_families(family, tmp_path):
    with pytest.raises(ValueError, match=f"is a model of {family}, and only Llama has the form of Meta's: --format hf"):
        jaxlm.export(tiny(family), tmp_path / "meta", format="meta")


def test_the_factor_of_the_rope_is_told(tmp_path, caplog):
    raw = {**LLAMA, "rope_scaling": SCALED, "max_position_embeddings": 131072}
    with caplog.at_level(logging.WARNING):
        jaxlm.export(from_config(raw), tmp_path / "meta", format="meta")
    (record,) = caplog.records
    assert record.getMessage().endswith("load this folder with --rope-factor 32 (rope_factor=32)")
    assert json.loads((tmp_path / "meta/params.json").read_text())["use_scaled_rope"] is True
    assert jaxlm.load(tmp_path / "meta", rope_factor=32).config == llama3.Config.from_hf(raw)


def test_the_context_that_is_lost_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        jaxlm.export(from_config({**LLAMA, "max_position_embeddings": 100}), tmp_path / "meta", format="meta")
    assert caplog.messages == ["params.json cannot say the context: 100 here, taken for 8192 there"]


# The tokenizer


@pytest.fixture
def with_tiktoken(tmp_path):
    """A folder in Meta's form with a tokenizer.model in tiktoken form: the bytes, and one pair."""
    jaxlm.export(from_config({**LLAMA, "vocab_size": 600}), tmp_path / "meta", format="meta")
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [bytes([i]) for i in order + [i for i in range(256) if i not in order]] + [b"ab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "meta/tokenizer.model").write_text("\n".join(lines) + "\n")
    return tmp_path / "meta"


def test_metas_tokenizer_becomes_one_that_transformers_reads(with_tiktoken, tmp_path):
    model = jaxlm.load(with_tiktoken)
    jaxlm.export(model, tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "tokenizer.model" not in names
    exported = jaxlm.load(tmp_path / "hf")
    for text in ("ab abba, naïve", "<|eot_id|>x"):
        assert exported.tokenizer.encode(text) == model.tokenizer.encode(text)
    chat = [{"role": "user", "content": "ab"}]
    assert exported.tokenizer.chat(chat) == model.tokenizer.chat(chat)
    assert exported.tokenizer.stop_ids == model.tokenizer.stop_ids
    assert exported.tokenizer.bos_id == model.tokenizer.bos_id

    jaxlm.export(model, tmp_path / "meta again", format="meta")
    assert (tmp_path / "meta again/tokenizer.model").read_bytes() == (with_tiktoken / "tokenizer.model").read_bytes()
    jaxlm.export(exported, tmp_path / "third", format="meta")
    assert jaxlm.load(tmp_path / "third").tokenizer.encode("ab") == model.tokenizer.encode("ab")


def test_a_tokenizer_that_lies_elsewhere(with_tiktoken, tmp_path):
    elsewhere = tmp_path / "elsewhere.model"
    (with_tiktoken / "tokenizer.model").rename(elsewhere)
    model = jaxlm.load(with_tiktoken, tokenizer=elsewhere)
    jaxlm.export(model, tmp_path / "out", format="meta")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == elsewhere.read_bytes()


def test_a_tokenizer_json_that_lies_elsewhere(tmp_path):
    vocabulary = original.tokenizer(tmp_path / "vocabulary")
    folder = checkpoint_files.folder(tmp_path / "in", LLAMA, checkpoint_files.tensors(LLAMA))
    model = jaxlm.load(folder, tokenizer=vocabulary / "tokenizer.json")
    for form in ("hf", "meta"):
        jaxlm.export(model, tmp_path / form, format=form)
        assert not (tmp_path / form / "tokenizer.model").exists()
        written = (tmp_path / form / "tokenizer.json").read_bytes()
        assert written == (vocabulary / "tokenizer.json").read_bytes()
        assert jaxlm.load(tmp_path / form).tokenizer.encode("a b") == [0, 1]


def test_a_tokenizer_that_comes_from_no_file_is_told(tmp_path, caplog):
    tokenizer = Tokenizer.load(original.tokenizer(tmp_path / "vocabulary"))
    model = replace(from_config(LLAMA), tokenizer=tokenizer)
    with caplog.at_level(logging.WARNING):
        jaxlm.export(model, tmp_path / "meta", format="meta")
        jaxlm.export(model, tmp_path / "hf", config=LLAMA)  # which writes it
    (message,) = caplog.messages
    assert message.startswith("the tokenizer is not written")
    model.tokenizer.hf.save_pretrained(tmp_path / "meta")
    assert jaxlm.load(tmp_path / "meta").tokenizer.encode("a b") == [0, 1]


def test_the_ends_of_a_text_are_kept(tmp_path):
    """config.json has them, params.json has not."""
    from helpers import tiny_files as sample

    folder = tmp_path / "hf"
    folder.mkdir()
    sample.write(folder)
    model = jaxlm.load(folder)
    jaxlm.export(model, tmp_path / "meta", format="meta")
    exported = jaxlm.load(tmp_path / "meta")
    assert exported.tokenizer.stop_ids == model.tokenizer.stop_ids == (257,)
    assert exported.tokenizer.encode("ab") == model.tokenizer.encode("ab")


def test_every_tensor_has_a_name():
    assert NAMES.keys() == llama3.PARAMS.keys()
