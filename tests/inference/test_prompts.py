"""From prompts to ids, and the ids that end an answer. What is refused is read in test_generation.py."""

import json
from dataclasses import replace

import pytest
from helpers import tiny_files
from helpers.tiny_chat import SIZES, TEMPLATE, model_of, tokenizer_of

import jaxlm
from jaxlm.inference.prompts import DEFAULT_TOKENS, resolve_max_tokens, stop_ids, to_ids
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.models import llama3
from jaxlm.nn import Rope
from jaxlm.processing.tokenizer import Tokenizer

CONFIG = llama3.Config(**SIZES, L=1, rope=Rope(), context=400)


def test_stop_ids_follow_generation_config():
    tokenizer = tokenizer_of(TEMPLATE)
    end = tokenizer.convert_tokens_to_ids("<end>")  # by the word of the tokenizer, and of its template
    model = model_of(llama3, CONFIG, Tokenizer(tokenizer.hf, [3]))
    assert stop_ids(model, SamplingParams()) == {3, end}
    model.generation_config["eos_token_id"] = [5, 6]
    assert stop_ids(model, SamplingParams()) == {5, 6, end}
    assert replace(model, generation_config=None).generation_config == {}
    model = replace(model, generation_config={"eos_token_id": 7})
    assert stop_ids(model, SamplingParams(stop_token_ids=(8,))) == {7, 8, end}
    assert stop_ids(model, SamplingParams(ignore_eos=True)) == set()
    assert stop_ids(model, SamplingParams(ignore_eos=True, stop_token_ids=(8,))) == {8}
    model = replace(model, tokenizer=None)
    assert stop_ids(model, SamplingParams()) == {7}


def test_loaded_model_has_the_eos_ids_of_both_files(tmp_path):
    tiny_files.write(tmp_path)  # whose config.json says 257
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    model = jaxlm.load(tmp_path)
    assert model.generation_config["eos_token_id"] == [3, 4, 257]
    assert stop_ids(model, SamplingParams()) == {3, 4, 257}
    model.generation_config["eos_token_id"] = [4]
    assert 3 not in stop_ids(model, SamplingParams())


def test_text_parts_are_accepted_and_images_raise():
    model = model_of(llama3, CONFIG, tokenizer_of(TEMPLATE))
    plain = [{"role": "user", "content": "one two"}]
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert to_ids(model, [{"role": "user", "content": parts}], {}) == to_ids(model, plain, {})
    with pytest.raises(ValueError, match="images and other media are not supported yet"):
        jaxlm.generate(model, [{"role": "user", "content": [*parts, {"type": "image", "url": "a.png"}]}])


def test_resolve_max_tokens():
    model = model_of(llama3, CONFIG)
    assert resolve_max_tokens(model, [1] * 10, None) == DEFAULT_TOKENS
    assert resolve_max_tokens(model, [1] * 390, None) == 10
    assert resolve_max_tokens(model, [1] * 390, 10) == 10
    model.generation_config["max_new_tokens"] = 64
    assert resolve_max_tokens(model, [1] * 10, None) == 64
