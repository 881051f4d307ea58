"""The rules of docs/architecture.md, computed from the source: who may import whom, no circles, sizes.

Imports inside functions count. Imports under TYPE_CHECKING do not: they do not run.
"""

import ast
import difflib
import graphlib
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "jaxlm"
# Each row may import the rows above it, and itself without a circle of files.
ORDER = (
    "version",
    "devices",
    "nn",
    "models",
    "checkpoint",
    "processing",
    "data",
    "activations model adapters nnx",
    "inference",
    "server",
    "evaluation",
    "loading sidecars exporting",
    "verification",
    "training",
    "bench",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
# What a family's `forward` reaches may not depend on anything above `nn`.
MODELS_MAY_IMPORT = ("jaxlm.nn", "jaxlm.models.config")
TORCH_IN = ("verification", "bench/rivals.py")
# The one import against the order, when `load` of a model file is called (docs/decisions.md).
UPWARD = {"jaxlm.models.config": {"jaxlm.loading"}}
ROOT_FILES = 7  # besides __init__ and __main__
# Lines. Of a documented function only what follows the docstring counts: a public docstring lists shapes and errors.
FILE, FUNCTION, FAMILY, REACHED = 400, 50, 160, 2400
# Not counted in REACHED: a table of names, which no code path runs through.
TABLES = {"jaxlm.models.config_fields"}
# Longer than FUNCTION, with the reason.
LONG_FUNCTIONS: dict[str, str] = {}


def files(src: Path) -> list[Path]:
    return sorted(src.rglob("*.py"))


def module_of(path: Path, src: Path) -> str:
    """`jaxlm.nn.rope` for nn/rope.py, `jaxlm.nn` for nn/__init__.py."""
    parts = path.relative_to(src.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from running_nodes(child)


def imports(path: Path) -> set[str]:
    """Full names of what a file imports anywhere: modules, or names in modules."""
    return imports_of(path.read_text())


@cache
def imports_of(text: str) -> set[str]:
    names: set[str] = set()
    for node in running_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import: {ast.unparse(node)}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return names


def graph(src: Path) -> dict[str, set[str]]:
    """module -> the modules of the package that it imports."""
    modules = {module_of(path, src): path for path in files(src)}

    def home(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {there for name in imports(path) if (there := home(name)) and there != module}
        for module, path in modules.items()
    }


def row(module: str) -> str:
    """`nn` for jaxlm.nn.rope, `model` for jaxlm.model, `__init__` for jaxlm."""
    return (module.split(".") + ["__init__"])[1]


def wrong_imports(src: Path) -> list[str]:
    """Imports that go up, circles of files, and what models and others may not import."""
    edges, wrong = graph(src), []
    for module, targets in edges.items():
        for target in targets - UPWARD.get(module, set()):
            here, there = row(module), row(target)
            if here == "__init__" or (there == "__init__" and target == "jaxlm" and here == "cli"):
                continue  # the package's lazy exports, and the command line, which uses them
            if there == "__init__" or RANK[there] > RANK[here]:
                wrong.append(f"{module} imports {target}, which stands below it")
            if here == "models" and module != "jaxlm.models" and not target.startswith(MODELS_MAY_IMPORT):
                wrong.append(f"{module} imports {target}: a model file imports nn and models.config alone")
    try:
        graphlib.TopologicalSorter({m: targets - UPWARD.get(m, set()) for m, targets in edges.items()}).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a circle of files: {' -> '.join(error.args[1])}")
    for path in files(src):
        place = path.relative_to(src).as_posix()
        if any(name.split(".")[0] == "torch" for name in imports(path)) and not place.startswith(TORCH_IN):
            wrong.append(f"{place} imports torch")
    return wrong


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    """All modules that a module reaches by imports."""
    found, waiting = set(), [start]
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += edges[module]
    return found


NO_FAMILIES = ("__init__", "config", "config_fields", "family", "unsupported")
FAMILIES = [path for path in files(SRC / "models") if path.stem not in NO_FAMILIES]


def test_import_directions() -> None:
    assert wrong_imports(SRC) == []


@pytest.mark.parametrize(
    ("file", "line", "word"),
    [
        ("nn/norm.py", "import jaxlm.model", "below"),
        ("processing/detokenizer.py", "def f():\n    from jaxlm.inference import engine", "below"),
        ("models/llama3.py", "from jaxlm.models.qwen3 import Config as Other", "a model file"),
        ("models/llama3.py", "from jaxlm.devices import mesh", "a model file"),
        ("nn/params.py", "from jaxlm.nn import lora", "circle"),
        ("inference/engine.py", "from jaxlm.cli import main", "below"),
        ("loading/__init__.py", "import torch", "torch"),
        ("nn/norm.py", "from importlib import import_module\nimport_module('jaxlm.cli')", "below"),
    ],
)
def test_a_planted_import_is_found(file, line, word, tmp_path) -> None:
    copy = tmp_path / "jaxlm"
    shutil.copytree(SRC, copy, ignore=shutil.ignore_patterns("__pycache__", "stories"))
    with open(copy / file, "a") as out:
        out.write(f"\n{line}\n")
    assert any(word in text for text in wrong_imports(copy))


def test_imports_for_type_checkers_do_not_count(tmp_path) -> None:
    copy = tmp_path / "jaxlm"
    shutil.copytree(SRC, copy, ignore=shutil.ignore_patterns("__pycache__", "stories"))
    with open(copy / "nn/norm.py", "a") as out:
        out.write("\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxlm.model import Model\n")
    assert wrong_imports(copy) == []


def test_root_holds_few_files() -> None:
    names = {path.stem for path in SRC.glob("*.py")} - {"__init__", "__main__"}
    assert len(names) <= ROOT_FILES, names


@pytest.mark.parametrize("path", files(SRC), ids=lambda p: str(p.relative_to(SRC)))
def test_sizes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            first = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
            length = node.end_lineno - first + 1
            assert length <= FUNCTION or f"{path.name}:{node.name}" in LONG_FUNCTIONS, (node.name, length)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda p: p.stem)
def test_what_forward_reaches_stays_short(family: Path) -> None:
    lengths = {module_of(path, SRC): len(path.read_text().splitlines()) for path in files(SRC)}
    assert lengths[module_of(family, SRC)] < FAMILY
    edges = {module: targets - UPWARD.get(module, set()) for module, targets in graph(SRC).items()}
    modules = reached(edges, module_of(family, SRC)) - TABLES
    assert sum(lengths[module] for module in modules) <= REACHED, sorted((lengths[m], m) for m in modules)


def test_modules_do_not_bear_names_of_public_functions() -> None:
    """`jaxlm.generate` stays a function after any import."""
    import jaxlm

    modules = {path.stem for path in SRC.glob("*.py")} | {path.name for path in SRC.iterdir() if path.is_dir()}
    assert not modules & set(jaxlm.__all__)


def test_qwen3_is_llama3_plus_a_norm() -> None:
    """`diff` shows the architecture alone: at most 6 changed lines besides the docstrings."""
    texts = [
        (SRC / "models" / f"{name}.py").read_text().split('"""', 2)[2].splitlines() for name in ("llama3", "qwen3")
    ]
    changes = [x for x in difflib.ndiff(*texts) if x[0] in "+-"]
    assert 0 < len(changes) <= 6
