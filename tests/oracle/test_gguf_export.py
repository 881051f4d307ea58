"""GGUF files that `export` writes, in llama.cpp: log-probabilities of every family and RoPE type, texts, token ids; and
quantized blocks beside those of llama.cpp's package gguf."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.llama_cpp import LlamaCpp, llama_cpp
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import FULL, SLIDING, tiny
from helpers.varied_text import texts

import jaxlm
from jaxlm.checkpoint import gguf_types, gguf_writer
from jaxlm.cli.common import STORIES

pytestmark = pytest.mark.oracle
SIZES = {"vocab_size": 157, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 4096}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
WINDOWS = {"sliding_window": 24}
GEMMA3 = {"query_pre_attn_scalar": 32, **WINDOWS, "num_hidden_layers": 7,
          "layer_types": [*[SLIDING] * 5, FULL, SLIDING]}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", {}),
    "llama, tied": ("llama3", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama3", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama, linear": ("llama3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen3": ("qwen3", {}),
    "qwen3, yarn": ("qwen3", {"rope_theta": 1e6, "rope_scaling": YARN}),
    "olmo2": ("olmo2", {"hidden_size": 128}),
    "olmo3": ("olmo3", {"hidden_size": 128, **WINDOWS, "num_hidden_layers": 5,
                        "layer_types": [SLIDING, SLIDING, SLIDING, FULL, SLIDING], "rope_scaling": YARN}),
    "olmo3, other layers": ("olmo3", {"hidden_size": 128, **WINDOWS, "layer_types": [SLIDING, FULL]}),
    "smollm3": ("smollm3", {"hidden_size": 128, "num_hidden_layers": 5, "no_rope_layers": None,
                            "rope_scaling": YARN}),
    "gemma3": ("gemma3", {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3, other layers": ("gemma3", {**GEMMA3, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2}),
}  # fmt: skip
# Of log-probabilities. float32 products in another order: the worst seen is 7e-5. llama.cpp looks GELU up in a table of
# float16 on CPU, which rounds to 11 bits: the worst seen is 2e-3 for Gemma, and 4e-4 if jaxlm rounds there too.
LIMIT, GELU_LIMIT, FAULT = 5e-4, 1e-2, 1.0
PROMPTS = (6, 200)


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaCpp]:
    with llama_cpp() as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of ASCII letters only: llama.cpp has no log-probabilities for a part of a letter."""
    from tokenizers.pre_tokenizers import ByteLevel

    found = tokenizer_of(TEMPLATE)
    found.hf.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return found


def built(case: str, tokenizer: Any) -> jaxlm.Model:
    family, fields = CASES[case]
    return replace(tiny(family, **{**SIZES, **fields}), tokenizer=tokenizer)


def distance(model: jaxlm.Model, path: Path, llama: LlamaCpp) -> float:
    """The largest difference of the ten best log-probabilities after a few prompts."""
    prompts = np.random.default_rng(0).integers(10, 150, PROMPTS)
    llama.load(path, context=512)
    found = [llama.complete(prompt.tolist(), 1, probabilities=10) for prompt in prompts]
    logits, _ = model.forward(prompts, model.weights)
    ours = np.asarray(jax.nn.log_softmax(logits[:, -1], axis=-1))
    # There are none for a special token, which has no text.
    pairs = [(row, answer["completion_probabilities"][0]) for row, answer in zip(ours, found)
             if answer.get("completion_probabilities")]  # fmt: skip
    assert len(pairs) > len(prompts) // 2
    return max(abs(float(row[best["id"]]) - best["logprob"]) for row, step in pairs for best in step["top_logprobs"])


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities(case, tokenizer, llama, tmp_path):
    model = built(case, tokenizer)
    jaxlm.export(model, tmp_path / "model.gguf", type="f32")
    limit = GELU_LIMIT if "gemma3" in case else LIMIT
    assert distance(model, tmp_path / "model.gguf", llama) < limit


def wrongly(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plants a fault of other converters."""
    if case == "llama":
        monkeypatch.setattr(gguf_writer, "HEADS_IN_PAIRS", ())
    elif case == "gemma3":
        encoded = gguf_writer._encoded
        monkeypatch.setattr(gguf_writer, "_encoded", lambda *args: encoded(*args[:-1], 0.0))
    else:
        factors = gguf_writer.rope_factors
        kept = gguf_writer.entries

        def entries(*args: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gguf_writer, "rope_factors", lambda cfg: np.ones_like(factors(cfg)))
                return kept(*args)

        monkeypatch.setattr(gguf_writer, "entries", entries)


@pytest.mark.parametrize("case", ["llama", "llama 3.1", "gemma3"])
def test_planted_faults_are_seen(case, tokenizer, llama, tmp_path, monkeypatch):
    """The row order of q and k, factors of frequencies that are all 1, and norms without their 1."""
    model = built(case, tokenizer)
    wrongly(case, monkeypatch)
    jaxlm.export(model, tmp_path / "model.gguf", type="f32")
    assert distance(model, tmp_path / "model.gguf", llama) > FAULT


# The story model


@pytest.fixture(scope="module")
def stories() -> jaxlm.Model:
    return jaxlm.load(STORIES, dtype="float32")


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_text_of_the_story_model(kind, stories, llama, tmp_path):
    """Its weights are bfloat16: both files hold all of them."""
    jaxlm.export(stories, tmp_path / "model.gguf", type=kind)
    llama.load(tmp_path / "model.gguf", context=256)
    prompt = "Once upon a time"
    found, ids = llama.complete(prompt)["tokens"], stories.tokenizer.encode(prompt)
    logits, _ = stories.forward([[*ids, *found]], stories.weights)
    assert len(found) == 64
    assert logits[0, len(ids) - 1 : -1].argmax(axis=-1).tolist() == found


def test_token_ids_of_the_story_model(stories, llama, tmp_path):
    """Of texts in many scripts. llama.cpp drops nothing and adds BOS, as the tokenizer does."""
    jaxlm.export(stories, tmp_path / "model.gguf")
    llama.load(tmp_path / "model.gguf", context=256)
    found = [text for text in texts(None)[::97] if text]
    assert llama.tokenize(found) == stories.tokenizer.hf(found)["input_ids"]


def test_a_file_that_is_cut_short_is_refused(stories, tmp_path):
    """The tests above would see a file that llama.cpp does not load."""
    jaxlm.export(stories, tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with llama_cpp() as running, pytest.raises(RuntimeError, match=r"status 1: (?s:.*)not within the file bounds"):
        running.load(tmp_path / "model.gguf")


# The package gguf


@pytest.mark.parametrize("name", gguf_types.QUANTIZABLE)
def test_blocks_equal_those_of_gguf_bit_for_bit(name):
    """Values of every size, halves of a step, zeros, and two values of the same magnitude."""
    import gguf

    values = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
    values *= np.exp(np.linspace(-12, 9, 512, dtype=np.float32))[:, None]
    values[:9] = np.random.default_rng(1).integers(-126, 126, (9, 256)) + 0.5  # halves of a step of 1 in Q8_0
    values[:9, ::32] = 127
    values[9] = 0
    values[10, ::2] = -values[10, 1::2]
    values[11] = 1e-30
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(gguf_types.quantize(name, values), theirs)


def test_the_package_reads_what_was_written(stories, tmp_path):
    import gguf

    jaxlm.export(stories, tmp_path / "model.gguf", type="q8_0")
    theirs = gguf.GGUFReader(tmp_path / "model.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, stories.config.L)
    known = {name for found in names.mapping.values() for name in (f"{found[1]}.weight",)}
    assert {tensor.name for tensor in theirs.tensors} <= known
    assert len(theirs.tensors) == 2 + 9 * stories.config.L
    for key, value in {"general.architecture": "llama", "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
                       "general.quantization_version": gguf.GGML_QUANT_VERSION, "llama.block_count": stories.config.L,
                       "llama.rope.freq_base": 10_000.0, "tokenizer.ggml.pre": "gpt-2"}.items():  # fmt: skip
        assert theirs.fields[key].contents() == value
    embed = np.asarray(stories.weights["embed"])
    stored = next(tensor for tensor in theirs.tensors if tensor.name == "token_embd.weight")
    np.testing.assert_array_equal(stored.data, gguf.quants.quantize(embed, gguf.GGMLQuantizationType.Q8_0))
