"""`jaxlm train -c FILE`: the file, its fields, and flags that override them."""

from pathlib import Path
from typing import Any

import pytest

from jaxlm import cli
from jaxlm.cli.flags import flags_of
from jaxlm.cli.suggestions import unknown_flag, unknown_key
from jaxlm.cli.train import Train
from jaxlm.training import config


@pytest.fixture
def parsed(tmp_path) -> Any:
    """Returns a function that parses `train -c FILE` with flags, for the text of a file."""
    path = tmp_path / "a.yaml"

    def parse(text: str, *argv: str) -> Any:
        path.write_text(text)
        return cli.parse(["train", "-c", str(path), *argv])

    return parse


def refused(capsys: Any, *argv: str) -> str:
    """Returns the error of usage, in one line."""
    with pytest.raises(SystemExit) as end:
        cli.parse(["train", *argv])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_every_form_of_the_flag(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("steps: 7\n")
    for argv in (["-c", str(path)], [f"-c={path}"], [f"-c{path}"], ["--config", str(path)], [f"--config={path}"]):
        run = cli.parse(["train", *argv])
        assert (run.steps, run.config) == (7, path), argv


@pytest.mark.parametrize("second", [["-c", "b.yaml"], ["-c=b.yaml"], ["-cb.yaml"], ["--config=b.yaml"]])
def test_second_file_is_an_error(second, capsys) -> None:
    message = refused(capsys, "--config", "a.yaml", *second)
    assert message.startswith("jaxlm: -c takes one file, not a.yaml and b.yaml")


def test_a_file_without_a_name(capsys) -> None:
    assert "-c needs a value" in refused(capsys, "-c")


def test_config_key_in_a_file_is_an_error(tmp_path, capsys) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("config: b.yaml\n")
    message = refused(capsys, "-c", str(path))
    assert message.startswith(f"jaxlm: {path} names another file (config: b.yaml)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- steps", " must be a mapping"),
        (b"steps: [", ":1 is not valid YAML"),
        (b"out: \xff", " is not valid YAML"),
        (None, " cannot be read: No such file"),
    ],
)
def test_invalid_yaml_files(content, message, tmp_path, capsys) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    assert refused(capsys, f"-c={path}").startswith(f"jaxlm: {path}{message}")


def test_values_that_look_like_flags(parsed) -> None:
    run = parsed("""
samples: ["-hello", "--steps", "a=b", "", "two\\nlines"]
out: -run
optimizer: {lr: -1.0}
data: {train: [-a.txt, b.txt], text_field: --text, template_arg: [x=-1]}
report: [wandb, tensorboard]
""")
    assert run.samples == ("-hello", "--steps", "a=b", "", "two\nlines")
    assert (run.out, run.optimizer.lr, run.report) == (Path("-run"), -1.0, ("wandb", "tensorboard"))
    assert (run.data.train, run.data.text_field, run.data.template_arg) == (("-a.txt", "b.txt"), "--text", ("x=-1",))


@pytest.mark.parametrize(
    "argv",
    [
        ["--samples", "x", "--data.template-arg", "b=2", "--steps", "5", "--data.dataset", "d"],
        ["--samples=x", "--data.template-arg=b=2", "--steps=5", "--dataset=d"],
        ["--samples=x", "--data.template_arg", "b=2", "--steps=5", "--dataset", "d"],
    ],
)
def test_flags_override_the_file(argv, parsed) -> None:
    run = parsed("steps: 3\nsamples: [a, b]\ndata: {dataset: c, template_arg: [a=1], valid: [v]}", *argv)
    assert (run.steps, run.samples) == (5, ("x",))
    assert (run.data.dataset, run.data.template_arg, run.data.valid) == ("d", ("b=2",), ("v",))


def test_booleans_can_be_turned_off(parsed) -> None:
    text = "lora: {rslora: true}\ndry_run: true\ndebug: yes\n"
    run = parsed(text)
    assert (run.lora.rslora, run.dry_run, run.debug) == (True, True, True)
    run = parsed(text, "--lora.no-rslora", "--no-dry-run", "--no-debug")
    assert (run.lora.rslora, run.dry_run, run.debug) == (False, False, False)
    assert parsed("lora: {rslora: false}", "--lora.rslora").lora.rslora


def test_other_commands_have_no_negated_flags(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["generate", "--help"])
    assert "--no-" not in capsys.readouterr().out.replace("--no-think", "")


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("rslro: true", 1, "lora.rslora"),
        ("lora: {rslro: false}", 1, "lora.rslora"),
        ("steps: 3\n\nstepps: 7\n", 3, "steps"),
        ("steps: 3\nlora:\n  r: 8\n", 3, "lora.rank"),
        ("training:\n  learning_rate: 1\n", 2, "optimizer.lr"),
        ("num_train_epochs: 3", 1, "epochs"),
        ("lr: 1.0", 1, "optimizer.lr"),
        ("optimiser: {lr: 1, b1: 0.9}", 1, "optimizer"),
        ("data:\n  train: x\n  learn: all\n", 3, "data.train_on"),
        ("data: {form: text}", 1, "data.format"),
        ("optimizer: 3", 1, "optimizer.lr"),
        ("steps: {a: 1}", 1, "steps.a"),
    ],
)
def test_unknown_key_gives_its_line_and_a_suggestion(text, line, field, tmp_path, capsys) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    message = refused(capsys, "-c", str(path))
    assert message.startswith(f"jaxlm: {path}:{line}: ")
    assert field in message


def test_every_unknown_key_is_reported(tmp_path, capsys) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("max_steps: 1\nsteps: 2\nbatch_size: 3\nqqqq: 4\n")
    message = refused(capsys, "-c", str(path))
    assert [f"{path}:{n}:" in message for n in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_value_of_a_known_key_is_checked_by_its_flag(tmp_path, capsys) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("resume: false")
    assert "--no-resume" in refused(capsys, "-c", str(path))


def test_keys_with_hyphens_aliases_and_merged_mappings(parsed) -> None:
    run = parsed("save-every: 7\ndataset: wikitext\noptimizer: &a {lr: 0.5}\nlora: \ndata: {<<: {format: text}}")
    assert (run.save_every, run.data.dataset, run.optimizer.lr, run.data.format) == (7, "wikitext", 0.5, "text")


def test_rename_tables_have_existing_fields_only() -> None:
    known = set(config.field_names(Train))
    groups = {name.partition(".")[0] for name in known}
    assert {*config.RENAMED_FIELDS.values()} <= known | groups
    assert not known & {*config.RENAMED_FIELDS}
    assert config.current_name("optimiser.lr") == "optimizer.lr"
    assert unknown_key("optimiser.lr", "train", flags_of(Train)) == "optimiser.lr is now optimizer.lr"


@pytest.mark.parametrize(("key", "field"), [
    ("eval_dataset", "data.valid"), ("grad_accum", "accumulate"), ("save_dir", "out"), ("cutoff_len", "length"),
    ("min_lr", "optimizer.final"), ("fsdp", "mesh: data=N"), ("bf16", "dtype: bfloat16"), ("use_lora", "method: lora"),
    ("gradient_checkpointing", "remat: full"), ("dataset_name", "dataset"), ("beta1", "optimizer.b1"),
    ("val_set_size", "data.valid_split"), ("template", "chat_template"), ("streaming", "data.streaming"),
])  # fmt: skip
def test_keys_and_flags_of_other_tools_get_the_same_suggestion(key, field) -> None:
    flag = field.replace("_", "-").replace(": ", " ")
    assert unknown_key(key, "train", flags_of(Train)) == f"unknown key {key}: did you mean {field}?"
    assert unknown_flag(f"--{key}", "train", flags_of(Train)) == f"unknown flag --{key}: did you mean --{flag}?"


@pytest.mark.parametrize(("key", "note"), [("interleave_probs", "a.jsonl=0.7")])
def test_keys_of_other_tools_without_a_flag_get_a_note(key, note) -> None:
    assert note in unknown_key(key, "train", flags_of(Train))
    assert note in unknown_flag(f"--{key}", "finetune", flags_of(Train))


def test_config_with_one_dash(capsys) -> None:
    assert "--config" in refused(capsys, "-config", "run.yaml")
