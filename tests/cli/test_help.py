"""`jaxlm --help` and `jaxlm COMMAND --help`: groups, width, defaults, examples."""

import re
import shlex
import subprocess
import sys
from typing import Any, get_args

import pytest

from jaxlm import cli
from jaxlm.cli import help
from jaxlm.cli.flags import flags_of

COMMANDS = cli.commands()


def shown(capsys, *argv: str) -> str:
    assert cli.main([*argv, "--help"]) == 0
    return capsys.readouterr().out


def sample(kind: Any, default: Any) -> str:
    """A value of the type other than the default."""
    choices = [choice for choice in get_args(kind) if choice != default]
    return choices[0] if choices else {int: "7", float: "0.7"}.get(kind, "value")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_in_help_is_parsed(name):
    """The flags read from the dataclass are those of tyro: each sets its own field."""
    flags = [flag for flag in flags_of(COMMANDS[name]) if not flag.positional and flag.field != "config"]
    argv = [arg for flag in flags for arg in (flag.name, *(sample(kind, flag.default) for kind in flag.types))]
    command = cli.parse([name, *argv])
    for flag in flags:
        owner = getattr(command, flag.group) if flag.group else command
        value = getattr(owner, flag.field)
        assert value != flag.default, flag.name
        assert isinstance(value, tuple | dict) == flag.repeats, flag.name


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_width(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    out = shown(capsys, *filter(None, [name]))
    widest = max(out.splitlines(), key=len)
    assert len(widest) <= min(int(columns), 80), widest


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_text_and_no_empty_default(name, capsys):
    out = shown(capsys, name)
    assert out.startswith(f"Usage: jaxlm {name} ")
    for words in ("None", "default: )", "default: False", "default: ()"):
        assert words not in out
    for flag in flags_of(COMMANDS[name]):
        assert help.text_of(flag), flag.name


@pytest.mark.parametrize("name", COMMANDS)
def test_groups_name_fields_of_the_command(name):
    flags = flags_of(COMMANDS[name])
    known = {flag.field for flag in flags if not flag.group}
    named = [field for fields in help.GROUPS[name].values() for field in fields]
    assert set(named) - known == set()
    assert [flag.field for flag in help.grouped(name, flags)["Options"]] == ["quiet", "debug"]


@pytest.mark.parametrize(("name", "example"), [(name, x) for name, row in help.EXAMPLES.items() for x in row])
def test_examples_parse(name, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    words = shlex.split(example.partition(" <")[0].partition("| ")[2] or example.partition(" <")[0])
    assert words[0] == "jaxlm"
    assert isinstance(cli.parse(words[1:]), COMMANDS[words[1]])


def test_the_overview_lists_every_command(capsys):
    out = shown(capsys)
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", out, re.M), name
    for title in ("Inference", "Training", "Checkpoints", "Evaluation", "Environment", "Examples"):
        assert f"\n{title}:\n" in out
    assert cli.main(["--version"]) == 0


def test_titles_are_bold_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\033" not in shown(capsys, "chat")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[1mSampling:\033[0m" in shown(capsys, "chat")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown(capsys, "chat")


def test_negations_are_shown_where_they_exist(capsys):
    assert "--[no-]dry-run" in shown(capsys, "train")
    assert "--lora.[no-]rslora" in shown(capsys, "finetune")
    assert "[no-]" not in shown(capsys, "generate")


HEAVY = {
    "jax",
    "numpy",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "optax",
    "datasets",
    "rich",
    "pydantic",
}


@pytest.mark.parametrize(
    ("arguments", "more"), [(["--version"], {"tyro"}), (["--help"], set()), (["serve", "-h"], set())]
)
def test_help_imports_nothing_that_takes_time(arguments, more):
    code = f"import sys; from jaxlm.cli import main; main({arguments}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert "jaxlm.cli" in done.stderr.split()
    assert not (HEAVY | more) & set(done.stderr.split())
