"""A hook of mkdocs: the reference of all flags and of the YAML keys of training, as pages of the site.

They are made from the dataclasses of the commands, as `--help` is, and are not stored. `jaxlm generate --help` in a
page becomes a link to the flags of that command.
"""

import html
import inspect
import re
from typing import Any

import jaxlm.cli
from jaxlm.cli import help
from jaxlm.cli.flags import Flag, flags_of
from jaxlm.training.config import Run, to_dict

LISTED = {name: title for title, row in help.COMMANDS.items() for name in row.split()}
NEGATED = ("train", "finetune")  # switches have a --no- form


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links `jaxlm COMMAND --help`, written as code, to the flags of the command."""
    up = "../" * page.file.src_uri.count("/")
    commands = "|".join(LISTED)
    return re.sub(rf"(?<!\[)`jaxlm ({commands}) --help`", rf"[`jaxlm \1 --help`]({up}reference/\1.md)", markdown)


def pages() -> dict[str, str]:
    """The Markdown of each page by name."""
    commands = jaxlm.cli.commands()
    texts = {name: command_page(name, command) for name, command in commands.items()}
    return texts | {"index": overview(commands), "training_yaml": yaml_page(commands)}


def overview(commands: dict[str, type]) -> str:
    """The commands, the environment variables and the exit status."""
    lines = ["# Commands", "", "Each command has a page with its flags. `jaxlm COMMAND --help` prints the same.", ""]
    for title, row in help.COMMANDS.items():
        lines += [f"## {title}", ""]
        for name in row.split():
            lines += [f"- [`jaxlm {name}`]({name}.md): {prose(help.first_sentence(commands[name]))}"]
        lines += [""]
    lines += ["## Environment variables", "", "| Variable | Meaning |", "| --- | --- |"]
    lines += [f"| {code(name)} | {prose(text)} |" for name, text in help.ENVIRONMENT.items()]
    lines += ["", "## Exit status", "", "| Status | Meaning |", "| --- | --- |", "| 0 | done |", "| 1 | failed |"]
    lines += ["| 2 | wrong usage: an unknown flag, a missing value |", "| 130 | interrupted by Ctrl-C |", ""]
    return "\n".join([*lines, help.SEVERAL_VALUES + help.POSITIONAL_FIRST, ""])


def command_page(name: str, command: type) -> str:
    """The flags of a command in the groups of its help."""
    flags = flags_of(command)
    positional = [flag.metavar for flag in flags if flag.positional]
    lines = [f"# jaxlm {name}", "", prose(inspect.cleandoc(command.__doc__ or "")), ""]
    lines += [f"    {' '.join(['jaxlm', name, *positional, '[flags]'])}", ""]
    if help.EXAMPLES.get(name):
        lines += ["## Examples", "", *(f"    {example}" for example in help.EXAMPLES[name]), ""]
    for title, members in help.grouped(name, flags).items():
        rows = [(flag_name(flag, name), kind(flag), default(flag), prose(help.docstring_of(flag))) for flag in members]
        lines += [f"## {title}", "", *table("Flag", rows), ""]
    return "\n".join(lines)


def yaml_page(commands: dict[str, type]) -> str:
    """The keys of the YAML file of `jaxlm train` and `jaxlm finetune`."""
    lines = [
        "# YAML keys of training { #yaml-keys }", "",
        "`jaxlm train -c run.yaml` and `jaxlm finetune -c run.yaml` read these keys. They are also the fields of",
        "[`Run`](../api/training.md#jaxlm.training.config.Run) in Python. A flag overrides the file.",
        "Where `jaxlm finetune` has another default, it is in brackets.", "",
    ]  # fmt: skip
    run = {flag.name: flag for flag in flags_of(Run)}
    finetune = {flag.name: flag for flag in flags_of(commands["finetune"])}
    for group in ("", "data", "optimizer", "lora"):
        rows = []
        for flag in (flag for flag in run.values() if flag.group == group):
            of_run, of_finetune = default(flag), default(finetune[flag.name])
            both = of_run if of_run == of_finetune else f"{of_run} (finetune: {of_finetune})"
            rows.append((code(flag.field), kind(flag), both, prose(help.docstring_of(flag))))
        lines += [f"## {group or 'Top level'}", "", *table("Key", rows), ""]
    import yaml

    defaults = yaml.safe_dump(to_dict(Run()), sort_keys=False).rstrip()
    return "\n".join([*lines, "## All keys with their defaults", "", "```yaml", defaults, "```", ""])


def table(first: str, rows: list[tuple[str, str, str, str]]) -> list[str]:
    """A table of flags or keys. On a narrow screen, each row is a block (stylesheets/site.css)."""
    lines = ['<div class="flags" markdown>', "", f"| {first} | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), "", "</div>"]


def flag_name(flag: Flag, command: str) -> str:
    if flag.positional:
        return code(flag.metavar)
    name = flag.negated("[no-]") if command in NEGATED and not flag.types else flag.name
    return ", ".join(map(code, [*flag.aliases, name]))


def kind(flag: Flag) -> str:
    """What a flag takes: nothing, a value, one of some words, or a list of these."""
    if flag.positional:
        return "list of texts" if flag.repeats else "text"
    if not flag.types:
        return "switch"
    choices = re.fullmatch(r"\{(.*)\}", flag.metavar)
    words = ", ".join(map(code, choices[1].split(","))) if choices else code(flag.metavar)
    return f"list of {words}" if flag.repeats else words


def default(flag: Flag) -> str:
    """The default of a flag; nothing if there is none."""
    value = flag.default
    if value is None or value == "" or value == () or value == {}:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return code(f"{value:g}" if isinstance(value, float) else str(value))


def code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def prose(text: str) -> str:
    """A docstring as Markdown: characters with a meaning are escaped, and flags and names in backticks are code."""
    text = re.sub(r"([*_<>|\[\]])", lambda match: f"&#{ord(match[0])};", text)
    return re.sub(r"(?<![\w`-])(--?[a-z][\w.-]*\w|-[a-z])(?![\w`])", r"<code>\1</code>", text)
