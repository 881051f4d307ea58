"""jaxlm.processing.detokenizer: the pieces add up to the text, at every token, for every kind of vocabulary."""

import functools

import pytest
from helpers.published import SHARED, TOKENIZERS
from helpers.tiny_tokenizers import SMALL, load_once, write
from hypothesis import given, settings
from hypothesis import strategies as st
from processing.test_tokenizer import TEXT

from jaxlm.processing.detokenizer import TextStream
from jaxlm.processing.tokenizer import Tokenizer

TEXTS = [
    TEXT,
    "",
    " ",
    "  the  the",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪🇯🇵🇺🇳",
    "日本語の文字 漢字かな交じり文、한국어",
    "e\u0301\u0327 a\u0308\u0304 क्षि นี่",
    "العربية: مَرْحَبًا 12 שלום",
    "\ufffd",
    "a\ufffdb \ufffd\ufffd",
    "end \ufffd",
    "𝄞 \U0010ffff \x00 \x7f \u2028",
    "<0x41> <0xE4><two words> Ġ Ċ ▁ ▁▁",
]
REAL = TOKENIZERS if SHARED.is_dir() else []
VALUES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
CASES = pytest.mark.parametrize("name", SMALL + REAL)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """name -> a small tokenizer made here, or a real one."""

    @functools.cache
    def get(name: str) -> Tokenizer:
        return load_once(SHARED / name if name in REAL else write(name, tmp_path_factory.mktemp(name)))

    return get


def pieces(tok: Tokenizer, ids, **options) -> list[str]:
    stream = TextStream(tok, **options)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def cut(text: str, stops) -> tuple[str, str | None]:
    """What a stream must show of `text`, found letter by letter."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_published_tokenizers_are_among_the_cases(shared, tokenizer):
    assert len(TOKENIZERS) == len(REAL) == len({tokenizer(name).vocab_size for name in REAL})


# Characters


@CASES
@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_add_up(tokenizer, name, skip_special):
    tok = tokenizer(name)
    for text in TEXTS:
        ids = tok.encode(text)
        assert "".join(pieces(tok, ids, skip_special=skip_special)) == tok.decode(ids, skip_special)


@CASES
def test_every_character_is_shown_with_its_last_token(tokenizer, name):
    tok = tokenizer(name)
    for text in TEXTS:
        ids = tok.encode(text)
        stream, shown = TextStream(tok), ""
        for n, token_id in enumerate(ids, 1):
            shown += stream.push(token_id)
            whole = tok.decode(ids[:n])
            if "\ufffd" not in whole:  # complete so far: nothing may be held back
                assert shown == whole
        assert stream.flush() == ""


@CASES
def test_random_text(tokenizer, name):
    tok = tokenizer(name)

    @VALUES
    @given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=12), max_size=5).map("".join))
    def check(text):
        ids = tok.encode(text)
        assert "".join(pieces(tok, ids)) == tok.decode(ids)

    check()


@pytest.mark.parametrize("name", ["byte_level", *REAL[:3]])
def test_random_ids_of_byte_level_vocabularies(tokenizer, name):
    tok = tokenizer(name)
    common = st.integers(0, 300) | st.sampled_from(sorted(tok.special_ids))
    ids = st.lists(common | st.integers(0, tok.vocab_size + 50), max_size=40)

    @VALUES
    @given(ids, st.booleans())
    def check(ids, skip_special):
        assert "".join(pieces(tok, ids, skip_special=skip_special)) == tok.decode(ids, skip_special)

    check()


@pytest.mark.parametrize("name", ["byte_fallback", "byte_fallback_prefix", *REAL[3:]])
def test_random_pieces_of_byte_fallback_vocabularies(tokenizer, name):
    tok = tokenizer(name)
    raw = {byte: tok.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    plain = [token_id for token_id in range(tok.vocab_size) if token_id not in raw.values()]
    spelled = st.characters(min_codepoint=0x21, exclude_categories=["Cs"]).map(lambda c: [raw[b] for b in c.encode()])
    words = st.sampled_from(plain).map(lambda token_id: [token_id])

    @VALUES
    @given(st.lists(spelled | words, max_size=20), st.booleans())
    def check(parts, skip_special):
        ids = [token_id for part in parts for token_id in part]
        assert "".join(pieces(tok, ids, skip_special=skip_special)) == tok.decode(ids, skip_special)

    check()


def test_invalid_byte_fallback(tokenizer):
    tok = tokenizer("byte_fallback_prefix")

    def shown(raw: bytes, then: str = "") -> list[str]:
        tail = [tok.convert_tokens_to_ids(then)] if then else []
        return pieces(tok, [*tok.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw]), *tail])

    assert shown("é日".encode()) == ["", "é", "", "", "日", ""]
    assert shown("é日".encode()[:-1]) == ["", "é", "", "", "\ufffd"]
    assert shown("é".encode()[:1], "▁the") == ["", "\ufffd the", ""]
    assert shown(b"\xffA", "▁the") == ["\ufffd", "A", " the", ""]


def test_special_tokens_do_not_eat_the_next_space(tokenizer):
    tok = tokenizer("byte_fallback_prefix")
    the = tok.convert_tokens_to_ids("▁the")
    assert pieces(tok, [the, tok.eos_token_id, the]) == ["the", "", " the", ""]
    assert pieces(tok, [the, 99999, the]) == ["the", "", " the", ""]
    assert pieces(tok, [the, 1, the], skip_special=False) == ["the", "<eos>", " the", ""]


@CASES
def test_a_push_costs_the_same_late_as_early(tokenizer, name, monkeypatch):
    tok = tokenizer(name)
    ids = tok.encode("the cat 日本語 " * 50)
    decoded = []
    plain = tok.decode
    monkeypatch.setattr(
        tok, "decode", lambda ids, *args, **kwargs: decoded.append(len(ids)) or plain(ids, *args, **kwargs)
    )
    assert "".join(pieces(tok, ids, stop="no such text")) == plain(ids)
    assert max(decoded, default=0) <= 2
    assert len(decoded) <= 2 * len(ids)


# Stop strings


def letters(tok: Tokenizer, text: str) -> list[int]:
    """A token a letter."""
    return [token_id for letter in text for token_id in tok.encode(letter, add_special_tokens=False)]


def test_a_stop_string_across_tokens(tokenizer):
    tok = tokenizer("byte_level")
    stream = TextStream(tok, stop=["###"])
    assert [stream.push(token_id) for token_id in letters(tok, "a##b## ###c")] == [
        *("a", "", "", "##b", "", "", "## "),
        *("", "", "", ""),
    ]
    assert stream.stopped == "###"
    assert stream.push(tok.encode("d")[-1]) == ""
    assert stream.flush() == ""


def test_what_was_withheld_comes_at_the_end(tokenizer):
    tok = tokenizer("byte_level")
    stream = TextStream(tok, stop="###")
    assert [stream.push(token_id) for token_id in letters(tok, "a##")] == ["a", "", ""]
    assert (stream.flush(), stream.flush(), stream.stopped) == ("##", "", None)
    stream = TextStream(tok, stop="###")
    half = letters(tok, "#é")[:-1]
    assert [stream.push(token_id) for token_id in half] == ["", ""]
    assert (stream.flush(), stream.flush(), stream.stopped) == ("#\ufffd", "", None)
    # what flush releases may itself complete a stop string
    stream = TextStream(tok, stop=["#\ufffd"])
    assert [stream.push(token_id) for token_id in half] == ["", ""]
    assert (stream.flush(), stream.stopped) == ("", "#\ufffd")


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped"),
    [
        ("xabcd", ["abcd", "bc"], "xa", "bc"),  # complete first
        ("the cat", ["the", "h"], "t", "h"),
        ("xabc", ["bc", "abc"], "x", "abc"),  # complete together: the longer
        ("xabc", ["ab", "abc"], "x", "ab"),
        ("aab", ["ab"], "a", "ab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("x\n\nHuman:", ["\nHuman:", "\n\nHuman:"], "x", "\n\nHuman:"),
        ("日本語", ["本"], "日", "本"),
        ("the cat", ["t"], "", "t"),
        ("abc", ["d", "cd"], "abc", None),
    ],
)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_several_stop_strings(tokenizer, name, text, stops, shown, stopped):
    tok = tokenizer(name)
    for ids in (tok.encode(text), letters(tok, text)):
        stream = TextStream(tok, stop=stops)
        assert "".join(map(stream.push, ids)) + stream.flush() == shown
        assert stream.stopped == stopped
    assert cut(text, stops) == (shown, stopped)


@CASES
def test_random_stop_strings(tokenizer, name):
    tok = tokenizer(name)
    texts = st.text("ab日👍 \n", max_size=20)

    @VALUES
    @given(texts, st.lists(st.text("ab日👍 \n", min_size=1, max_size=4), min_size=1, max_size=4))
    def check(text, stops):
        ids = tok.encode(text)
        want, stopped = cut(tok.decode(ids), stops)
        stream, shown = TextStream(tok, stop=stops), ""
        for token_id in ids:
            shown += stream.push(token_id)
            assert want.startswith(shown)
        assert (shown + stream.flush(), stream.stopped) == (want, stopped)

    check()


def test_stop_strings_are_checked(tokenizer):
    tok = tokenizer("byte_level")
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(tok, stop=["a", ""])
    assert "".join(pieces(tok, letters(tok, "xbay"), stop="ba")) == "x"  # one string, not the letters b and a
