"""jaxlm.data.corpus: tokenized documents on disk, the cache, and counts of dropped rows."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.varied_text import CODE

from jaxlm.data import corpus as module
from jaxlm.data.corpus import Corpus, corpora_folder, load, prepare
from jaxlm.data.documents import DocumentTokenizer, TextOptions
from jaxlm.data.sources import find_sources

TOK = tokenizer_of(TEMPLATE)
GOOD = [{"prompt": "Say a", "completion": "b"}, {"prompt": "Add\n1 2", "completion": "3"}]


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def write(path: Path, *values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def made(cache: Path, *names, tok=TOK, **options) -> Corpus:
    return prepare([str(name) for name in names], tok, folder=cache, **options)


def test_documents_are_those_of_the_texts(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", *GOOD * 50)
    monkeypatch.setattr(module, "FLUSH", 100)  # in many writes
    corpus = made(cache, path)
    wanted = list(DocumentTokenizer(TOK).documents(row for source in find_sources(path) for row in source.rows()))
    assert len(corpus) == len(wanted) == 100
    for i, document in enumerate(wanted):
        found = corpus.document(i)
        assert (found.source, found.number, corpus.where(i)) == (str(path), i + 1, f"{path}:{i + 1}")
        assert found.ids.tolist() == document.ids.tolist()
        assert found.loss_mask.tolist() == document.loss_mask.tolist()
        assert found.ids.dtype == np.int32
    assert corpus.lengths.tolist() == [len(document.ids) for document in wanted]
    assert isinstance(corpus.ids, np.memmap)
    assert corpus.ids.dtype == np.uint16
    masked = sum(int(document.loss_mask.sum()) for document in wanted)
    assert str(corpus) == f"100 documents (prompt), {len(corpus.ids):,} tokens, {masked:,} in the loss mask"


def test_texts_have_no_file_of_the_loss_mask(tmp_path, cache):
    (tmp_path / "a.txt").write_text("One\n<|endoftext|>\ntwo")
    corpus = made(cache, tmp_path / "a.txt")
    assert corpus.loss_mask is None
    assert corpus.document(1).loss_mask.all()
    assert TOK.decode(corpus.document(1).ids) == "two"
    assert corpus.where(1) == f"{tmp_path / 'a.txt'}:3"
    assert corpus.about["loss_tokens"] == len(corpus.ids) - 2  # the first of a document is not predicted
    assert str(corpus) == f"2 documents (text), {len(corpus.ids)} tokens"
    assert not list(cache.rglob("loss_mask.bin"))


def test_a_text_in_parts_is_one_document(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("and so on " * 50 + "\n<|endoftext|>\nmore")
    whole = made(cache, tmp_path / "a.txt")
    monkeypatch.setattr("jaxlm.data.readers.PART", 20)
    parts = made(tmp_path / "other", tmp_path / "a.txt")
    assert len(parts) == 2
    assert parts.about == whole.about
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.ends.tolist() == whole.ends.tolist()


def test_large_vocabularies_have_wide_ids(tmp_path, cache):
    tok = tokenizer_of(None)
    tok.hf.add_tokens([f"<word{i}>" for i in range(66_000)])
    (tmp_path / "a.txt").write_text("<word65999>")
    corpus = made(cache, tmp_path / "a.txt", tok=tok)
    assert corpus.ids.dtype == np.int32
    assert corpus.document(0).ids.max() == corpus.about["vocabulary"] - 1 > 1 << 16


# The cache


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_the_cache_depends_on_contents_and_options(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", *GOOD)
    first = made(cache, path)
    written = []
    monkeypatch.setattr(module, "write", lambda *args: written.append(args))
    again = made(cache, path)
    assert again.ids.tolist() == first.ids.tolist()
    moved = path.rename(tmp_path / "b.jsonl")
    made(cache, moved)  # contents count, not names
    monkeypatch.undo()
    assert not written
    stat = moved.stat()
    moved.write_text(moved.read_text().replace("Say a", "Say e"))  # as long as before, and no newer
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "Say e" in TOK.decode(made(cache, moved).document(0).ids)
    assert len(folders(cache)) == 2
    made(cache, moved, options=TextOptions(train_on="all"))
    other = tokenizer_of(TEMPLATE.replace("<end>", "<end> "))
    made(cache, moved, tok=other)
    assert len(folders(cache)) == 4
    assert len(made(cache, moved, moved)) == 4
    assert len(folders(cache)) == 5


def test_the_suffix_of_a_file_counts(tmp_path, cache):
    """JSON lines are one text in a .txt file, and rows in a .jsonl file."""
    path = write(tmp_path / "a.txt", *GOOD)
    assert made(cache, path).about["format"] == "text"
    corpus = made(cache, path.rename(tmp_path / "a.jsonl"))
    assert (corpus.about["format"], len(corpus)) == ("prompt", 2)
    assert len(folders(cache)) == 2


def test_a_cached_corpus_has_the_current_names(tmp_path, cache):
    """Also if a file has no document, if two files are equal, and if they are in another order."""
    a, b = (write(tmp_path / name, *GOOD, {"text": "x"}) for name in ("a.jsonl", "b.jsonl"))
    blank = tmp_path / "blank.txt"
    blank.write_text("\n")
    made(cache, blank, a, b, on_bad="skip")
    (tmp_path / "moved").mkdir()
    a, b, blank = (path.rename(tmp_path / "moved" / path.name) for path in (a, b, blank))
    again = made(cache, blank, a, b, on_bad="skip")
    assert len(folders(cache)) == 1
    assert [again.where(i) for i in range(4)] == [f"{a}:1", f"{a}:2", f"{b}:1", f"{b}:2"]
    assert again.document(3).source == str(b)
    with pytest.raises(ValueError, match=rf"^{a}:3: .*prompt and completion"):
        made(cache, blank, a, b)
    swapped = made(cache, blank, b, a, on_bad="skip")
    assert [swapped.where(i) for i in range(4)] == [f"{b}:1", f"{b}:2", f"{a}:1", f"{a}:2"]
    twice = made(cache, blank, a, a, on_bad="skip")
    assert (len(folders(cache)), twice.where(3)) == (1, f"{a}:2")


def test_an_incomplete_corpus_is_tokenized_again(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", *GOOD)
    ids = made(cache, path).ids.tolist()
    [folder] = cache.iterdir()
    for damage in (
        lambda: os.truncate(folder / "ids.bin", 2),
        lambda: (folder / "loss_mask.bin").unlink(),
        lambda: (folder / "corpus.json").write_text("{"),
        lambda: (folder / "corpus.json").write_text("{}"),
    ):
        damage()
        assert load(folder, []) is None
        assert made(cache, path).ids.tolist() == ids
        assert folders(cache) == [folder.name]


@pytest.mark.parametrize("rows", [GOOD, [{"text": "abc"}]])
def test_a_corpus_of_an_earlier_version_is_tokenized_again(rows, tmp_path, cache):
    """It names format, train_on and the loss mask (absent where all tokens count) otherwise, under the same digest."""
    path = write(tmp_path / "a.jsonl", *rows)
    corpus = made(cache, path)
    [folder] = cache.iterdir()
    about = json.loads((folder / "corpus.json").read_text())
    about["form"], about["learn"] = about.pop("format"), about.pop("train_on")
    about["learned"] = about.pop("loss_tokens")
    if "loss_mask" in about["arrays"]:
        (folder / "loss_mask.bin").rename(folder / "learned.bin")
        for part in ("arrays", "sizes"):
            about[part]["learned"] = about[part].pop("loss_mask")
    (folder / "corpus.json").write_text(json.dumps(about))
    again = made(cache, path)
    assert again.about == corpus.about
    assert again.document(0).loss_mask.tolist() == corpus.document(0).loss_mask.tolist()


def test_nothing_is_left_of_a_failed_corpus(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", *GOOD, {"prompt": "a"})
    with pytest.raises(ValueError, match=r"a\.jsonl:3"):
        made(cache, path)
    assert folders(cache) == []

    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module._Writer, "_flush", full)
    with pytest.raises(OSError, match=r"disk of .*cache is full"):
        made(cache, write(path, *GOOD))
    assert folders(cache) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written to .*file"):
        made(tmp_path / "file", path)


def test_another_process_may_be_first(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", *GOOD)
    about = module._Writer.about

    def overtaken(self):
        monkeypatch.undo()
        made(cache, path)
        return about(self)

    monkeypatch.setattr(module._Writer, "about", overtaken)
    corpus = made(cache, path)
    assert len(corpus) == 2
    assert len(folders(cache)) == 1


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare(str(write(tmp_path / "a.jsonl", *GOOD)), TOK)
    assert corpora_folder() == tmp_path / "jaxlm" / "corpora"
    assert len(folders(corpora_folder())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpora_folder() == tmp_path / ".cache" / "jaxlm" / "corpora"


# Invalid rows


def test_invalid_rows_stop_or_are_counted(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", GOOD[0], {"prompt": "a"}, {"text": "x"}, GOOD[1])
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff", "completion": "b"}\nno json\n{"prompt": "refuse", "completion": "b"}\n')
    message = r"a.jsonl:2: .*prompt and completion.*on_bad=skip"
    with pytest.raises(ValueError, match=message):
        made(cache, path)
    corpus = made(cache, path, on_bad="skip")
    assert len(corpus) == 2
    assert corpus.about["dropped"] == {
        "missing fields": 2, "invalid UTF-8 (lines)": 1, "invalid JSON": 1, "refused by the chat template": 1,
    }  # fmt: skip
    assert str(corpus).endswith(
        "; dropped: 2 missing fields, 1 invalid UTF-8 (lines), 1 invalid JSON, 1 refused by the chat template "
        f"(the first: {path}:2)"
    )
    with pytest.raises(ValueError, match=message):  # from the cache too
        made(cache, path)


def test_empty_texts_are_counted_and_never_stop(tmp_path, cache):
    corpus = made(cache, write(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"}, {"text": "\n"}))
    assert corpus.about["dropped"] == {"empty text": 2}
    assert corpus.where(0).endswith("a.jsonl:2")


def test_sources_of_which_no_row_is_used_are_named(tmp_path, cache):
    good = write(tmp_path / "a.jsonl", *GOOD)
    others = [write(tmp_path / f"{name}.jsonl", {"text": "x"}) for name in "bcdef"]
    corpus = prepare([good, *others], TOK, folder=cache, on_bad="skip")
    assert f"NO ROW IS USED of {others[0]}, {others[1]}, {others[2]} and 2 more" in str(corpus)
    assert "NO ROW" not in str(prepare([good], TOK, folder=cache, on_bad="skip"))


def test_no_document_to_train_on(tmp_path, cache):
    for values, message in [
        ([{"text": ""}], r"\(dropped: 1 empty text\)$"),
        ([{"prompt": "a"}], r"\(dropped: 1 missing fields\); the first: .*a.jsonl:1"),
    ]:
        with pytest.raises(ValueError, match=message):
            made(cache, write(tmp_path / "a.jsonl", *values), on_bad="skip")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl: .*empty"):
        made(cache, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="on_bad"):
        made(cache, tmp_path / "a.jsonl", on_bad="ignore")


def test_progress(tmp_path, cache):
    calls = []
    corpus = made(cache, write(tmp_path / "a.jsonl", *GOOD * 1250), progress=lambda *counts: calls.append(counts))
    assert [documents for documents, _ in calls] == [1000, 2000, 2500]
    assert calls[-1] == (len(corpus), len(corpus.ids))


def test_a_long_text(tmp_path, cache):
    """The package's own code, in the letters that the tokenizer has."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(CODE.rglob("*.py")))
    text = "".join(letter for letter in code if letter == "\n" or " " <= letter <= "~")
    (tmp_path / "code.txt").write_text(text)
    corpus = made(cache, tmp_path / "code.txt")
    assert len(text) > 500_000
    assert len(corpus) == 1
    assert TOK.decode(corpus.document(0).ids, skip_special=False) == f"<bos>{text}<end>"


# Fields that are not used


def test_fields_that_are_not_used_are_told_once(tmp_path, cache):
    """In the order in which they appear, from the cache too. Empty fields, and those that are read, are not told."""
    rows = [
        {"id": i, **row, "source": "web" if i else None, "system": "s", "input": "", "score": 0}
        for i, row in enumerate(GOOD)
    ]
    corpus = made(cache, write(tmp_path / "a.jsonl", *rows))
    assert str(corpus).endswith("; fields that are not used: id, score, source")
    assert str(made(cache, tmp_path / "a.jsonl")) == str(corpus)
    plain = made(cache, write(tmp_path / "b.jsonl", *GOOD))
    assert "not used" not in str(plain)
    texts = made(cache, write(tmp_path / "c.jsonl", {"text": "a", "url": "x"}, {"text": "b", "url": "y"}))
    assert str(texts).endswith("; fields that are not used: url")


def test_fields_of_messages_and_variables_that_are_not_used_are_told_once(tmp_path, cache):
    """A field that the template reads for one role may be lost for another."""
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.name if m.role == 'system' }}")
    messages = [
        {"role": "system", "content": "s", "name": "Sys"},
        {"role": "user", "content": "a", "name": "Ann", "time": 5},
        {"role": "assistant", "content": "b", "weight": 1, "name": None},
    ]
    rows = [{"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}] * 2
    corpus = made(cache, write(tmp_path / "a.jsonl", *rows), tok=tokenizer_of(template))
    assert str(corpus).endswith(
        "; fields that are not used: chat_template_kwargs.enable_thinking, messages.name (user), messages.time (user)"
    )
    assert "sSys<end>" in TOK.decode(corpus.document(0).ids, skip_special=False)
    named = made(cache, write(tmp_path / "b.jsonl", {"messages": [messages[0], {"role": "user", "content": "a"},
                                                               messages[2]]}), tok=tokenizer_of(template))  # fmt: skip
    assert "not used" not in str(named)
