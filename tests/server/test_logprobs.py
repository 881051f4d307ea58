"""The columns of log-probabilities of completions agree with the text, also inside of characters."""

from itertools import pairwise
from pathlib import Path

import pytest
from helpers.all_tokenizers import TIKTOKEN
from helpers.all_tokenizers import make as make_tokenizer
from helpers.tiny_tokenizers import SMALL

from jaxlm.inference.requests import Logprobs
from jaxlm.server.logprobs import CompletionLogprobs, chat_logprobs, echoed

TEXTS = ["the cat", "naïve 日本, привет!", "  two  spaces\n", "🙂x🙂", "é"]


@pytest.fixture(scope="module", params=[*SMALL, TIKTOKEN])
def tokenizer(request, tmp_path_factory):
    return make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def characters_before(tokenizer, ids: list[int], text: str) -> list[int]:
    """The number of complete characters of the text before each token, from the bytes of the tokens."""
    data = [tokenizer.token_bytes(token) for token in ids]
    counts = [len(b"".join(data[:n]).decode(errors="ignore")) for n in range(len(ids) + 1)]
    assert b"".join(data).decode().endswith(text)
    return [max(0, count - counts[-1] + len(text)) for count in counts[:-1]]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_of_a_prompt(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    found, offsets = echoed(tokenizer, text, ids)
    assert found == text
    assert offsets == characters_before(tokenizer, ids, text)
    found, offsets = echoed(tokenizer, ids, ids)  # token ids: special tokens are in the text, as in the tokens
    assert found == tokenizer.decode(ids, skip_special=False)
    assert offsets == characters_before(tokenizer, ids, found)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_of_an_answer(tokenizer, text: str) -> None:
    before, ids = tokenizer.encode("the"), tokenizer.encode("the " + text)
    ids = ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text, False)
    answer = tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
    scores = [Logprobs(-1.0, [(0, -0.5)])] * len(ids)
    columns = CompletionLogprobs(tokenizer, before, 7)
    half = len(ids) // 2
    parts = [columns.add(scores[:half], ids[:half], 999), columns.add(scores[half:], ids[half:], 999)]
    offsets = [at for part in parts for at in part["text_offset"]]
    assert offsets == [7 + at for at in characters_before(tokenizer, ids, answer)]
    assert all(a <= b for a, b in pairwise(offsets))
    assert columns.add(scores[:1], ids[:1], 9)["text_offset"] == [9]  # the text has ended before


def test_special_tokens_of_an_answer_have_no_width(tokenizer) -> None:
    special = min(tokenizer.special_ids)
    ids = [*tokenizer.encode("the", False), special, *tokenizer.encode("cat", False)]
    scores = [Logprobs(-1.0, [])] * len(ids)
    offsets = CompletionLogprobs(tokenizer, tokenizer.encode("on"), 0).add(scores, ids, 999)["text_offset"]
    at = ids.index(special)
    assert offsets[at] == offsets[at + 1]


def test_parts_of_characters_have_names_of_their_own(tmp_path: Path) -> None:
    """They would all be U+FFFD: a dict would keep one of them."""
    tokenizer = make_tokenizer(SMALL[0], tmp_path)
    parts = tokenizer.encode("🙂", False)
    assert len({*parts}) > 1
    likely = [(token, -1.0 - n) for n, token in enumerate(parts)]
    score = Logprobs(-float("inf"), likely)
    columns = CompletionLogprobs(tokenizer, [], 0).add([score], tokenizer.encode("x", False), 9)
    assert [*columns["top_logprobs"][0].values()] == [*(value for _, value in likely), -9999.0]
    assert [*columns["top_logprobs"][0]] == [*("bytes:" + rf"\x{byte:02x}" for byte in "🙂".encode()), "x"]
    chat = chat_logprobs([Logprobs(-0.5, likely)] * len(parts), parts, tokenizer)
    assert chat is not None
    assert bytes(byte for entry in chat["content"] for byte in entry["bytes"]).decode() == "🙂"
    assert chat["content"][0]["token"] == r"\xf0"
    assert [top["bytes"] for top in chat["content"][0]["top_logprobs"]] == [[byte] for byte in "🙂".encode()]


def test_without_a_tokenizer_tokens_are_named_by_their_ids() -> None:
    columns = CompletionLogprobs(None, [1], 0).add([Logprobs(-1.0, [(5, -0.5)])], [7], 0)
    assert columns["tokens"] == ["token_id:7"]
    assert columns["top_logprobs"] == [{"token_id:5": -0.5, "token_id:7": -1.0}]
    assert echoed(None, [1, 2], [1, 2]) == ("", [0, 0])
