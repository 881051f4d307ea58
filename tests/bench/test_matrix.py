"""The hardware matrix: its records, what the checks find, and the page that is rendered from them."""

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_files

from jaxlm import models
from jaxlm.bench import checking, hardware_page, matrix, programs, random_model, records
from jaxlm.bench.matrix import Device, Settings, Subject
from jaxlm.nn import params

ROOT = Path(__file__).parents[2]
COLUMNS = {"cpu", "A100", "A100-8", "H100", "H100-8", "H200", "v2-8", "v5e-1", "v5e-8", "v6e-1", "v6e-8", "v5p-8"}
SETTINGS = Settings(2, 64, "float32")


def tiny(name: str = "org/tiny", **fields: Any) -> Subject:
    config = tiny_files.CONFIG | fields
    family = models.family_of(config["model_type"])
    return Subject(name, family, family.Config.from_hf(config), True, None, None)


def cpu(memory: float = 1e9) -> Device:
    device = matrix.named("cpu")
    return device._replace(spec=device.spec._replace(memory=memory))


def record(name: str = "org/tiny", device: str = "cpu", **fields: Any) -> records.Record:
    """A record with a result."""
    made = matrix.blank(tiny(name), matrix.named(device), SETTINGS, "compile", f"jaxlm check {name}")
    result = {"status": "compiles", "memory": {"total": 10**6}, "mesh": {"data": 1, "model": 1}, "needs": 1}
    return made | result | fields


def ran(speed: float, method: str = "run") -> records.Record:
    figure = {"kind": "decode", "name": "tg64", "tokens": 64, "depth": 0, "tokens_per_second": speed}
    figures = [figure | {"batch": 8, "tokens_per_second": 7 * speed}, figure | {"batch": 1}]
    verify = {"verify": {"against": ["transformers 5", "itself"]}} if method == "run" else {}
    return record(status="ran", method=method, figures=figures, **verify)


# Records and their files


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    one, other = record("org/b"), record("org/a", tuned=None)
    path = records.write(tmp_path, one)
    assert records.write(tmp_path, other) == path == tmp_path / "cpu.jsonl"
    assert records.read(tmp_path) == [other, one]
    lines = path.read_text().splitlines()
    assert all(list(json.loads(line)) == sorted(json.loads(line)) for line in lines)
    records.write(tmp_path, one | {"status": "fails"})
    assert path.read_text().splitlines()[0] == lines[0]
    assert [old["status"] for old in records.read(tmp_path)] == ["compiles", "fails"]


def test_an_interrupted_write_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = records.write(tmp_path, record())
    before = path.read_bytes()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.write(tmp_path, record(status="fails"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not a record"),
        (json.dumps(record() | {"schema": 99}), "upgrade"),
        (json.dumps({k: v for k, v in record().items() if k != "date"}), "date"),
        (json.dumps(record() | {"batch": "8"}), "batch"),
        (json.dumps(record() | {"status": "works"}), "status"),
        (json.dumps(record() | {"method": "guess"}), "method"),
        (json.dumps(record()) + "\n" + json.dumps(record()), "twice"),
        (json.dumps(record() | {"device": "H100"}), "H100.jsonl"),
    ],
)
def test_a_wrong_line_is_named(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=word) as error:
        records.read(tmp_path)
    assert f"cpu.jsonl, line {text.count(chr(10)) + 1}:" in str(error.value)


def test_names_of_devices_are_names_of_files(tmp_path: Path) -> None:
    assert records.file_of(tmp_path, "Apple M4 (10 cores)").name == "Apple-M4-10-cores.jsonl"
    assert records.file_of(tmp_path, "../../x").parent == tmp_path


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ({}, {}, True),
        ({}, {"versions": {"jax": "99"}}, False),
        ({}, {"command": "jaxlm check org/tiny --batch 1"}, False),
        ({}, {"machine": {"processor": "another"}}, False),
        ({"method": "arithmetic", "status": "does not fit"}, {}, True),  # the arithmetic comes before the compiler
        ({"method": "arithmetic", "status": "fits"}, {}, False),
        ({"method": "arithmetic", "status": "fits"}, {"method": "arithmetic"}, True),
        ({"method": "run"}, {"versions": {"jax": "99"}}, True),  # a run says more than a compilation
        ({"method": "run with random weights"}, {"method": "run", "command": "jaxlm check"}, False),
        ({"method": "run"}, {"method": "run with random weights", "command": "jaxlm check"}, True),
    ],
)
def test_what_is_not_checked_again(old: Any, new: Any, kept: bool) -> None:
    assert records.keeps(record() | old, record() | new) is kept


def test_a_result_is_shared_by_equal_shapes_alone() -> None:
    old, new = record("org/a"), record("org/b")
    assert records.twin([old], new) is old
    assert records.twin([old], new | {"context": 128}) is None
    assert records.twin([old], new | {"shapes": "0"}) is None
    assert records.twin([old | {"method": "arithmetic"}], new) is None
    assert records.twin([old | {"same_as": "org/c"}], new) is None  # no chains
    assert records.twin([record("org/b")], new) is None


# Models and devices


def test_published_models_the_smallest_first() -> None:
    found = matrix.published()
    assert len(found) == len(matrix.MODELS) > 40
    assert [one.parameters for one in found] == sorted(one.parameters for one in found)
    assert found[0].name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert all(one.page and one.config_page for one in found)


def test_shapes_are_equal_where_programs_take_the_same_memory() -> None:
    shapes = {one.name: one.shapes for one in matrix.published()}
    assert shapes["Qwen/Qwen3-0.6B"] == shapes["Qwen/Qwen3-0.6B-Base"]
    assert shapes["meta-llama/Meta-Llama-3-8B"] == shapes["meta-llama/Llama-3.1-8B-Instruct"]  # another RoPE
    assert tiny().shapes != tiny(num_attention_heads=8, head_dim=8).shapes  # equal shapes of weights, but for q
    assert tiny().shapes != tiny(model_type="olmo2").shapes
    gemma = {"model_type": "gemma3_text", "head_dim": 16, "hidden_act": None}
    windows = [tiny(**gemma, sliding_window=n).shapes for n in (16, 32)]
    assert windows[0] != windows[1]


def test_a_folder_is_listed_as_a_published_model_of_its_shapes(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    tiny_files.write(folder)
    subject = matrix.subject_of(str(folder))
    assert (subject.name, subject.page, subject.parameters) == ("tiny", None, 102848)
    assert matrix.subject_of(str(folder), "https://example.org/a/b")[0] == "a/b"
    assert matrix.subject_of(str(folder), "a/b").page == "https://huggingface.co/a/b"
    with pytest.raises(ValueError, match=r"Qwen/Qwen3-0\.6B"):
        matrix.subject_of(str(folder), "qwen3-0.6b")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setitem(matrix.MODELS, name, matrix.MODELS[name]._replace(config=tiny_files.CONFIG))
    listed = matrix.subject_of(str(folder), "smollm2-135m-instruct")
    assert (listed.name, listed.tuned) == (name, True)
    assert listed.source is not None
    assert listed.source.name == str(folder)


def test_devices_by_name() -> None:
    assert matrix.named("v5p-8").count == 4
    assert matrix.named("h100-8").name == "H100-8"
    assert matrix.named("CPU").machine == matrix.at_hand().machine
    assert matrix.at_hand("Apple M4").name == "Apple M4"
    for wrong, word in (("v6e-3", "no slice"), ("v7x", "unknown"), ("v5p-3", "cores")):
        with pytest.raises(ValueError, match=word):
            matrix.named(wrong)


# Checks


def test_the_memory_by_arithmetic() -> None:
    found = checking.estimate(tiny(), cpu(), SETTINGS)
    assert found.fits
    assert found.memory.weights == 4 * tiny().parameters
    assert found.context == 64
    assert checking.estimate(tiny(max_position_embeddings=32), cpu(), SETTINGS).context == 32
    assert not checking.estimate(tiny(), cpu(found.memory.total), SETTINGS).fits  # a part stays free


def test_the_fewest_devices_that_a_model_fits_on() -> None:
    models_of = {one.name: one for one in matrix.published()}
    llama = checking.estimate(models_of["meta-llama/Llama-3.1-70B"], matrix.named("v5e-8"), Settings())
    assert (llama.fits, llama.needs) == (False, 16)
    assert sum(llama.mesh.values()) >= 8
    small = checking.estimate(models_of["Qwen/Qwen3-0.6B"], matrix.named("v5e-1"), Settings())
    assert (small.fits, small.needs) == (True, 1)


def test_programs_are_compiled_whole() -> None:
    device = cpu()
    on, reason = checking.compiler_devices(device)
    assert (len(on), reason) == (1, "")
    result = checking.without_running(tiny(), device, SETTINGS, on, reason)
    assert (result["status"], result["method"]) == ("compiles", "compile")
    weights, cache = 4 * tiny().parameters, result["memory"]["cache"]
    for name, beside in (("decode", 0), ("prefill", cache)):
        account = result["compiled"][name]
        # An untied head or an unused weight may be missing, but not a layer.
        assert weights + cache <= account["arguments"] < 1.2 * (weights + cache), name
        assert account["beside"] == beside
        parts = account["arguments"] + account["temporaries"] + account["output"] - account["aliased"] + account["code"]
        assert account["total"] == parts + beside
        assert account["seconds"] > 0


def test_a_device_without_a_compiler_is_arithmetic() -> None:
    device = matrix.named("L4")  # no description for the CUDA compiler
    on, reason = checking.compiler_devices(device)
    assert on == []
    assert reason
    result = checking.without_running(tiny(), device, SETTINGS, on, reason)
    assert (result["status"], result["method"], result["error"]) == ("fits", "arithmetic", reason)
    assert "compiled" not in result


def test_what_does_not_fit_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "decode", None)
    result = checking.without_running(tiny(), cpu(1000), SETTINGS, jax.devices("cpu")[:1], "")
    assert (result["status"], result["method"], result["needs"]) == ("does not fit", "arithmetic", None)


def _raises(error: BaseException) -> Any:
    def build(*args: Any) -> Any:
        raise error

    return build


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm\nmore"),
            "does not fit",
            "prefill: RES",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed | to compile\nmore"), "fails", "Mosaic failed"),
        (NotImplementedError("no lowering"), "fails", "NotImplementedError: no lowering"),
    ],
)
def test_errors_of_a_compiler_are_results(error: Any, status: str, word: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(programs, "prefill", _raises(error))
    result = checking.without_running(tiny(), cpu(), SETTINGS, jax.devices("cpu")[:1], "")
    assert (result["status"], result["method"]) == (status, "compile")
    assert word in result["error"]
    assert "more" not in result["error"]


def test_a_compilation_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "decode", _raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checking.without_running(tiny(), cpu(), SETTINGS, jax.devices("cpu")[:1], "")


def test_the_compilers_account_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    account = programs.Account(arguments=2 * 10**9, temporaries=0, output=0, aliased=0, code=0)
    monkeypatch.setattr(programs, "account", lambda program: account)
    result = checking.without_running(tiny(), cpu(), SETTINGS, jax.devices("cpu")[:1], "")
    assert (result["status"], result["method"]) == ("does not fit", "compile")
    assert "2.00 GB" in result["error"]


def test_random_weights_are_those_of_the_shapes() -> None:
    subject = tiny(head_dim=16)
    model = random_model.draw(subject.family, subject.cfg, "bfloat16")
    expected = params.shapes(subject.family.PARAMS, subject.cfg, jnp.bfloat16)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), model.weights) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    q, k = (np.asarray(model.weights["layers"][i]["q"], np.float32) for i in (0, 1))
    assert np.std(q) == pytest.approx(64**-0.5, rel=0.1)
    assert not np.array_equal(q, k)
    assert np.all(np.asarray(model.weights["norm"], np.float32) == 1)


def test_cases_fit_the_context() -> None:
    assert [case.name for case in checking.cases(4096, 8)] == ["pp512", "tg64", "tg64"]
    assert len(checking.cases(4096, 1)) == 2
    for context in (4, 100, 256):
        assert all(case.prompt_tokens + case.max_tokens <= context for case in checking.cases(context, 8))


# The page


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (None, "not checked"),
        (ran(41.23), "✓ 41.2 tok/s"),
        (ran(1234.5), "✓ 1,234 tok/s"),
        (ran(0.123), "✓ 0.12 tok/s"),
        (ran(41.23, "run with random weights"), "○ 41.2 tok/s"),
        (ran(41.23, "run") | {"verify": {"against": ["itself"]}}, "◐ 41.2 tok/s"),
        (record(), "compiles"),
        (record(status="fits"), "fits"),
        (record(status="fails"), "**fails**"),
        (record(device="v5p-8", status="does not fit", needs=8), "needs 16"),
        (record(device="H100", status="does not fit", needs=2), "needs 2"),
        (record(device="H100", status="does not fit", needs=None), "too large"),
        (record(device="H100", status="does not fit", needs=1), "too large"),  # by the compiler, against the arithmetic
        (
            record(status="does not fit", memory={"total": 57e9, "usable": 9e9}, device_memory=10**10, needs=None),
            "needs 64 GB",
        ),
    ],
)
def test_cells(one: Any, text: str) -> None:
    assert hardware_page.cell(one) == text


def test_numbers_have_three_digits() -> None:
    counts = (260032, 134515008, 999885952, 8030261248, 405853388800, 999)
    assert [hardware_page.parameters(n) for n in counts] == ["260 k", "135 M", "1 B", "8.03 B", "406 B", "999"]


def test_every_cell_that_the_legend_shows_exists() -> None:
    marks = {text.partition(" ")[0].strip("*") for text, _ in hardware_page.LEGEND[1:]}
    assert marks == {"✓", "◐", "○", "compiles", "fits", "needs", "too", "fails", "not"}


def test_rows_and_columns() -> None:
    found = [
        record("org/z", tuned=False, parameters=1),
        record("org/y", tuned=True, parameters=1, page="https://example.org/y", config_page="https://example.org/c"),
        record("org/x", tuned=False, parameters=2, device="v6e-8"),
        record("org/x", tuned=False, parameters=2) | {"device": "Mac"},
    ]
    page = hardware_page.render(found)
    table = [line for line in page.splitlines() if line.startswith(("| org", "| [y", "| model | config"))]
    assert table[0] == "| model | config | parameters | kind | CPU | TPU v6e-8 | Mac |"
    rows = [line for line in table if "| pretrained |" in line or "| instruct |" in line]
    assert [line.split(" |")[0] for line in rows] == ["| org/z", "| org/x", "| [y](https://example.org/y)"]
    assert rows[1].endswith("| pretrained | not\u00a0checked | compiles | compiles |")
    assert "[config](https://example.org/c)" in rows[2]


@pytest.mark.parametrize("field", ["shapes", "method", "versions", "machine", "batch", "context", "dtype", "device"])
def test_results_are_shared_for_equal_programs_alone(field: str) -> None:
    old = record("org/a")
    new = record("org/b") | {"shapes": old["shapes"]}
    assert records.twin([old], new) == old
    assert records.twin([old | {field: "other"}], new) is None


def test_arithmetic_does_not_take_the_place_of_a_compilation() -> None:
    weak = {"method": "arithmetic"}
    assert records.is_stronger(record(method="compile"), weak)
    assert not records.is_stronger(record(method="arithmetic"), weak)
    assert not records.is_stronger(record(method="compile"), {"method": "run"})


def test_the_page_depends_on_the_records_alone() -> None:
    found = [record(f"org/{name}", device) for name in "abc" for device in ("cpu", "v6e-8", "H100-8")]
    page = hardware_page.render(found)
    for seed in range(5):
        random.Random(seed).shuffle(found)
        assert hardware_page.render(found) == page


def test_every_record_is_on_the_page_with_date_versions_and_command() -> None:
    found = [
        record("org/a", date="2026-01-02", versions={"jax": "9.9.9"}),
        record("org/b", error="a | b", status="fails"),
    ]
    page = hardware_page.render(found)
    assert "2026-01-02 to " in page
    assert "(1) jax 9.9.9\n" in page
    line = next(line for line in page.splitlines() if line.startswith("| org/a | compiles;"))
    assert line.endswith("| 2026-01-02 | (1) | `jaxlm check org/a` |")
    assert "a \\| b" in page


# The records and the page of this repository


@pytest.fixture(scope="module")
def stored() -> list[records.Record]:
    return records.read(ROOT / "compat")


def test_the_page_is_rendered_from_the_records(stored: list[records.Record]) -> None:
    """If this fails: jaxlm check --page docs/hardware.md"""
    assert (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8") == hardware_page.render(stored)


def test_the_matrix_is_large_and_nearly_full(stored: list[records.Record]) -> None:
    cells = {(one["model"], one["device"]) for one in stored}
    names = {one["model"] for one in stored}
    assert len(names) >= 20
    assert {one["device"] for one in stored} >= COLUMNS
    assert names >= set(matrix.MODELS)
    checked = cells & set(itertools.product(names, COLUMNS))
    assert len(checked) >= max(200, 0.9 * len(names) * len(COLUMNS))


def test_records_name_no_path(stored: list[records.Record]) -> None:
    for one in stored:
        assert one["date"]
        assert one["versions"]["jax"]
        assert one["command"].startswith("jaxlm check ")
        assert not [word for word in one["command"].split() if word.startswith(("/", "~", "."))], one["command"]
        assert not [word for word in one.get("error", "").split() if word.startswith(("/", "~"))], one["error"]
        if one["model"] in matrix.MODELS:
            known = matrix.MODELS[one["model"]]
            assert (one["page"], one["config_page"], one["tuned"]) == (known.page, known.config_page, known.tuned)
