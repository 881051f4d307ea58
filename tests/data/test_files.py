"""jaxlm.data.readers and sources: kinds of files, compressed ones, tables, and what a folder means."""

import csv
import gzip
import hashlib
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.tiny_chat import TEMPLATE, tokenizer_of

from jaxlm.data import readers, sources
from jaxlm.data.corpus import prepare
from jaxlm.data.readers import InvalidRow, Row, kind
from jaxlm.data.sources import find_sources, split_of

TOK = tokenizer_of(TEMPLATE)
LINES = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(2500))


def rows(*names, **options) -> list:
    return [row for source in find_sources(list(names), **options) for row in source.rows()]


def names(folder: Path, **options) -> list[str]:
    found = find_sources(folder, **options)
    return [Path(source.name).relative_to(folder).as_posix() for source in found]


def write(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


# Splits of a folder


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("train_1.jsonl", "train"), ("train-00000-of-00003.parquet", "train"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train"), ("TRAIN.JSONL.gz", "train"),
        ("train/part-7.jsonl", "train"), ("en/train/dev.jsonl", "validation"), ("dev.txt", "validation"),
        ("val01.csv", "validation"), ("data/test-00000.arrow", "test"), ("train-notes.txt", None),
        ("training.jsonl", None), ("train_clean.jsonl", None), ("my-train.jsonl", None), ("notes.txt", None),
        ("train.old/notes.txt", None), ("test_2.final.jsonl", None),
    ],
)  # fmt: skip
def test_the_split_of_a_file_is_its_name_up_to_a_number(name, split):
    assert split_of(Path(name)) == split


def test_a_file_whose_name_begins_like_a_split_hides_no_other(tmp_path):
    write(tmp_path, "a.jsonl", "train-notes.jsonl", "b.jsonl")
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "train-notes.jsonl"]
    corpus = prepare(str(tmp_path), TOK, folder=tmp_path / ".cache")
    assert str(corpus).endswith(f"all files of {tmp_path} are read, for no name is exactly that of a split "
                                "(train-notes.jsonl)")  # fmt: skip


def test_what_belongs_to_no_split_is_named(tmp_path):
    write(tmp_path, "train.jsonl", "train_2.jsonl", "valid.jsonl", "notes.jsonl", *(f"more{i}.jsonl" for i in range(4)))
    assert names(tmp_path) == ["train.jsonl", "train_2.jsonl"]
    note = f"left out of {tmp_path}: more0.jsonl, more1.jsonl, more2.jsonl and 2 more (named after no split"
    for cache in (".cache", ".cache", ".other"):  # newly tokenized, and from the cache
        assert note in str(prepare(str(tmp_path), TOK, folder=tmp_path / cache))
    write(tmp_path / "x", "a.jsonl", "b.jsonl", "dev.jsonl")
    with pytest.raises(FileNotFoundError, match=r"split 'train'; it has validation; left out .*: a.jsonl, b.jsonl"):
        find_sources(tmp_path / "x")
    assert names(tmp_path / "x", split="valid") == ["dev.jsonl"]


def test_runs_in_a_folder_of_data_are_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for path in ("x/run", "run2"):
        (tmp_path / path / "checkpoints/2").mkdir(parents=True)
        (tmp_path / path / "run.json").write_text("{}")
        (tmp_path / path / "checkpoints/2/done.txt").write_text("")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.txt").write_text("b")
    found = find_sources(tmp_path)
    assert [source.path.name for source in found] == ["a.txt", "b.txt"]
    assert "run2, x/run (of training runs)" in found[0].note
    assert "training runs" not in find_sources(tmp_path / "more")[0].note


@pytest.mark.parametrize("name", ["qa.cs", "notes.md"])
def test_a_missing_file_is_no_hub_data_set(name, monkeypatch):
    monkeypatch.setattr(sources, "_from_hub", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"no such file: {name}"):
        find_sources(name)


def test_a_file_that_is_named_twice_is_told(tmp_path):
    for name in ("train.txt", "train-notes.txt", "b.txt"):
        (tmp_path / name).write_text("a")
    found = find_sources([tmp_path, tmp_path / "train.txt"])
    assert "train.txt is read 2 times" in found[0].note
    assert "left out of" in found[0].note
    assert not any("times" in source.note for source in find_sources([tmp_path / "train.txt", tmp_path / "b.txt"]))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_sources(f"{tmp_path.name}/")


def test_folders_named_after_splits(tmp_path):
    write(tmp_path, "train/a.jsonl", "train/b.jsonl", "test/a.jsonl", ".git/train/c.jsonl")
    assert names(tmp_path) == ["train/a.jsonl", "train/b.jsonl"]
    assert names(tmp_path / "test") == ["a.jsonl"]  # a folder that is named itself is read
    (tmp_path / "train/loop").symlink_to(tmp_path)
    assert names(tmp_path) == ["train/a.jsonl", "train/b.jsonl"]


# datasets' save_to_disk


@pytest.fixture
def saved(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    values = [{"text": f"row {i}", "extra": None if i else "x"} for i in range(5)]
    data = datasets.Dataset.from_list(values)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(train_sft=data).save_to_disk(tmp_path / "other")
    data.save_to_disk(tmp_path / "apart/train")
    data.select([3]).save_to_disk(tmp_path / "apart/valid")
    datasets.enable_progress_bars()
    return tmp_path


def test_a_folder_of_save_to_disk_is_a_data_set(saved):
    one = rows(saved / "one")
    assert one[0] == Row(str(saved / "one"), 1, {"text": "row 0", "extra": "x"})
    assert [row.value for row in one[1:]] == [{"text": f"row {i}"} for i in range(1, 5)]
    assert [row.number for row in one] == [1, 2, 3, 4, 5]
    for name in ("both", "apart"):
        assert [row.value for row in rows(saved / name)] == [row.value for row in one]
    assert [row.value["text"] for row in rows(saved / "both", split="test")] == ["row 1"]
    assert [row.value["text"] for row in rows(saved / "apart", split="validation")] == ["row 3"]
    with pytest.raises(FileNotFoundError, match=r"both has no split 'validation': name one of its folders .*both/test"):
        find_sources(saved / "both", split="validation")
    with pytest.raises(FileNotFoundError, match=r"name one of its folders .*other/train_sft"):
        find_sources(saved / "other")
    assert len(rows(saved / "other/train_sft")) == 5
    assert len(rows(saved / "other", split="train_sft")) == 5


def test_the_digest_of_a_saved_data_set_covers_its_contents(saved):
    [before] = find_sources(saved / "one")
    digest = before.digest()
    assert digest != find_sources(saved / "both")[0].digest()
    [*_, last] = sorted((saved / "one").glob("*.arrow"))
    whole = last.read_bytes()
    last.write_bytes(whole.replace(b"row 4", b"row 9"))
    assert before.digest() != digest
    assert rows(saved / "one")[-1].value == {"text": "row 9"}
    last.write_bytes(whole[:200])
    [*_, bad] = rows(saved / "one")
    assert bad.why == "unreadable file"
    assert str(saved / "one") in str(bad)


# Kinds


def test_capital_letters_in_a_suffix(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "a"}\n5\n')
    small, capital = tmp_path / "b.jsonl", tmp_path / "A.JSONL"
    small.write_text(capital.read_text())
    assert names(tmp_path) == ["A.JSONL", "b.jsonl"]
    assert rows(capital)[0].value == {"text": "a"}
    assert str(rows(capital)[1]).startswith(f"{capital}:2: ")
    assert find_sources(capital)[0].digest() == find_sources(small)[0].digest()


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '[\n {"text": "a"}\n]', "\n[1]"])
def test_a_json_list_under_jsonl_is_refused_with_the_way_out(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    first, *more = rows(tmp_path / "a.jsonl")
    assert isinstance(first, InvalidRow)
    assert str(first).endswith("If the file is one JSON list, rename it to .json")
    assert not [bad for bad in more if "rename" in str(bad)]


def compressed(text: str, suffix: str) -> bytes:
    data = text.encode()
    return gzip.compress(data) if suffix == ".gz" else pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "One\n<|endoftext|>\ntwo"),
        ("a.jsonl", LINES),
        ("a.json", '[{"text": "a"}, 5]'),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("a.csv", 'text,n\n"a\nb",1\nc,2\n'),
        ("a.tsv", "text\tn\na\t1\n"),
    ],
)
def test_a_compressed_file_is_read_like_itself(name, text, suffix, tmp_path):
    (tmp_path / name).write_text(text)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(compressed(text, suffix.lower()))
    plain = [(type(row), *row[1:]) for row in rows(tmp_path / name)]
    assert [(type(row), *row[1:]) for row in rows(packed)] == plain
    assert {row.source for row in rows(packed)} == {str(packed)}
    assert find_sources(packed)[0].digest().endswith(f"{name[1:]}{suffix.lower()}")


def test_compressed_members_one_after_the_other(tmp_path):
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(compressed(LINES, suffix) * 2)
        assert len(rows(tmp_path / f"a.jsonl{suffix}")) == 5000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_damaged_compressed_file_is_named(name, suffix, tmp_path):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(compressed("[" + LINES * 20, suffix)[:-9])
    bad = [row for row in rows(path) if isinstance(row, InvalidRow) and row.why == "unreadable file"]
    assert len(bad) == 1
    assert str(bad[0]).startswith(str(path))
    path.write_bytes(b"no archive")
    [bad] = rows(path)
    assert bad.why == "unreadable file"
    path.write_bytes(compressed("", suffix))
    [bad] = rows(path)
    assert bad.why == "empty file"


def test_a_compressed_file_is_never_in_memory_as_a_whole(tmp_path):
    path, size = tmp_path / "a.jsonl.zst", 50_000_000
    path.write_bytes(pa.compress((json.dumps({"text": "x" * 99_988}) + "\n").encode() * (size // 100_000), "zstd",
                                 asbytes=True))  # fmt: skip
    tracemalloc.start()
    count, before = sum(1 for _ in find_sources(path)[0].rows()), pa.total_allocated_bytes()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == size // 100_000
    assert peak + before < 5_000_000


def test_a_compressed_file_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(LINES, ".zst"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.jsonl.zst needs pyarrow: pip install 'jaxlm\[train\]'"):
        rows(tmp_path / "a.jsonl.zst")


def test_other_compressed_files_are_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    (tmp_path / "b.gz").write_bytes(b"x")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="unknown suffix"):
            find_sources(path)
    assert [kind(Path(name)) for name in ("a.b.jsonl", "a", "a.gz", "A.TXT.ZST")] == [".jsonl", "", ".gz", ".txt.zst"]


def test_tables_in_csv(tmp_path):
    path = tmp_path / "a.csv"
    values = [["a, b", "c\n\nd", "7"], ['he said "no"', "", "8"], ["x" * 200_000, "y", "é"]]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "completion", ""], *values])
    names = ["prompt", "completion", "column 3"]
    wanted = [{name: value for name, value in zip(names, row) if value} for row in values]
    assert rows(path) == [Row(str(path), number, value) for number, value in zip((2, 5, 6), wanted)]
    corpus = prepare(str(path), TOK, folder=tmp_path / "cache", on_bad="skip")
    assert [corpus.where(i) for i in range(len(corpus))] == [f"{path}:2", f"{path}:6"]
    assert "column 3" in str(corpus)


def test_tables_of_other_programs(tmp_path):
    import datasets

    values = [{"text": 'a "quoted", text\nof lines', "n": "1"}, {"text": "b\tc", "n": "2"}]
    data = datasets.Dataset.from_list(values)
    data.to_csv(tmp_path / "a.csv")
    data.to_csv(tmp_path / "a.tsv", sep="\t")
    for name in ("a.csv", "a.tsv"):
        assert [row.value for row in rows(tmp_path / name)] == values


def test_invalid_rows_of_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\na,1\nb\n\n"c"d,3\n\xff,4\n"e\n\xff",5\nf,6,\ng,7\n"h,8\n')
    found = rows(path)
    assert [(row.number, row.value["text"]) for row in found if isinstance(row, Row)] == [(2, "a"), (9 + 1, "g")]
    bad = [str(row) for row in found if isinstance(row, InvalidRow)]
    for message, (line, word) in zip(
        bad, [(3, "1 values"), (5, "valid row"), (6, "UTF-8"), (8, "UTF-8"), (9, "3 values"), (11, "not closed")],
        strict=True,
    ):  # fmt: skip
        assert message.startswith(f"{path}:{line}: ")
        assert word in message
    for content, word in ((b"a,a\n1,2\n", "two columns"), (b"\xff\na\n", "UTF-8"), (b'"a\n1\n', "is not closed")):
        path.write_bytes(content)
        [only] = rows(path)
        assert word in str(only)
        assert str(only).startswith(f"{path}:1: ")


def test_a_quote_that_is_never_closed_stays_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CELL", 1000)
    before = csv.field_size_limit(1000)
    try:
        (tmp_path / "a.csv").write_text("text\n" + '"' + "never closed\n" * 100 + "\nb\n")
        assert "field limit" in str(rows(tmp_path / "a.csv")[0])
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("format", ["stream", "file"])
def test_arrow_files(format, tmp_path):
    values = [{"text": f"row {i}", "more": {"a": i} if i % 2 else None} for i in range(2500)]
    table, path = pa.Table.from_pylist(values), tmp_path / "a.arrow"
    writer = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[format]
    with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as out:
        out.write_table(table, max_chunksize=1700)
    found = rows(path)
    assert [row.number for row in found] == list(range(1, 2501))
    assert found[2].value == {"text": "row 2"}
    assert found[2001].value == {"text": "row 2001", "more": {"a": 2001}}
    assert readers.location(str(path), 3) == f"{path}, row 3"
    path.write_bytes(path.read_bytes()[:20_000])
    bad = rows(path)[-1]
    assert bad.why == "unreadable file"
    path.write_bytes(b"ARROW")
    [bad] = rows(path)
    assert bad.why == "unreadable file"


def test_a_plain_file_has_the_digest_of_earlier_versions(tmp_path):
    """blake2b of its contents, and its suffix."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    assert find_sources(path)[0].digest() == hashlib.blake2b(path.read_bytes()).hexdigest() + ".jsonl"
