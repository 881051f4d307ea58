"""benchmarks/tables.py: the tables of docs/performance.md come from records, and records say where they are from."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
V6E, GPU = ("v6e", 8), ("H100", 8)
# (table, chip, devices, model, batch, sequence, library)
REQUIRED = [
    ("training", "v6e", 1, "Qwen3-4B", 8, 512, "jaxlm"),
    ("training", "v6e", 1, "Qwen3-4B", 8, 512, "jax-llm"),
    ("training", *V6E, "Qwen3-8B", 128, 512, "jaxlm"),
    ("training", *V6E, "Qwen3-8B", 128, 512, "jax-llm"),
    ("training", *V6E, "Llama-3.1-8B", 8, 8192, "jaxlm"),
    ("training", *V6E, "Llama-3.1-8B", 24, 8192, "MaxText"),
    ("training", *GPU, "Llama-2-7B", 16, 4096, "jaxlm"),
    ("training", *GPU, "Llama-2-7B", 16, 4096, "MaxText"),
    ("training", *GPU, "Llama-3.1-8B", 16, 8192, "jaxlm"),
    ("training", *GPU, "Llama-3.1-8B", 16, 8192, "torchtitan"),
    ("training", "H200", 8, "Llama-3.1-8B", 16, 8192, "jaxlm"),
    *(("sampling", *V6E, "Qwen3-32B", *shape, library)
      for shape in ((1, 512), (512, 512), (128, 4096)) for library in ("jaxlm", "jax-llm")),
    ("sampling", "H100", 1, "Llama-3.2-1B", 1, 160, "jaxlm"),
    ("sampling", "H100", 1, "Llama-3.2-1B", 1, 160, "Hazy Research megakernel"),
    ("sampling", "H100", 1, "Llama-3.1-8B", 1, None, "torchao"),
    ("sampling", "H200", 1, "Llama-3.1-8B", 1, 2048, "jaxlm"),
    ("sampling", "H200", 1, "Llama-3.1-8B", 8, 160, "jaxlm"),
    ("sampling", "H200", 1, "Llama-3.1-8B", 8, 160, "vLLM"),
    ("sampling", "H200", 1, "Llama-3.1-8B", None, 2176, "TensorRT-LLM"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> Iterator[Any]:
    """The module."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("tables")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def record(tables: Any) -> dict[str, Any]:
    """A published record of sampling."""
    return next(one for one in tables.records() if one["library"] == "jax-llm" and one["table"] == "sampling")


def written(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_docs_are_what_the_records_render_to(tables: Any) -> None:
    text = tables.DOCS.read_text()
    assert tables.replaced(text, tables.section(tables.records())) == text, "run python benchmarks/tables.py"


def test_check_fails_where_the_docs_differ(
    tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tables.DOCS.read_text()
    begin, end = text.index(tables.BEGIN), text.index(tables.END)
    edited = text[:begin] + text[begin:end].replace("108", "109", 1) + text[end:]
    assert edited != text
    monkeypatch.setattr(tables, "DOCS", tmp_path / "performance.md")
    tables.DOCS.write_text(edited)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "tables.py" in capsys.readouterr().err
    assert tables.DOCS.read_text() == edited  # --check writes nothing
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    assert tables.DOCS.read_text() == text
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0


def test_a_bad_record_is_one_line_on_the_command_line(
    tables: Any,
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tables.records, "__defaults__", (written(tmp_path, {**record, "kind": "guessed"}),))
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_every_required_row_is_there(tables: Any) -> None:
    fields = ("table", "chip", "chips", "model", "batch", "sequence", "library")
    there = {tuple(record[field] for field in fields) for record in tables.records()}
    assert [row for row in REQUIRED if row not in there] == []


def test_every_record_has_a_row(tables: Any) -> None:
    records = tables.records()
    shown = [cells for name in tables.CELLS for cells in tables.rows(name, records)]
    assert len(shown) == len(records)
    assert all(cells[-1].split()[0] in tables.KINDS for cells in shown)
    figures = [cells[len(tables.HEADS) : -1] for cells in shown]
    assert all(any(cells) for cells in figures)


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        ({"kind": "guessed"}, "guessed"),
        ({"kind": None}, "kind"),
        ({"url": None}, "url"),
        ({"url": "the README"}, "url"),
        ({"read": ""}, "read"),
        ({"run": ""}, "run"),
        ({"values": []}, "values"),
        ({"values": [{"name": "interactivity", "value": 1, "unit": "ms"}]}, "interactivity"),
        ({"values": [{"name": "speed", "value": 1, "unit": "tokens/s"}]}, "speed"),
        ({"values": [{"name": "interactivity", "value": 1}]}, "unit"),
        ({"values": [{"name": "interactivity", "unit": "tokens/s"}]}, "value"),
        ({"chip": "v7e"}, "v7e"),
        ({"library": "jaxlm"}, "command, date, versions"),
    ],
)
def test_a_record_without_kind_or_source_is_refused(
    tables: Any, record: dict[str, Any], tmp_path: Path, change: dict[str, Any], noun: str
) -> None:
    assert tables.records(written(tmp_path, record)) == [record]
    with pytest.raises(ValueError, match=rf"some.jsonl, line 2.*{noun}"):
        tables.records(written(tmp_path, record, {**record, **change}))


def test_a_record_that_leaves_out_the_batch_is_refused(tables: Any, record: dict[str, Any], tmp_path: Path) -> None:
    assert tables.records(written(tmp_path, {**record, "batch": None}))[0]["batch"] is None  # stated as not known
    del record["batch"]
    with pytest.raises(ValueError, match="batch"):
        tables.records(written(tmp_path, record))


def test_the_later_record_of_a_run_counts(tables: Any, record: dict[str, Any], tmp_path: Path) -> None:
    later = {**record, "values": [{"name": "interactivity", "value": 7, "unit": "tokens/s"}]}
    other = {**record, "kind": "predicted"}
    found = tables.records(written(tmp_path, record, other, later))
    assert found == [later, other]
    assert next(tables.rows("sampling", found))[7] == "7"


def test_hbm_use_is_computed_as_its_source_defines_it(tables: Any) -> None:
    published = [one for one in tables.records() if one["library"] == "jax-llm" and one["table"] == "sampling"]
    assert len(published) == 3
    for one in published:
        computed = {**one, "values": [figure for figure in one["values"] if figure["name"] != "hbm_use"]}
        assert tables.hbm_use(one) == tables.value(one, "hbm_use") / 100
        assert tables.hbm_use(computed) == pytest.approx(tables.hbm_use(one), abs=0.006)


def test_mfu_is_computed_as_its_sources_define_it(tables: Any) -> None:
    published = [one for one in tables.records() if one["library"] == "MaxText" and tables.value(one, "flops")]
    assert len(published) == 2
    for one in published:
        assert tables.mfu(one, causal=False) == pytest.approx(tables.value(one, "flops") / 918, rel=2e-3)
        scores = 6 * 32 * 32 * 128 * 8192  # L N H T of Llama 3.1 8B
        difference = tables.tokens_per_second(one) * scores / 918e12
        assert tables.mfu(one, causal=False) - tables.mfu(one, causal=True) == pytest.approx(difference)


def test_float8_has_no_mfu(tables: Any) -> None:
    found = [one for one in tables.records() if one["table"] == "training" and one["precision"] == "float8"]
    assert found
    assert all(tables.mfu(one, causal=True) is None and tables.tokens_per_second(one) for one in found)


def test_docs_without_the_markers_are_refused(tables: Any) -> None:
    with pytest.raises(ValueError, match="tables: begin"):
        tables.replaced("# Performance\n", "")
