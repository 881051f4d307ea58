"""Documents of files like those that people train on: questions, instructions, tables and stories."""

import json
from pathlib import Path

from data.test_documents import CHATTING, text, write

from jaxlm.data.documents import DocumentTokenizer, TextOptions
from jaxlm.data.readers import Row
from jaxlm.data.sources import find_sources


def made_of(path: Path, tok=CHATTING, count: int = 50, **options) -> list:
    [source] = find_sources(path)
    found = [row for row, _ in zip(source.rows(), range(count))]
    assert all(isinstance(row, Row) for row in found)
    return list(DocumentTokenizer(tok, TextOptions(**options)).documents(found))


def test_questions_through_named_fields(tmp_path):
    answer = "He eats 3*2 = <<3*2=6>>6 figs a day.\nIn a week that is 6*7 = <<6*7=42>>42.\n#### 42"
    path = write(tmp_path / "a.jsonl", *[{"riddle": f"Day {i}: how many figs?", "solution": answer} for i in range(60)])
    made = made_of(path, prompt_field="riddle", completion_field="solution")
    assert text(made[1]) == (f"<bos><user>Day 1: how many figs?<end><assistant>{answer}<end>", f"{answer}<end>")
    assert (len(made), made[49].number) == (50, 50)


def test_instructions_as_a_json_list(tmp_path):
    one = {"instruction": "Spell this word.", "input": "recieve", "output": "receive"}
    (tmp_path / "a.json").write_text(json.dumps([{**one, "input": ""}, one] * 550, indent=4))
    made = made_of(tmp_path / "a.json", count=1100)
    assert len(made) == 1100
    assert text(made[0])[0] == "<bos><user>Spell this word.<end><assistant>receive<end>"
    assert text(made[1]) == ("<bos><user>Spell this word.\n\nrecieve<end><assistant>receive<end>", "receive<end>")


def test_texts_of_rows_and_between_separators(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "table: 1\ncolumns: a, b\nQ: a?\nA: b"})
    assert text(made_of(path)[0])[0] == "<bos>table: 1\ncolumns: a, b\nQ: a?\nA: b<end>"
    (tmp_path / "a.txt").write_text("A cat sat.\n\nIt slept.\n<|endoftext|>\nA dog ran.\n")
    made = made_of(tmp_path / "a.txt")
    assert [text(one)[0] for one in made] == ["<bos>A cat sat.\n\nIt slept.<end>", "<bos>A dog ran.\n<end>"]


def test_published_files(shared):
    made = made_of(shared / "corpora/gsm8k/train.jsonl", prompt_field="question", completion_field="answer")
    whole, learned = text(made[0])
    assert whole.startswith("<bos><user>Natalia sold clips to 48 of her friends")
    assert learned.startswith("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia")
    assert learned.endswith("#### 72<end>")
    assert made[49].number == 50
    made = made_of(shared / "corpora/instruct_rasbt/instruction-data.json", count=1100)
    assert len(made) == 1100
    assert text(made[1]) == (
        "<bos><user>Edit the following sentence for grammar.\n\nHe go to the park every day.<end>"
        "<assistant>He goes to the park every day.<end>",
        "He goes to the park every day.<end>",
    )
    made = made_of(shared / "corpora/wikisql_mlx/valid.jsonl")
    assert text(made[0])[0].startswith("<bos>table: 1-10015132-11\ncolumns: ")
    made = made_of(shared / "corpora/stories/tinystories.txt")
    assert text(made[0])[0].startswith("<bos>Mama and Michael were in the kitchen.")
    assert not text(made[0])[0].endswith("\n<end>")
