"""The memory that `jaxlm plan` predicts, beside that of compiled programs (compat/)."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def accuracy() -> Any:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("plan_accuracy")
    sys.path.remove(BENCHMARKS)


def test_nine_of_ten_predictions_are_within_five_percent(accuracy: Any) -> None:
    rows = list(accuracy.rows())
    assert len(rows) >= 20
    assert {row.program for row in rows} == {"decode", "prefill"}
    assert {row.device[0] for row in rows} >= {"v", "H"}  # of both compilers
    far = [(row.model, row.device, row.program, f"{row.difference:+.1%}") for row in rows if abs(row.difference) > 0.05]
    assert len(far) <= len(rows) // 10, far
    assert all(abs(row.difference) <= 0.2 for row in rows), far


def test_the_page_is_rendered_from_the_records(accuracy: Any) -> None:
    page = accuracy.PAGE.read_text()
    assert accuracy.with_table(page, accuracy.render(list(accuracy.rows()))) == page
