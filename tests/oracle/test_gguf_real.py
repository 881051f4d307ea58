"""Real GGUF files, in the folder that JAXLM_REAL_MODELS names: SmolLM2-135M-Instruct.Q4_1.gguf (Llama),
gemma-3-270m.Q4_K_M.gguf, and gemma-3-tokenizer/ (tokenizer.json)."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.varied_text import CODE, EMOJI, NEARLY, SPACES, SPECIAL, WORDS
from oracle import reference
from oracle.test_gguf_oracle import unpermuted

import jaxlm
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import import_transformers

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
SMOLLM2, GEMMA3 = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf"
LINES = 20_000
MARKS = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<unused12>", "<table>", "<0x0A>", "▁", "▁▁", "Ġ", "<mask>",
         "<|im_end|>", "<repo_name>", "<|endoftext|>"]  # fmt: skip


def lines() -> Iterator[str]:
    """Lines of code, and of words in many scripts, runs of whitespace, emoji, numbers and special tokens as text."""
    code = [line for path in sorted(CODE.rglob("*.py")) for line in path.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    parts = (
        SPACES * 2 + EMOJI + WORDS * 2 + NEARLY + SPECIAL + MARKS + ["0", "12", "345", "31415", "  ", "    ", "\n\n\n"]
    )
    yield from rng.sample(code, min(len(code), LINES // 4))
    while True:
        yield "".join(rng.choice(parts) + rng.choice([" ", " ", "", "\n"]) for _ in range(rng.randrange(1, 30)))


def compare_ids(ours: Tokenizer | None, theirs: Any) -> None:
    found = [line for line, _ in zip(lines(), range(LINES))]
    assert ours is not None
    a, b = ours.hf(found)["input_ids"], theirs(found)["input_ids"]
    assert [line for line, x, y in zip(found, a, b) if x != y] == []
    assert [ours.decode(ids, skip_special=False) for ids in b[:2000]] == theirs.batch_decode(b[:2000])


def test_ids_of_gemma_3(real):
    ours = Tokenizer.load(real / GEMMA3)
    fast = import_transformers().PreTrainedTokenizerFast
    theirs = fast.from_pretrained(real / "gemma-3-tokenizer")
    compare_ids(ours, theirs)


def test_ids_of_smollm2(real):
    """Its published tokenizer is byte-level BPE over GPT-2's words with every digit a word."""
    from tokenizers import pre_tokenizers

    ours = Tokenizer.load(real / SMOLLM2)
    theirs = import_transformers().AutoTokenizer.from_pretrained(real, gguf_file=SMOLLM2)
    # transformers does not read tokenizer.ggml.pre.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    compare_ids(ours, theirs)
    assert ours is not None
    assert ours.stop_ids == (2,)


CONFIGS: dict[str, dict[str, Any]] = {
    SMOLLM2: {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
              "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 8192, "rope_theta": 1e5, "tie_word_embeddings": True},
    GEMMA3: {},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name, real, shared):
    """A transformers model with the values that the package gguf reads."""
    import gguf
    import torch
    import transformers

    raw = CONFIGS[name] or json.loads((shared / "configs" / "google-gemma-3-270m.json").read_text())
    config = transformers.AutoConfig.for_model(**raw)
    # In bfloat16, Gemma's factor of the embedding would be rounded.
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    oracle = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    architecture = {SMOLLM2: gguf.MODEL_ARCH.LLAMA, GEMMA3: gguf.MODEL_ARCH.GEMMA3}[name]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(real / name).tensors}
    for key, parameter in oracle.named_parameters():
        tensor = tensors[names.get_name(key, try_suffixes=(".weight",))]
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name == SMOLLM2 and ("q_proj" in key or "k_proj" in key):
            value = unpermuted(value, 64)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value - np.float32(name == GEMMA3 and "norm" in key)))
    model = jaxlm.load(real / name, dtype="float32")
    reference.share_frequencies(oracle, model)
    tokens = np.random.default_rng(0).integers(5, 40_000, (1, 40))
    pos = np.concatenate([np.arange(20), np.arange(7000, 7020)])[None]
    ours, _ = reference.forward(model, tokens, pos)
    assert reference.distance(ours, reference.logits(oracle, tokens, pos)) < reference.LIMIT
