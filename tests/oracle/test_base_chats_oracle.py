"""A base model that has learned chats, in transformers: it answers, and stops at the end of the turn."""

from pathlib import Path
from typing import Any

import pytest
from helpers import base_chats
from helpers.base_chats import ANSWERS, question
from helpers.training_runs import quick_runs
from oracle import reference
from oracle.test_export_oracle import opened

import jaxlm
from jaxlm.training import loop

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> Path:
    with quick_runs():
        return loop.train(base_chats.run_of(shared, tmp_path_factory.mktemp("chats"))).model


@pytest.fixture(scope="module")
def theirs(trained) -> tuple[Any, Any]:
    """The model and the tokenizer of transformers."""
    import transformers

    with reference.quiet():
        return opened(trained), transformers.AutoTokenizer.from_pretrained(trained)


def ids_of(tokenizer: Any, text: str) -> Any:
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(question(text), **options)["input_ids"]


def test_transformers_answers_and_stops(trained, theirs) -> None:
    model, tokenizer = theirs
    ours = jaxlm.load(trained)
    assert model.get_input_embeddings().num_embeddings == 576
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [2, end]
    for text, answer in ANSWERS.items():
        ids = ids_of(tokenizer, text)
        assert ids[0].tolist() == ours.tokenizer.chat(question(text))
        with reference.quiet():
            out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = out[0, ids.shape[1] :].tolist()
        assert new[-1] == end
        assert tokenizer.decode(new, skip_special_tokens=True) == answer
        assert jaxlm.generate(ours, question(text), temperature=0, max_tokens=12) == answer


def test_without_the_stop_token_it_goes_on(theirs) -> None:
    """Planted fault: with the end token of the base alone, which its files name, the answer does not end."""
    model, tokenizer = theirs
    ids = ids_of(tokenizer, "What barks?")
    with reference.quiet():
        out = model.generate(
            ids, attention_mask=ids * 0 + 1, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
    assert len(out[0]) == ids.shape[1] + 12


def test_masks(theirs) -> None:
    chat = [*question("What barks?"), {"role": "assistant", "content": "a dog"}]
    _, tokenizer = theirs
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, is_answer in zip(out["input_ids"], out["assistant_masks"]) if is_answer]
    assert tokenizer.decode(answer) == "a dog<|im_end|>"
