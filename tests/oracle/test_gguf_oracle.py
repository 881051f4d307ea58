"""GGUF files written with llama.cpp's package gguf: blocks, names and values as it has them, and the logits of
transformers' models with its values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import FAMILIES
from oracle import reference
from oracle.reference import FAULT, LIMIT

import jaxlm
from jaxlm.checkpoint import gguf as gguf_format
from jaxlm.checkpoint import gguf_models, gguf_types, hf

pytestmark = pytest.mark.oracle
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 32, "tie_word_embeddings": False}  # fmt: skip
OWN = {"gemma3": {"query_pre_attn_scalar": 32, "tie_word_embeddings": True, "num_hidden_layers": 6,
                  "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
       "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None}}  # fmt: skip
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": 1.2,
        "rope_theta": 5e5}  # fmt: skip
# Types in files that are common: matrices of other types follow each other.
KINDS = ("Q4_0", "Q8_0", "Q5_1", "Q4_1", "Q5_0", "F16", "BF16", "MXFP4", "F32")


def permuted(w: np.ndarray, H: int) -> np.ndarray:
    """The rows of q or k ordered by rotated pairs, as convert_hf_to_gguf.py does for llama."""
    return w.reshape(len(w) // H, 2, H // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def unpermuted(w: np.ndarray, H: int) -> np.ndarray:
    return w.reshape(len(w) // H, H // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write(oracle: Any, family: str, path: Path, kinds: tuple[str, ...]) -> Path:
    """Writes a model of transformers as convert_hf_to_gguf.py does, and gives the model the values of the file."""
    import gguf
    import torch

    architecture, cfg = {"llama3": "llama", "olmo3": "olmo2"}.get(family, family), oracle.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    rope = cfg.rope_parameters.get("full_attention", cfg.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(cfg.head_dim if hasattr(cfg, "head_dim") and cfg.head_dim else SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    if family in ("olmo3", "gemma3"):
        writer.add_sliding_window(cfg.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in cfg.layer_types])
    if rope["rope_type"] == "llama3":
        radians = 1.0 / rope["rope_theta"] ** (torch.arange(0, SIZES["head_dim"], 2).float() / SIZES["head_dim"])
        writer.add_tensor("rope_freqs.weight", (radians / reference._rotary(oracle).inv_freq).numpy())
    if rope["rope_type"] == "yarn":  # as for Olmo3ForCausalLM
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, cfg.num_hidden_layers)
    matrices = 0
    for name, parameter in oracle.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        value = parameter.numpy()
        turned = family in ("llama3", "smollm3") and ("q_proj" in name or "k_proj" in name)
        value = permuted(value, SIZES["head_dim"]) if turned else value
        shift = np.float32(family == "gemma3" and "norm" in name)
        kind = gguf.GGMLQuantizationType["F32" if value.ndim == 1 else kinds[matrices % len(kinds)]]
        matrices += value.ndim > 1
        raw = gguf.quants.quantize(value + shift, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), raw, raw_dtype=kind)
        back = gguf.quants.dequantize(raw, kind) - shift
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(unpermuted(back, SIZES["head_dim"]) if turned else back))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def built(family: str, path: Path, kinds: tuple[str, ...] = KINDS, **fields: Any) -> tuple[Any, jaxlm.Model]:
    sizes = {**SIZES, **OWN.get(family, {}), **fields}
    if "olmo" in family:
        sizes.pop("head_dim")
    oracle = reference.build(family, **sizes)
    return oracle, jaxlm.load(write(oracle, family, path, kinds), dtype="float32")


def compare(oracle: Any, model: jaxlm.Model) -> float:
    """The distance of logits, for positions near 0 and, in the same row, past a window and an original context."""
    reference.share_frequencies(oracle, model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, reference.V, (2, 24))
    pos = np.concatenate([np.arange(12), np.arange(9000, 9012)])[None].repeat(2, 0)
    ours, _ = reference.forward(model, tokens, pos)
    return reference.distance(ours, reference.logits(oracle, tokens, pos))


CASES = [(family, {}) for family in FAMILIES] + [
    ("llama3", {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_logits_equal_those_of_transformers(family, fields, tmp_path):
    oracle, model = built(family, tmp_path / "model.gguf", **fields)
    assert model.dtype == np.float32
    if "rope_parameters" in fields:
        scaled = fields["rope_parameters"].get("full_attention", fields["rope_parameters"])
        assert (model.config.rope.type, model.config.rope.factor) == (scaled["rope_type"], scaled["factor"])
    assert compare(oracle, model) < LIMIT


def test_planted_faults_are_seen(tmp_path, monkeypatch):
    """The row order of q and k, and Gemma's norms."""
    llama, gemma = (built(family, tmp_path / f"{family}.gguf")[0] for family in ("llama3", "gemma3"))
    with monkeypatch.context() as patch:
        patch.setitem(gguf_models.ARCHITECTURES, "llama", gguf_models.Architecture("llama", "LlamaForCausalLM"))
        assert compare(llama, jaxlm.load(tmp_path / "llama3.gguf", dtype="float32")) > FAULT
    with monkeypatch.context() as patch:
        loadable = gguf_models.loadable
        patch.setattr(gguf_models, "loadable", lambda tensors, shift: loadable(tensors, 0.0))
        assert compare(gemma, jaxlm.load(tmp_path / "gemma3.gguf", dtype="float32")) > FAULT


@pytest.mark.parametrize("name", gguf_types.READABLE)
def test_blocks_equal_those_of_gguf_bit_for_bit(name):
    """Random bytes: every number and scale, infinite and NaN ones too, and scales that make zeros and subnormals."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block = gguf_types.BY_NAME[name]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (64, 16 * block.nbytes)).astype(np.uint8)
    for row, scale in enumerate((0x0000, 0x8000, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0x3C00)):
        raw[row].view(np.uint16)[:] = scale
    with np.errstate(all="ignore"):
        # The package does not read F64.
        theirs = raw.view(np.float64).astype(np.float32) if name == "F64" else gguf.quants.dequantize(raw, kind)
    ours = gguf_types.dequantize(name, raw)
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(theirs, np.float32).view(np.uint32))


def test_types_have_the_sizes_of_gguf():
    import gguf

    for number, block in gguf_types.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == block


@pytest.mark.parametrize("name", gguf_types.READABLE)
@pytest.mark.parametrize("columns", [(0, 512), (0, 256), (256, 256), (37, 100), (300, 212)])
def test_a_part_of_a_tensor_equals_that_part_of_the_whole(name, columns, tmp_path):
    block = gguf_types.BY_NAME[name]
    raw = np.random.default_rng(2).integers(0, 256, (6, 512 // block.elements * block.nbytes)).astype(np.uint8)
    path = tmp_path / "x"
    path.write_bytes(b"abc" + raw.tobytes())
    tensor = hf.Tensor("x", path, "F32", (6, 512), 3, raw.size, name, 0.0)
    whole = gguf_types.dequantize(name, raw)
    out = np.empty((3, columns[1]), np.float32)
    hf.read_block(tensor, out, 2, columns[0])
    np.testing.assert_array_equal(out, whole[2:5, columns[0] : sum(columns)])


def test_the_reader_agrees_with_gguf(tmp_path):
    import gguf

    built("gemma3", path := tmp_path / "model.gguf")
    ours, theirs = gguf_format.read(path), gguf.GGUFReader(path)
    assert {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in theirs.tensors
    } == {name: (t.dtype, t.shape, t.offset, t.nbytes) for name, t in ours.tensors.items()}
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == pytest.approx(field.contents())
