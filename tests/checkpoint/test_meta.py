"""Meta's original checkpoints: the same weights, to the bit, as in Hugging Face's form; every misfit is told."""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import checkpoint_files as made
from helpers import meta_files
from helpers.published_configs import CONFIGS, META_PARAMS
from helpers.tiny_tokenizers import write_tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.checkpoint import hf, meta
from jaxlm.checkpoint.safetensors import Tensor
from jaxlm.models import config, llama3

TOKENS = np.arange(24).reshape(2, 12)[:, ::-1] % 24
SCALED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of a few rows, so that every tensor takes several."""
    monkeypatch.setattr(hf, "SLICE", 700)


def equal(a, b):
    """Whether two models have the same weights, bit for bit."""
    a, b = jax.tree.leaves_with_path(a.weights), jax.tree.leaves_with_path(b.weights)
    return [p for p, _ in a] == [p for p, _ in b] and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for (_, x), (_, y) in zip(a, b)
    )


# The same weights


@pytest.mark.parametrize("kind", made.KINDS)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_weights_and_logits_are_those_of_hugging_faces_form(shards, kind, tmp_path, small_slices):
    theirs = jaxlm.load(made.folder(tmp_path / "hf", meta_files.RAW, meta_files.weights(kind=kind)))
    ours = jaxlm.load(meta_files.folder(tmp_path / "meta", shards, kind))
    assert ours.config == theirs.config
    assert equal(ours, theirs)
    logits = [np.asarray(model.forward(TOKENS, model.weights)[0]) for model in (ours, theirs)]
    assert (logits[0] == logits[1]).all()
    assert logits[0].std() > 0.5


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", made.KINDS)
def test_types_are_converted_on_the_way(kind, wanted, tmp_path, small_slices):
    theirs = jaxlm.load(made.folder(tmp_path / "hf", meta_files.RAW, meta_files.weights(kind=kind)), dtype=wanted)
    assert equal(jaxlm.load(meta_files.folder(tmp_path / "meta", 2, kind), dtype=wanted), theirs)


def test_values_beyond_float16_are_an_error(tmp_path):
    arrays = meta_files.renamed(meta_files.weights())
    arrays["layers.1.attention.wo.weight"][0, 20] = 1e5
    folder = meta_files.write(tmp_path, meta_files.cut(arrays, 2))
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth: layers\.1\.attention\.wo\.weight has values beyond"):
        jaxlm.load(folder, dtype="float16")


@pytest.mark.parametrize("shards", [2, 4])
def test_an_embedding_that_is_cut_by_columns(shards, tmp_path):
    whole = jaxlm.load(meta_files.folder(tmp_path / "one"))
    assert equal(jaxlm.load(meta_files.folder(tmp_path / "older", shards, embed_axis=1)), whole)
    assert equal(jaxlm.load(meta_files.folder(tmp_path / "open", shards, embed_axis=1, vocab_size=-1)), whole)


@pytest.mark.parametrize("vocabulary", [{"vocab_size": -1}, {"vocab_size": None}])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_vocabulary_that_the_tensors_tell(shards, vocabulary, tmp_path):
    folder = meta_files.folder(tmp_path / "x", shards, **vocabulary)
    assert jaxlm.load(folder).config.V == 24
    params = {name: value for name, value in meta_files.PARAMS.items() if name != "vocab_size"}
    (folder / "params.json").write_text(json.dumps(params))
    assert jaxlm.load(folder).config.V == 24


@settings(deadline=None)
@given(
    H=st.sampled_from([2, 4, 6, 64]),
    heads=st.integers(1, 5),
    D=st.integers(1, 9),
    kind=st.sampled_from(list(made.KINDS)),
)
def test_rows_in_metas_order_fill_an_array_in_ours(H, heads, D, kind):
    w = np.random.default_rng(0).standard_normal((heads * H, D)).astype(made.KINDS[kind])
    for shape in ((heads * H, D), (heads, H, D)):  # as in a file, and as in the model
        out = np.empty(shape, w.dtype)
        view = meta.in_pairs(out, H)
        assert np.shares_memory(view, out)
        view[...] = meta_files.pairs(w, heads).reshape(view.shape)
        assert (out.reshape(w.shape) == w).all()
    assert H == 2 or (meta_files.pairs(w, heads) != w).any()


def test_every_weight_has_metas_name():
    assert meta.NAMES.keys() == llama3.PARAMS.keys()


# Blocks


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_block_of_a_stored_tensor(data, tmp_path_factory):
    """Rows and columns in any type, into a part of a larger array."""
    kind, wanted = (data.draw(st.sampled_from(list(made.KINDS))) for _ in range(2))
    rows, columns = (data.draw(st.integers(1, 12)) for _ in range(2))
    row, column = (data.draw(st.integers(0, n - 1)) for n in (rows, columns))
    r, c = (data.draw(st.integers(1, n)) for n in (rows - row, columns - column))
    array = np.random.default_rng(0).standard_normal((rows, columns)).astype(made.KINDS[kind])
    path = tmp_path_factory.getbasetemp() / "block"
    path.write_bytes(b"abc" + array.tobytes())
    tensor = Tensor("w", path, kind, array.shape, 3, array.nbytes)
    around = np.zeros((r + 2, c + 3), made.KINDS[wanted])
    out = around[1 : r + 1, 2 : c + 2] if data.draw(st.booleans()) else np.empty((r, c), made.KINDS[wanted])
    assert hf.read_block(tensor, out, row, column) == r * c * array.itemsize
    assert (out == array[row : row + r, column : column + c].astype(made.KINDS[wanted])).all()
    assert (around[[0, -1]] == 0).all()
    assert (around[:, [0, 1, -1]] == 0).all()


def test_a_block_reads_its_own_bytes_alone(tmp_path, monkeypatch):
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    path = tmp_path / "x"
    path.write_bytes(array.tobytes())
    read = []
    monkeypatch.setattr(hf, "read_into", lambda buffer, *_: read.append(buffer.nbytes))
    hf.read_block(Tensor("w", path, "F32", (6, 10), 0, 240), np.empty((2, 3), np.float32), 4, 7)
    assert read == [24]


def test_a_tensor_of_several_parts_is_filled_by_slices(tmp_path, small_slices):
    weights = meta_files.weights()
    arrays = meta_files.renamed(weights)
    folder = meta_files.write(tmp_path, meta_files.cut(arrays, 4))
    joined, _ = meta.join(meta.read_shards(folder, meta_files.PARAMS), 32, 4)
    with ThreadPoolExecutor(2) as pool:
        for name, parts in (
            ("layers.0.attention.wo.weight", 4),
            ("layers.0.attention.wq.weight", 4),
            ("norm.weight", 1),
        ):
            shape = joined[name].shape
            whole = (slice(None),) * len(shape)
            value, pieces = hf.new_block(joined[name], shape, whole, np.dtype(np.float32))
            read = list(pool.map(lambda piece: hf.read_block(*piece), pieces))
            assert sum(read) == joined[name].nbytes == arrays[name].nbytes
            assert len(joined[name].parts) == parts
            assert len(read) > parts or parts == 1
            expected = weights["model.layers.0.self_attn.q_proj.weight"] if "wq" in name else arrays[name]
            assert (value == expected).all()


# The head


def heads(tmp_path, change, shards=2):
    arrays = meta_files.renamed(meta_files.weights(kind="BF16"))
    change(arrays)
    return jaxlm.load(meta_files.write(tmp_path, meta_files.cut(arrays, shards)))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_head_that_is_the_embedding_is_tied(shards, tmp_path):
    model = heads(tmp_path, lambda a: a.update({"output.weight": a["tok_embeddings.weight"]}), shards)
    assert model.config.tied
    assert "head" not in model.weights
    assert model.checkpoint.config["tie_word_embeddings"] is True
    assert [row.path for row, _ in model.checkpoint.tensors.pairs if row.path in ("embed", "head")] == ["embed"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_that_is_not_stored_is_missing(shards, tmp_path):
    """Meta's files have it also where it is the embedding."""
    with pytest.raises(ValueError, match=r"the weights do not match params\.json\. missing: 1 \(output\.weight\)"):
        heads(tmp_path, lambda a: a.pop("output.weight"), shards)


def test_a_head_that_differs_in_one_bit_is_not(tmp_path):
    def change(arrays):
        arrays["output.weight"] = arrays["tok_embeddings.weight"].copy()
        arrays["output.weight"].view(np.uint16)[23, 31] ^= 1

    model = heads(tmp_path, change)
    assert not model.config.tied
    assert model.checkpoint.config["tie_word_embeddings"] is False
    assert (np.asarray(model.weights["head"]) != np.asarray(model.weights["embed"])).sum() == 1


def test_a_head_of_the_same_storage_is_not_read_to_know_it(tmp_path):
    tensor = Tensor("output.weight", tmp_path / "absent", "BF16", (24, 32), 64, 24 * 32 * 2)
    assert hf.same(tensor, tensor._replace(name="tok_embeddings.weight"))
    with pytest.raises(FileNotFoundError):
        hf.same(tensor, tensor._replace(offset=128))


# What params.json stands for


PARAMS_FILES = {
    "llama3_8b": "meta-llama-Meta-Llama-3-8B", "llama3_1_8b": "meta-llama-Llama-3.1-8B",
    "llama3_1_70b": "meta-llama-Llama-3.1-70B", "llama3_2_1b": "meta-llama-Llama-3.2-1B",
    "llama3_2_3b": "meta-llama-Llama-3.2-3B",
}  # fmt: skip


def check_params(params, raw, name):
    """A params.json gives the Config of config.json, and the fields that both state."""
    made = meta.hf_config(params) | {"tie_word_embeddings": "3.2" in name}
    ours, theirs = llama3.Config.from_hf(made), llama3.Config.from_hf(raw)
    assert ours == theirs, name
    spelled = {field: raw[field] for field in made if field in raw and field != "rope_scaling"}
    assert spelled == {field: made[field] for field in spelled}, name
    assert (made["rope_scaling"] is None) == (raw.get("rope_scaling") is None), name


@pytest.mark.parametrize("name", META_PARAMS)
def test_params_are_the_config(name):
    check_params(META_PARAMS[name], CONFIGS[name], name)


def test_published_params_are_the_published_configs(shared):
    assert set(PARAMS_FILES.values()) == set(META_PARAMS)
    for file, name in PARAMS_FILES.items():
        params = json.loads((shared / f"configs/meta_params/{file}.params.json").read_text())
        assert params == META_PARAMS[name], file
        [path, *_] = sorted((shared / "configs").glob(f"{name}*.json"))
        check_params(params, json.loads(path.read_text()), name)


def test_the_largest_model():
    """Llama 3.1 405B, whose params.json is not among the test data: its published sizes."""
    params = {"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "n_heads": 128, "n_kv_heads": 8,
              "n_layers": 126, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256}  # fmt: skip  # noqa: E501
    config = meta.hf_config(params)
    assert config["intermediate_size"] == 53248
    assert config["rope_scaling"]["factor"] == 8


def test_what_params_json_leaves_out():
    """The defaults of Meta's ModelArgs, but for the rope's."""
    config = meta.hf_config({"dim": 64, "n_layers": 2, "n_heads": 4, "rope_theta": 1e4}, vocabulary=10)
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] == 16
    assert config["intermediate_size"] == 256  # 170, up to a multiple of 256
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 10000
    assert config["max_position_embeddings"] == 8192
    assert config["rope_scaling"] is None


def test_as_many_layers_as_a_config_may_have():
    assert meta.LAYERS == config.LAYERS


@pytest.mark.parametrize("given", [{}, {"rope_theta": None}])
def test_files_of_llama_2(given):
    params = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
    message = r"no rope_theta"
    with pytest.raises(ValueError, match=message):
        meta.hf_config({**params, **given}, vocabulary=32000)


@pytest.mark.parametrize("factor", [1, 8, 32.0])
def test_a_rope_factor_of_the_users(factor, tmp_path):
    folder = meta_files.folder(tmp_path / "x", use_scaled_rope=True)
    model = jaxlm.load(folder, rope_factor=factor)
    raw = {**meta_files.RAW, "rope_scaling": {**SCALED, "factor": float(factor)}, "max_position_embeddings": 131072}
    assert model.config == llama3.Config.from_hf(raw)


def test_a_published_shape_may_have_another_factor():
    params = {**meta_files.PARAMS, "dim": 2048, "n_layers": 16, "n_heads": 32, "use_scaled_rope": True}
    assert meta.hf_config(params)["rope_scaling"]["factor"] == 32
    assert meta.hf_config(params, rope_factor=8)["rope_scaling"]["factor"] == 8


def test_a_scaled_rope_of_unknown_shape_asks_for_its_factor(tmp_path):
    folder = meta_files.folder(tmp_path / "x", use_scaled_rope=True)
    message = r"use_scaled_rope .*\(32, 2, 8\) .* --rope-factor"
    with pytest.raises(ValueError, match=message) as caught:
        jaxlm.load(folder)
    assert str(caught.value).startswith(f"{folder}: params.json")


@pytest.mark.parametrize("factor", [0.5, 0, -8, math.nan, math.inf, "8"])
def test_factors_that_are_none(factor):
    with pytest.raises(ValueError, match=r"--rope-factor .* must be a number of at least 1"):
        meta.hf_config({**meta_files.PARAMS, "use_scaled_rope": True}, rope_factor=factor)


def test_a_factor_for_a_rope_that_is_not_scaled(tmp_path):
    with pytest.raises(ValueError, match=r"--rope-factor 8 .* is for a model whose params.json has use_scaled_rope"):
        jaxlm.load(meta_files.folder(tmp_path / "x"), rope_factor=8)
    folder = made.folder(tmp_path / "hf", meta_files.RAW, meta_files.weights())
    with pytest.raises(ValueError, match="rope-factor"):
        jaxlm.load(folder, rope_factor=8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dim", None, "dim is None, but must be an integer"),
        ("dim", "32", "dim is '32', but must be an integer"),
        ("dim", 32.0, "dim is 32.0, but must be an integer"),
        ("dim", True, "dim is True, but must be an integer"),
        ("n_layers", 0, "n_layers is 0, but must be an integer"),
        ("n_heads", -8, "n_heads is -8, but must be an integer"),
        ("n_kv_heads", "4", "n_kv_heads is '4', but must"),
        ("n_kv_heads", 3, "dim 32, n_heads 8 and n_kv_heads 3 do not divide each other"),
        ("n_heads", 7, "dim 32, n_heads 7 and n_kv_heads 4 do not divide"),
        ("vocab_size", 2.5, "vocab_size is 2.5"),
        ("vocab_size", 0, "vocab_size is 0"),
        ("n_kv_heads", 0, "n_kv_heads is 0"),
        ("n_kv_heads", [4] * 10**5, "n_kv_heads is [4, 4, 4, 4, 4, 4, ...], but must"),
        ("dim", 10**4000, "from 1 to 2,147,483,647"),
        ("dim", 2**31 - 8, "lacks"),
        ("n_layers", 10**9, "n_layers is 1000000000, but must be an integer from 1 to 2,000"),
        ("norm_eps", 1e300, "norm_eps is 1e+300, but must be a number above 0 (1e-15 to 1e15)"),
        ("use_scaled_rope", "no", "use_scaled_rope is 'no', but must be true or false"),
        ("multiple_of", 0, "multiple_of is 0"),
        ("ffn_dim_multiplier", "1.3", "ffn_dim_multiplier is '1.3', but must be a number above 0"),
        ("norm_eps", -1e-5, "norm_eps is -1e-05, but must be a number above 0"),
        ("rope_theta", True, "rope_theta is True, but must be a number above 0"),
        ("moe_args", {"num_experts": 8}, "does not compute: moe_args = {'num_experts': 8}. If a field does not change"),
        ("quantization_args", {"scheme": "int4"}, "does not compute: quantization_args"),
        ("vision_chunk_size", 448, "does not compute: vision_chunk_size = 448"),
    ],
)
def test_params_that_make_no_sense(field, value, message, tmp_path):
    folder = meta_files.folder(tmp_path / "x", **{field: value})
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        jaxlm.load(folder)
    assert str(caught.value).startswith(f"{folder}: params.json" if message != "lacks" else str(folder))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_fields_that_pass(tmp_path):
    harmless = {"max_batch_size": 32, "max_seq_len": 2048, "lora_args": None, "vision_chunk_size": -1}
    jaxlm.load(meta_files.folder(tmp_path / "x", **harmless))
    folder = meta_files.folder(tmp_path / "y", trained_on="web")
    with pytest.raises(ValueError, match=r"accept it with --allow-field NAME"):
        jaxlm.load(folder)
    jaxlm.load(folder, allow_fields=["trained_on"])


def test_params_that_are_no_json(tmp_path):
    folder = meta_files.folder(tmp_path / "x")
    (folder / "params.json").write_text("{")
    with pytest.raises(ValueError, match=r"params\.json is not valid JSON"):
        jaxlm.load(folder)


# Shards that do not fit


def refused(tmp_path, change, shards=2, **params):
    arrays = meta_files.cut(meta_files.renamed(meta_files.weights()), shards)
    change(arrays)
    folder = meta_files.write(tmp_path / "x", arrays, {**meta_files.PARAMS, **params})
    with pytest.raises(ValueError) as caught:
        jaxlm.load(folder)
    assert str(caught.value).startswith(f"{folder}: the weights do not match params.json. ")
    return str(caught.value)


def test_all_misfits_are_told_together(tmp_path):
    def change(shards):
        a, b = shards
        del a["layers.0.attention.wv.weight"], b["layers.0.attention.wv.weight"]
        del b["layers.1.feed_forward.w1.weight"]
        a["layers.0.attention.wq.bias"] = b["layers.0.attention.wq.bias"] = np.zeros(16, np.float32)
        a["layers.2.attention.wv.weight"] = b["layers.2.attention.wv.weight"] = np.zeros((8, 32), np.float32)
        b["layers.0.attention.wo.weight"] = b["layers.0.attention.wo.weight"][:, :8]
        b["layers.1.attention.wo.weight"] = b["layers.1.attention.wo.weight"].astype(np.float16)
        a["layers.0.feed_forward.w2.weight"] = b["layers.0.feed_forward.w2.weight"] = np.zeros((32, 10), np.float32)
        b["norm.weight"] = b["norm.weight"] + np.float32(1)

    message = refused(tmp_path, change)
    for part in (
        "not in every shard: 1 (layers.1.feed_forward.w1.weight)",
        "of different types or shapes in the shards: 2 (layers.0.attention.wo.weight, layers.1.attention.wo.weight)",
        "replicated in every shard, with different values: 1 (norm.weight)",
        "missing: 1 (layers.0.attention.wv.weight)",
        "unexpected: 2 (layers.0.attention.wq.bias, layers.2.attention.wv.weight)",
        "misshapen: 1 (layers.0.feed_forward.w2.weight [32, 20] instead of [32, 24])",
    ):
        assert part in message
    assert message.endswith("Are both files of the same model and revision?")


def test_layers_are_told_apart_by_their_whole_number(tmp_path):
    def change(shards):
        shards[0]["layers.11.attention.wv.weight"] = shards[0].pop("layers.1.attention.wv.weight")

    message = refused(tmp_path, change, shards=1)
    assert "missing: 1 (layers.1.attention.wv.weight)" in message
    assert "unexpected: 1 (layers.11.attention.wv.weight)" in message


def test_shards_that_cut_a_head_in_two(tmp_path):
    """Eight shards of four kv heads."""
    message = refused(tmp_path, lambda shards: None, shards=8)
    assert "layers.0.attention.wk.weight (a head is split over two shards)" in message


def test_a_params_json_of_another_model(tmp_path):
    assert "misshapen: 6 (" in refused(tmp_path, lambda shards: None, ffn_dim_multiplier=0.5)
    assert "missing: 9 (layers.2.attention_norm.weight" in refused(tmp_path, lambda shards: None, n_layers=3)
    message = refused(tmp_path, lambda shards: None, vocab_size=32)
    assert "misshapen: 2 (tok_embeddings.weight [24, 32] instead of [32, 32], output.weight" in message


def test_frequencies_that_older_files_store_are_left(tmp_path):
    arrays = meta_files.cut(meta_files.renamed(meta_files.weights()), 2)
    for shard in arrays:
        shard["rope.freqs"] = np.ones(2, np.float32)
    model = jaxlm.load(meta_files.write(tmp_path, arrays))
    assert not model.ignored


def test_missing_shards_are_named(tmp_path):
    folder = meta_files.folder(tmp_path / "x", 4)
    hidden = tmp_path / "hidden.pth"
    for number in ("00", "01", "03"):
        os.rename(folder / f"consolidated.{number}.pth", hidden)
        with pytest.raises(FileNotFoundError, match=rf"lacks 1 \(consolidated\.{number}\.pth\) of 4 shards"):
            jaxlm.load(folder)
        os.rename(hidden, folder / f"consolidated.{number}.pth")
    for name in ("consolidated.pth", "consolidated.0.pth", "consolidated.99999999999.pth", "consolidated.0a.pth"):
        (folder / name).touch()  # no shards
    jaxlm.load(folder)
    for path in sorted(folder.glob("*.0[123].pth")):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 3 \(consolidated\.01\.pth, .*03\.pth\) of 4 shards"):
        jaxlm.load(folder)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 \(consolidated\.00\.pth\) of 1 shards"):
        jaxlm.load(folder)


def test_a_pickle_in_a_shard_is_refused_before_anything_is_read(tmp_path):
    folder = meta_files.folder(tmp_path / "x", 2)
    (folder / "consolidated.01.pth").write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth cannot be read .* nothing in it was executed"):
        jaxlm.load(folder)


# Where things lie


def test_the_form_is_what_the_folder_holds(tmp_path):
    """Hugging Face's where it holds both."""
    folder = meta_files.folder(tmp_path / "x")
    assert jaxlm.load(folder).checkpoint.format == "meta"
    assert jaxlm.load(folder, format="meta").checkpoint.format == "meta"
    with pytest.raises(FileNotFoundError, match=r"has no config\.json \(it holds .*Meta's format: --format meta rea"):
        jaxlm.load(folder, format="hf")
    made.folder(folder, meta_files.RAW, meta_files.weights(seed=1))
    assert jaxlm.load(folder).checkpoint.format == "hf"
    assert jaxlm.load(folder, format="hf").checkpoint.format == "hf"
    assert jaxlm.load(folder, format="meta").checkpoint.format == "meta"
    with pytest.raises(ValueError, match="format 'gguf' is not one of hf, meta"):
        jaxlm.load(folder, format="gguf")


def test_the_folder_original(tmp_path):
    """As a snapshot of the hub has it: the folder itself, or the one it lies in."""
    expected = jaxlm.load(meta_files.folder(tmp_path / "plain"))
    snapshot = tmp_path / "snapshot"
    shutil.copytree(tmp_path / "plain", snapshot / "original")
    for folder, format in ((snapshot, None), (snapshot, "meta"), (snapshot / "original", None)):
        model = jaxlm.load(folder, format=format)
        assert equal(model, expected)
        assert model.checkpoint.folder == snapshot / "original"
    made.folder(snapshot, meta_files.RAW, meta_files.weights(seed=1))
    assert not equal(jaxlm.load(snapshot), expected)
    assert equal(jaxlm.load(snapshot, format="meta"), expected)


def test_a_folder_of_neither_form(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no params\.json, nor has its original/ one \(it holds nothing\)"):
        jaxlm.load(tmp_path, format="meta")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json \(it holds nothing\)"):
        jaxlm.load(tmp_path)


def test_another_family_does_not_compute_it(tmp_path):
    from jaxlm.models import qwen3

    with pytest.raises(ValueError, match=r"model_type 'llama'"):
        qwen3.load(meta_files.folder(tmp_path / "x"))
    assert llama3.load(tmp_path / "x").family is llama3


def test_what_the_model_remembers(tmp_path):
    found = jaxlm.load(meta_files.folder(tmp_path / "x", 2)).checkpoint
    assert (found.format, found.folder, found.params) == ("meta", tmp_path / "x", meta_files.PARAMS)
    assert llama3.Config.from_hf(found.config) == llama3.Config.from_hf(meta_files.RAW)
    sources = {row.path: (row.names[0], tensor) for row, tensor in found.tensors.pairs}
    name, tensor = sources["layers.1.down"]
    assert name == "model.layers.1.mlp.down_proj.weight"
    assert (tensor.name, tensor.dtype, tensor.shape) == ("layers.1.feed_forward.w2.weight", "F32", (32, 24))
    assert [part.file.name for part in tensor.parts] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert tensor.nbytes == 32 * 24 * 4
    assert not found.tensors.heads
    assert not found.tensors.ignored


# The tokenizer


@pytest.fixture
def vocabulary(tmp_path):
    return meta_files.tokenizer(tmp_path / "tokenizer")


def test_a_tokenizer_beside_the_weights(vocabulary, tmp_path):
    folder = meta_files.folder(tmp_path / "x")
    assert jaxlm.load(folder).tokenizer is None
    shutil.copy(vocabulary / "tokenizer.json", folder)
    model = jaxlm.load(folder)
    assert model.tokenizer.encode("a b") == [0, 1]
    assert model.checkpoint.tokenizer is None
    assert model.tokenizer.stop_ids == (4, 5, 6)
    assert model.generation_config["eos_token_id"] == [4, 5, 6]
    assert model.checkpoint.config["eos_token_id"] == [4, 5, 6]


@pytest.mark.parametrize("place", ["", "tokenizer.json"])
def test_a_tokenizer_elsewhere(place, vocabulary, tmp_path):
    model = jaxlm.load(meta_files.folder(tmp_path / "x"), tokenizer=vocabulary / place)
    assert model.tokenizer.encode("a b") == [0, 1]
    assert model.checkpoint.tokenizer == vocabulary  # the files beside tokenizer.json belong to it
    theirs = jaxlm.load(made.folder(tmp_path / "hf", meta_files.RAW, meta_files.weights()), tokenizer=str(vocabulary))
    assert theirs.tokenizer.encode("a b") == [0, 1]


def test_the_tokenizers_own_folder_names_the_ends(vocabulary, tmp_path):
    (vocabulary / "generation_config.json").write_text('{"eos_token_id": [5]}')
    model = jaxlm.load(meta_files.folder(tmp_path / "x"), tokenizer=vocabulary)
    assert model.generation_config["eos_token_id"] == [5]


def test_a_tokenizer_beside_the_folder_original(vocabulary, tmp_path):
    meta_files.folder(tmp_path / "snapshot/original")
    shutil.copy(vocabulary / "tokenizer.json", tmp_path / "snapshot")
    model = jaxlm.load(tmp_path / "snapshot")
    assert model.tokenizer.encode("b") == [1]
    assert model.checkpoint.tokenizer == tmp_path / "snapshot"


def test_a_tokenizer_that_is_not_there(tmp_path):
    folder = meta_files.folder(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder"):
        jaxlm.load(folder, tokenizer=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no tokenizer: .*tokenizer\.json, tokenizer\.model or"):
        jaxlm.load(folder, tokenizer=tmp_path / "empty")


@pytest.mark.parametrize("vocabulary", ["made", "published"])
def test_metas_own_tokenizer(vocabulary, request, tmp_path):
    """Its special tokens have the ids after those of the file."""
    if vocabulary == "made":
        path, first = write_tiktoken(tmp_path / "tokenizer"), 400
        hello = [39, 68, 75, 75, 78]  # a byte each: "!" is 0
    else:
        path, first = request.getfixturevalue("shared") / "tokenizers/llama3/tokenizer.model", 128000
        hello = [9906]
    model = jaxlm.load(meta_files.folder(tmp_path / "x"), tokenizer=path)
    ends = [first + 1, first + 8, first + 9]
    assert model.tokenizer.encode("Hello") == [first, *hello]
    assert model.generation_config == {"bos_token_id": first, "eos_token_id": ends}
    assert model.tokenizer.stop_ids == tuple(ends)
    assert model.tokenizer.has_template
