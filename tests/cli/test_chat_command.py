"""`jaxlm chat`: with lines as input in this process, and once in a pseudo-terminal."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_files
from helpers.tiny_chat import SIZES, TEMPLATE, bias_of, model_of, quick_compilation, tokenizer_of

from jaxlm import cli, models
from jaxlm.bench import published
from jaxlm.cli import terminal
from jaxlm.cli.chat import CHAT_MODELS, ChatSession, parse
from jaxlm.inference.conversation import Conversation
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.model import Model
from jaxlm.models import llama3
from jaxlm.nn import Rope, params
from jaxlm.nn.kv_cache import slot_counts

CONFIG = llama3.Config(**SIZES, L=1, rope=Rope(), context=128)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(model_of(llama3, CONFIG, tokenizer_of(TEMPLATE, thinking=True)), source="tiny/chatting")


class Lines:
    """Runs a chat with lines as its input. `tty` names the streams that are a terminal."""

    def __init__(self, model: Model, monkeypatch, capsys):
        self.model, self.monkeypatch, self.capsys = model, monkeypatch, capsys
        self.screens: list = []  # the streams of prompts
        self.conversation = Conversation(model, temperature=0, max_tokens=5, logit_bias=bias_of(model))

    def __call__(self, *lines: str, tty: str = "") -> tuple[int, list[str], str]:
        """Returns the exit status, the lines on stdout, and stderr."""
        typed = iter(lines)

        def read() -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        with self.monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
            patch.setattr("jaxlm.cli.line_input.prompt_session", lambda screen: self.screens.append(screen) or read)
            for name in tty.split():
                patch.setattr(f"sys.{name}.isatty", lambda: True)
            status = ChatSession(self.conversation).run()
        out, err = self.capsys.readouterr()
        return status, out.split("\n")[:-1], err


@pytest.fixture
def lines(model, monkeypatch, capsys) -> Lines:
    return Lines(model, monkeypatch, capsys)


def test_piped_lines_are_answered_and_stdout_has_only_answers(lines):
    status, out, err = lines("hello", "", "and?")
    answers = [m["content"] for m in lines.conversation.messages if m["role"] == "assistant"]
    assert status == 0
    assert out == answers
    assert len(answers) == 2
    assert re.search(r"\d+ prompt tokens \(\d+ cached\) · 5 generated · \d+\.\d tokens/s · first token .* · peak", err)
    assert "stopped at max_tokens: /set max_tokens" in err
    assert ">" not in err


def test_the_input_prompt_is_not_on_redirected_stdout(lines):
    _, out, _ = lines("hello", tty="stdin stderr")
    assert out == [lines.conversation.messages[1]["content"]]
    assert lines.screens == [sys.stderr] or lines.screens[0].name == "<stderr>"


def test_set_changes_sampling_parameters(lines):
    changes = "/set max_tokens 3", "/set temperature 0.5", "/set top-k 4"
    status, out, err = lines(*changes, "hi", "/set", "/set top_k none")
    assert status == 0
    assert len(out) == 1
    assert lines.conversation.options.temperature == 0.5
    assert lines.conversation.options.top_k is None
    assert "3 generated" in err
    assert "temperature 0.5\n" in err
    assert "min_p 0.0 (default)\n" in err
    assert err.endswith("top_k 0 (default)\n")


def test_retry_reset_and_system(lines):
    _, out, err = lines("hi", "/retry", "/system be kind", "ho", "/system", "/reset", "hi")
    assert out[0] == out[1] == out[3]
    assert lines.conversation.system is None
    assert "system message for the next turns: be kind" in err
    assert "system message for the next turns: none" in err
    assert "all messages deleted" in err
    assert len(lines.conversation.messages) == 2


def test_save_and_load(lines, tmp_path):
    path = tmp_path / "chat with spaces.json"
    lines("hi", f"/save {path}")
    assert len(json.loads(path.read_text())["messages"]) == 2
    lines.conversation.reset()
    status, _, err = lines(f"/load {path}")
    assert status == 0
    assert f"2 messages from {path}" in err
    assert f"> hi\n{lines.conversation.messages[1]['content']}\n" in err


def test_an_error_is_printed_and_the_chat_continues(lines, tmp_path):
    wrong = {
        "refuse": "the chat template cannot render these messages: no such words",
        "/what": "/help, /system, /set, /retry, /save, /load, /reset, /exit",
        "/rety": "did you mean /retry?",
        "/retry": "no message yet",
        "/set top_p 3": "/set top_p 3: must be a number from 0 to 1",
        "/set temprature 1": "/set temprature: did you mean temperature?",
        "/set top_p": "expected /set NAME VALUE",
        "/save": "expected /save FILE",
        f"/load {tmp_path / 'no.json'}": "no.json cannot be read (No such file or directory)",
        f"/save {tmp_path / 'a/b'}": "a/b cannot be written (No such file or directory)",
        "x" * 200: "context is full: the conversation has 20",
    }
    status, out, err = lines(*wrong, "hi")
    assert status == 1  # piped input
    assert len(out) == 1
    errors = [line for line in err.splitlines() if line.startswith("jaxlm: ")]
    assert len(errors) == len(wrong)
    for line, text in zip(errors, wrong.values(), strict=True):
        assert text in line


@pytest.mark.parametrize(("typed", "message"), [
    ("temprature 1", "did you mean temperature?"), ("temprature=1", "did you mean temperature?"),
    ("temprature", "did you mean temperature?"), ("max_new_tokens 3", "did you mean max_tokens?"),
    ("--max-new-tokens 3", "did you mean max_tokens?"), ("num_predict 3", "did you mean max_tokens?"),
    ("eos_token_id 3", "did you mean stop_token_ids?"), ("temp 1", "did you mean temperature?"),
    ("do_sample true", "temperature 0 is greedy"), ("num_beams 3", "beam search is not supported"),
    ("system be kind", "/system TEXT"), ("offline true", "does not change"), ("quxx 3", "Names: max_tokens, temp"),
    ("temperature hot", "/set temperature hot: must be a finite number"),
    ("ignore_eos 3", "/set ignore_eos 3: must be True or False"), ("logit_bias 3", "must be token ids"),
])  # fmt: skip
def test_errors_of_set_speak_of_set(lines, typed, message):
    _, _, err = lines(f"/set {typed}")
    [line] = [line for line in err.splitlines() if line.startswith("jaxlm: ")]
    assert line.startswith("jaxlm: /set ")
    assert message in line
    assert not re.search(r"keyword|argument| --(?!offline)|TypeError", line)


def test_set_takes_an_equals_sign(lines):
    lines("/set top_k=4", "/set temperature = 0.5", "/set stop a=b")
    options = lines.conversation.options
    assert (options.top_k, options.temperature, options.stop) == (4, 0.5, ("a=b",))


def test_quoted_lines_are_one_message(lines):
    status, _, _ = lines('"""', "one", "/retry", '"""', "next")
    assert status == 0
    assert [m["content"] for m in lines.conversation.messages[::2]] == ["one\n/retry", "next"]


def test_stdout_that_cannot_be_written_ends_the_chat(lines, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(BrokenPipeError):
            lines("one", "two")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write_end)


def test_quiet_prints_answers_and_what_was_asked_for(lines, monkeypatch):
    monkeypatch.setattr(terminal._State, "quiet", True)
    _, out, err = lines("hi", "/set top_k 4", "/set", "/nope")
    assert len(out) == 1
    assert "top_k 4\n" in err
    assert len(err.splitlines()) == len(dataclasses.fields(SamplingParams)) + 1
    assert err.splitlines()[-1].startswith("jaxlm: unknown command /nope")


def test_help_lists_every_command(lines):
    _, _, err = lines("/help", "/exit", "never read")
    for name in ("/help", "/system TEXT", "/set NAME VALUE", "/retry", "/save FILE", "/load FILE", "/reset", "/exit"):
        assert f"\n{name} " in "\n" + err
    assert not lines.conversation.messages


def test_a_full_context_is_reported_after_the_answer(lines):
    _, _, err = lines("/set max_tokens none", "hi", "more")
    assert "the context of 128 tokens is full: /reset" in err
    assert "jaxlm: the context is full" in err


def test_reasoning_is_dim_on_a_terminal_only(lines):
    lines.conversation.set("max_tokens", 2)
    for tag, shown in (("<think>", "\033[2m<think>"), ("</think>", "</think>\033[0m")):
        lines.conversation.set("logit_bias", {lines.model.tokenizer.convert_tokens_to_ids(tag): 1e4})
        assert lines("hi")[1] == [2 * tag]
        _, out, err = lines("hi", "/exit", tty="stdin stdout stderr")
        assert out == [2 * shown + "\033[0m"]
        assert "\033[2mtiny/chatting: /help lists the commands" in err


def test_a_model_without_chat_template_continues_text_and_names_chat_models(model, monkeypatch, capsys):
    plain = model_of(llama3, CONFIG, tokenizer_of(None))
    plain = replace(plain, source="tiny/plain")
    lines = Lines(plain, monkeypatch, capsys)
    status, out, err = lines("one", "", "/system be kind")
    assert status == 1
    assert len(out) == 2
    assert "a system message needs a chat template; tiny/plain has none" in err
    assert "stopped at max_tokens" not in err
    assert plain.tokenizer.decode(lines.conversation._prefixes[0].ids) == "one" + "".join(out)
    ChatSession(lines.conversation).greet()
    err = capsys.readouterr().err
    assert re.search("(?s)tiny/plain has no chat template.*Qwen/Qwen3-0.6B", err)


@pytest.mark.parametrize(("name", "typed", "value"), [
    ("temperature", "0.7", 0.7), ("temperature", "hot", "hot"), ("max_tokens", "none", None),
    ("ignore_eos", "True", True), ("stop", "the end", "the end"), ("stop", '["a", "b"]', ["a", "b"]),
    ("stop", "12", "12"), ("logit_bias", '{"5": 1.5}', {5: 1.5}),
])  # fmt: skip
def test_parse_reads_values_of_sampling_parameters(name, typed, value):
    assert parse(name, typed) == value


# The program as a process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose answers end at max_tokens only."""
    path = tmp_path_factory.mktemp("chatting")
    tiny_files.write(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 17}))
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return path


@pytest.mark.parametrize(("flags", "message"), [
    (["--no-think"], "--no-think: the chat template of .* does not use 'enable_thinking'"),
    (["--template-arg", "mood=1"], "--template-arg mood: the chat template of .* does not use 'mood'"),
    (["--temperature", "-1"], "temperature=-1.0: must be a finite number"),
])  # fmt: skip
def test_flags_that_the_model_does_not_support(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("jaxlm.cli.common.set_up_process", lambda: None)
    assert cli.main(["chat", "-m", str(folder), *flags]) == 1
    assert re.search(message, capsys.readouterr().err)


PROMPT = "\033[0m>\b"  # an empty prompt of prompt_toolkit
# Makes the terminal on stdin the controlling terminal, from which Ctrl-C comes.
OWN_TERMINAL = "import os, sys; os.login_tty(os.dup(0)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *argv: str, **env: str):
        self.fd, inside = pty.openpty()
        command = [sys.executable, "-c", OWN_TERMINAL, *argv]
        self.process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, **env})
        os.close(inside)
        self.read = b""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def enter(self, text: str) -> None:
        """Types at the next prompt."""
        self.until(PROMPT)
        self.type(text)

    def until(self, text: str, seconds: float = 120) -> str:
        """Returns the output up to `text`, from the end of the last call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.read:
            ready = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.read[-2000:]!r}"
            try:
                self.read += os.read(self.fd, 65536)
            except OSError as error:  # the program has exited
                raise AssertionError(f"no {text!r} in {self.read[-2000:]!r}") from error
        before, _, self.read = self.read.partition(text.encode())
        return before.decode(errors="replace")

    def end(self) -> int:
        """Returns the exit status."""
        status = self.process.wait(60)
        os.close(self.fd)
        return status


def test_in_a_terminal(folder, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm", "JAX_PLATFORMS": "cpu"}
    flags = ["--ignore-eos", "--temperature", "0.9", "--seed", "3"]
    terminal = Terminal("-m", "jaxlm", "chat", "-m", str(folder), *flags, **env)
    try:
        terminal.until("/help lists the commands")
        terminal.enter("tell me all\r")
        for _ in range(3):
            terminal.until("\033[K")  # a compilation notice is erased
        terminal.type("\x03")
        terminal.until("stopped; /retry answers again, /exit or Ctrl-D ends the chat")
        terminal.enter("\x03")  # at the prompt, Ctrl-C only says how to end the chat
        assert "stopped" not in terminal.until("/exit or Ctrl-D ends the chat")
        terminal.enter("/set max_tokens 7\r")
        terminal.until("max_tokens 7\033[0m")
        terminal.enter(f"/save {tmp_path / 'chat.json'}\r")
        terminal.until("saved to")
        terminal.enter("\033[200~and\nmore\033[201~\r")  # pasted
        terminal.until("cached) · 7 generated")
        terminal.enter(f"/save {tmp_path / 'pasted.json'}\r")
        terminal.enter("/set max_tokens 9\x7f89\r")  # edited with backspace
        terminal.until("max_tokens 89\033[0m")
        terminal.enter("\x1b[A\r")  # the previous line from the history
        terminal.until("max_tokens 89\033[0m")
        terminal.enter("\x04")
        assert terminal.end() == 0
    except BaseException:
        terminal.process.kill()
        raise
    stopped = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["role"] for m in stopped] == ["user", "assistant"]
    assert stopped[1]["content"]
    pasted = json.loads((tmp_path / "pasted.json").read_text())["messages"]
    assert [m["content"] for m in pasted if m["role"] == "user"] == ["tell me all", "and\nmore"]


def test_the_chat_models_that_are_named_load_and_take_the_memory_that_is_said():
    smollm2 = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
               "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "rope_theta": 130000,
               "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
    for name, (parameters, memory) in CHAT_MODELS.items():
        raw = smollm2 if "SmolLM2" in name else published.MODELS[name].config
        family = models.family_of(raw["model_type"])
        cfg = family.Config.from_hf(raw)
        count = params.count(family.PARAMS, cfg)
        cache = 2 * sum(slot_counts(4096, cfg.windows, 4096)) * cfg.K * cfg.H
        assert parameters == f"{count / 1e9:.1f}B"
        assert memory == f"{2 * (count + cache) / 1e9:.1f} GB"
