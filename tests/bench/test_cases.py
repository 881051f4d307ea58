"""Cases and rows: names, prompts, means and percentiles."""

import statistics

import numpy as np
import pytest

from jaxlm.bench.cases import Case, Row, Sample


def test_names_are_those_of_llama_bench() -> None:
    assert Case("prefill", 512, 0, 1).name == "pp512"
    assert Case("decode", 128, 4096, 8).name == "tg128 @ d4096"


def test_tokens_of_a_case() -> None:
    """Decoding generates one token more than it times, behind one token at least."""
    assert (Case("prefill", 512, 64, 1).prompt_tokens, Case("prefill", 512, 64, 1).max_tokens) == (576, 1)
    assert (Case("decode", 128, 0, 1).prompt_tokens, Case("decode", 128, 0, 1).max_tokens) == (1, 129)
    assert Case("decode", 128, 64, 1).prompt_tokens == 64


def test_prompts_are_the_same_in_every_run() -> None:
    case = Case("prefill", 20, 5, 3)
    prompts = case.prompts(100)
    assert np.shape(prompts) == (3, 25)
    assert prompts == case.prompts(100)
    assert 0 <= np.min(prompts) <= np.max(prompts) < 100
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_speed_is_of_all_rows_together() -> None:
    row = Row(Case("decode", 10, 0, 4), [Sample(1.0), Sample(2.0)])
    assert row.speeds == [40.0, 20.0]
    assert row.speed == 30.0
    assert row.deviation == pytest.approx(statistics.stdev([40, 20]))
    assert Row(row.case, [Sample(1.0)]).deviation == 0


def test_percentiles_are_over_all_rounds() -> None:
    row = Row(Case("decode", 2, 0, 1), [Sample(1, intervals=[0.1, 0.2]), Sample(1, intervals=[0.3, 0.4])])
    assert row.milliseconds("intervals", 50) == pytest.approx(250)
    assert row.milliseconds("intervals", 100) == pytest.approx(400)
    assert row.milliseconds("first_token", 50) is None


def test_the_fastest_contestant_of_a_rival() -> None:
    """A contestant that ended after the first round does not count: one round is mostly luck."""
    rivals = {"a float32": [1.0, 1.0], "a bfloat16": [0.5, 0.25], "a compiled": [0.01], "b": [0.1]}
    row = Row(Case("decode", 10, 0, 1), rivals=rivals)
    assert row.rival("a") == ("a bfloat16", 30.0)
    assert row.rival("b") == ("b", 100.0)
    assert row.rival("c") is None
