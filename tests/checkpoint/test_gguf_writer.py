"""GGUF files that `export` writes, read back: weights bit for bit, the config, the tokenizer, and every refusal.
Comparisons with llama.cpp are in oracle/test_gguf_export.py."""

import errno
import json
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_writer import rope_factors
from helpers.tiny_models import CONFIGS, FULL, SLIDING, from_config, tiny

import jaxlm
from jaxlm import exporting
from jaxlm.checkpoint import gguf, gguf_types, gguf_writer
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.gguf_types import dequantize, quantize
from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli import main
from jaxlm.nn import params

# Rows of whole blocks. GGUF has no key for Gemma 3's query scale, which follows from the head width.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FIELDS: dict[str, dict[str, Any]] = {
    **{family: {} for family in CONFIGS},
    "gemma3": {"query_pre_attn_scalar": 16},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},  # every fourth layer has no RoPE
}
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Slices so small that every tensor has several, the last one shorter."""
    monkeypatch.setattr(files, "SLICE", 1000)


def wide(family: str, dtype: Any = jnp.float32, **fields: Any) -> jaxlm.Model:
    return tiny(family, dtype=dtype, **{**WIDE, **FIELDS[family], **fields})


def assert_equal(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance)


# Weights and config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_and_config_come_back(family, dtype, tied, tmp_path):
    model = wide(family, dtype, tie_word_embeddings=tied)
    done = jaxlm.export(model, tmp_path / "model.gguf")
    again = jaxlm.load(tmp_path / "model.gguf")
    assert again.config == model.config
    # Gemma's norms are stored as w + 1: float32 rounds that by up to 2**-23 where it is above 2.
    exact = family != "gemma3" or dtype != "float32"
    assert_equal(again.weights, model.weights, 0.0 if exact else 2**-23)
    file = gguf.read(tmp_path / "model.gguf")
    assert done[:3] == (tmp_path / "model.gguf", len(file.tensors), sum(t.nbytes for t in file.tensors.values()))
    assert {t.dtype for t in file.tensors.values() if len(t.shape) == 1} == {"F32"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_is_converted_tensor_by_tensor(family, tmp_path):
    """From file to file, as the command does; and from one GGUF file to another."""
    raw = {**CONFIGS[family], **WIDE, **FIELDS[family]}
    model = from_config(raw, dtype=jnp.bfloat16)
    jaxlm.export(model, tmp_path / "model", config=raw)
    for source, out in (("model", "1/model.gguf"), ("1/model.gguf", "2/model.gguf")):
        jaxlm.export(exporting.open_model(ModelSource(tmp_path / source)), tmp_path / out)
    assert_equal(jaxlm.load(tmp_path / "1/model.gguf").weights, model.weights)
    assert (tmp_path / "2/model.gguf").read_bytes() == (tmp_path / "1/model.gguf").read_bytes()


def test_stacked_layers(tmp_path):
    model = wide("qwen3")
    jaxlm.export(replace(model, weights=params.stack(model.weights)), tmp_path / "model.gguf")
    assert_equal(jaxlm.load(tmp_path / "model.gguf").weights, model.weights)


@pytest.mark.parametrize(("kind", "type"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("bf16", "BF16"), ("f16", "F16")])
@pytest.mark.parametrize("tied", [False, True])
def test_types(kind, type, tied, tmp_path):
    """The head, or the embedding that is tied to it, has 8 bits in a file of 4."""
    model = wide("llama3", tie_word_embeddings=tied)
    jaxlm.export(model, tmp_path / "model.gguf", type=kind)
    file = gguf.read(tmp_path / "model.gguf")
    head = "token_embd.weight" if tied else "output.weight"
    for name, tensor in file.tensors.items():
        wanted = "F32" if "norm" in name else "Q8_0" if (name, type) == (head, "Q4_0") else type
        assert tensor.dtype == wanted, name
    assert file.metadata["general.file_type"] == {"Q8_0": 7, "Q4_0": 2, "BF16": 32, "F16": 1}[type]
    assert ("general.quantization_version" in file.metadata) == (type[0] == "Q")
    again = jaxlm.load(tmp_path / "model.gguf", dtype="float32")
    # A value of 4 bits is off by half of a step, an eighth of the largest one in its block.
    worst = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (again.weights, model.weights))))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(model.weights))
    assert worst < largest * {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "BF16": 2**-8, "F16": 2**-11}[type]


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama3", {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}),
    "linear": ("llama3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_theta": 1e6, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}),
    "layers with full attention": ("olmo3", {"rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}}),
    "global layers": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "local layers": ("gemma3", {"rope_local_base_freq": 2e4}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_rope_comes_back(case, tmp_path):
    family, fields = ROPES[case]
    model = wide(family, **fields)
    jaxlm.export(model, tmp_path / "model.gguf")
    assert jaxlm.load(tmp_path / "model.gguf").config == model.config


def test_rope_factors_divide_frequencies():
    """Those of Llama 3.1, by Meta's formula."""
    cfg = wide("llama3", **{**ROPES["llama3"][1], "head_dim": 64}).config
    np.testing.assert_allclose(gguf_writer.rope_factors(cfg), rope_factors(5e5, 64, 32.0, 1.0, 4.0, 8192), rtol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ([SLIDING] * 5 + [FULL] + [SLIDING] * 2, None),
        ([SLIDING, FULL] * 2, 2),
        ([SLIDING] * 3, 4),
        ([FULL] * 3, None),
    ],
)
def test_windows_of_gemma(kinds, pattern, tmp_path):
    model = wide("gemma3", num_hidden_layers=len(kinds), layer_types=kinds)
    jaxlm.export(model, tmp_path / "model.gguf")
    file = gguf.read(tmp_path / "model.gguf").metadata
    assert file.get("gemma3.attention.sliding_window_pattern") == pattern
    assert file.get("gemma3.attention.sliding_window") == (5 if SLIDING in kinds else None)
    assert jaxlm.load(tmp_path / "model.gguf").config == model.config


@pytest.mark.parametrize(("period", "pattern"), [(4, None), (2, 2)])
def test_windows_of_olmo3(period, pattern, tmp_path):
    kinds = ([SLIDING] * (period - 1) + [FULL]) * (4 // period)
    model = wide("olmo3", num_hidden_layers=4, layer_types=kinds)
    jaxlm.export(model, tmp_path / "model.gguf")
    file = gguf.read(tmp_path / "model.gguf").metadata
    assert file.get("olmo2.attention.sliding_window_pattern") == pattern  # llama.cpp's default is 4
    assert file["olmo2.attention.sliding_window"] == 5
    assert jaxlm.load(tmp_path / "model.gguf").config == model.config


NO_KEYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a query scale": ("gemma3", {"query_pre_attn_scalar": 12}, r"scale is 0\.28.*, not 0\.25"),
    "irregular windows": ("gemma3", {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING]}, "windows is"),
    "another period of layers without RoPE": (
        "smollm3", {"no_rope_layer_interval": 2}, r"rotated is \(True, False, True, False\)"
    ),
    "windows of SmolLM3": ("smollm3", {"use_sliding_window": True, "sliding_window": 7}, "windows is"),
    "scaling of RoPE beside windows": ("olmo3", {"rope_parameters": {
        FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "local_rope is"),
    "bands of frequencies": ("llama3", {"head_dim": 64, "rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}, "rope_freqs|rope is"),
    "a scale of yarn": ("qwen3", {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}}, "rope is"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_KEYS)
def test_a_config_that_gguf_cannot_express_is_refused(case, tmp_path):
    family, fields, message = NO_KEYS[case]
    with pytest.raises(ValueError, match=message):
        jaxlm.export(wide(family, **fields), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_family_that_gguf_does_not_know(tmp_path):
    model = wide("qwen3")
    model = replace(model, family=SimpleNamespace(**vars(model.family)))
    with pytest.raises(ValueError, match=r"qwen3 has no architecture in GGUF .*export to a folder"):
        jaxlm.export(model, tmp_path / "model.gguf")


# Blocks


@pytest.mark.parametrize("name", gguf_types.QUANTIZABLE)
def test_blocks_hold_their_values(name):
    """Of values that a block has, nothing is lost: the second time gives the same bytes. Others are off by half a
    step (in 4 bits, the end of the scale without a number by a whole one)."""
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    values[2] = 0
    values[3, ::2] = -values[3, 1::2]
    raw = quantize(name, values)
    back = dequantize(name, raw)
    step = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True) / {"Q8_0": 127, "Q4_0": 8}[name]
    error = np.abs(back - values).reshape(-1, 32)
    assert (error <= step * {"Q8_0": 0.51, "Q4_0": 1.01}[name]).all()  # the scale itself is rounded to float16
    assert not back[2].any()
    np.testing.assert_array_equal(dequantize(name, quantize(name, back)), back)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_values_that_no_block_holds_are_refused(bad, tmp_path):
    model = wide("llama3")
    model.weights["layers"][1]["up"] = model.weights["layers"][1]["up"].at[3, 2].set(bad)
    with pytest.raises(ValueError, match=r"layers\.1\.up has values that are not finite, or too large for Q8_0"):
        jaxlm.export(model, tmp_path / "model.gguf", type="q8_0")
    assert not list(tmp_path.iterdir())


def test_rows_of_part_of_a_block(tmp_path):
    with pytest.raises(ValueError, match=r"embed has rows of 48 elements.* whole blocks of 32.* such as f16"):
        jaxlm.export(tiny("llama3"), tmp_path / "model.gguf", type="q8_0")


def test_values_beyond_float16(tmp_path):
    model = wide("llama3")
    model.weights["embed"] = model.weights["embed"].at[3, 2].set(1e5)
    with pytest.raises(ValueError, match=r"embed has values beyond float16.*--type bf16"):
        jaxlm.export(model, tmp_path / "model.gguf", type="f16")
    assert not list(tmp_path.iterdir())


# The file


def test_memory_is_a_slice(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SLICE", 1 << 16)
    model = wide("llama3", vocab_size=40_000)
    assert model.weights["embed"].nbytes > 1e7
    tracemalloc.start()
    try:
        for kind in gguf_writer.CHOICES:
            jaxlm.export(model, tmp_path / f"{kind}.gguf", type=kind)
            source = exporting.open_model(ModelSource(tmp_path / "f32.gguf"))
            jaxlm.export(source, tmp_path / f"{kind} from a file.gguf", type=kind)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_what_is_replaced(tmp_path):
    model, out = wide("llama3"), tmp_path / "new" / "model.gguf"
    jaxlm.export(model, out)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"model\.gguf exists already: --force"):
        jaxlm.export(model, out, type="q8_0")
    assert out.read_bytes() == before
    jaxlm.export(model, out, type="q8_0", force=True)
    assert len(out.read_bytes()) < len(before)
    with pytest.raises(FileExistsError, match=r"is a file that this model was loaded from"):
        jaxlm.export(jaxlm.load(out), out, force=True)
    (tmp_path / "text.gguf").write_text("my notes")
    (tmp_path / "folder.gguf").mkdir()
    for name, message in (("text.gguf", "exists and is not a GGUF file"), ("folder.gguf", "is not a file")):
        with pytest.raises(FileExistsError, match=message):
            jaxlm.export(model, tmp_path / name, force=True)


def test_what_appears_while_a_file_is_written_stays(tmp_path, monkeypatch):
    out, write = tmp_path / "model.gguf", gguf_writer.write

    def slow(*args):
        write(*args)
        out.write_text("my notes")

    monkeypatch.setattr(gguf_writer, "write", slow)
    with pytest.raises(FileExistsError, match="exists and is not a GGUF file"):
        jaxlm.export(wide("llama3"), out)
    assert out.read_text() == "my notes"


@pytest.mark.parametrize(("error", "message"), [
    (KeyboardInterrupt("stop"), "stop"), (OSError(errno.ENOSPC, "No space left on device"), "is full, and nothing"),
])  # fmt: skip
def test_a_failure_leaves_the_old_file(error, message, tmp_path, monkeypatch):
    model, out = wide("llama3"), tmp_path / "model.gguf"
    jaxlm.export(model, out)
    before = out.read_bytes()

    def counted(parts, advance):
        yield next(iter(parts))
        raise error

    monkeypatch.setattr(gguf_writer, "counted", counted)
    with pytest.raises(type(error), match=message):
        jaxlm.export(model, out, type="q8_0", force=True)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_arguments_that_do_not_apply(tmp_path):
    model = wide("llama3")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("model.gguf", {"dtype": "bfloat16"}, r"--dtype bfloat16 .* applies to a folder.*--type \(type=\) of f32, f16"),
        ("folder", {"type": "f16"}, r"--type f16 .* applies to a GGUF file.*ends in \.gguf.*--dtype"),
        ("model.gguf", {"type": "q4_k_m"}, "unknown type 'q4_k_m': choose one of f32, f16, bf16, q8_0, q4_0"),
        ("model.gguf", {"format": "gguf"}, "unknown format 'gguf'.*ends in .gguf selects GGUF"),
        ("model.gguf", {"config": {}}, "config= applies to a folder"),
    ]
    for name, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            jaxlm.export(model, tmp_path / name, **arguments)
    assert not list(tmp_path.iterdir())


def test_without_a_tokenizer(tmp_path):
    done = jaxlm.export(wide("llama3"), tmp_path / "model.gguf")
    assert done.notes == ("the model has no tokenizer: llama.cpp takes token ids only",)
    assert jaxlm.load(tmp_path / "model.gguf").tokenizer is None


# The command


@pytest.fixture
def folder(tmp_path):
    jaxlm.export(wide("llama3"), tmp_path / "in", config={**CONFIGS["llama3"], **WIDE})
    return tmp_path / "in"


def test_export_on_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    assert main(["export", str(folder), str(out), "--type", "q8_0"]) == 0
    said = capsys.readouterr().err
    assert "the model has no tokenizer" in said
    assert f"wrote {out}: 21 tensors, 0.1 MB\n" in said
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["counts"] == {"Q8_0": 16, "F32": 5}
    for argv, message in (
        (["export", str(folder), str(tmp_path / "out"), "--type", "q8_0"], "applies to a GGUF file"),
        (["export", str(folder), str(tmp_path / "x.gguf"), "--dtype", "float32"], "applies to a folder"),
    ):
        assert main(argv) == 1
        assert message in capsys.readouterr().err
    assert main(["export", str(folder), str(out), "--outtype", "q8_0"]) == 2
    assert "--type" in capsys.readouterr().err
