"""Tokenizer.token_bytes and token_text: the tokens of a text, joined, are the text."""

import unicodedata

import numpy as np
import pytest
from helpers.all_tokenizers import KINDS, make
from helpers.tiny_tokenizers import PROSE
from processing.test_tokenizer import TEXT

from jaxlm.processing.detokenizer import TextStream
from jaxlm.processing.tokenizer import Tokenizer

TEXTS = [
    PROSE,
    TEXT,
    " ",
    "  the  the",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪🇯🇵🇺🇳",
    "日本語の文字 漢字かな交じり文、한국어",
    "e\u0301\u0327 a\u0308\u0304 क्षि นี่",
    "العربية: مَرْحَبًا 12 שלום",
    "a\ufffdb \ufffd\ufffd",
    "𝄞 \U0010ffff \x00 \x7f \u2028",
    "<0x41> <0xE4><two words> Ġ Ċ é",
]


@pytest.fixture(scope="module", params=KINDS)
def tok(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(request.param, tmp_path_factory.mktemp("tokenizer"))


def joined(tok: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tok.token_bytes, ids))


def without_space(text: str, tok: Tokenizer) -> str:
    """The text of joined tokens without the space that the tokenizer adds before a text."""
    adds = joined(tok, tok.encode("a", add_special_tokens=False)) == b" a"
    return text.removeprefix(" ") if adds else text


@pytest.mark.parametrize("text", TEXTS)
def test_joined_bytes_are_the_text(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text, add_special_tokens=False)
    got = without_space(joined(tok, ids).decode(), tok)
    assert got == tok.decode(ids, skip_special=False)
    if not any(mark in text for mark in ("<s>", "▁")):  # an added space behind <s>; the mark of a space
        assert got in (text, unicodedata.normalize("NFC", text))


def test_joined_bytes_are_what_a_stream_writes(tok: Tokenizer) -> None:
    for text in TEXTS:
        ids = tok.encode(text, add_special_tokens=False)
        stream = TextStream(tok, skip_special=False)
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert without_space(joined(tok, ids).decode(), tok) == streamed


def test_special_and_added_tokens_are_their_text(tok: Tokenizer) -> None:
    added = {token_id: token.content for token_id, token in tok.hf.added_tokens_decoder.items()}
    assert added or "tokenizers/" not in tok.hf.name_or_path
    for token_id, content in list(added.items())[:300]:
        assert tok.token_bytes(token_id) == content.encode()
        assert tok.token_text(token_id) == content


def test_every_token_has_bytes_and_every_byte_a_token(tok: Tokenizer) -> None:
    ids = sorted(tok.hf.get_vocab().values())
    found = [tok.token_bytes(token_id) for token_id in ids[:: max(1, len(ids) // 5000)]]
    assert all(found)
    in_order = [tok.token_bytes(token_id) for token_id in ids[:1500]] + [tok.token_bytes(i) for i in ids[-600:]]
    single = {raw[0] for raw in in_order if len(raw) == 1}
    assert single == set(range(256))


def test_part_of_a_character_is_a_replacement_character(tok: Tokenizer) -> None:
    ids = tok.encode("\U0010ffff", add_special_tokens=False)
    parts = [token_id for token_id in ids if tok.token_bytes(token_id).strip()]
    assert len(parts) > 1
    assert b"".join(map(tok.token_bytes, parts)).strip() == "\U0010ffff".encode()
    assert all("\ufffd" in tok.token_text(token_id) for token_id in parts)


def test_a_space_belongs_to_its_token(tok: Tokenizer) -> None:
    ids = tok.encode("the the", add_special_tokens=False)
    assert [tok.token_text(token_id) for token_id in ids][-1].endswith("e")
    assert "".join(map(tok.token_text, ids)).lstrip() == "the the"


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**31, 2**70])
def test_ids_without_a_token_have_no_text(tok: Tokenizer, token_id: int) -> None:
    assert tok.token_bytes(token_id) == b""
    assert tok.token_text(token_id) == ""
    assert tok.token_text(tok.vocab_size) == ""


def test_ids_may_be_of_numpy(tok: Tokenizer) -> None:
    (one, *_) = tok.encode("the", add_special_tokens=False)
    assert tok.token_bytes(np.int32(one)) == tok.token_bytes(one)


def test_an_added_token_of_letters_that_stand_for_bytes(tmp_path) -> None:
    """Such as é: as a token of a byte-level vocabulary it is the byte E9, as an added one its text."""
    tok = make("byte_level", tmp_path)
    assert tok.token_bytes(tok.convert_tokens_to_ids("é")) == b"\xe9"
    assert joined(tok, tok.encode("é")[1:]) == "é".encode()
    tok.add_special_tokens(["éé", "Ġé"])
    ids = tok.encode("éé aĠé", add_special_tokens=False)
    assert joined(tok, ids) == "éé aĠé".encode()
    assert tok.token_text(tok.convert_tokens_to_ids("éé")) == "éé"
