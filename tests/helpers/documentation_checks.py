"""What must hold of a block of code and of a command. Each check returns an error, or "" if all is well."""

import ast
import importlib
import json
import re
import tomllib
import traceback
from contextlib import suppress
from typing import Any

import yaml
from packaging.requirements import Requirement

from helpers.documentation import DATA, OTHER, PYTHON, ROOT, SHELL, Block, Command
from jaxlm import cli
from jaxlm.cli.flags import Flag, flags_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
MARKERS = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
SOURCES = re.compile(r"(?:tests|src|docs|benchmarks|examples|compat|\.ci|\.github)/[\w./*-]+")
PLACEHOLDERS = ("OLD/", "DIR")  # beginnings of paths that the reader fills in


def check_block(block: Block) -> str:
    """The syntax of a block; for Python, also the names of jaxlm."""
    try:
        if block.language in PYTHON:
            return check_names(ast.parse(block.text))
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "jsonl":
            [json.loads(line) for line in block.text.splitlines()]
        elif block.language == "yaml":
            list(yaml.safe_load_all(block.text))
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language not in SHELL | DATA | OTHER | {""}:
            return f"unknown language {block.language!r}: add it to the sets in helpers/documentation.py"
    except SyntaxError as error:
        return f"line {block.line + (error.lineno or 1) - 1}: {error.msg}"
    except (ValueError, yaml.YAMLError) as error:
        return f"{block.language}: {error}"
    return ""


def check_names(tree: ast.AST) -> str:
    """Whether the modules and names of jaxlm exist that the code imports, or names with dots."""
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "jaxlm":
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxlm":
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Attribute) and re.fullmatch(r"jaxlm\.[\w.]+", name := ast.unparse(node)):
                resolve(name)
        except (ImportError, AttributeError) as error:
            return str(error)
    return ""


def resolve(name: str) -> Any:
    """The object of a name with dots. Raises ImportError or AttributeError."""
    here, *rest = name.split(".")
    found = importlib.import_module(here)
    for part in rest:
        here = f"{here}.{part}"
        if not hasattr(found, part):
            with suppress(ModuleNotFoundError):
                importlib.import_module(here)  # a submodule
        found = getattr(found, part)
    return found


def check_command(command: Command) -> str:
    """Whether jaxlm, pip and pytest take these arguments, and whether the files exist that a command names."""
    program, *args = command.words
    if program == "jaxlm":
        return check_jaxlm(args)
    if program == "uv" and args[:1] == ["pip"]:
        program, *args = args
    if program == "pip" and args[:1] == ["install"]:
        return check_pip(args[1:])
    if program == "pytest" and "-m" in args:
        unknown = set(re.findall(r"\w+", args[args.index("-m") + 1])) - MARKERS - {"not", "and", "or"}
        if unknown:
            return f"no such marker: {', '.join(unknown)}"
    if program in ("python", "pytest", "bash", "ruff", "pyright"):
        missing = [arg for arg in args if SOURCES.fullmatch(arg.split("::")[0]) and not exists(arg.split("::")[0])]
        return f"no such file: {', '.join(missing)}" if missing else ""
    return ""


def check_jaxlm(args: list[str]) -> str:
    """The CLI's own parser: every flag exists, values have their types, and what is required is there."""
    try:
        cli.parse(args or ["--help"])
    except SystemExit as end:
        return "" if not end.code else f"jaxlm {' '.join(args)}: not parsed"
    return ""


def check_pip(args: list[str]) -> str:
    for arg in args:
        if arg.startswith("-"):
            continue
        own = re.fullmatch(r"(?:\.|jaxlm)(?:\[(.*)\])?", arg)
        try:
            extras = set((own[1] or "").split(",")) - {""} if own else Requirement(arg).extras and set()
        except ValueError as error:
            return str(error)
        if unknown := set(extras) - set(EXTRAS):
            return f"no such extra: {', '.join(unknown)}"
    return ""


def exists(path: str) -> bool:
    return any(True for _ in ROOT.glob(path.rstrip("/"))) or path.startswith(PLACEHOLDERS)


def check_inline(code: str, flags: dict[str, list[Flag]]) -> str:
    """`jaxlm COMMAND --flag` and paths of the repository within a sentence."""
    words = code.split()
    if SOURCES.fullmatch(code) and not exists(code):
        return f"no such file: {code}"
    if len(words) > 1 and words[0] == "jaxlm" and re.fullmatch(r"[a-z]+", words[1]):
        if words[1] not in flags:
            return f"no such command: {code}"
        names = {name for flag in flags[words[1]] for name in (flag.name, *flag.aliases, flag.negated())} | {"--help"}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.split("=")[0] not in names]
        return f"{code}: no such flag: {', '.join(unknown)}" if unknown else ""
    return ""


def all_flags() -> dict[str, list[Flag]]:
    return {name: flags_of(command) for name, command in cli.commands().items()}


def run_python(block: Block, namespace: dict[str, Any], replaced: dict[str, str]) -> str:
    """Runs a block. Its line numbers are those of the page.

    Args:
        block: The block.
        namespace: The names that the blocks above it have defined.
        replaced: Regular expressions, and what the tests have in their place.
    """
    text = block.text
    for pattern, new in replaced.items():
        text = re.sub(pattern, new, text)
    try:
        exec(compile("\n" * (block.line - 1) + text, block.page, "exec"), namespace)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == block.page), block.line)
        return f"{block.page}:{line}: {type(error).__name__}: {error}"
    return ""
