"""The processors against a float64 reference that sorts, the draw against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr
from scipy import stats

from jaxlm.inference import sampling
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.sampling_params import SamplingParams

pytestmark = pytest.mark.smoke

B, V = 4, 23
EPS = 1e-5  # thresholds closer than this to a token's value may fall either way in float32
MAX = float(np.finfo(np.float32).max)

process, sample, update, step_keys = map(
    jax.jit, (sampling.process, sampling.sample, sampling.update, sampling.step_keys)
)
count, split = jax.jit(sampling.count, static_argnums=2), jax.jit(jax.random.split, static_argnums=1)


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def of(*rows: dict) -> Sampling:
    return Sampling.of([SamplingParams(**row).resolve({}) for row in rows])


def run(x, *rows: dict, counts=None, bias=None) -> np.ndarray:
    """`x` [B, V] or [V] processed, one dict of options a row."""
    x = np.atleast_2d(np.asarray(x, np.float32))
    return np.asarray(process(jnp.asarray(x), of(*rows), counts, bias))


def kept(x, **row) -> list[int]:
    """The tokens of one row [V] that may be drawn."""
    out = run(x, {"temperature": 1.0, **row})
    assert not np.isnan(out).any()
    return np.flatnonzero(np.isfinite(out[0])).tolist()


def reference(x, temperature, top_k, top_p, min_p):
    """One row [V] filtered in float64 by sorting: its logits, and whether float32 may cut elsewhere."""
    x = (x / np.float32(temperature)).astype(np.float64)
    close = False
    if 0 < top_k < V:
        x = np.where(x < np.sort(x)[-top_k], -np.inf, x)
    if top_p < 1:
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        values = np.unique(x)[::-1]
        share = np.array([p[x >= value].sum() for value in values])
        x = np.where(x < values[np.searchsorted(share, min(top_p, share[-1]))], -np.inf, x)
        close |= bool((abs(share - top_p) < EPS).any()) and top_p > 0
    if min_p > 0:
        ratio = np.exp(x - x.max())
        x = np.where(ratio < min_p, -np.inf, x)
        close |= bool((abs(ratio - min_p) < EPS).any()) and min_p < 1
    return x, close


def logits(kind: str, seed: int) -> np.ndarray:
    """One row [V]: distinct or tied values, some -inf, or one token far above the rest."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=V) * 4).astype(np.float32)
    if kind == "tied":
        x = np.round(x / 2)
    elif kind == "banned":
        x[rng.permutation(V)[: rng.integers(1, V)]] = -np.inf
    elif kind == "peaked":
        x[rng.integers(V)] += 15
    return x


rows_of_logits = st.builds(logits, st.sampled_from(["distinct", "tied", "banned", "peaked"]), st.integers(0, 2**32))
share = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1, width=32))
request = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.1, 0.7, 1, 3]), "top_k": st.integers(0, V + 2), "top_p": share, "min_p": share}
)


@settings(max_examples=400, deadline=None)
@given(st.lists(rows_of_logits, min_size=B, max_size=B), st.lists(request, min_size=B, max_size=B))
def test_filters_match_a_reference_with_sorting(x, rows):
    for got, values, row in zip(run(np.stack(x), *rows), x, rows):
        want, close = reference(values, **row)
        if not close:
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary(spread, top_p):
    x = np.random.default_rng(0).normal(size=50_021).astype(np.float32) * np.float32(spread)
    out = run(x, {"temperature": 1.0, "top_p": top_p})[0]
    p = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum()
    inside = np.isfinite(out)
    share = p[inside].sum()
    assert p[inside].min() > p[~inside].max()
    assert share >= top_p - 3e-6
    assert share - p[inside].min() < top_p + 3e-6  # without the least of them it would not do


@pytest.mark.parametrize("kind", ["distinct", "tied", "peaked", "few finite"])
def test_the_largest_logits_give_the_thresholds_of_bisection(kind, monkeypatch):
    """In rows whose threshold is among the 64 largest logits, and in batches with one where it is not."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(6, 9_001)) * 3).astype(np.float32)
    if kind == "tied":
        x = np.round(x)
    if kind == "peaked":
        x[np.arange(6), rng.integers(9_001, size=6)] += 15
    if kind == "few finite":
        x[:, 40:] = -np.inf
    near = [{"top_k": k, "top_p": p} for k, p in ((1, 1), (5, 0.3), (64, 0.95), (40, 0), (0, 0.01), (63, 1))]
    far = [{"top_k": 65}, {"top_k": 300, "top_p": 0.9}, {"top_p": 0.9999}]
    batches = [near, *([row, *near[1:]] for row in far)]
    found = [run(x, *({"temperature": 1.3, **row} for row in rows)) for rows in batches]
    if kind == "distinct":
        assert [np.isfinite(row).sum() for row in (found[0][0], found[0][5], found[1][0])] == [1, 63, 65]
    for rows in found[1:]:
        np.testing.assert_array_equal(rows[1:], found[0][1:])
    monkeypatch.setattr(sampling, "_largest", lambda x: None)
    bisected = jax.jit(sampling.process)
    for rows, out in zip(batches, found):
        np.testing.assert_array_equal(bisected(x, of(*({"temperature": 1.3, **row} for row in rows))), out)


def test_few_finite_logits_need_no_bisection(monkeypatch):
    """The last block is filled up, and its filling is among the 64 largest if fewer are finite."""
    x = np.full((1, 9_001), -np.inf, np.float32)
    x[0, -3:] = 1.0, 3.0, 2.0
    monkeypatch.setattr(sampling, "_bisection", lambda x, weight, target: jnp.full(x.shape[:1], jnp.nan))
    assert sampling._top_p_threshold(x, jnp.full(1, 0.9, jnp.float32)) == 2.0


def test_equal_logits_are_kept_or_dropped_together():
    assert kept([1, 3, 2, 2, 2, 0], top_k=2) == [1, 2, 3, 4]
    assert kept([0, 0, 0, 0], top_p=0.3) == [0, 1, 2, 3]
    assert kept([1, 2, 1, 0], top_p=0.62) == [0, 1, 2]  # shares: 0.53, then 0.20 twice
    assert kept([0.0, -0.0, -1, -2], top_k=1) == [0, 1]
    assert kept([0.0, -0.0, -1, -2], top_p=0.1) == [0, 1]


def test_limits_of_each_filter():
    x = [0.5, 3.0000002, -2.0, 3.0, 1.0]  # neighbors in float32: the last bit decides
    assert kept(x, top_p=0.0) == [1]
    assert kept(x, top_k=1) == [1]
    assert kept(x, min_p=1.0) == [1]
    for off in ({}, {"top_k": 0}, {"top_k": 5}, {"top_k": 2**31 - 1}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert kept(x, **off) == [0, 1, 2, 3, 4]
    assert kept(np.log([0.4, 0.3, 0.2, 0.1]), top_p=0.55, top_k=2) == [0]  # 0.4 of the 0.7 that top-k left is 0.57
    assert kept([-60.0, 0.0, -60.0], top_p=1.0) == [0, 1, 2]  # shares of 1e-26 stay where top_p is off


@pytest.mark.parametrize("row", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.9}], ids=str)
def test_extreme_logits_give_finite_probabilities(row):
    inf = np.inf
    assert kept([-inf, -inf, 7.0, -inf], **row) == [2]
    assert kept([MAX, -MAX, 0.0, -MAX], **row)[0] == 0
    assert kept([-MAX, -MAX, -1.0, -inf], **row)[-1] == 2
    assert kept([inf, 0.0, -inf, 5.0], **row)[0] == 0
    for temperature in (1e-37, 1e-30, 1e30):
        assert 1 in kept([50.0, 51.0, -5.0, 40.0], temperature=temperature, **row)
    assert kept([50.0, 51.0, -5.0, 40.0], temperature=1e-37, top_p=0.9) == [1]


def test_greedy_rows_skip_temperature_and_filters_but_not_bias_and_penalties():
    x = np.array([[1.0, 2.0, 3.0, -1.0]] * 2, np.float32)
    bias = jnp.asarray([[0.0, 0.0, 0.0, 9.0]] * 2, jnp.float32)
    counts = count(np.full((2, 1), 2, np.int32), np.zeros((2, 1), np.int32), 4)
    greedy = {"temperature": 0.0, "top_k": 1, "top_p": 0.0, "min_p": 1.0}
    rows = ({**greedy, "repetition_penalty": 2.0}, {"temperature": 0.5, "top_k": 1})
    out = run(x, *rows, counts=counts, bias=bias)
    np.testing.assert_array_equal(out, [[1, 2, 1.5, 8], [-np.inf, -np.inf, -np.inf, 16]])


def test_count_ignores_padding_and_counts_token_0():
    tokens = jnp.asarray([[0, 3, 3, 9], [5, 0, 0, 0]], jnp.int32)
    pos = jnp.asarray([[0, 1, 2, 3], [0, -1, -1, -1]], jnp.int32)
    counts = count(tokens, pos, 7)  # 9 lies outside: dropped, not wrapped or clamped
    assert [np.flatnonzero(row).tolist() for row in np.asarray(counts.seen)] == [[0, 3], [5]]
    assert not np.any(counts.generated)
    for step in ([0, 6], [0, -1]):
        counts = update(counts, np.array(step, np.int32))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(counts.seen)] == [[0, 3], [5, 6]]
    np.testing.assert_array_equal(counts.generated, [[2, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])


@settings(max_examples=40, deadline=None)
@given(
    *(st.lists(st.integers(0, V - 1), min_size=low, max_size=high) for low, high in ((6, 6), (0, 8))),
    *(st.floats(low, 2) for low in (0.5, -2, -2)),
)
def test_penalties_match_their_definition(prompt, made, repetition, presence, frequency):
    x = np.random.default_rng(len(made)).normal(size=V).astype(np.float32)
    counts = count(np.array([prompt], np.int32), np.arange(6, dtype=np.int32)[None], V)
    for token in made:
        counts = update(counts, np.array([token], np.int32))
    row = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    want = x.astype(np.float64)
    for token in {*prompt, *made}:
        want[token] *= repetition if want[token] < 0 else 1 / repetition
    for token in set(made):
        want[token] -= presence + frequency * made.count(token)
    np.testing.assert_allclose(run(x, row, counts=counts)[0], want, atol=1e-5)


def test_bias_of():
    assert sampling.bias_of([None, {}], 4) is None
    np.testing.assert_array_equal(sampling.bias_of([None, {3: -100.0, 0: 1.5}], 4), [[0, 0, 0, 0], [1.5, 0, 0, -100]])
    for token in (4, -1):
        with pytest.raises(ValueError, match=rf"logit_bias has token {token}; this model's ids are 0 to 3"):
            sampling.bias_of([{token: 1.0}], 4)


ROWS = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.5, "min_p": 0.01},
    {"temperature": 0.9, "min_p": 0.05},
)


def test_rows_are_independent_and_new_values_do_not_compile():
    traced = []
    sample = jax.jit(lambda *args: traced.append(args[0].shape) or sampling.sample(*args))
    x = np.random.default_rng(3).normal(size=(len(ROWS), 5003)).astype(np.float32) * 3
    keys = step_keys(split(jax.random.key(0), len(ROWS)), np.arange(len(ROWS), dtype=np.int32))
    together, tokens = run(x, *ROWS), np.asarray(sample(jnp.asarray(x), of(*ROWS), keys))
    for i, row in enumerate(ROWS):
        np.testing.assert_array_equal(run(x[i], row)[0].view(np.int32), together[i].view(np.int32))
        assert int(*sample(x[i : i + 1], of(row), keys[np.array([i])])) == tokens[i]
    assert traced == [(len(ROWS), 5003), (1, 5003)]


def test_top_p_does_not_depend_on_the_order_of_the_sum():
    """At shares that a token reaches exactly: with float sums, which round by order, the cut moves."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=997).astype(np.float32)
    share = np.cumsum(np.sort(np.exp(x) / np.exp(x).sum())[::-1])
    for top_p in share[10:900:60]:
        row = {"temperature": 1.0, "top_p": float(top_p)}
        want = run(x, row)[0]
        for _ in range(10):
            order = rng.permutation(x.size)
            np.testing.assert_array_equal(run(x[order], row)[0], want[order])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1, 0, 1, 0), (0.5, 0, 1, 0), (1.5, 4, 1, 0), (1, 0, 0.7, 0), (1, 0, 1, 0.2), (2, 6, 0.8, 0.3)],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, min_p):
    row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    n, x = 20_000, np.random.default_rng(5).normal(size=V).astype(np.float32) * 1.5
    keys = step_keys(split(jax.random.key(1), n), np.zeros(n, np.int32))
    s = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (n,)), of(row))
    drawn = np.bincount(np.asarray(sample(np.tile(x, (n, 1)), s, keys)), minlength=V)
    want, close = reference(x, **row)
    assert not close
    p = np.exp(want - want.max()) / np.exp(want - want.max()).sum()
    assert drawn[p == 0].sum() == 0
    assert stats.chisquare(drawn[p > 0], n * p[p > 0]).pvalue > 1e-3


def test_noise_has_the_tail_of_a_gumbel_distribution():
    noise = np.asarray(jax.jit(sampling._gumbel, static_argnums=1)(jax.random.key(2), 2**21))
    assert np.isfinite(noise).all()
    assert stats.kstest(noise[:100_000], "gumbel_r").pvalue > 1e-3
    # With 23 random bits the thousand largest would share some 200 of their values.
    assert np.unique(np.sort(noise)[-1000:]).size > 995


def test_tokens_depend_on_key_and_position():
    x, s = jnp.zeros((1, 1000), jnp.float32), of({"temperature": 1.0})
    keys = split(jax.random.key(7), 1)
    draw = [int(*sample(x, s, step_keys(keys, np.array([pos], np.int32)))) for pos in (3, 3, 4, 5)]
    assert [draw.index(token) for token in draw] == [0, 0, 2, 3]


def test_greedy_selects_the_first_of_equal_logits():
    x = jnp.asarray([[1, 5, 5, 0], [7, -1, 7, 7], [0, 0, 0, 0]], jnp.float32)
    for seed in range(5):  # the third row draws: its noise must not reach the others
        out = sample(x, of({}, {}, {"temperature": 1.0}), split(jax.random.key(seed), 3))
        assert (out.tolist()[:2], out.dtype) == ([1, 0], jnp.int32)


def test_unused_filters_are_not_computed():
    """What costs lies inside a `cond`, the filters inside a second one; nothing sorts anywhere."""
    keys = jax.random.split(jax.random.key(0), 2)
    closed = jax.make_jaxpr(sampling.sample)(jnp.zeros((2, V), jnp.float32), of({}, {}), keys)

    def names(jaxpr, conds: int) -> set[str]:
        """Of all primitives but those more than `conds` conditionals deep."""
        found = {eqn.primitive.name for eqn in jaxpr.eqns}
        for eqn in jaxpr.eqns:
            left = conds - (eqn.primitive.name == "cond")
            inner = jax.tree.leaves(list(eqn.params.values()) if left >= 0 else [])
            found |= {name for sub in inner if isinstance(sub, ClosedJaxpr) for name in names(sub.jaxpr, left)}
        return found

    loops, draws = {"while", "scan", "exp"}, {"log", "log1p", "random_bits"}
    always, when_drawn, when_filtered, when_far = (names(closed.jaxpr, conds) for conds in range(4))
    assert not always & (loops | draws)
    assert when_drawn >= draws
    assert not when_drawn & loops
    assert "top_k" in when_filtered - when_drawn
    assert not when_filtered & {"while", "scan"}  # bisection, for thresholds below the largest logits
    assert when_far & {"while", "scan"}
    assert not when_far & {"sort", "approx_top_k"}


@pytest.mark.parametrize("n", [0, 1, 5])
def test_logprobs(n):
    x = np.random.default_rng(8).normal(size=(3, V)).astype(np.float32) * 10
    tokens = np.array([0, 5, V - 1], np.int32)
    chosen, ids, values = jax.jit(lambda x, t: sampling.logprobs(x, t, n))(jnp.asarray(x), jnp.asarray(tokens))
    exact = x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-exact)[:, :n]
    np.testing.assert_allclose(chosen, exact[np.arange(3), tokens], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.take_along_axis(exact, order, -1), rtol=1e-6, atol=1e-6)
    assert (chosen.dtype, ids.dtype, values.dtype) == (jnp.float32, jnp.int32, jnp.float32)


def test_sampling_from_params():
    s = of({"temperature": 0.5, "top_k": 7}, {})
    assert [leaf.tolist() for leaf in s] == [[0.5, 0], [7, 0], [1, 1], [0, 0], [1, 1], [0, 0], [0, 0]]
    assert [leaf.dtype for leaf in s] == [jnp.int32 if name == "top_k" else jnp.float32 for name in s._fields]
