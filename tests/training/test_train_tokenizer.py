"""jaxlm.training.train_tokenizer and `jaxlm tokenizer train`: lossless for every text, the same file in every run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.varied_text import CODE

from jaxlm.cli.tokenizer import Tokenizer as Command
from jaxlm.data.formats import TextOptions
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.training.train_tokenizer import train_tokenizer

KINDS = ["bpe", "unigram", "char"]
TEXT = (
    "Hello  world! I'm don't \t\n\n 12345 67, naïve café e\u0301 日本語 العربية 👩‍👩‍👧‍👦 🇩🇪 \ufffd \r\n"
    " <s> </s> <unk> <|im_start|>x <0x41> <0xE6> \u2581 \x00 Ġ end "
)
STORY = "Once upon a time there was a café. The cat sat on the mat, and the cat said: hello!\n" * 40 + "Zoë: 日本"


@pytest.fixture
def story(tmp_path) -> Path:
    (tmp_path / "story.txt").write_text(STORY)
    return tmp_path / "story.txt"


def load(folder: Path) -> Tokenizer:
    tok = Tokenizer.load(folder)
    assert tok is not None
    return tok


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_lossless(story, tmp_path, kind):
    done = train_tokenizer(story, tmp_path / "tok", kind, 300, ["<|user|>"])
    tok = load(tmp_path / "tok")
    for text in (TEXT, STORY, "", " ", "\n", *map(chr, range(256)), "\U0010ffff"):
        assert tok.decode(tok.encode(text)) == text
    assert (done.folder, done.vocabulary) == (tmp_path / "tok", len(tok))
    assert len(tok) == tok.vocab_size <= 300
    assert done.characters == len(STORY)
    assert done.tokens == len(tok.encode(STORY, add_special_tokens=False))
    assert str(done).startswith(f"{len(tok)} tokens, {len(STORY) / done.tokens:.2f} characters per token on 3,3")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(story, tmp_path, kind):
    train_tokenizer(story, tmp_path / "tok", kind, 300, ["<|user|>", "<|bot|>"])
    tok = load(tmp_path / "tok")
    assert tok.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|bot|>"]) == [0, 1, 2]
    assert tok.bos_id == tok.hf.eos_token_id == 0
    assert tok.stop_ids == (0,)
    assert tok.special_ids == {0, 1, 2}
    assert tok.encode("<|user|>a<|bot|>")[:2] == [0, 1]
    assert tok.encode("<|endoftext|>a") == tok.encode("a")


def test_transformers_reads_it(story, tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(story, tmp_path / "tok", "bpe", 300)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert theirs.encode(TEXT) == load(tmp_path / "tok").encode(TEXT)
    assert theirs.decode(theirs.encode(TEXT), skip_special_tokens=True) == TEXT
    assert (theirs.bos_token, theirs.eos_token) == ("<|endoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_in_every_run(story, tmp_path, kind):
    """Also in another process, whose hash tables have another order."""
    code = (
        "import sys; from jaxlm.training.train_tokenizer import train_tokenizer; train_tokenizer(*sys.argv[1:4], 400)"
    )
    subprocess.run([sys.executable, "-c", code, story, tmp_path / "0", kind], check=True)
    for run in "12":
        train_tokenizer(story, tmp_path / run, kind, 400)
    files = {(tmp_path / run / "tokenizer.json").read_bytes() for run in "012"}
    assert len(files) == 1


def test_characters(story, tmp_path):
    train_tokenizer(story, tmp_path / "all", "char")
    tok = load(tmp_path / "all")
    assert len(tok) == 1 + 256 + len(set(STORY))
    assert len(tok.encode(STORY, add_special_tokens=False)) == len(STORY)
    train_tokenizer(story, tmp_path / "few", "char", 1 + 256 + 5)
    few = load(tmp_path / "few")
    kept = {
        char for char in set(STORY) if len(few.encode(char, add_special_tokens=False)) == 1 and char in few.get_vocab()
    }
    assert kept == set(sorted(set(STORY), key=lambda char: -STORY.count(char))[:5])


def test_bpe_merges_frequent_pairs(story, tmp_path):
    done = train_tokenizer(story, tmp_path / "tok", "bpe", 400)
    small = train_tokenizer(story, tmp_path / "small", "bpe", 257)
    assert small.tokens == len(STORY.encode())
    assert done.tokens < small.tokens / 3
    assert "Ġcat" in load(tmp_path / "tok").get_vocab()


def test_unigram_and_bpe_have_the_requested_size(tmp_path):
    """On 200,000 characters of the package's own code."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(CODE.rglob("*.py")))
    (tmp_path / "a.txt").write_text(code[:200_000], encoding="utf-8")
    for kind in ("bpe", "unigram"):
        done = train_tokenizer(tmp_path / "a.txt", tmp_path / kind, kind, 800)
        assert done.vocabulary == 800
        assert done.characters / done.tokens > 2


def test_rows_of_any_format(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "abcabc"}, {"role": "assistant", "content": "xyz"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_tokenizer(tmp_path / "a.jsonl", tmp_path / "a", "char").vocabulary == 257 + 6
    (tmp_path / "b.jsonl").write_text('{"story": "abc"}\n')
    options = TextOptions(text_field="story")
    assert train_tokenizer(tmp_path / "b.jsonl", tmp_path / "b", "char", options=options).vocabulary == 257 + 3


def test_errors(story, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"story": "abc"}\n')
    (tmp_path / "five.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "there").mkdir()
    (tmp_path / "there/tokenizer.json").touch()
    for given, error, message in [
        ((story, "x", "wordpiece"), ValueError, "kind is 'wordpiece'"),
        (
            (story, "x", "bpe", 256),
            ValueError,
            "vocab_size is 256",
        ),
        ((story, "x", "bpe", 300, ["<a>", "<a>"]), ValueError, "special tokens"),
        ((story, "x", "bpe", 300, [" "]), ValueError, "special tokens"),
        ((story, tmp_path / "there"), FileExistsError, "--force"),
        (
            (tmp_path / "bad.jsonl", "x"),
            ValueError,
            r"bad.jsonl:1: .*--text-field",
        ),
        ((tmp_path / "five.jsonl", "x"), ValueError, r"five.jsonl:1: .*field text"),
        ((tmp_path / "empty.txt", "x"), ValueError, "empty.txt"),
        ((tmp_path / "blank.jsonl", "x"), ValueError, "no text to train on"),
        (("nowhere.txt", "x"), FileNotFoundError, "nowhere.txt"),
    ]:
        with pytest.raises(error, match=message):
            train_tokenizer(*given)
    assert not Path("x").exists()
    train_tokenizer(story, tmp_path / "there", vocab_size=300, force=True)
    assert len(load(tmp_path / "there")) == 300
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_command(story, tmp_path, capsys):
    command = Command(action="train", files=(str(story),), out=tmp_path / "tok", kind="bpe", vocab_size=300)
    assert command.run() == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("300 tokens, ")
    assert " characters per token on 3," in captured.out
    assert captured.err.splitlines() == ["training a bpe tokenizer …", f"wrote {tmp_path / 'tok'}"]
    assert load(tmp_path / "tok").decode(load(tmp_path / "tok").encode(TEXT)) == TEXT
    for incomplete in (Command(), Command(action="train", files=("a.txt",)), Command(action="train", out=tmp_path)):
        with pytest.raises(SystemExit, match="2"):
            incomplete.run()
        assert "jaxlm tokenizer train FILES --out FOLDER" in capsys.readouterr().err


def test_the_command_imports_no_jax():
    code = (
        "import sys; from jaxlm.cli.tokenizer import Tokenizer; import jaxlm.training.train_tokenizer\n"
        "assert not sys.modules.keys() & {'jax', 'transformers', 'tokenizers', 'datasets', 'grain', 'pyarrow'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
