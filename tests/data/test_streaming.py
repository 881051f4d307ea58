"""Streamed data: every document once per epoch, batches that depend on seed and step alone, and positions."""

import gzip
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.test_packing import same
from helpers.tiny_chat import TEMPLATE, tokenizer_of

from jaxlm.data.corpus import prepare
from jaxlm.data.documents import DocumentTokenizer
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import DataLoader
from jaxlm.data.readers import Row
from jaxlm.data.sources import find_sources
from jaxlm.data.streaming import Position, StreamingLoader, UnreadableSource

TOK = tokenizer_of(TEMPLATE)
PACKINGS = ["split", "whole", "none", None]
WORDS = ["one", "two", "three", "cat", "dog", "sat", "ran", "home", "and", "big"]


def text_of(file: int, i: int) -> str:
    return f"{file}:{i} " + " ".join(WORDS[(i * k) % 10] for k in range(i % 7))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """90 texts in three files, one of them compressed."""
    folder = tmp_path_factory.mktemp("files")
    names = []
    for file, suffix in enumerate([".jsonl", ".jsonl.gz", ".jsonl"]):
        rows = "".join(json.dumps({"text": text_of(file, i)}) + "\n" for i in range(30))
        path = folder / f"{file}{suffix}"
        path.write_bytes(gzip.compress(rows.encode()) if suffix.endswith(".gz") else rows.encode())
        names.append(str(path))
    return names


def stream_of(names: Any, B=4, T=16, seed=3, packing=None, share=None, buffer=11, **options: Any) -> StreamingLoader:
    sources = find_sources(names, streaming=True)
    return StreamingLoader(sources, DocumentTokenizer(TOK), B, T, seed, packing, share, buffer=buffer, **options)


def end_of_epoch(stream: StreamingLoader, epoch: int = 1) -> int:
    """Reads on until an epoch ends. Returns the number of its rows and of those before."""
    while stream.positions[-1].epoch < epoch:
        stream.take([stream.positions[-1].row])
    return next(position.row for position in stream.positions if position.epoch == epoch)


def counted(loader: Any, rows: range) -> Counter:
    """How often each pair of a token and its target is in rows, and how often it is in the loss mask."""
    batch = loader.take(rows)
    there = batch.pos >= 0
    return Counter(zip(batch.tokens[there].tolist(), batch.targets[there].tolist(), batch.loss_mask[there].tolist()))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("buffer", [1, 11, 30, 1000])
def test_each_epoch_has_each_document_once(files, tmp_path, packing, buffer):
    stream = stream_of(files, packing=packing, buffer=buffer, T=40)
    corpus = DataLoader(prepare(files, TOK, folder=tmp_path), 4, 40, 3, packing)
    wanted = counted(corpus, range(corpus.rows()))
    first, second = end_of_epoch(stream), end_of_epoch(stream, 2)
    assert counted(stream, range(first)) == wanted
    assert counted(stream, range(first, second)) == wanted
    assert not same(stream.take(range(3)), stream.take(range(first, first + 3)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_depend_on_seed_and_step_alone(files, packing):
    whole = stream_of(files, packing=packing)
    for step in (0, 40, 3, 17, 60):
        wanted = whole.batch(step)
        assert same(stream_of(files, packing=packing).batch(step), wanted)
        parts = [stream_of(files, packing=packing, share=slice(i, i + 2)).batch(step) for i in (0, 2)]
        assert same(type(wanted)(*map(np.concatenate, zip(*parts))), wanted)
        assert not same(stream_of(files, packing=packing, seed=4).batch(step), wanted)
    for batch, step in zip(stream_of(files, packing=packing).iterate(17), range(17, 40)):
        assert same(batch, whole.batch(step))


def test_documents_are_shuffled_within_a_window_alone(files):
    """Rows of a window are from its documents, in another order. Sources are in another order in each epoch."""

    def documents(window: int) -> list[str]:
        rows = range(stream.positions[window].row, stream.positions[window + 1].row)
        batch = stream.take(rows)
        return [TOK.decode(tokens[pos >= 0]).split()[0] for tokens, pos in zip(batch.tokens, batch.pos)]

    stream = stream_of(files, packing="none", T=40, buffer=10)
    end_of_epoch(stream, 5)
    sizes = np.diff([position.row for position in stream.positions])
    assert sizes.tolist()[:20] == [*[10] * 9, 0] * 2  # where an epoch ends, nothing may be left
    found = [documents(window) for window in np.flatnonzero(sizes)]
    orders = []
    for epoch in range(4):
        windows = found[9 * epoch : 9 * epoch + 9]
        for n, window in enumerate(windows):
            file = window[0].split(":")[0]
            assert sorted(window) == sorted(f"{file}:{i}" for i in range(10 * (n % 3), 10 * (n % 3) + 10))
            assert window != [f"{file}:{i}" for i in range(10 * (n % 3), 10 * (n % 3) + 10)]
        orders.append([window[0].split(":")[0] for window in windows])
    assert len({tuple(order) for order in orders}) > 1


def test_a_loader_continues_from_positions_without_reading_what_is_before(files, monkeypatch):
    before = stream_of(files)
    wanted = [before.batch(step) for step in range(30)]
    positions = [Position(*position) for position in json.loads(json.dumps(before.positions))]
    assert len(before._windows) <= 3  # the others are not in memory
    after = stream_of(files)
    after.continue_from(positions)
    read: list[Position] = []
    theirs = after._read
    monkeypatch.setattr(after, "_read", lambda number, begin: read.append(begin) or theirs(number, begin))
    for step in range(20, 30):
        assert same(after.batch(step), wanted[step])
    assert min(position.row for position in read) > 20 * 4 - 40
    assert len(read) < len(positions)
    assert after.positions[: len(positions)] == positions


def test_data_that_changed_are_found(files, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text_of(0, i)}) + "\n" for i in range(90)]
    path.write_text("".join(rows))
    before = stream_of(path)
    before.batch(12)
    longer = [json.dumps({"text": "cat " * 100}) + "\n"]
    path.write_text("".join(longer + rows))
    after = stream_of(path)
    assert after.digest != before.digest
    assert after.sources_digest != before.sources_digest
    with pytest.raises(ValueError, match="not those that the run has read"):
        after.continue_from(before.positions)
    path.write_text("".join(rows[:20] + longer + rows[20:]))
    after = stream_of(path)
    after.continue_from(before.positions)
    with pytest.raises(ValueError, match="not those that the run has read"):
        after.take([before.positions[1].row])
    same_size = tmp_path / "same.jsonl"
    same_size.write_text("".join(rows).replace("cat", "dog", 1))
    path.write_text("".join(rows))
    others = [stream_of(path, buffer=6), stream_of(path, T=17), stream_of(path, seed=4), stream_of(same_size)]
    other_tokens = tokenizer_of(TEMPLATE.replace("<end>", "<bos>"))
    others.append(StreamingLoader(find_sources(path), DocumentTokenizer(other_tokens), 4, 16, 3, buffer=11))
    assert len({before.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert stream_of(path, on_bad="skip").digest == before.digest  # what resolves an error may change


@pytest.mark.parametrize(
    "changed", ["another word", "an earlier row is missing", "the rows of two windows change places"]
)
def test_rows_that_were_read_may_not_change(changed, tmp_path):
    """Although positions, sizes and the first window stay the same."""
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"the cat sat {WORDS[i % 9]}"}) + "\n" for i in range(90)]
    bad = '{"text": "the cat\n'
    path.write_text("".join([*rows[:44], bad, *rows[44:]]))  # the fifth window of 11 rows
    before = stream_of(path, packing="none")
    with pytest.raises(ValueError, match=r"a\.jsonl:45"):
        before.take(range(44, 45))
    assert len(before.positions) == 5
    repaired = [*rows[:44], rows[50], *rows[44:]]
    path.write_text("".join(repaired))
    after, whole = stream_of(path, packing="none"), stream_of(path, packing="none")
    after.continue_from(before.positions)
    for row in (33, 43, 44, 60):
        assert same(after.take([row]), whole.take([row]))
    other = list(repaired)
    if changed == "another word":
        other[40] = other[40].replace("the", "red")
    elif changed == "an earlier row is missing":
        del other[20]
    else:
        other[22:33], other[33:44] = other[33:44], other[22:33]
    path.write_text("".join(other))
    after = stream_of(path, packing="none")
    after.continue_from(before.positions)
    with pytest.raises(ValueError, match="not those that the run has read"):
        after.take([44])


def test_a_document_in_parts_is_not_cut(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(["and so on " * 50, "cat", "dog sat"]))
    whole = stream_of(tmp_path / "a.txt", buffer=1, T=1000, packing="none").take(range(3))
    monkeypatch.setattr("jaxlm.data.readers.PART", 20)
    assert same(stream_of(tmp_path / "a.txt", buffer=1, T=1000, packing="none").take(range(3)), whole)


def test_invalid_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text_of(0, i)}) for i in range(40)]
    path.write_text("\n".join([*rows[:20], "{", *rows[20:], '{"text": ""}', "["]) + "\n")
    stream = stream_of(path)
    assert stream.new_notes() == []
    with pytest.raises(ValueError, match=r"a\.jsonl:21: .*on_bad=skip"):
        end_of_epoch(stream)
    with pytest.raises(ValueError, match=r"a\.jsonl:21"):  # again, and in a thread that prefetches
        list(zip(stream.iterate(0), range(30)))
    skipping = stream_of(path, on_bad="skip")
    end_of_epoch(skipping)
    [note] = skipping.new_notes()
    assert "2 invalid JSON" in note
    assert "1 empty" in note
    assert "a.jsonl:21" in note
    assert skipping.new_notes() == []


@pytest.mark.parametrize("rows", [3, 100])
def test_each_source_is_opened_once_per_epoch(files, monkeypatch, rows):
    """Although batches are prefetched, and whether a window has many batches or a part of one."""
    opened: list[int] = []
    theirs = type(find_sources(files)[0]).rows
    monkeypatch.setattr(
        type(find_sources(files)[0]), "rows", lambda self, start=0: opened.append(start) or theirs(self, start)
    )
    stream = stream_of(files, buffer=rows)
    for _, _ in zip(stream.iterate(), range(60)):
        pass
    assert not any(opened)
    assert len(opened) <= 3 * (stream.positions[-1].epoch + 1)


class Failing:
    """A source that can be read in part."""

    name, note = "remote", ""

    def rows(self, start=0):
        for i in range(start, 40):
            if i == 25:
                raise ConnectionError("Connection reset\nby peer")
            yield Row("remote", i + 1, {"text": text_of(0, i)})

    def sample_digest(self):
        return "a"


def test_a_source_that_cannot_be_read(tmp_path):
    stream = StreamingLoader([Failing()], DocumentTokenizer(TOK), 4, 16, 3, buffer=11)  # pyright: ignore
    with pytest.raises(UnreadableSource, match=r"remote cannot be read after row 25: Connection reset by peer$"):
        list(zip(stream.iterate(), range(30)))


def test_notes_do_not_wait_for_a_window_that_is_read(files):
    stream, notes = stream_of(files), []
    asking = threading.Thread(target=lambda: notes.append(stream.new_notes()), daemon=True)
    with stream._reading:
        asking.start()
        asking.join(10)
        assert notes == [[]]


def test_the_next_window_is_read_ahead(files):
    stream = stream_of(files)
    stream.take([0])
    assert set(stream._windows) == {0, 1}
    ahead = stream._windows[1]
    assert ahead.result(10).begin == stream.positions[1]
    stream.take([stream.positions[1].row])
    assert stream._windows[1] is ahead


@pytest.mark.parametrize("packing", ["whole", "none"])
def test_long_documents(tmp_path, packing):
    path = tmp_path / "a.jsonl"
    texts = ["one two" if i < 20 else "cat " * 30 for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for long, name in (("drop", "dropped"), ("truncate", "truncated")):
        stream = stream_of(path, packing=packing, long=long)
        stream.take(range(end_of_epoch(stream)))
        assert stream.dropped == {name: 20}
        assert str(20) in stream.new_notes()[0]
    stream = stream_of(path, packing=packing, long="stop")
    with pytest.raises(ValueError, match=r"a\.jsonl:21 has"):
        end_of_epoch(stream)
    path.write_text("".join(json.dumps({"text": "cat " * 30}) + "\n" for _ in range(40)))
    with pytest.raises(ValueError, match="left out: 11 dropped"):
        stream_of(path, packing=packing, long="drop")


def test_an_invalid_line_within_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.readers.PART", 20)
    lines = [b"and so on and so on and so on\n"] * 4
    (tmp_path / "a.txt").write_bytes(b"".join([*lines, b"\xff\n", *lines, b"<|endoftext|>\n", *lines]))
    whole = prepare(str(tmp_path / "a.txt"), TOK, on_bad="skip", folder=tmp_path / "cache")
    stream = stream_of(tmp_path / "a.txt", buffer=1, T=1000, packing="none", on_bad="skip")
    found = (stream.take(range(end_of_epoch(stream))).pos >= 0).sum()
    assert found == (whole.lengths - 1).sum()


def test_data_without_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 30)
    with pytest.raises(ValueError, match="no document to train on"):
        stream_of(path)
    path.write_text('{"text": "one two"}\n' + '{"text": ""}\n' * 30)
    stream = stream_of(path)  # windows without a document are passed over
    assert stream.batch(5).tokens.any()
    with pytest.raises(ValueError, match="at least 1"):
        stream_of(path, buffer=0)
    for number in (stream.rows, stream.steps):
        with pytest.raises(ValueError, match="number of"):
            number()


def test_a_mixture_of_streams(files):
    def mixture() -> Mixture:
        return Mixture(["a", "b"], [stream_of(files[:1]), stream_of(files[1:])], [0.75, 0.25])

    found = mixture()
    wanted = [found.batch(step) for step in range(30)]
    for step in (29, 3):
        assert same(mixture().batch(step), wanted[step])
    for batch, one in zip(mixture().iterate(), wanted):
        assert same(batch, one)
    found.batch(200)
    assert found.epoch(29) == 0
    assert found.epoch(200) >= 1
    assert "unknown" in found.describe_epochs(29)
    assert found.digest == mixture().digest


def test_a_window_is_shuffled_anew_in_each_epoch(files):
    """Also the only window of the only source."""
    stream = stream_of(files[:1], packing="none", T=40, buffer=1000)
    n = end_of_epoch(stream)
    assert not same(stream.take(range(n)), stream.take(range(n, 2 * n)))


# Sources


@pytest.mark.parametrize("place", [0, -1])
def test_the_sample_digest_has_the_beginning_and_the_end(tmp_path, monkeypatch, place):
    monkeypatch.setattr("jaxlm.data.sources.SAMPLE", 10)
    text = bytearray(b'{"text": "one two three"}\n' * 4)
    (tmp_path / "a.jsonl").write_bytes(text)
    [source] = find_sources(tmp_path / "a.jsonl")
    before = source.sample_digest()
    text[place] = ord(" ")
    (tmp_path / "a.jsonl").write_bytes(text)
    assert source.sample_digest() != before


def test_rows_from_a_start(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [{"text": f"{i}"} for i in range(7)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{value['text']}\n" for value in values))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    datasets.Dataset.from_list(values).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "a.csv", "a.jsonl", "saved"):
        [source] = find_sources(tmp_path / name)
        rows = list(source.rows())
        assert len(rows) == 7
        for start in (0, 1, 6, 7):
            assert list(source.rows(start)) == rows[start:]
        assert source.sample_digest() == source.sample_digest()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in place of the hub's org/name, with three files."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "hub"
    folder.mkdir()
    for file in range(3):
        rows = "".join(json.dumps({"text": text_of(file, i)}) + "\n" for i in range(10))
        (folder / f"train-{file}.jsonl").write_text(rows)
    theirs = datasets.load_dataset

    def load(repo, config, split, revision, streaming):
        assert (repo, revision, streaming) == ("org/name", "abc", True)
        return theirs(str(folder), config, split=split, streaming=True)

    def info(repo, revision):
        return type("Info", (), {"sha": {None: "abc", "old": "abc"}[revision]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda repo, config, revision: None)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    return folder


def test_a_hub_dataset_is_read_shard_by_shard(hub):
    sources = find_sources("org/name", streaming=True)
    assert [source.name for source in sources] == [f"org/name (shard {i} of 3)" for i in (1, 2, 3)]
    texts = sorted(row.value["text"] for source in sources for row in source.rows())
    assert texts == sorted(text_of(file, i) for file in range(3) for i in range(10))
    for source in sources:
        rows = list(source.rows())
        assert [row.number for row in rows] == list(range(1, 11))
        assert list(source.rows(4)) == rows[4:]
    local = stream_of([str(path) for path in sorted(hub.glob("*"))])
    stream = stream_of("org/name")
    assert same(stream.batch(0), local.batch(0))
    assert same(stream.batch(12), local.batch(12))
    assert stream.digest == stream_of("org/name").digest == local.digest
    assert stream.sources_digest == stream_of("org/name").sources_digest != local.sources_digest


def test_a_hub_dataset_is_not_streamed_offline(hub):
    with pytest.raises(ValueError, match="offline"):
        find_sources("org/name", streaming=True, offline=True)
