"""jaxlm.training.sources, forms and texts: files and hub datasets to documents."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_chat import TEMPLATE, tokenizer_of

from jaxlm.training import sources
from jaxlm.training.sources import Bad, Hub, Row, find
from jaxlm.training.texts import Document, TextOptions, Texts

CHATTING, PLAIN = tokenizer_of(TEMPLATE), tokenizer_of(None)
BASE = {"base": PLAIN, "chat": CHATTING}


def rows(*names, **options) -> list:
    return [row for source in find(list(names), **options) for row in source.rows()]


def text(made: Document | Bad, tok=PLAIN) -> tuple[str, str]:
    """A document's whole text, and what is learned of it."""
    assert isinstance(made, Document), str(made)
    return tok.decode(made.ids, skip_special=False), tok.decode(made.ids[made.learned], skip_special=False)


def documents(value, template: bool = True, **options) -> list:
    tok = CHATTING if template else PLAIN
    return list(Texts(tok, TextOptions(**options)).documents([Row("a.jsonl", 7, value)]))


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


def test_a_long_text_comes_in_parts_and_gives_the_same_document(tmp_path, monkeypatch):
    words = "and so the rat sat on a mat. Then, it ran!\n".replace(".", ".\n\n") * 30
    path = tmp_path / "a.txt"
    path.write_text(f"{words}\n<|endoftext|>\n{words.replace(chr(10), ' ')}")
    wholes = list(Texts(PLAIN).documents(rows(path)))
    monkeypatch.setattr(sources, "PART", 100)
    parts = rows(path)
    assert len(parts) > 20
    assert max(len(row.value) for row in parts) < 250
    assert [row.ends for row in parts].count(True) == 2
    made = list(Texts(PLAIN).documents(parts))
    for whole, last in zip(wholes, np.flatnonzero([document.ends for document in made])):
        joined = [document for document in made if document.number == whole.number]
        assert np.concatenate([document.ids for document in joined]).tolist() == whole.ids.tolist()
        assert joined[-1] is made[last]
    # So does a row of another file, which is there as a whole.
    [long] = [wholes[0].ids.tolist()]
    made = list(Texts(PLAIN).documents([Row("a.jsonl", 1, {"text": f"{words}"})]))
    assert len(made) > 10
    assert [token for document in made for token in document.ids.tolist()] == long
    assert [document.ends for document in made] == [False] * (len(made) - 1) + [True]


def test_a_text_without_a_place_to_cut_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * 50 + "\n" + "y" * 50 + "\n" + ", " * 100)
    assert "".join(row.value for row in rows(path)) == path.read_text()
    assert sources.cut("日本語" * 100) == ["日本語" * 100]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"\n[1]\n{"text": "\xff"}\n{"text": "c"}')
    found = rows(path)
    assert [row for row in found if isinstance(row, Row)] == [
        Row(str(path), 1, {"text": "a"}),
        Row(str(path), 7, {"text": "c"}),
    ]
    messages = [str(row) for row in found if isinstance(row, Bad)]
    assert f"{path}:4: the line is no JSON (Expecting ',' delimiter" in messages[0]
    assert messages[1:] == [
        f"{path}:5: a row is an object with fields, this is [1]",
        f"{path}:6: byte 11 of the line is not UTF-8: convert the file, or leave the line out",
    ]


def test_json_lists(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, 5], indent=2))
    assert rows(path)[0] == Row(str(path), 1, {"text": "a"})
    assert str(rows(path)[1]) == f"{path}, row 2: a row is an object with fields, this is 5"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # lines under another name
    assert [row.value["text"] for row in rows(path)] == ["a", "b"]
    for content, message in (
        ("[1,", "it is no JSON"),
        ("5", "should be a list of objects"),
        ('{\n"a": 1}', "or one on"),
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
    assert "train-00000-of-00001.parquet: it cannot be read on from here" in str(bad)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.txt").touch()
    [bad] = rows(tmp_path)
    assert str(bad) == f"{tmp_path / 'a.txt'}: the file is empty"


# What is named


def test_folders_splits_and_globs(tmp_path, monkeypatch):
    for name in ("b.txt", "a.jsonl", "deep/c.parquet", "notes.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = lambda *given, **more: [source.path.relative_to(tmp_path).as_posix() for source in find(given, **more)]  # noqa: E731
    assert names(tmp_path) == ["a.jsonl", "b.txt", "deep/c.parquet"]
    assert names(f"{tmp_path}/*") == ["a.jsonl", "b.txt"]
    assert names(tmp_path / "b.txt", tmp_path / "a.jsonl") == ["b.txt", "a.jsonl"]
    for name in ("train.jsonl", "valid.jsonl", "test-00000-of-00001.parquet"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["train.jsonl"]
    assert names(tmp_path, split="validation") == names(tmp_path, split="valid") == ["valid.jsonl"]
    assert names(tmp_path, split="test") == ["test-00000-of-00001.parquet"]
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no files of the split 'dev', but of test, train"):
        find(tmp_path, split="dev")


def test_what_is_not_there_or_not_read(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for name, error, message in [
        (tmp_path / "a.csv", ValueError, r"a.csv is none of .txt, .jsonl, .json, .parquet"),
        (tmp_path, FileNotFoundError, "holds no file that is one of .txt, .jsonl"),
        (f"{tmp_path}/*.txt", FileNotFoundError, r"no file fits .*/\*.txt"),
        ("stories.txt", FileNotFoundError, "there is no file or folder stories.txt"),
        ("./stories", FileNotFoundError, "there is no file or folder ./stories"),
        ([], ValueError, "no dataset is named"),
    ]:
        with pytest.raises(error, match=message):
            find(name)


# The hub, without one


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """datasets with this folder for a hub: org/name is tmp_path/hub/org/name. -> what was asked for."""
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
    digests = {find("wikitext", config=name)[0].digest() for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")}
    assert len(digests) == 2


def test_a_hub_datasets_digest():
    """By its place in datasets' cache, wherever that is; of one in memory alone by what it holds."""
    import datasets

    def place(*parts):
        return SimpleNamespace(cache_files=[{"filename": str(Path("/", *parts))}])

    same = ("org___name", "default", "0.0.0", "abc", "name-train.arrow")
    first = Hub("org/name", place("one", *same)).digest()
    assert first == Hub("org/name", place("other", "cache", *same)).digest()
    others = [(*same[:1], "small", *same[2:]), (*same[:3], "abd", same[4]), (*same[:4], "name-test.arrow")]
    assert first not in [Hub("org/name", place("one", *other)).digest() for other in others]
    held = [Hub("held", datasets.Dataset.from_dict({"text": [text]})).digest() for text in "aab"]
    assert held[0] == held[1] != held[2]


def test_what_the_hub_has_not(hub, tmp_path):
    write_wikitext(tmp_path / "hub/org/several", "small", "large")
    for name, options, error, message in [
        ("org/several", {}, ValueError, "org/several has several configurations, name one with config: small, large"),
        ("org/several", {"config": "huge"}, ValueError, "no such configuration, but small, large"),
        ("org/several", {"config": "small", "split": "dev"}, ValueError, "no such split, but train"),
        ("org/none", {}, FileNotFoundError, "'org/none' is no file or folder here, and on the hub: Dataset 'org/none'"),
    ]:
        with pytest.raises(error, match=message):
            find(name, **options)


def test_offline_asks_nobody(hub, tmp_path, monkeypatch):
    import datasets

    with pytest.raises(ValueError, match="offline, and org/name is not in the cache: run once without offline"):
        find("org/name", offline=True)
    write_wikitext(tmp_path / "hub/org/name", "default")
    cache = tmp_path / "cache"
    find("org/name")
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
    with pytest.raises(
        ConnectionError, match="'org/name' cannot be fetched, and is no file here: Couldn't reach 'org/"
    ):
        find("org/name")


# Forms

PAIR = {"prompt": "Say a", "completion": "b"}
ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("form", "value", "whole", "learned"),
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
def test_forms(form, value, whole, learned):
    texts = Texts(CHATTING)
    [made] = texts.documents([Row("a.jsonl", 7, {**value, "id": 5})])
    assert text(made) == (whole, learned)
    assert texts.form == form
    assert (made.source, made.number, made.ends) == ("a.jsonl", 7, True)
    [made] = documents(value, learn="all")
    assert text(made) == (whole, whole)
    assert text(documents(value, form=form)[0]) == (whole, learned)


@pytest.mark.parametrize(
    ("value", "whole", "learned"),
    [
        (PAIR, "<bos>Say a\nb<end>", "b<end>"),
        ({"prompt": "Say a:", "completion": " b"}, "<bos>Say a: b<end>", " b<end>"),
        ({"prompt": "Say a: ", "completion": "b"}, "<bos>Say a: b<end>", "b<end>"),
        ({"prompt": "", "completion": "b"}, "<bos>b<end>", "b<end>"),
        ({"prompt": "<bos>a\n", "completion": "b"}, "<bos>a\nb<end>", "b<end>"),
        (ALPACA, "<bos>### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<end>", "3<end>"),
    ],
)
def test_prompts_without_a_template(value, whole, learned):
    assert text(documents(value, template=False)[0]) == (whole, learned)
    assert text(documents(value, template=False, learn="all")[0]) == (whole, whole)


def test_fields_with_other_names():
    value = {"question": "a", "answer": "b", "text": "c"}
    [made] = documents(value, prompt_field="question", completion_field="answer")
    assert text(made)[1] == "b<end>"
    assert text(documents({"question": "a", "answer": "b"})[0])[1] == "b<end>"
    assert text(documents({"story": "a", "messages": []}, text_field="story")[0])[0] == "<bos>a<end>"
    assert text(documents({**PAIR, "text": "c"}, form="text")[0])[0] == "<bos>c<end>"


@pytest.mark.parametrize(
    ("value", "options", "why", "message"),
    [
        ({"asked": "a", "answer": "b"}, {}, "fields are missing",
         "prompt and completion or instruction and output or question and answer or text is expected, this has "
         "the fields asked, answer: other names are given by text_field, or prompt_field and completion_field"),
        ({}, {}, "fields are missing", r"this has the fields \(none\)"),
        ({"text": "a"}, {"form": "messages"}, "fields are missing", "a row with messages is expected"),
        ("a", {"form": "messages"}, "fields are missing", "a row with messages is expected, this is a text"),
        ({"text": None}, {}, "not a text", "the field text should be a text, it is None"),
        ({"text": " \n"}, {}, "empty text", "the text is empty"),
        ({"text": "\ud800"}, {}, "invalid UTF-8", "half of a surrogate pair"),
        ({"messages": "a"}, {}, "no messages", "the field messages should be a list of messages, it is 'a'"),
        ({"messages": []}, {}, "no messages", r"it is \[\]"),
        ({"messages": [{"content": "a"}]}, {}, "no messages", "a message is a dict with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": 5}]}, {}, "no messages", "texts both, got {'role': 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "no messages", "'image'.*not supported"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "no assistant turn",
         r"no turn of the assistant to learn from \(roles: user\)"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, {}, "refused by the chat template", "no such words"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": "{"}]}]}, {}, "no messages",
         "the arguments of a tool call should be JSON, it is '{'"),
        ({**PAIR, "tools": "[{"}, {}, "no messages", r"tools should be JSON, it is '\[{'"),
        ({**PAIR, "tools": [5]}, {}, "no messages", "tools should be a list of JSON schemas"),
        ({**PAIR, "completion": 5}, {}, "no messages", "field completion should be a list of messages, it is 5"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "a"}]}, {}, "no assistant turn", "roles: user"),
        ({"instruction": "a", "output": None}, {}, "not a text", "the field output should be a text, it is None"),
    ],
)  # fmt: skip
def test_rows_that_give_no_document(value, options, why, message):
    [bad] = documents(value, **options)
    assert isinstance(bad, Bad)
    assert bad.why == why
    with pytest.raises(ValueError, match=f"a.jsonl:7: .*{message}"):
        raise ValueError(str(bad))


def test_to_end_at_once_is_an_answer():
    for template in (True, False):
        assert text(documents({"prompt": "a\n", "completion": ""}, template=template)[0])[1] == "<end>"


def test_one_form_for_all_rows():
    texts = Texts(CHATTING)
    given = [Row("a.jsonl", 1, PAIR), Bad("a.jsonl", 2, "w", "d"), Row("b.txt", 1, "a"), Row("a.jsonl", 4, PAIR)]
    made = list(texts.documents(given))
    assert [type(one) for one in made] == [Document, Bad, Bad, Document]
    assert str(made[2]).startswith("b.txt:1: a row with prompt and completion is expected, this is a text")


def test_what_no_row_can_help():
    for options, value, template, message in [
        ({"learn": "assistant"}, {"text": "a"}, True, "a.jsonl holds texts, in which nobody speaks: learn=assistant"),
        ({"form": "chat"}, {"text": "a"}, True, "form 'chat' is not one of messages, conversations, prompt"),
        ({}, {"messages": [{"role": "user", "content": "a"}]}, False, "no chat template"),
        ({}, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, False, "no chat template"),
    ]:
        with pytest.raises(ValueError, match=message):
            documents(value, template=template, **options)


def test_bos_and_eos_once():
    tok = tokenizer_of(None)
    for given in ("at", "<bos>at", "at<end>", "<bos>at<end>"):
        [made] = Texts(tok).documents([Row("a.txt", 1, given)])
        assert tok.decode(made.ids, skip_special=False) == "<bos>at<end>"
        assert made.ids.dtype == np.int32
    tok.hf.eos_token = None
    tok.backend_tokenizer.post_processor = None
    [made] = Texts(tok).documents([Row("a.txt", 1, "at")])
    assert tok.decode(made.ids, skip_special=False) == "at"


# Real data


def made_of(shared, name: str, tok=CHATTING, count: int = 50, **options) -> list:
    [source] = find(shared / "corpora" / name)
    found = [row for row, _ in zip(source.rows(), range(count))]
    assert all(isinstance(row, Row) for row in found)
    return list(Texts(tok, TextOptions(**options)).documents(found))


def test_gsm8k_through_named_fields(shared):
    made = made_of(shared, "gsm8k/train.jsonl", prompt_field="question", completion_field="answer")
    whole, learned = text(made[0])
    assert whole.startswith("<bos><user>Natalia sold clips to 48 of her friends")
    assert learned.startswith("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia")
    assert learned.endswith("#### 72<end>")
    assert made[49].number == 50


def test_instructions_as_a_json_list(shared):
    made = made_of(shared, "instruct_rasbt/instruction-data.json", count=1100)
    assert len(made) == 1100
    assert text(made[1]) == (
        "<bos><user>Edit the following sentence for grammar.\n\nHe go to the park every day.<end>"
        "<assistant>He goes to the park every day.<end>",
        "He goes to the park every day.<end>",
    )


def test_texts_of_rows_and_between_separators(shared):
    assert text(made_of(shared, "wikisql_mlx/valid.jsonl")[0])[0].startswith("<bos>table: 1-10015132-11\ncolumns: ")
    made = made_of(shared, "stories/tinystories.txt")
    assert text(made[0])[0].startswith("<bos>Mama and Michael were in the kitchen.")
    assert not text(made[0])[0].endswith("\n<end>")
