"""The check of a command line before the parser: lists of values, positional arguments, errors, suggestions."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_chat import tokenizer_of

from jaxlm import cli
from jaxlm.cli import suggestions
from jaxlm.cli.flags import flags_of
from jaxlm.cli.generate import template_args
from jaxlm.training.config import Data


def parse(line: str) -> Any:
    return cli.parse(line.split())


def refused(capsys, *argv: str) -> str:
    """The last line on stderr of a command line that is wrong usage."""
    with pytest.raises(SystemExit) as end:
        cli.parse(list(argv))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()[-1]


@pytest.mark.parametrize(("line", "prompt", "stop"), [
    ("generate hi --stop a b", "hi", ("a", "b")),
    ("generate hi --stop a b --stop c", "hi", ("a", "b", "c")),
    ("generate hi --stop a --stop b --raw", "hi", ("a", "b")),
    ("generate --stop a b -- hi", "hi", ("a", "b")),
    ("generate --stop a hi", "hi", ("a",)),
    ("generate --stop a hi --stop b c", "hi", ("a", "b", "c")),
    ("generate --stop=a hi", "hi", ("a",)),
    ("generate hi --stop=-x --stop=", "hi", ("-x", "")),
    ("generate --stop - -5", "-5", ("-",)),
    ("generate -- --stop", "--stop", ()),
    ("generate --raw --stop a", None, ("a",)),
])  # fmt: skip
def test_list_flags_and_the_prompt(line, prompt, stop):
    command = cli.parse(line.split())
    assert (command.prompt, command.stop) == (prompt, stop)


def test_lists_of_other_commands():
    chat = parse("chat --stop a b --logit-bias 5 -1.5 7 2 --stop-token-ids 3 4 --top-k 2")
    assert (chat.stop, chat.logit_bias, chat.stop_token_ids) == (("a", "b"), {5: -1.5, 7: 2.0}, (3, 4))
    train = parse("train --data.train a b --lora.targets q k v --samples x --report wandb tensorboard")
    assert (train.data.train, train.lora.targets) == (("a", "b"), ("q", "k", "v"))
    assert train.report == ("wandb", "tensorboard")
    assert parse("info m --allow-field x y --json").allow_field == ("x", "y")


def test_positional_arguments_in_any_position():
    assert parse("eval a --length 8 b --json c").files == ("a", "b", "c")
    export = parse("export --dtype float32 m --force out")
    assert (export.name, str(export.out)) == ("m", "out")
    tokenizer = parse("tokenizer train a --special x y --out d")
    assert (tokenizer.files, tokenizer.special) == (("a",), ("x", "y"))


@pytest.mark.parametrize(("line", "message"), [
    ("generate hi --max-tokens", "--max-tokens needs a value"),
    ("generate hi --stop --raw", "--stop needs a value"),
    ("generate hi --logit-bias 5", "--logit-bias needs a value"),
    ("generate hi --top-k many", "--top-k takes an integer, not 'many'"),
    ("generate hi --top-p=x", "--top-p takes a number, not 'x'"),
    ("generate hi --dtype int4", "--dtype must be one of auto, float32, bfloat16, float16, not 'int4'"),
    ("generate hi --raw=true", "--raw is a switch"),
    ("generate Once upon", "unexpected argument 'upon'"),
    ("chat hello", "unexpected argument 'hello'"),
    ("tokenizer learn a", "not 'learn'"),
    ("train -c", "-c needs a value"),
    ("--model m generate", "the command comes before the flags"),
])  # fmt: skip
def test_wrong_usage_is_one_line(line, message, capsys):
    assert refused(capsys, *line.split()).startswith("jaxlm: ")
    assert message in refused(capsys, *line.split())


@pytest.mark.parametrize(("line", "flag"), [
    # spellings
    ("generate --max_new_tokens=5", "--max-tokens"), ("generate -max-tokens 5", "--max-tokens"),
    ("generate --MAX-TOKENS 5", "--max-tokens"), ("generate --topk 5", "--top-k"), ("generate --sytem x", "--system"),
    ("generate --temprature=1", "--temperature"), ("generate -model x", "--model"),
    ("generate -max_new_tokens 5", "--max-tokens"), ("generate -mlx=1 -max-length=5", "--max-tokens"),
    ("chat --temper 1", "--temperature"),
    # transformers, TRL, PEFT
    ("generate --max-length 5", "--max-tokens"), ("train --max-length 5", "--length"),
    ("chat --model_name_or_path x", "--model"), ("train --learning_rate 1", "--optimizer.lr"),
    ("finetune --lora_r 8", "--lora.rank"), ("finetune --r 8", "--lora.rank"),
    ("train --lora", "--method lora"), ("generate --lora x", "--adapter"), ("train --output_dir x", "--out"),
    ("train --num_train_epochs 1", "--epochs"), ("train --per_device_train_batch_size 1", "--batch"),
    ("train --gradient_accumulation_steps 2", "--accumulate"), ("train --optim adamw", "--optimizer.name"),
    ("train --optimizer adamw", "--optimizer.name"), ("train --weight_decay 0", "--optimizer.weight-decay"),
    ("train --gradient_checkpointing", "--remat full"), ("train --bf16", "--dtype bfloat16"),
    # vLLM, llama.cpp, mlx-lm, lm-eval
    ("generate --tensor-parallel-size 2", "--mesh model=N"), ("generate --n-predict 5", "--max-tokens"),
    ("generate -n 5", "--max-tokens"), ("generate --num_return_sequences 5", "--n"),
    ("generate --temp 1", "--temperature"), ("chat --sys x", "--system"),
    ("generate --repeat_penalty 1", "--repetition-penalty"), ("finetune --iters 5", "--steps"),
    ("eval --num_fewshot 5", "--shots"), ("eval --apply_chat_template", "--chat"),
    # former names
    ("train --optimiser.lr 1", "--optimizer.lr"), ("train --data.form text", "--data.format"),
    ("train --data.learn all", "--data.train-on"), ("eval --form text", "--data-format"),
    ("eval --learn all", "--train-on"),
])  # fmt: skip
def test_unknown_flags_get_a_suggestion(line, flag, capsys):
    said = refused(capsys, *line.split())
    assert re.fullmatch(rf"jaxlm: unknown flag \S+: did you mean {re.escape(flag)}\?", said)


@pytest.mark.parametrize(("line", "key"), [
    ("generate --ctx-size 5", "KV cache"), ("generate -c 5", "KV cache"), ("generate -p hi", "PROMPT"),
    ("generate --do-sample", "--temperature 0"), ("chat --device cuda", "JAX_PLATFORMS"),
    ("chat -ngl 99", "JAX_PLATFORMS"),
    ("info --trust-remote-code", "omit this flag"), ("export m --out x", "jaxlm export MODEL OUT"),
    ("generate --quxx", "jaxlm generate --help"), ("chat --out x", "jaxlm chat --help"),
    ("info --text x", "jaxlm info --help"), ("generate hi -o x", "jaxlm generate --help"),
])  # fmt: skip
def test_unknown_flags_get_an_explanation(line, key, capsys):
    assert key in refused(capsys, *line.split())


def test_all_unknown_flags_are_named(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["generate", "hi", "--temp", "1", "--max_new_tokens", "5"])
    assert [line.partition(":")[2] for line in capsys.readouterr().err.splitlines()] == [
        " unknown flag --temp: did you mean --temperature?",
        " unknown flag --max_new_tokens: did you mean --max-tokens?",
    ]


@pytest.mark.parametrize(("word", "command"), [
    ("genrate", "generate"), ("Generate", "generate"), ("fine-tune", "finetune"), ("merge", "fuse"),
    ("run", "generate"), ("evaluate", "eval"), ("convert", "export"), ("ch", None), ("chats", "chat"),
    ("help", "--help"),
])  # fmt: skip
def test_unknown_commands(word, command, capsys):
    said = refused(capsys, word, "x")
    assert said.startswith(f"jaxlm: unknown command {word}")
    assert said.endswith(f"did you mean {command}?" if command else "(jaxlm --help)")


def test_suggestion_tables_have_existing_flags_only():
    commands = cli.commands()
    names = {flag.name for command in commands.values() for flag in flags_of(command)}
    aliases = {alias for command in commands.values() for flag in flags_of(command) for alias in flag.aliases}
    for row in suggestions.FLAGS:
        assert row.split()[0] in names | aliases, row
    for _, of_commands, _ in suggestions.NOTES:
        assert set(of_commands.split()) <= set(commands)
    for row in suggestions.COMMANDS:
        assert row in commands or row.startswith("--"), row


@pytest.mark.parametrize(("typed", "value"), [
    ("False", False), ("false", False), ("TRUE", True), ("None", None), ("null", None), ("3", 3), ("0.5", 0.5),
    ('["a"]', ["a"]), ('{"a": true}', {"a": True}), ('"False"', "False"), ("high", "high"), ("a=b", "a=b"), ("", ""),
    ("[" * 100_000, "[" * 100_000),
])  # fmt: skip
def test_values_of_template_variables(typed, value):
    """Of jaxlm generate and chat, and of training."""
    tokenizer = tokenizer_of("{{ mood }}")
    model = SimpleNamespace(tokenizer=tokenizer, source="tiny")
    assert template_args(model, (f"mood={typed}",), False) == {"mood": value}
    assert type(template_args(model, (f"mood={typed}",), False)["mood"]) is type(value)
    assert Data(template_arg=(f"mood={typed}",)).template_variables == {"mood": value}
    for wrong in ("mood", "=3"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            template_args(model, (wrong,), False)
        with pytest.raises(ValueError, match="NAME=VALUE"):
            Data(template_arg=(wrong,)).template_variables  # noqa: B018


def test_choices_in_any_case():
    command = cli.parse(["export", "m", "out.gguf", "--type", "Q8_0", "--dtype=BFloat16"])
    assert (command.type, command.dtype) == ("q8_0", "bfloat16")


@pytest.mark.parametrize(("line", "hint"), [
    ("serve org/name", "-m org/name"), ("chat org/name --raw-x", None), ("serve -m a b", None),
    ("generate a b", None), ("export a b c", None),
])  # fmt: skip
def test_a_model_without_its_flag(line, hint, capsys):
    said = refused(capsys, *line.split())
    assert said.endswith(f"a model is named with {hint}") if hint else "a model is named" not in said


@pytest.mark.parametrize(
    "command", ["info NAME", "plan NAME", "verify NAME", "bench --random-weights NAME", "bench load NAME"]
)
def test_quantize_is_refused_where_it_would_change_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--quantize", "int8"]) == 2
    assert "--quantize does not apply" in capsys.readouterr().err
