"""Base models that learn chats: the chat template that a run gives its tokenizer, and the tokens that it needs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import base_chats, tiny_files
from helpers.base_chats import ANSWERS, question, write_chats
from helpers.training_runs import BASE, Stopped, lines, stopping_at, write_base

import jaxlm
from jaxlm.cli import main
from jaxlm.cli.train import metrics_line
from jaxlm.inference import generation
from jaxlm.nn import params
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.training import loop
from jaxlm.training.config import Data, Optimizer, Run
from jaxlm.training.init_state import init_state
from jaxlm.training.setup import set_up

pytestmark = pytest.mark.usefixtures("quick")
FEW = {"Hi": "Hello", "Who?": "Me", "How?": "So"}
MARKS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", FEW)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A base model whose vocabulary has no spare row."""
    folder = tmp_path_factory.mktemp("full")
    tiny_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    """A base model whose vocabulary has spare rows."""
    return write_base(tmp_path_factory.mktemp("padded"))


def run_of(base: Path, chats: str, out: Path, **fields: Any) -> Run:
    sizes: dict[str, Any] = {"steps": 4, "batch": 2, "length": 96, "log_every": 1, "save_every": 2, "eval_every": 0}
    names: dict[str, Any] = {"model": str(base), "out": out, "data": Data(train=(chats,)), "chat_template": "chatml"}
    return Run(**{**names, **sizes, "optimizer": Optimizer(lr=1e-2), **fields})


def notes_of(run: Run) -> list[str]:
    return list(set_up(run).notes)


def test_stories260k_learns_twenty_chats(shared, tmp_path) -> None:
    done = loop.train(base_chats.run_of(shared, tmp_path))
    assert done.last["loss"] < 0.1
    model = jaxlm.load(done.model)
    assert model.config.V == 576
    answers = [jaxlm.generate(model, question(text), temperature=0, max_tokens=12) for text in ANSWERS]
    assert dict(zip(ANSWERS, map(str, answers))) == ANSWERS
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_the_files_of_the_model(full, chats, tmp_path, capsys) -> None:
    done = loop.train(run_of(full, chats, tmp_path / "run"))
    model, before = jaxlm.load(done.model), jaxlm.load(full)
    assert model.tokenizer.convert_tokens_to_ids(MARKS) == [258, 259]
    assert set(MARKS) == {model.tokenizer.decode([i], skip_special=False) for i in (258, 259)}
    assert model.tokenizer.decode([258, 259]) == ""
    names = {path.name for path in done.model.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert json.loads((done.model / "config.json").read_text()) == {**tiny_files.CONFIG, "vocab_size": 320}
    assert json.loads((done.model / "generation_config.json").read_text())["eos_token_id"] == [257, 259]
    assert model.tokenizer.encode("Hi") == before.tokenizer.encode("Hi")
    assert model.tokenizer.chat(question("Hi"))[:2] == [256, 258]
    assert json.loads((done.folder / "run.json").read_text())["chat_template"] == "chatml"
    assert main(["info", str(done.model)]) == 0
    assert ", chat template" in capsys.readouterr().out
    assert main(["export", str(done.model), str(tmp_path / "copy")]) == 0
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (done.model / name).read_bytes()
    # The next run has nothing to add.
    again = set_up(run_of(done.model, chats, tmp_path / "again"))
    assert (again.config.V, again.new_rows, again.notes) == (320, None, ())


def test_a_run_resumes_with_the_same_tokens(full, chats, tmp_path) -> None:
    run = run_of(full, chats, tmp_path / "run")
    whole = loop.train(run)
    other = replace(run, out=tmp_path / "other")
    with pytest.raises(Stopped):
        loop.train(other, stopping_at(3))
    done = loop.train(other)
    assert lines(other.out) == lines(run.out)
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole.model, done.model)]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="chat_template"):
        loop.train(replace(run, chat_template="llama3"))


@pytest.mark.parametrize("mesh", [None, "data=4,model=2"])
@pytest.mark.parametrize("name", ["full", "padded", "untied", "bfloat16"])
def test_new_rows_are_the_mean(name, mesh, full, padded, chats, tmp_path) -> None:
    """Both where the vocabulary grows and where it has spare rows. All other rows stay."""
    base = full if name == "full" else padded
    if name == "bfloat16":
        base = jaxlm.export(jaxlm.load(full), tmp_path / "base", dtype="bfloat16").folder
    elif name == "untied":
        base = tmp_path / "untied"
        model = jaxlm.load(padded)
        head = model.weights["embed"][::-1]
        config = {**BASE, "tie_word_embeddings": False, "vocab_size": 259}
        weights = {**model.weights, "embed": model.weights["embed"][:259], "head": head[:259]}
        untied = replace(model, weights=weights, config=model.family.Config.from_hf(config))
        jaxlm.export(untied, base, config=config)
    setup = set_up(run_of(base, chats, tmp_path / "run", mesh=mesh, batch=8))
    before, n = jaxlm.load(base, dtype="float32").weights, Tokenizer.load(base).vocab_size
    V, end = (512, n + 2) if name == "padded" else (320, 320)
    assert (setup.config.V, setup.new_rows) == (V, (n, end))
    weights = init_state(setup).weights
    for path in ("embed", "head") if name == "untied" else ("embed",):
        old, new = np.asarray(before[path]), np.asarray(weights[path])
        np.testing.assert_array_equal(new[:n], old[:n])
        np.testing.assert_allclose(new[n:end], np.tile(old[:n].mean(0), (end - n, 1)), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(new[end:], old[end:V])
        if mesh is not None:
            assert weights[path].sharding.shard_shape(new.shape) == (V // 8, 64)
    for path in ("layers", "norm"):
        jax.tree.map(np.testing.assert_array_equal, params.unstack(weights)[path], before[path])


def test_a_model_with_random_weights(full, chats, tmp_path) -> None:
    shape = full / "config.json"
    run = run_of(full, chats, tmp_path / "run", model=None, shape=shape, tokenizer=full, chat_template="gemma")
    done = loop.train(run)
    model = jaxlm.load(done.model)
    assert model.config.V == 320
    prompt = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert model.tokenizer.render(question("Hi")).endswith(prompt)


def test_an_adapter_cannot_learn_new_tokens(full, chats, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"<\|im_start\|>, <\|im_end\|>.*--method full.*--chat-template FILE.jinja"):
        loop.train(run_of(full, chats, tmp_path / "run", method="lora"))


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_with_tokens_of_the_vocabulary(named, chats, tmp_path) -> None:
    """Those of a named template, or those of a file."""
    base = write_base(tmp_path / "base")
    given = "chatml"
    if named:
        tokenizer = Tokenizer.load(base)
        tokenizer.add_special_tokens(MARKS)
        tokenizer.hf.save_pretrained(base)
    else:
        given = str(tmp_path / "own.jinja")
        Path(given).write_text("<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    done = loop.train(run_of(base, chats, tmp_path / "run", method="lora", chat_template=given))
    assert (done.model / "chat_template.jinja").is_file()
    model = jaxlm.load(done.model)
    text = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" if named else "<s>user: Hi</s>"
    assert model.tokenizer.render(question("Hi")) == text
    assert main(["fuse", "-m", str(done.model), "--out", str(tmp_path / "fused")]) == 0
    fused = jaxlm.load(tmp_path / "fused")
    assert fused.tokenizer.render(question("Hi")) == text
    stop = fused.tokenizer.convert_tokens_to_ids("<|im_end|>" if named else "</s>")
    assert stop in fused.generation_config["eos_token_id"]


def test_what_a_run_says(full, padded, chats, tmp_path, capsys) -> None:
    run = run_of(full, chats, tmp_path / "run")
    assert notes_of(run) == ["new tokens: <|im_start|>, <|im_end|> (vocab_size 320 instead of 258)"]
    [note] = notes_of(run_of(padded, chats, tmp_path / "run"))
    assert note.endswith("(spare rows of the vocabulary)")
    (tmp_path / "base").mkdir()
    tiny_files.write(tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    notes = notes_of(run_of(tmp_path / "base", chats, tmp_path / "run"))
    assert notes[0] == "the chat template chatml replaces that of the tokenizer"
    with pytest.raises(ValueError, match=r"messages need a chat template.*--chat-template chatml"):
        set_up(replace(run, chat_template=None))
    with pytest.raises(ValueError, match="'chatlm', which is neither a file nor one of chatml, llama3, gemma"):
        set_up(replace(run, chat_template="chatlm"))
    with pytest.raises(ValueError, match="context length"):
        set_up(replace(run, samples=("Hi" * 2000,)))
    flags = ["--model", str(full), "--data.train", chats, "--out", str(tmp_path / "dry"), "--method", "full"]
    sizes = ["--steps", "1", "--batch", "2", "--length", "96"]
    assert main(["finetune", *flags, *sizes, "--chat-template", "chatml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "new tokens: <|im_start|>, <|im_end|>" in out
    assert "<|im_start|>assistant\n⟧Hello<|im_end|>" in out


def test_samples_are_answers_if_the_data_are_chats(padded, chats, tmp_path, capsys) -> None:
    options: dict[str, Any] = {"steps": 1, "samples": ("Hi", "the"), "sample_tokens": 2}
    asked = []
    with pytest.MonkeyPatch.context() as spy:
        answer = generation.generate
        spy.setattr(generation, "generate", lambda model, prompt, **more: asked.append(prompt) or answer(
            model, prompt, **more))  # fmt: skip
        done = loop.train(run_of(padded, chats, tmp_path / "run", **options))
        (tmp_path / "a.txt").write_text("the cat sat")
        texts = loop.train(run_of(padded, str(tmp_path / "a.txt"), tmp_path / "texts", **options))
    assert asked == [question("Hi"), question("the"), "Hi", "the"]
    assert [(line["prompt"], "text" in line) for line in lines(done.folder) if "answer" in line] == [
        ("Hi", False), ("the", False)]  # fmt: skip
    assert "text" in texts.last
    assert metrics_line({"step": 1, "prompt": "Hi", "answer": "Hello"}, 1) == "step 1/1 sample Hi -> Hello"
    assert main(["generate", "-m", str(done.model), "Hi", "--max-tokens", "2"]) == 0
    capsys.readouterr()
