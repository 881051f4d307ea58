"""GGUF files: values, types, names, configs, split files, and every refusal. Comparisons with llama.cpp's package gguf
and with transformers are in oracle/test_gguf_oracle.py."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from helpers.gguf_writer import (
    BF16,
    F16,
    F32,
    Q4_0,
    Q8_0,
    Raw,
    content,
    header,
    metadata_of,
    rope_factors,
    text,
    tiny_file,
    write,
    write_split,
)
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import CONFIGS, tiny

import jaxlm
from jaxlm import models
from jaxlm.checkpoint import gguf, gguf_models, gguf_sampling, safetensors
from jaxlm.cli import main

# llama.cpp has no key for Gemma 3's query scale, which follows from the head width.
FIELDS: dict[str, dict[str, Any]] = {
    **{family: {} for family in CONFIGS},
    "gemma3": {"query_pre_attn_scalar": 20},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},  # every fourth layer has no RoPE
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def assert_equal(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance)


# Values


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_values_and_config_of_every_family(family, tied, tmp_path):
    fields = {**FIELDS[family], "tie_word_embeddings": tied}
    path = write(tmp_path / "model.gguf", *tiny_file(family, **fields))
    model, expected = jaxlm.load(path), tiny(family, **fields)
    assert model.config == expected.config
    assert model.dtype == np.float32
    # Gemma's norms are written as w + 1 in float32.
    assert_equal(model.weights, expected.weights, tolerance=1e-6 if family == "gemma3" else 0.0)


@pytest.mark.parametrize(("kind", "auto"), [(F32, "float32"), (F16, "float16"), (BF16, "bfloat16"), (Q8_0, "bfloat16")])
def test_the_type_of_the_file_is_kept_and_a_quantized_file_may_be_bfloat16(kind, auto, tmp_path):
    path = write(tmp_path / "model.gguf", *tiny_file("llama3", kind, **WIDE))
    model = jaxlm.load(path, dtype="bfloat16" if kind == Q8_0 else "auto")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.weights)} == {auto}
    exact = jaxlm.load(path, dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(exact.weights)} == {"float32"}
    assert_equal(model.weights, jax.tree.map(lambda leaf: leaf.astype(auto), exact.weights))


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    metadata, tensors = tiny_file("llama3", F16, **WIDE)
    tensors["output_norm.weight"] = Raw(F32, (64,), np.full(64, 1e6, np.float32).tobytes())
    with pytest.raises(ValueError, match=r"output_norm\.weight has values beyond float16"):
        jaxlm.load(write(tmp_path / "model.gguf", metadata, tensors))


def test_quantized_blocks_are_read_whole_where_a_mesh_divides_rows(tmp_path):
    """F is 96: over 2 devices a row of 3 blocks of 32 is cut within a block."""
    path = write(tmp_path / "model.gguf", *tiny_file("llama3", Q4_0, **{**WIDE, "intermediate_size": 96}))
    alone, sharded = (jaxlm.load(path, dtype="bfloat16", mesh=mesh) for mesh in ("model=1", "model=2"))
    assert sharded.weights["layers"][0]["down"].sharding.shard_shape((64, 96)) == (64, 48)
    assert_equal(alone.weights, sharded.weights)


@pytest.mark.parametrize("kind", [F32, Q8_0])
def test_export_writes_what_was_loaded(kind, tmp_path):
    path = write(tmp_path / "model.gguf", *tiny_file("gemma3", kind, **{**WIDE, "head_dim": 32}))
    model = jaxlm.load(path, dtype="bfloat16" if kind == Q8_0 else "auto")
    jaxlm.export(model, tmp_path / "out")
    again = jaxlm.load(tmp_path / "out")
    assert again.config == model.config
    assert_equal(again.weights, model.weights)
    assert main(["export", str(path), str(tmp_path / "lazy")]) == 0
    assert_equal(jaxlm.load(tmp_path / "lazy").weights, model.weights)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_are_the_scaling_of_llama_3(factor, tmp_path):
    metadata, tensors = tiny_file("llama3")
    factors = rope_factors(5e5, 12, factor, 1.0, 4.0, 8192)
    assert len(set(factors)) == 3, "no frequency is between the bands"
    metadata["llama.rope.freq_base"] = 5e5
    tensors["rope_freqs.weight"] = Raw(F32, (6,), factors.tobytes())
    rope = jaxlm.load(write(tmp_path / "model.gguf", metadata, tensors)).config.rope
    assert (rope.type, rope.factor, rope.original_context) == ("llama3", factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)


@pytest.mark.parametrize(
    "factors", [np.arange(1, 7), np.ones(6), np.ones(5), np.full(6, np.nan), np.array([1, 1, 1, 1, 1, -8])]
)
def test_other_rope_factors_are_refused(factors, tmp_path):
    metadata, tensors = tiny_file("llama3")
    tensors["rope_freqs.weight"] = Raw(F32, factors.shape, factors.astype(np.float32).tobytes())
    with pytest.raises(ValueError, match=r"model\.gguf: .*rope_freqs\.weight"):
        jaxlm.load(write(tmp_path / "model.gguf", metadata, tensors))


# Configs


def config_of(metadata: dict[str, Any], V: int, names: tuple[str, ...] = ()) -> Any:
    raw = gguf_models.hf_config(metadata, V, "output.weight" not in names, None)
    return models.family_of(raw["model_type"]).Config.from_hf(raw)


PUBLISHED = {
    "google-gemma-3-270m": "gemma3", "google-gemma-3-12b-it": "gemma3", "google-gemma-3-27b-it": "gemma3",
    "Qwen-Qwen3-0.6B": "qwen3", "Qwen-Qwen3-32B": "qwen3", "allenai-OLMo-2-0325-32B": "olmo2",
    "meta-llama-Meta-Llama-3-8B-Instruct": "llama",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_models(name, shared, tmp_path):
    """Metadata as llama.cpp writes it gives the Config of the published config.json."""
    raw = json.loads((shared / "configs" / f"{name}.json").read_text())
    expected = models.family_of(raw["model_type"]).Config.from_hf(raw)
    fields = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
              "max_position_embeddings": 131072, **raw["text_config"]} if "text_config" in raw else raw  # fmt: skip
    metadata = metadata_of(fields, PUBLISHED[name])
    metadata |= {"tokenizer.ggml.eos_token_id": 1}
    # The metadata has float32 numbers.
    path = write(tmp_path / "x.gguf", metadata, {"token_embd.weight": Raw(F32, (1,), b"\0" * 4)})
    read = gguf.read(path).metadata
    head = () if expected.tied else ("output.weight",)
    assert config_of(read, expected.V, head) == expected


def test_yarn(tmp_path):
    metadata, _ = tiny_file("qwen3")
    metadata |= {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
                 "qwen3.rope.scaling.original_context_length": 8192}  # fmt: skip
    rope = config_of(metadata, 199).rope
    assert (rope.type, rope.factor, rope.original_context) == ("yarn", 4.0, 8192)
    assert rope.amplitude == pytest.approx(0.1 * np.log(4) + 1)


def test_the_attention_factor_of_olmo3():
    """Only layers with full attention have yarn. The converter writes transformers' attention_factor as it is."""
    metadata, _ = tiny_file("olmo3")
    metadata |= {"olmo2.rope.scaling.type": "yarn", "olmo2.rope.scaling.factor": 4.0,
                 "olmo2.rope.scaling.original_context_length": 8192, "olmo2.rope.scaling.attn_factor": 1.3}  # fmt: skip
    config = config_of(metadata, 199)
    assert (config.rope.type, config.rope.amplitude) == ("yarn", 1.3)
    assert config.local_rope.type == "default"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"general.architecture": "mamba"},
        r"'mamba' is not supported.*llama, qwen3, olmo2, smollm3, gemma3",
    ),
    "no architecture": ({"general.architecture": 3}, "architecture 3 is not supported"),
    "an adapter": ({"general.type": "adapter"}, "not a model .*adapter"),
    "a key that is not known": ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
    "a missing key": ({"llama.context_length": None}, r"lack 1 \(llama\.context_length\)"),
    "values of another width": ({"llama.attention.value_length": 8}, "values of width 8"),
    "half of a head rotated": ({"llama.rope.dimension_count": 6}, "partial_rotary_factor"),
    "a rope type": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope'"),
    "another factor of attention": ({"llama.rope.scaling.attn_factor": 2.0}, r"attn_factor = 2\.0"),
    "no causal mask": ({"llama.attention.causal": False}, "causal"),
    "a width that is no number": ({"llama.embedding_length": "48"}, "hidden_size is '48'"),
    "heads that differ by layer": ({"llama.attention.head_count": [4, 2]}, r"num_attention_heads is \[4, 2\]"),
    "a sliding window": ({"llama.attention.sliding_window": 512}, "sliding_window = 512"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case, tmp_path):
    changes, message = REFUSED[case]
    metadata, tensors = tiny_file("llama3")
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    path = write(tmp_path / "model.gguf", metadata, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        jaxlm.load(path)
    assert "model.gguf" in str(caught.value)


def test_an_unknown_key_can_be_allowed_and_equal_values_of_all_layers_are_one(tmp_path):
    metadata, tensors = tiny_file("llama3")
    metadata |= {
        "llama.something": 8,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.attention.head_count": [4, 4],
        "llama.attention.head_count_kv": [2, 2],
    }
    path = write(tmp_path / "model.gguf", metadata, tensors)
    assert jaxlm.load(path, allow_fields=["llama.something"]).config.K == 2


def test_tensors_match_exactly_once(tmp_path):
    metadata, tensors = tiny_file("llama3")
    bias = {"blk.0.attn_q.bias": Raw(F32, (48,), b"\0" * 192)}
    short = {"blk.1.ffn_up.weight": Raw(F32, (71, 48), b"\0" * 71 * 48 * 4)}
    lacking = {name: raw for name, raw in tensors.items() if name != "blk.1.attn_v.weight"}
    cases = ({**tensors, **bias}, r"unexpected: 1 \(blk\.0\.attn_q\.bias"), (lacking, r"missing: 1 \(blk\.1\.attn_v")
    for changed, message in (*cases, ({**tensors, **short}, r"misshapen: 1 \(blk\.1\.ffn_up.*71, 48.*72, 48")):
        with pytest.raises(ValueError, match=message):
            jaxlm.load(write(tmp_path / "model.gguf", metadata, changed))


def test_a_type_that_is_not_read_is_named(tmp_path):
    metadata, tensors = tiny_file("llama3", **{**WIDE, "hidden_size": 256})
    tensors["blk.0.ffn_up.weight"] = Raw(16, (128, 256), b"\0" * 128 * 66)
    with pytest.raises(ValueError, match=r"IQ2_XXS.*It reads .*Q4_K.*another quantization") as caught:
        jaxlm.load(write(tmp_path / "model.gguf", metadata, tensors))
    assert "blk.0.ffn_up.weight" in str(caught.value)


# Files


def test_split_files_are_one_model(tmp_path):
    metadata, tensors = tiny_file("llama3")
    paths = write_split(tmp_path / "model.gguf", metadata, tensors)
    for name in (*paths, tmp_path):
        assert_equal(jaxlm.load(name).weights, tiny("llama3").weights)
    paths[1].rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 \(model-00002-of-00003\.gguf\) of 3 parts"):
        jaxlm.load(paths[0])
    write(paths[1], {}, {})
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf says that it is part 0"):
        jaxlm.load(paths[0])
    write(paths[1], {"split.no": 1, "split.count": 3}, {"output_norm.weight": tensors["output_norm.weight"]})
    with pytest.raises(ValueError, match="tensors instead of"):
        jaxlm.load(paths[0])
    with pytest.raises(ValueError, match=r"alone\.gguf says that it is part 0 \(from 0\) of 3"):
        jaxlm.load(paths[0].rename(tmp_path / "alone.gguf"))


def test_a_folder_with_one_model(tmp_path):
    metadata, tensors = tiny_file("llama3")
    path = write(tmp_path / "a.gguf", metadata, tensors)
    write(tmp_path / "mmproj-a.gguf", {}, {})
    model = jaxlm.load(tmp_path)
    assert_equal(model.weights, tiny("llama3").weights)
    assert model.checkpoint is not None
    assert model.checkpoint.folder == path
    write(tmp_path / "b.gguf", metadata, tensors)
    with pytest.raises(ValueError, match=r"holds 2 GGUF models \(a\.gguf, b\.gguf\)"):
        jaxlm.load(tmp_path)


def test_safetensors_beside_a_gguf_file_come_first(tmp_path):
    write(tmp_path / "model.gguf", *tiny_file("llama3", seed=1))
    jaxlm.export(tiny("llama3"), tmp_path / "hf", config=CONFIGS["llama3"])
    for file in (tmp_path / "hf").iterdir():
        file.rename(tmp_path / file.name)
    assert_equal(jaxlm.load(tmp_path).weights, tiny("llama3").weights)


def test_arguments_of_other_formats_are_refused(tmp_path):
    path = write(tmp_path / "model.gguf", *tiny_file("llama3"))
    for fields in ({"format": "hf"}, {"rope_factor": 8.0}, {"revision": "main"}, {"family": models.qwen3}):
        with pytest.raises(ValueError, match=str(next(iter(fields))).replace("_", "[-_]") + "|model.gguf"):
            jaxlm.load(path, **fields)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.gguf"):
        jaxlm.load(tmp_path / "absent.gguf")


def test_another_tokenizer_replaces_one_that_is_not_supported(tmp_path):
    metadata, tensors = tiny_file("llama3")
    metadata |= {"tokenizer.ggml.model": "t5", "tokenizer.ggml.eos_token_id": 3}
    path = write(tmp_path / "model.gguf", metadata, tensors)
    with pytest.raises(ValueError, match=r"'t5', is not supported .*--tokenizer FOLDER"):
        jaxlm.load(path)
    tokenizer_of(TEMPLATE).hf.save_pretrained(tmp_path / "tokenizer")
    model = jaxlm.load(path, tokenizer=tmp_path / "tokenizer")
    assert model.tokenizer is not None
    assert model.generation_config["eos_token_id"] == [3]


def test_info_reads_no_weights(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "model.gguf", *tiny_file("llama3", Q8_0, **WIDE))
    for module in (safetensors, gguf):
        monkeypatch.setattr(module, "read_into", lambda *args: pytest.fail("a weight was read"))
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "llama3"
    assert facts["weights"]["dtype"] == "bfloat16"
    assert facts["weights"]["counts"] == {"Q8_0": 16, "F32": 5}
    assert facts["weights"]["bytes"] == 2 * facts["parameters"]["total"]
    assert main(["info", str(path), "--json", "--quantize", "stored"]) == 0
    nbytes = json.loads(capsys.readouterr().out)["weights"]["bytes"]
    assert 1.0 < nbytes / facts["parameters"]["total"] < 1.1  # Q8_0 has 34 bytes for 32 numbers
    assert facts["context"] == 32768
    assert facts["tokenizer"] is None
    assert main(["info", str(path)]) == 0
    assert "in Q8_0 (16 tensors)" in capsys.readouterr().out.replace("\n│       ", " ")


def test_version_2_and_another_alignment(tmp_path):
    metadata, tensors = tiny_file("llama3")
    alignment = (4).to_bytes(4, "little") + (64).to_bytes(4, "little")  # uint32; the next one is uint64
    for value in (alignment, (10).to_bytes(4, "little") + (64).to_bytes(8, "little")):
        path = write(tmp_path / "model.gguf", {**metadata, "general.alignment": value}, tensors, version=2)
        assert_equal(jaxlm.load(path).weights, tiny("llama3").weights)


# Broken files

LONG = 2**63 - 1


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    """A metadata value that is an array with this number of items, whatever follows."""
    return (9).to_bytes(4, "little") + kind.to_bytes(4, "little") + count.to_bytes(8, "little") + data


def nested(depth: int) -> bytes:
    inner = b"".join((9).to_bytes(4, "little") + (1).to_bytes(8, "little") for _ in range(depth))
    return (9).to_bytes(4, "little") + inner


def one(kind: int, shape: tuple[int, ...], offset: int = 0, name: str = "a") -> tuple[str, int, tuple[int, ...], int]:
    return name, kind, shape, offset


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file, or is truncated"),
    "another magic": (b"GGML" + b"\0" * 100, "not a GGUF file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "version 1": (b"GGUF\x01\0\0\0" + b"\0" * 100, "version 1"),
    "big-endian": (b"GGUF\0\0\0\x03" + b"\0" * 100, "big-endian"),
    "no counts": (b"GGUF\x03\0\0\0", "ends within its header"),
    "too many keys": (header({}, [], num_keys=LONG), "9,223,372,036,854,775,807 keys"),
    "keys that are not there": (header({}, [], num_keys=1000), "ends within its header"),
    "too many tensors": (header({}, [], num_tensors=LONG), "tensors and 0 keys"),
    "tensors that are not there": (header({}, [], num_tensors=1000), "ends within its header"),
    "a long key": (header({}, [], num_keys=1) + LONG.to_bytes(8, "little"), "ends within its header"),
    "a type of metadata": (header({"a": (13).to_bytes(4, "little")}, []), "unknown type 13"),
    "a long text": (header({"a": (8).to_bytes(4, "little") + LONG.to_bytes(8, "little")}, []), "ends within"),
    "not UTF-8": (header({"a": (8).to_bytes(4, "little") + text(b"\xff")}, []), "not UTF-8"),
    "a long array of numbers": (header({"a": array(4, LONG // 4)}, []), "ends within its header"),
    "a long array of texts": (header({"a": array(8, 1000)}, []), "ends within its header"),
    "more texts than there can be": (header({"a": array(8, LONG)}, []), "more than 4,000,000 strings"),
    "texts that are not UTF-8": (header({"a": array(8, 1, text(b"\xff"))}, []), "not UTF-8"),
    "nested arrays": (header({"a": nested(9)}, []), "more than 4 levels"),
    "many arrays": (header({"a": array(9, LONG)}, []), "more than 4,000,000"),
    "a key twice": (header({"a": 1}, [], num_keys=2) + header({"a": 1}, [])[24:], "key 'a' twice"),
    "an alignment of 3": (header({"general.alignment": 3}, []), "general.alignment"),
    "an alignment of 0": (header({"general.alignment": 0}, []), "general.alignment"),
    "an alignment that is a text": (header({"general.alignment": "x"}, []), "general.alignment"),
    "5 axes": (header({}, [one(F32, (1, 1, 1, 1, 1))]) + b"\0" * 64, "5 axes"),
    "a type of tensor": (header({}, [one(99, (4,))]) + b"\0" * 64, "unknown type 99"),
    "a row of part of a block": (header({}, [one(Q8_0, (4, 33))]) + b"\0" * 999, "whole blocks of Q8_0"),
    "an odd offset": (header({}, [one(F32, (4,), 3)]) + b"\0" * 64, "cannot begin at 3"),
    "past the end": (header({}, [one(F32, (1000,))]) + b"\0" * 64, "cannot begin at 0"),
    "far past the end": (header({}, [one(F32, (4,), 1 << 62)]) + b"\0" * 64, "cannot begin"),
    "larger than memory": (header({}, [one(F32, (2**62, 2**62))]) + b"\0" * 64, "cannot begin at 0"),
    "overlap": (header({}, [one(F32, (16,)), one(F32, (16,), 32, "b")]) + b"\0" * 256, "'a' and 'b' overlap"),
    "a tensor twice": (header({}, [one(F32, (8,)), one(F32, (8,), 32)]) + b"\0" * 256, "tensor 'a' twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case, tmp_path):
    data, message = BROKEN[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        gguf.read(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    sound = content(*tiny_file("llama3", hidden_size=16, head_dim=4, intermediate_size=8, vocab_size=8))
    path = tmp_path / "model.gguf"
    for length in range(0, len(sound), 61):
        path.write_bytes(sound[:length])
        with pytest.raises(ValueError, match=r"model\.gguf"):
            gguf.read(path)


def test_the_header_has_a_limit(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", *tiny_file("llama3"))
    monkeypatch.setattr(gguf, "HEADER", 1000)
    with pytest.raises(ValueError, match="exceeds 1,000 bytes"):
        gguf.read(path)


# Sampling parameters


def test_sampling_parameters_are_defaults_of_generation(tmp_path, caplog, capsys):
    metadata, tensors = tiny_file("llama3")
    recommended = {"temp": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "penalty_repeat": 1.1, "penalty_last_n": 64,
                   "mirostat": 0, "mirostat_tau": 5.0, "xtc_probability": 0.0, "xtc_threshold": 0.1}  # fmt: skip
    metadata |= {f"general.sampling.{key}": value for key, value in recommended.items()}
    path = write(tmp_path / "model.gguf", metadata, tensors)
    model = jaxlm.load(path)
    options = jaxlm.SamplingParams().resolve(model.generation_config)
    assert options.temperature == 0.7
    assert (options.top_k, options.top_p, options.min_p, options.repetition_penalty) == (20, 0.9, 0.05, 1.1)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["general.sampling.penalty_last_n"]
    assert main(["info", str(path)]) == 0
    assert "temperature 0.7, top_k 20" in capsys.readouterr().out
    jaxlm.export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {"do_sample": True, "temperature": 0.7, "top_k": 20}.items() <= written.items()


@pytest.mark.parametrize(
    ("recommended", "expected", "named"),
    [
        ({}, {}, []),
        ({"temp": 0.0}, {"do_sample": False, "temperature": 0.0}, []),
        ({"top_k": -1, "top_p": 1.0}, {"do_sample": True, "top_k": 0, "top_p": 1.0}, []),
        ({"penalty_repeat": 1.0, "penalty_last_n": 64}, {"do_sample": True, "repetition_penalty": 1.0}, []),
        ({"mirostat": 2, "mirostat_tau": 5.0}, {}, ["mirostat"]),
        ({"xtc_probability": 0.5, "sequence": "kpt", "new": 1}, {}, ["xtc_probability", "sequence", "new"]),
    ],
)
def test_what_sampling_parameters_stand_for(recommended, expected, named, caplog):
    metadata = {f"general.sampling.{key}": value for key, value in recommended.items()}
    assert gguf_sampling.generation_config({"general.name": "x", **metadata}) == expected
    text = ", ".join(f"general.sampling.{key}" for key in named)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ([text] if named else [])
