"""The files around the package: workflow, issue forms, citation, hooks, container, source distribution."""

import importlib.metadata
import json
import re
import tomllib
from typing import Any

import pytest
import yaml
from helpers.documentation import ROOT, Block, commands
from helpers.documentation_checks import check_command

import jaxlm

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSIONS = [c.rsplit(" ", 1)[1] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
FILES = [
    ROOT / name
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "MANIFEST.in",
        "SECURITY.md",
        ".pre-commit-config.yaml",
    )
] + [path for folder in (".github", ".devcontainer") for path in (ROOT / folder).rglob("*") if path.is_file()]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def check_shell(where: str, text: str) -> None:
    """The commands of a script are known, and the files, extras and flags that they name exist."""
    for command in commands(Block(where, 1, "sh", text)):
        assert not check_command(command), f"{command.where}: {check_command(command)}"


def test_the_workflow_runs_what_there_is() -> None:
    workflow = load(".github/workflows/ci.yml")
    steps = [(name, step) for name, job in workflow["jobs"].items() for step in job["steps"]]
    for name, step in steps:
        assert ("uses" in step) != ("run" in step), step
        check_shell(f"ci.yml, {name}", step.get("run", ""))
    assert ".ci/run" in [step.get("run") for _, step in steps]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    versions = next(step["with"]["python-version"] for _, step in steps if "setup-python" in step.get("uses", ""))
    assert versions.split() == [VERSIONS[-1], VERSIONS[0]]  # the newest, and the oldest as `python`
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms(path: Any) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= FIELDS
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    for field in fields:
        for code in re.findall(r"`(jaxlm[^`]*)`", field["attributes"].get("description", "")):
            check_shell(path.name, code)


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("jaxlm") == jaxlm.__version__
    assert load("CITATION.cff")["version"] == jaxlm.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] in (jaxlm.__version__, "Unreleased")


def test_citation_has_the_fields_of_the_format() -> None:
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The jaxlm contributors"}]
    assert citation["license"] == PROJECT["project"]["license"]


def test_sections_of_the_changelog() -> None:
    titles = re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles
    assert set(titles) <= SECTIONS


def test_hooks_are_programs_of_the_dev_extra() -> None:
    [repo] = load(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"  # no network at a commit
    packages = {re.split(r"[<>=]", name)[0] for name in PROJECT["project"]["optional-dependencies"]["dev"]}
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].split()[0] in packages


def test_the_container_installs_extras_that_exist() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["image"].partition(":")[2] in VERSIONS
    check_shell("devcontainer.json", container["postCreateCommand"])


def test_the_source_distribution_names_what_exists() -> None:
    """Tests and what they read are in it: MANIFEST.in."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines() if not line.startswith("#")]
    named = {name for command, *names in lines if command in ("graft", "include") for name in names}
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert named >= {"tests", "docs", "examples", "benchmarks", "compat"}


def test_no_address_of_a_person() -> None:
    for path in FILES:
        assert not re.search(r"[\w.]+@[\w-]+\.[a-z]{2,}", path.read_text()), path
