"""Markdown tables, records for JSON, and what ran where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import tiny

from jaxlm.bench import tables
from jaxlm.bench.cases import Case, Row, Sample
from jaxlm.bench.limits import Rates
from jaxlm.bench.measure import Session
from jaxlm.nn import params


@pytest.fixture(scope="module")
def session() -> Session:
    model = tiny("llama3")
    decode, prefill, empty = Case("decode", 10, 0, 2), Case("prefill", 8, 4, 1), Case("decode", 3, 0, 1)
    found = Session(model, [decode, prefill, empty], 2)
    found.rates = Rates(read=1e6, matmul=1e30, matmul_dtype="float32", timed=1)
    found.rows[decode] = Row(decode, [Sample(2.0, intervals=[0.25] * 20)], 1.5, 123_000_000, {"llama.cpp f": [4.0]})
    found.rows[prefill] = Row(prefill, [Sample(0.5, 0.0, [0.5]), Sample(0.25, 0.0, [0.25])])
    found.rows[empty] = Row(empty)
    return found


def test_records(session) -> None:
    decode, prefill = tables.records(session, ["llama.cpp"])  # the row without a sample is left out
    assert (decode["test"], decode["batch"], decode["tokens_per_second"]) == ("tg10", 2, 10.0)
    assert decode["inter_token_p50_ms"] == pytest.approx(250)
    assert decode["first_token_ms"] is None
    assert decode["llama.cpp"] == {"contestant": "llama.cpp f", "tokens_per_second": 5.0, "ratio": 2.0}
    # Steps 1 to 10 behind one token: the weights, and 2 to 11 tokens of 2 rows, 2 layers, 2 heads of width 12, k and v.
    weights = params.nbytes(session.model.weights) - params.nbytes(session.model.weights["embed"])
    nbytes = 10 * weights + sum(2 * length * 2 * 2 * 2 * 12 * 4 for length in range(2, 12))
    assert decode["limit_tokens_per_second"] == pytest.approx(20 / (nbytes / 1e6))
    assert decode["fraction_of_limit"] == pytest.approx(10 / (20 / (nbytes / 1e6)))
    assert (prefill["test"], prefill["tokens_per_second"]) == ("pp8 @ d4", 24.0)
    assert prefill["first_token_ms"] == pytest.approx(375)
    assert prefill["llama.cpp"] is None


def test_the_table_is_markdown(session) -> None:
    found = tables.records(session, ["llama.cpp"])
    lines = tables.generation_table(found, ["llama.cpp"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, rule, decode, prefill = cells
    assert rule == [*["-" * len(rule[0])], *("-" * (len(cell) - 1) + ":" for cell in rule[1:])]
    decode, prefill = dict(zip(head, decode)), dict(zip(head, prefill))
    assert decode["tokens/s"] == "10.0 ± 0.0"
    assert decode["llama.cpp, ratio"] == "5.00 (f), 2.00 x"
    assert decode["limit, tokens/s"].endswith(" (memory)")
    assert decode["memory"] == "0.12 GB"
    assert decode["first token, ms"] == prefill["llama.cpp, ratio"] == prefill["memory"] == ""
    assert prefill["tokens/s"] == "24.0 ± 11.3"


def test_the_environment_names_the_commit(monkeypatch) -> None:
    found = tables.environment()
    root = Path(tables.__file__).parents[3]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert head.stdout.startswith(found["commit"].partition("+")[0])
        assert len(found["commit"].partition("+")[0]) >= 10
    lines = tables.environment_lines(found, Rates(read=2e9, matmul=3e12, matmul_dtype="bfloat16", timed=1))
    assert "memory read 2.0 GB/s; matmul 3,000 GFLOP/s bfloat16 (measured in this run)" in lines[0]
    assert f"jax {found['jax']}" in lines[1]


def test_no_commit_outside_a_checkout(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    assert tables.commit() is None


def test_numbers() -> None:
    assert [tables.number(x) for x in (None, 1.234, 12.34, 1234.5)] == ["", "1.23", "12.3", "1,234"]


def test_prefill_and_decoding_need_no_optax() -> None:
    """The extra jaxlm[bench] does not have it."""
    code = "import sys; from jaxlm.bench import measure, plots, rival_files, tables; sys.exit('optax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
