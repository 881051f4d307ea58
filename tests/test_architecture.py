"""The rules of the house (docs/architecture.md), read from the source: who may import whom, and how long things are."""

import ast
import difflib
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "jaxlm"
FILES = sorted(SRC.rglob("*.py"))
FAMILIES = [p for p in sorted((SRC / "models").glob("*.py")) if p.stem != "__init__"]
# What modules of a folder or a name may import from the package; what is not listed may import all but the CLI.
ALLOWED = {
    "ops": {"ops", "mesh"},
    "models": {"ops", "params", "config"},
    "config": {"ops"},
    "params": {"ops", "mesh"},
    "mesh": set(),
    "topology": {"mesh"},
    "lora": {"ops", "mesh", "params"},
    "checkpoint": {"checkpoint", "params", "mesh", "devices", "lora"},  # an adapter's files hold LoRA leaves
}
# Longer than 40 lines, with the reason.
LONG_FUNCTIONS: dict[str, str] = {}


def home(path: Path) -> str:
    """`ops` for ops/rotary.py, `params` for params.py."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_import_directions(path: Path) -> None:
    names = imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("jaxlm.")}
    where = home(path)
    if path != SRC / "models" / "__init__.py":  # which attaches `load` to each family
        assert ours <= ALLOWED.get(where, ours)
        if where == "models":
            assert not any(name.startswith("jaxlm.models") for name in names)
    if where not in ("cli", "__main__"):
        assert "cli" not in ours
    if where != "verification":
        assert not any(name.split(".")[0] == "torch" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_sizes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40 or f"{path.name}:{node.name}" in LONG_FUNCTIONS, node.name


def test_what_forward_reaches_stays_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert all(lengths[path] < 160 for path in FAMILIES)
    reachable = sum(lengths[path] for path in FILES if home(path) in ("ops", "mesh"))
    assert reachable + max(lengths[path] for path in FAMILIES) < 900


def test_qwen3_is_llama3_plus_a_norm() -> None:
    """`diff` shows the architecture alone: at most 6 changed lines beside the docstrings."""
    texts = [
        (SRC / "models" / f"{name}.py").read_text().split('"""', 2)[2].splitlines() for name in ("llama3", "qwen3")
    ]
    changes = [x for x in difflib.ndiff(*texts) if x[0] in "+-"]
    assert 0 < len(changes) <= 6
