"""Checkpoints against a family's table: everything fits, or all that does not is named at once."""

import ml_dtypes
import numpy as np
import pytest
from helpers import checkpoint_files

import jaxlm
from jaxlm.checkpoint import hf, safetensors
from jaxlm.models import gemma3


def misfit(tmp_path, arrays, raw=checkpoint_files.LLAMA):
    """The message about arrays that do not fit the config."""
    family, tensors = (
        checkpoint_files.FAMILY[raw["model_type"]],
        hf.read_index(checkpoint_files.folder(tmp_path / "m", raw, arrays)),
    )
    with pytest.raises(ValueError) as caught:
        hf.match(family.PARAMS, checkpoint_files.config(raw), tensors, family.IGNORED_PREFIXES)
    return str(caught.value)


def test_all_misfits_are_reported_together_with_counts(tmp_path):
    arrays = checkpoint_files.tensors()
    del arrays["model.norm.weight"], arrays["model.layers.1.mlp.up_proj.weight"]
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    arrays["model.layers.0.mlp.gate_proj.weight"] = np.zeros((8, 12), np.float32)
    arrays["model.layers.1.self_attn.o_proj.weight"] = np.zeros((8, 8), np.int8)
    assert misfit(tmp_path, arrays) == (
        "the weights do not match config.json. "
        "missing: 2 (model.layers.1.mlp.up_proj.weight, model.norm.weight); "
        "unexpected: 1 (model.layers.0.self_attn.q_proj.bias); "
        "misshapen: 1 (model.layers.0.mlp.gate_proj.weight [8, 12] instead of [12, 8]); "
        "of an unsupported type (supported: F32, BF16, F16; config.json names no quantization): "
        "1 (model.layers.1.self_attn.o_proj.weight I8). "
        "Are both files of the same model and revision?"
    )


def test_many_misfits_are_counted_and_ten_are_named(tmp_path):
    message = misfit(tmp_path, {"odd": np.zeros(1, np.float32)})
    assert "missing: 21 (model.embed_tokens.weight, " in message
    assert message.count("model.") == 10
    assert "…); unexpected: 1 (odd)" in message


def test_quantised_checkpoint(tmp_path):
    arrays = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in checkpoint_files.tensors().items()}
    message = misfit(tmp_path, arrays)
    assert (
        "(supported: F32, BF16, F16; config.json names no quantization): 21 (model.embed_tokens.weight F8_E4M3, "
        in message
    )


def test_layers_beyond_the_config(tmp_path):
    message = misfit(tmp_path, checkpoint_files.tensors({**checkpoint_files.LLAMA, "num_hidden_layers": 12}))
    assert "unexpected: 90 (model.layers.2.input_layernorm.weight, " in message
    assert "missing" not in message
    message = misfit(tmp_path, checkpoint_files.tensors(), {**checkpoint_files.LLAMA, "num_hidden_layers": 3})
    assert "missing: 9 (model.layers.2." in message


def test_layer_11_does_not_stand_for_layer_1(tmp_path):
    arrays = {name.replace("layers.1.", "layers.11."): array for name, array in checkpoint_files.tensors().items()}
    message = misfit(tmp_path, arrays)
    assert "missing: 9 (model.layers.1.input_layernorm.weight, " in message
    assert "unexpected: 9 (model.layers.11.input_layernorm.weight, " in message


@pytest.mark.parametrize("spelling", range(3))
def test_every_spelling_is_read(spelling, tmp_path):
    arrays = checkpoint_files.tensors(checkpoint_files.GEMMA, spelling=spelling)
    weights = jaxlm.load(checkpoint_files.folder(tmp_path / "m", checkpoint_files.GEMMA, arrays)).weights
    assert np.array_equal(weights["norm"], arrays[gemma3.PARAMS["norm"][1 + spelling]])


def test_two_spellings_of_one_tensor(tmp_path):
    arrays = checkpoint_files.tensors(checkpoint_files.GEMMA)
    arrays["language_model.model.norm.weight"] = arrays["model.norm.weight"]
    message = misfit(tmp_path, arrays, checkpoint_files.GEMMA)
    assert "stored under two names: 1 (model.norm.weight and language_model.model.norm.weight)." in message
    assert "unexpected" not in message


def test_tied_head_of_the_same_bytes_passes(tmp_path):
    raw = {**checkpoint_files.LLAMA, "tie_word_embeddings": True}
    arrays = checkpoint_files.tensors(raw)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    assert "head" not in jaxlm.load(checkpoint_files.folder(tmp_path / "m", raw, arrays)).weights


@pytest.fixture
def read(monkeypatch):
    """The bytes of tensors that are read, by name."""
    found: dict[str, int] = {}

    def read_into(buffer, tensor, *args):
        found[tensor.name] = found.get(tensor.name, 0) + buffer.nbytes
        original(buffer, tensor, *args)

    original = safetensors.read_into
    monkeypatch.setattr(safetensors, "read_into", read_into)
    monkeypatch.setattr(hf, "read_into", read_into)
    return found


def test_a_stored_head_that_is_tied_is_not_read_but_for_samples(tmp_path, monkeypatch, read):
    monkeypatch.setattr(hf, "SAMPLES", 4)
    monkeypatch.setattr(hf, "SAMPLE", 16)
    raw = {**checkpoint_files.LLAMA, "tie_word_embeddings": True}
    arrays = checkpoint_files.tensors(raw)
    expected = {name: array.nbytes for name, array in arrays.items()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    jaxlm.load(checkpoint_files.folder(tmp_path / "m", raw, arrays))
    expected["lm_head.weight"] = 4 * 16
    expected["model.embed_tokens.weight"] += 4 * 16
    assert read == expected


def test_tensors_that_are_not_used_are_not_read(tmp_path, read):
    arrays = checkpoint_files.tensors(checkpoint_files.GEMMA)
    expected = {name: array.nbytes for name, array in arrays.items()}
    arrays["vision_tower.a.weight"] = np.zeros((50, 60), np.float32)
    jaxlm.load(checkpoint_files.folder(tmp_path / "m", checkpoint_files.GEMMA, arrays))
    assert read == expected


@pytest.mark.parametrize("row", [0, 11, 23])
def test_samples_of_a_tied_head_span_all_of_it(row, tmp_path, monkeypatch):
    """Three samples of a row each, of 24 rows: the first, one in the middle and the last."""
    monkeypatch.setattr(hf, "SAMPLES", 3)
    monkeypatch.setattr(hf, "SAMPLE", 32)
    raw = {**checkpoint_files.LLAMA, "tie_word_embeddings": True}
    arrays = checkpoint_files.tensors(raw)
    head = arrays["model.embed_tokens.weight"].copy()
    head.view(np.uint32)[row, 5] ^= 1
    assert "1 (lm_head.weight)." in misfit(tmp_path, {**arrays, "lm_head.weight": head}, raw)


@pytest.mark.parametrize("fault", ["last bit", "shape", "type"])
def test_tied_head_that_differs(fault, tmp_path):
    raw = {**checkpoint_files.LLAMA, "tie_word_embeddings": True}
    arrays = checkpoint_files.tensors(raw)
    head = arrays["model.embed_tokens.weight"].copy()
    head.view(np.uint32)[-1, -1] ^= 1
    other = {"last bit": head, "shape": head[:3], "type": head.astype(np.float16)}
    message = misfit(tmp_path, {**arrays, "lm_head.weight": other[fault]}, raw)
    assert "set tie_word_embeddings to false): " in message
    assert "1 (lm_head.weight)." in message


def test_untied_head_that_is_missing(tmp_path):
    arrays = checkpoint_files.tensors()
    del arrays["lm_head.weight"]
    assert "missing: 1 (lm_head.weight)." in misfit(tmp_path, arrays)


def test_known_but_unread_tensors_are_listed(tmp_path):
    arrays = checkpoint_files.tensors(checkpoint_files.GEMMA)
    extra = ["vision_tower.a.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    arrays |= {name: np.zeros(2, np.float32) for name in extra}
    tensors = hf.read_index(checkpoint_files.folder(tmp_path / "m", checkpoint_files.GEMMA, arrays))
    assert hf.match(
        gemma3.PARAMS, checkpoint_files.config(checkpoint_files.GEMMA), tensors, gemma3.IGNORED_PREFIXES
    ).ignored == [tensors[name] for name in extra]
    message = misfit(tmp_path, {**arrays, "my_rotary_emb.inv_freq": arrays[extra[0]]}, checkpoint_files.GEMMA)
    assert "unexpected: 1 (my_rotary_emb.inv_freq)." in message


# Through the front door


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "rms_norm_eps": NaN}'])
def test_load_names_a_bad_config(text, tmp_path):
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors())
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        jaxlm.load(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_load_names_the_checkpoint_that_does_not_fit(tmp_path):
    folder = checkpoint_files.folder(
        tmp_path / "m", {**checkpoint_files.LLAMA, "hidden_size": 16}, checkpoint_files.tensors()
    )
    with pytest.raises(ValueError) as caught:
        jaxlm.load(folder)
    assert str(caught.value).startswith(f"{folder}: the weights do not match config.json. misshapen: 21 (model.embed")


def test_load_says_what_it_did_not_read(tmp_path):
    arrays = {**checkpoint_files.tensors(checkpoint_files.GEMMA), "vision_tower.a.weight": np.zeros(2, np.float32)}
    assert jaxlm.load(checkpoint_files.folder(tmp_path / "m", checkpoint_files.GEMMA, arrays)).ignored == [
        "vision_tower.a.weight"
    ]
