"""Meta's tokenizer.model over a varied text: a small one compared with the definition of its encoding, the published
one with tokenizer.json of the same vocabulary."""

import base64
import functools
import itertools
import re
from pathlib import Path

import pytest
from helpers import varied_text
from helpers.tiny_tokenizers import write_tiktoken

from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import META_WORDS


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("small"))


def definition(path: Path):
    """Returns a function from a text to its ids. Of each word, the two neighbors whose bytes together have the lowest
    rank are joined, as long as any two are a token."""
    import regex

    lines = [line.split() for line in path.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
             "eot_id", "python_tag"]  # fmt: skip
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    either = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    @functools.cache
    def word(text: str) -> list[int]:
        if (data := text.encode()) in ranks:
            return [ranks[data]]
        parts = [data[i : i + 1] for i in range(len(data))]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ranks[part] for part in parts]

    def encode(text: str) -> list[int]:
        pieces = either.split(text)
        return [i for piece in pieces
                for i in ([special[piece]] if piece in special
                          else [i for one in regex.findall(META_WORDS, piece) for i in word(one)])]  # fmt: skip

    return encode


def test_ids_are_those_of_the_definition(small):
    ours, encode = Tokenizer.load(small), definition(small)
    texts = varied_text.texts(None)[::9]
    assert sum(map(len, texts)) > 80_000
    assert {i for text in varied_text.SPECIAL for i in ours.encode(text, add_special_tokens=False)} <= ours.special_ids
    wrong = [text for text in texts if ours.encode(text, add_special_tokens=False) != encode(text)]
    assert wrong == []
    assert [ours.decode(encode(text), skip_special=False) for text in texts] == texts


def test_published_vocabulary(shared):
    """Ids are those of Hugging Face's file, and the text comes back."""
    import tokenizers

    ours = Tokenizer.load(shared / "tokenizers/llama3/tokenizer.model")
    plain = tokenizers.Tokenizer.from_file(str(shared / "tokenizers/llama3/tokenizer.json"))
    texts = varied_text.texts(shared, 20_000)
    assert sum(map(len, texts)) > 800_000
    assert {i for text in varied_text.SPECIAL for i in ours.encode(text, add_special_tokens=False)} <= ours.special_ids
    assert ours.encode("Hello") == [128000, 9906]
    theirs = plain.encode_batch(texts, add_special_tokens=False)
    mine = ours.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [text for text, a, b in zip(texts, mine, theirs) if a != b.ids] == []
    assert ours.get_vocab() == plain.get_vocab()
    texts = varied_text.texts(shared, 1000)[::7]
    assert [ours.decode(ours.encode(text, add_special_tokens=False), skip_special=False) for text in texts] == texts
