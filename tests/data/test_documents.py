"""jaxlm.data.sources, formats and documents: files and hub datasets to tokenized documents."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from helpers.tiny_chat import TEMPLATE, tokenizer_of

from jaxlm.data import readers, sources
from jaxlm.data.documents import Document, DocumentTokenizer, TextOptions
from jaxlm.data.formats import FORMATS, Format
from jaxlm.data.readers import InvalidRow, Row
from jaxlm.data.sources import find_sources

CHATTING, PLAIN = tokenizer_of(TEMPLATE), tokenizer_of(None)
BASE = {"base": PLAIN, "chat": CHATTING}


def rows(*names, **options) -> list:
    return [row for source in find_sources(list(names), **options) for row in source.rows()]


def text(made: Document | InvalidRow, tok=PLAIN) -> tuple[str, str]:
    """Returns the text of a document, and the part of it in the loss mask."""
    assert isinstance(made, Document), str(made)
    return tok.decode(made.ids, skip_special=False), tok.decode(made.ids[made.loss_mask], skip_special=False)


def documents(value, template: bool = True, **options) -> list:
    tok = CHATTING if template else PLAIN
    return list(DocumentTokenizer(tok, TextOptions(**options)).documents([Row("a.jsonl", 7, value)]))


def write(path: Path, *values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# Files


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne\r\n\n two \n")
    assert rows(path) == [Row(str(path), 1, "One\r\n\n two \n")]


def test_documents_between_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\nOne\ntwo\n<|endoftext|>\n\n \n<|endoftext|>\nThree <|endoftext|> x\n\n <|endoftext|>\r\nFour")
    assert rows(path) == [
        Row(str(path), 1, "\nOne\ntwo"),
        Row(str(path), 8, "Three <|endoftext|> x\n"),
        Row(str(path), 11, "Four"),
    ]


def test_a_long_text_in_parts_gives_the_same_document(tmp_path, monkeypatch):
    words = "and so the rat sat on a mat. Then, it ran!\n".replace(".", ".\n\n") * 30
    path = tmp_path / "a.txt"
    path.write_text(f"{words}\n<|endoftext|>\n{words.replace(chr(10), ' ')}")
    wholes = list(DocumentTokenizer(PLAIN).documents(rows(path)))
    monkeypatch.setattr(readers, "PART", 100)
    parts = rows(path)
    assert len(parts) > 20
    assert max(len(row.value) for row in parts) < 250
    assert [row.ends for row in parts].count(True) == 2
    made = list(DocumentTokenizer(PLAIN).documents(parts))
    for whole, last in zip(wholes, np.flatnonzero([document.ends for document in made])):
        joined = [document for document in made if document.number == whole.number]
        assert np.concatenate([document.ids for document in joined]).tolist() == whole.ids.tolist()
        assert joined[-1] is made[last]
    # So does a long text in a row of another file.
    [long] = [wholes[0].ids.tolist()]
    made = list(DocumentTokenizer(PLAIN).documents([Row("a.jsonl", 1, {"text": f"{words}"})]))
    assert len(made) > 10
    assert [token for document in made for token in document.ids.tolist()] == long
    assert [document.ends for document in made] == [False] * (len(made) - 1) + [True]


def test_a_text_that_cannot_be_split_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PART", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * 50 + "\n" + "y" * 50 + "\n" + ", " * 100)
    assert "".join(row.value for row in rows(path)) == path.read_text()
    assert readers.split_text("日本語" * 100) == ["日本語" * 100]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"\n[1]\n{"text": "\xff"}\n{"text": "c"}')
    found = rows(path)
    assert [row for row in found if isinstance(row, Row)] == [
        Row(str(path), 1, {"text": "a"}),
        Row(str(path), 7, {"text": "c"}),
    ]
    messages = [str(row) for row in found if isinstance(row, InvalidRow)]
    for message, (line, noun) in zip(messages, [(4, "JSON"), (5, "object"), (6, "byte 11")], strict=True):
        assert message.startswith(f"{path}:{line}: ")
        assert noun in message


def test_json_lists(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, 5], indent=2))
    assert rows(path)[0] == Row(str(path), 1, {"text": "a"})
    assert str(rows(path)[1]).startswith(f"{path}, row 2: ")
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # lines under another name
    assert [row.value["text"] for row in rows(path)] == ["a", "b"]
    for content, message in (
        ("[1,", "not valid JSON"),
        ("5", "list of objects"),
        ('{\n"a": 1}', "object per line"),
    ):
        path.write_text(content)
        assert message in str(rows(path)[0])
        assert str(rows(path)[0]).startswith(str(path))


def test_parquet_without_the_fields_that_other_rows_have(tmp_path):
    import datasets

    values = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "c", "tool_calls": [{"name": "f", "arguments": "{}"}]}]},
    ]
    folder = tmp_path / "data"
    datasets.Dataset.from_list(values).to_parquet(folder / "train-00000-of-00001.parquet")
    found = rows(folder)
    assert [row.value for row in found] == values
    assert [row.number for row in found] == [1, 2]
    # The same folder as a dataset of the hub would be.
    loaded = datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row.value for row in sources.Hub("x/y", loaded).rows()] == values
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but no more")
    [bad] = rows(folder)
    assert bad.why == "unreadable file"
    assert "train-00000-of-00001.parquet" in str(bad)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.txt").touch()
    [bad] = rows(tmp_path)
    assert (bad.why, bad.source) == ("empty file", str(tmp_path / "a.txt"))


# Names of sources


def test_folders_splits_and_globs(tmp_path, monkeypatch):
    for name in ("b.txt", "a.jsonl", "deep/c.parquet", "notes.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*sources, **options) -> list[str]:
        return [source.path.relative_to(tmp_path).as_posix() for source in find_sources(sources, **options)]

    assert names(tmp_path) == ["a.jsonl", "b.txt", "deep/c.parquet"]
    assert names(f"{tmp_path}/*") == ["a.jsonl", "b.txt"]
    assert names(tmp_path / "b.txt", tmp_path / "a.jsonl") == ["b.txt", "a.jsonl"]
    for name in ("train.jsonl", "valid.jsonl", "test-00000-of-00001.parquet"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["train.jsonl"]
    assert names(tmp_path, split="validation") == names(tmp_path, split="valid") == ["valid.jsonl"]
    assert names(tmp_path, split="test") == ["test-00000-of-00001.parquet"]
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="'dev'; it has test, train"):
        find_sources(tmp_path, split="dev")


def test_names_that_are_no_source(tmp_path):
    (tmp_path / "a.md").write_text("x")
    for name, error, message in [
        (tmp_path / "a.md", ValueError, r"a.md has an unknown suffix: convert it to one of .txt, .jsonl, .*\.zst"),
        (tmp_path, FileNotFoundError, r"has no file to read \(.txt, .jsonl"),
        (f"{tmp_path}/*.txt", FileNotFoundError, r"/\*.txt"),
        ("stories.txt", FileNotFoundError, "stories.txt"),
        ("./stories", FileNotFoundError, "./stories"),
        ([], ValueError, "no data: pass a file"),
    ]:
        with pytest.raises(error, match=message):
            find_sources(name)


# The hub, replaced by a folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: org/name is tmp_path/hub/org/name. Returns the list of requests."""
    import datasets

    theirs, asked = datasets.load_dataset, []

    def load(repo, config, split, revision):
        asked.append((repo, config, split, revision))
        if not (tmp_path / "hub" / repo).is_dir():
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub")
        return theirs(str(tmp_path / "hub" / repo), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def write_wikitext(folder: Path, *configs: str) -> None:
    folder.mkdir(parents=True)
    lines = [f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n" for name in configs]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    for name in configs:
        write(folder / f"{name}.jsonl", {"text": f"from {name}"}, {"text": ""})


def test_a_hub_dataset_by_name(hub, tmp_path):
    write_wikitext(tmp_path / "hub/Salesforce/wikitext", "wikitext-103-raw-v1", "wikitext-2-raw-v1")
    assert rows("wikitext")[0] == Row("Salesforce/wikitext", 1, {"text": "from wikitext-2-raw-v1"})
    assert hub == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None)]
    found = rows("wikitext", config="wikitext-103-raw-v1", revision="abc")
    assert found[0].value == {"text": "from wikitext-103-raw-v1"}
    assert hub[-1][3] == "abc"
    digests = {
        find_sources("wikitext", config=name)[0].digest() for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    }
    assert len(digests) == 2


def test_missing_datasets_configurations_and_splits(hub, tmp_path):
    write_wikitext(tmp_path / "hub/org/several", "small", "large")
    for name, options, error, message in [
        ("org/several", {}, ValueError, r"config \(small, large\)"),
        ("org/several", {"config": "huge"}, ValueError, "no such configuration: choose one of small, large"),
        ("org/several", {"config": "small", "split": "dev"}, ValueError, "no such split: choose one of train"),
        ("org/none", {}, FileNotFoundError, "Dataset 'org/none'"),
    ]:
        with pytest.raises(error, match=message):
            find_sources(name, **options)


def test_offline_makes_no_request(hub, tmp_path, monkeypatch):
    import datasets

    with pytest.raises(ValueError, match="not in the cache"):
        find_sources("org/name", offline=True)
    write_wikitext(tmp_path / "hub/org/name", "default")
    cache = tmp_path / "cache"
    find_sources("org/name")
    # What lies in the cache after a download bears the name of the repository.
    [made] = [path for path in cache.iterdir() if path.is_dir()]
    shutil.move(made, cache / "org___name")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    asked = len(hub)
    assert rows("org/name", offline=True)[0].value == {"text": "from default"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert rows("org/name")[0].value == {"text": "from default"}
    assert len(hub) == asked


def test_no_network(hub, monkeypatch):
    import datasets

    def load(*args, **options):
        raise ConnectionError("Couldn't reach 'org/name'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConnectionError, match="Couldn't reach 'org/"):
        find_sources("org/name")


# Formats

PAIR = {"prompt": "Say a", "completion": "b"}
ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("format", "value", "whole", "trained_on"),
    [
        ("text", {"text": "at sea"}, "<bos>at sea<end>", "<bos>at sea<end>"),
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "<bos><user>a<end><assistant>b<end>", "b<end>"),
        ("conversations", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                             {"from": "gpt", "value": "b"}]},
         "<bos><system>s<end><user>a<end><assistant>b<end>", "b<end>"),
        ("conversations", {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "<bos><user>a<end><assistant>b<end>", "b<end>"),
        ("prompt", PAIR, "<bos><user>Say a<end><assistant>b<end>", "b<end>"),
        ("prompt", {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                    "completion": {"role": "assistant", "content": "b"}},
         "<bos><system>s<end><user>a<end><assistant>b<end>", "b<end>"),
        ("instruction", ALPACA, "<bos><user>Add\n\n1 2<end><assistant>3<end>", "3<end>"),
        ("instruction", {**ALPACA, "input": ""}, "<bos><user>Add<end><assistant>3<end>", "3<end>"),
    ],
)  # fmt: skip
def test_formats(format, value, whole, trained_on):
    texts = DocumentTokenizer(CHATTING)
    [made] = texts.documents([Row("a.jsonl", 7, {**value, "id": 5})])
    assert text(made) == (whole, trained_on)
    assert texts.format == format
    assert (made.source, made.number, made.ends) == ("a.jsonl", 7, True)
    [made] = documents(value, train_on="all")
    assert text(made) == (whole, whole)
    assert text(documents(value, format=format)[0]) == (whole, trained_on)


@pytest.mark.parametrize(
    ("value", "whole", "trained_on"),
    [
        (PAIR, "<bos>Say a\nb<end>", "b<end>"),
        ({"prompt": "Say a:", "completion": " b"}, "<bos>Say a: b<end>", " b<end>"),
        ({"prompt": "Say a: ", "completion": "b"}, "<bos>Say a: b<end>", "b<end>"),
        ({"prompt": "", "completion": "b"}, "<bos>b<end>", "b<end>"),
        ({"prompt": "<bos>a\n", "completion": "b"}, "<bos>a\nb<end>", "b<end>"),
        (ALPACA, "<bos>### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<end>", "3<end>"),
    ],
)
def test_prompts_without_a_template(value, whole, trained_on):
    assert text(documents(value, template=False)[0]) == (whole, trained_on)
    assert text(documents(value, template=False, train_on="all")[0]) == (whole, whole)


def test_fields_with_other_names():
    value = {"question": "a", "answer": "b", "text": "c"}
    [made] = documents(value, prompt_field="question", completion_field="answer")
    assert text(made)[1] == "b<end>"
    assert text(documents({"question": "a", "answer": "b"})[0])[1] == "b<end>"
    assert text(documents({"story": "a", "messages": []}, text_field="story")[0])[0] == "<bos>a<end>"
    assert text(documents({**PAIR, "text": "c"}, format="text")[0])[0] == "<bos>c<end>"


@pytest.mark.parametrize(
    ("value", "options", "why", "message"),
    [
        ({"asked": "a", "answer": "b"}, {}, "missing fields",
         "prompt and completion or .* question and answer or text, but .* asked, answer: .*--data.text-field"),
        ({"Text": "a"}, {}, "missing fields", "did you mean 'text' instead of 'Text'"),
        ({"mesages": []}, {}, "missing fields", "did you mean 'messages'"),
        ({"question": "a"}, {"format": "question"}, "missing fields", "answer is absent or empty"),
        ({}, {}, "missing fields", r"\(none\)"),
        ({"text": "a"}, {"format": "messages"}, "missing fields", "a row with messages"),
        ("a", {"format": "messages"}, "missing fields", "messages, but this one is a text"),
        ({"text": None}, {}, "not a string", "field text is null"),
        ({"text": " \n"}, {}, "empty text", "text"),
        ({"text": "\ud800"}, {}, "invalid UTF-8", "half of a surrogate pair"),
        ({"messages": "a"}, {}, "invalid messages", "field messages"),
        ({"messages": []}, {}, "invalid messages", r"not \[\]"),
        ({"messages": [{"content": "a"}]}, {}, "invalid messages", "role"),
        ({"messages": [{"role": "user", "content": 5}]}, {}, "invalid messages", "has the content 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "invalid messages", "image"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "no assistant turn",
         r"roles: user"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, {}, "refused by the chat template", "no such words"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, {},
         "invalid messages", "arguments of a tool call"),
        ({**PAIR, "tools": "[{"}, {}, "invalid messages", "tools must be JSON"),
        ({**PAIR, "tools": [5]}, {}, "invalid messages", "tools must be a list"),
        ({**PAIR, "completion": 5}, {}, "invalid messages", "field completion"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "a"}]}, {}, "invalid messages", "no answer"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}, {},
         "invalid messages", "must begin with an answer"),
        ({**PAIR, "prompt": None}, {}, "invalid messages",
         "field prompt must be a text or a list of messages, not None"),
        ({"instruction": "a", "output": None}, {}, "not a string", "field output"),
    ],
)  # fmt: skip
def test_invalid_rows(value, options, why, message):
    [bad] = documents(value, **options)
    assert isinstance(bad, InvalidRow)
    assert bad.why == why
    with pytest.raises(ValueError, match=f"a.jsonl:7: .*{message}"):
        raise ValueError(str(bad))


def test_an_answer_that_repeats_the_prompt():
    """As in rows of preferences whose `chosen` is the whole conversation."""
    chosen = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"prompt": "Q", "chosen": chosen, "rejected": [*chosen[:1], {"role": "assistant", "content": "B"}]}
    [made] = documents(row, completion_field="chosen")
    assert text(made) == ("<bos><user>Q<end><assistant>A<end>", "A<end>")
    [made] = documents({**row, "chosen": chosen[1:]}, completion_field="chosen")
    assert text(made) == ("<bos><user>Q<end><assistant>A<end>", "A<end>")


def test_an_empty_answer():
    for template in (True, False):
        assert text(documents({"prompt": "a\n", "completion": ""}, template=template)[0])[1] == "<end>"
    texts = DocumentTokenizer(CHATTING)
    list(texts.documents(Row("a.jsonl", i, {**PAIR, "completion": " " * (i % 2)}) for i in range(3)))
    assert any("3 rows have an empty answer" in note for note in texts.notes)
    for chatting, rows, options in [
        (CHATTING, [PAIR], None),
        (CHATTING, [{**PAIR, "completion": ""}], TextOptions(train_on="all")),
        (CHATTING, [{**PAIR, "completion": "", "reasoning": "x"}], TextOptions()),
    ]:
        texts = DocumentTokenizer(chatting, options)
        list(texts.documents(Row("a.jsonl", i, row) for i, row in enumerate(rows, 1)))
        assert not any("empty answer" in note for note in texts.notes)
    texts = DocumentTokenizer(tokenizer_of(None))
    list(texts.documents([Row("a.jsonl", 1, {**PAIR, "completion": " "})]))
    assert any("1 row has an empty answer" in note for note in texts.notes)


def test_all_rows_have_one_format():
    texts = DocumentTokenizer(CHATTING)
    given = [Row("a.jsonl", 1, PAIR), InvalidRow("a.jsonl", 2, "w", "d"), Row("b.txt", 1, "a"), Row("a.jsonl", 4, PAIR)]
    made = list(texts.documents(given))
    assert [type(one) for one in made] == [Document, InvalidRow, InvalidRow, Document]
    assert str(made[2]).startswith("b.txt:1: ")
    assert "of the format prompt in a.jsonl: give each training source a weight" in str(made[2])
    given = [Row("a.jsonl", 1, PAIR), Row("a.jsonl", 2, {"text": "a"})]
    assert "all rows of a source have one format" in str(list(DocumentTokenizer(CHATTING).documents(given))[1])
    assert "prompt and completion" in str(made[2])


def test_options_that_no_row_can_have():
    for options, value, template, message in [
        (
            {"train_on": "assistant"},
            {"text": "a"},
            True,
            "--data.train-on all",
        ),
        ({"format": "chat"}, {"text": "a"}, True, "TextOptions.format is 'chat'"),
        ({"template_args": {"tools": []}}, {"text": "a"}, True, "template_args cannot set tools"),
        ({}, {"messages": [{"role": "user", "content": "a"}]}, False, "no chat template"),
        ({}, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, False, "no chat template"),
    ]:
        with pytest.raises(ValueError, match=message):
            documents(value, template=template, **options)


def test_bos_and_eos_once():
    tok = tokenizer_of(None)
    for given in ("at", "<bos>at", "at<end>", "<bos>at<end>"):
        [made] = DocumentTokenizer(tok).documents([Row("a.txt", 1, given)])
        assert tok.decode(made.ids, skip_special=False) == "<bos>at<end>"
        assert made.ids.dtype == np.int32
    tok.hf.eos_token = None
    tok.backend_tokenizer.post_processor = None
    [made] = DocumentTokenizer(tok).documents([Row("a.txt", 1, "at")])
    assert tok.decode(made.ids, skip_special=False) == "at"


def test_an_answer_may_repeat_all_before_it():
    """The system message and the history beside the prompt too."""
    history = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}]
    answer = {"role": "assistant", "content": "c"}
    before = [{"role": "system", "content": "s"}, *history, {"role": "user", "content": "a"}]
    row = {"prompt": "a", "system": "s", "history": history}
    wanted = text(*documents(row | {"completion": [answer]}), CHATTING)
    for repeated in (before, before[1:], before[3:]):
        assert text(*documents(row | {"completion": [*repeated, answer]}), CHATTING) == wanted


def test_options_without_effect_are_told_or_refused():
    texts = DocumentTokenizer(CHATTING, TextOptions(completion_field="answer", prompt_field="question", text_field="x"))
    list(texts.documents([Row("a.jsonl", 1, {"question": "a", "answer": "b"})]))
    assert [note.split(",")[0] for note in texts.notes] == ["text_field is x"]
    texts = DocumentTokenizer(CHATTING, TextOptions(completion_field="answr"))
    list(texts.documents([Row("a.jsonl", 1, {"question": "a", "answer": "b"})]))
    assert any("completion_field is answr" in note for note in texts.notes)
    with pytest.raises(ValueError, match="does not use the variable 'enable_thinkng'"):
        DocumentTokenizer(CHATTING, TextOptions(template_args={"enable_thinkng": False}))


def test_every_format_can_be_chosen():
    assert {*get_args(Format)} == {*FORMATS}
