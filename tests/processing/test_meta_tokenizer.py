"""Meta's tokenizer.model against tokenizer.json of the same vocabulary, over a large and varied text."""

import pytest
from helpers import varied_text

from jaxlm.processing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def ours(shared):
    return Tokenizer.load(shared / "tokenizers/llama3/tokenizer.model")


def test_ids_are_those_of_hugging_faces_file(ours, shared):
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(shared / "tokenizers/llama3/tokenizer.json"))
    texts = varied_text.texts(shared, 20_000)
    assert sum(map(len, texts)) > 800_000
    assert {i for text in varied_text.SPECIAL for i in ours.encode(text, add_special_tokens=False)} <= ours.special_ids
    theirs = plain.encode_batch(texts, add_special_tokens=False)
    mine = ours.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [text for text, a, b in zip(texts, mine, theirs) if a != b.ids] == []
    assert ours.get_vocab() == plain.get_vocab()


def test_text_comes_back(ours, shared):
    texts = varied_text.texts(shared, 1000)[::7]
    assert [ours.decode(ours.encode(text, add_special_tokens=False), skip_special=False) for text in texts] == texts
