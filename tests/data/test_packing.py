"""The data loader: every token once per epoch, in any packing; batches depend on seed and step alone; documents in one
row do not attend to each other, by the loss of a model."""

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest
from helpers.tiny_models import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.corpus import Corpus
from jaxlm.data.packing import WINDOW, Batch, DataLoader, best_fit, pack

PACKINGS = ["split", "whole", "none"]


def corpus_of(lengths, format: str = "messages", masked: bool = True) -> Corpus:
    """Returns documents of so many ids, all different: 1, 2, 3, … Every third is outside the loss mask."""
    ends = np.cumsum(lengths, dtype=np.int64)
    n = int(ends[-1])
    arrays = {"ids": np.arange(1, n + 1, dtype=np.int32), "ends": ends}
    arrays["places"] = np.stack([np.zeros(len(ends), np.int64), np.arange(1, len(ends) + 1)], axis=1).ravel()
    if masked:
        arrays["loss_mask"] = np.arange(1, n + 1) % 3 != 0
    about = {"format": format, "sources": ["a.jsonl"], "train_on": "assistant", "digest": "d"}
    about |= {"documents": len(ends), "tokens": n, "loss_tokens": n, "dropped": {}}
    return Corpus(about, arrays)


def check(corpus: Corpus, batch: Batch) -> Counter:
    """Checks a batch by itself. Returns how often each token is an input."""
    tokens, targets, pos, loss_mask = batch
    assert tokens.dtype == targets.dtype == pos.dtype == np.int32
    assert loss_mask.dtype == bool
    there = pos >= 0
    assert not tokens[~there].any()
    assert not targets[~there].any()
    assert not loss_mask[~there].any()
    assert (there[:, :-1] >= there[:, 1:]).all()  # padding is last
    assert (targets == tokens + 1)[there].all()
    if corpus.loss_mask is not None:
        assert (loss_mask == (targets % 3 != 0))[there].all()
    starts = {1, *(corpus.ends + 1).tolist()}
    for row, at in zip(tokens, pos):
        for i in range(np.count_nonzero(at >= 0)):
            if at[i]:
                assert row[i] == row[i - 1] + 1
                assert at[i] == at[i - 1] + 1
                assert int(row[i]) not in starts
    return Counter(tokens[there].tolist())


def pairs(corpus: Corpus) -> Counter:
    """Returns every id that has a target in its document, once."""
    return Counter(set(corpus.ids.tolist()) - set(corpus.ends.tolist()))


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)


@pytest.mark.parametrize("packing", PACKINGS)
@given(lengths=LENGTHS, T=st.integers(1, 50), B=st.integers(1, 5), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_every_token_once_per_epoch(packing, lengths, T, B, seed):
    corpus = corpus_of(lengths)
    T = T if packing == "split" else max(T, 39)
    batches = DataLoader(corpus, B, T, seed, packing)
    seen = sum((check(corpus, batch) for batch in batches.once()), Counter())
    assert seen == pairs(corpus)
    # The same by steps, where a batch may have rows of two epochs.
    rows = batches.rows(0) + batches.rows(1) + batches.rows(2)
    taken = [batches.batch(step) for step in range(-(-rows // B))]
    tokens = np.concatenate([batch.tokens[batch.pos >= 0] for batch in taken[:-1]] + [np.zeros(0, int)])
    last = taken[-1]
    kept = rows - (len(taken) - 1) * B
    seen = Counter(tokens.tolist()) + Counter(last.tokens[:kept][last.pos[:kept] >= 0].tolist())
    assert seen == Counter(dict.fromkeys(pairs(corpus), 3))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_is_a_function_of_seed_and_step(packing):
    corpus = corpus_of(np.arange(2, 60))
    first = DataLoader(corpus, 4, 64, seed=3, packing=packing)
    assert same(DataLoader(corpus, 4, 64, seed=3, packing=packing).batch(40), first.batch(40))
    assert first.epoch(40) > 2
    assert not same(DataLoader(corpus, 4, 64, seed=4, packing=packing).batch(40), first.batch(40))
    epochs = [
        np.concatenate([first.assemble([(epoch, row)]).tokens for row in range(first.rows(epoch))]) for epoch in (0, 1)
    ]
    assert epochs[0].shape != epochs[1].shape or (epochs[0] != epochs[1]).any()


def test_the_order_is_the_same_with_every_numpy():
    """Digests of batches at the time of writing."""
    corpus = corpus_of(np.arange(300) % 37 + 2)
    found = {}
    for packing in PACKINGS:
        batch = DataLoader(corpus, 4, 64, seed=7, packing=packing).batch(11)
        found[packing] = hashlib.sha256(np.stack(batch[:3]).tobytes()).hexdigest()[:12]
    assert found == {"split": "a838ee7a40bb", "whole": "c2da4b0b727e", "none": "94677a024482"}


@pytest.mark.parametrize("packing", PACKINGS)
def test_processes_share_a_batch(packing):
    corpus = corpus_of(np.arange(2, 60))
    whole = DataLoader(corpus, 6, 64, packing=packing)
    shares = [DataLoader(corpus, 6, 64, packing=packing, share=slice(i, i + 2)) for i in (0, 2, 4)]
    for step in (0, 5, 17):
        parts = [share.batch(step) for share in shares]
        assert [part.tokens.shape for part in parts] == [(2, 64)] * 3
        assert same(Batch(*map(np.concatenate, zip(*parts))), whole.batch(step))
    for parts in zip(*(share.once() for share in shares)):
        assert {part.tokens.shape for part in parts} == {(2, 64)}


@pytest.mark.parametrize("packing", PACKINGS)
def test_prefetched_batches_resume_at_any_step(packing):
    batches = DataLoader(corpus_of(np.arange(2, 60)), 4, 64, packing=packing)
    for start in (0, 13, 1000):
        running = batches.iterate(start)
        for step in range(start, start + 12):
            assert same(next(running), batches.batch(step))
        running.close()


def test_an_error_while_prefetching_is_raised(monkeypatch):
    batches = DataLoader(corpus_of([5, 6]), 2, 8)
    good = batches.batch(0)

    def batch(step):
        if step == 1:
            raise OSError("the disk has gone")
        return good

    monkeypatch.setattr(batches, "batch", batch)
    running = batches.iterate()
    assert same(next(running), good)
    with pytest.raises(OSError, match="the disk has gone"):
        next(running)


# Packings


def test_defaults():
    assert DataLoader(corpus_of([5], "text"), 1, 4).packing == "split"
    for format in ("messages", "prompt", "instruction", "conversations"):
        assert DataLoader(corpus_of([5], format), 1, 4).packing == "whole"


def test_split_has_no_padding_and_shuffles_one_long_text():
    batches = DataLoader(corpus_of([1000]), 1, 10, packing="split")
    assert (batches.rows(), batches.fill()) == (100, 0.999)
    for epoch in range(3):
        starts = [int(batches.plan(epoch).row(row)[0, 1]) for row in range(100)]
        assert len(set(starts)) == 100
        assert starts != sorted(starts)
    cuts = {int(batches.plan(epoch).row(0)[0, 1]) % 10 for epoch in range(30)}
    assert len(cuts) > 5  # they differ between epochs


def test_whole_cuts_no_document():
    corpus = corpus_of(np.arange(2, 60))
    batches = DataLoader(corpus, 1, 64, packing="whole")
    plan = batches.plan(0)
    for row in range(batches.rows()):
        pieces = plan.row(row)
        assert (pieces[:, 1] == 0).all()
        assert (pieces[:, 2] == corpus.lengths[pieces[:, 0]] - 1).all()
        assert pieces[:, 2].sum() <= 64
    assert batches.fill() > 0.95


def test_best_fit_is_best_fit():
    """Compared with a simple loop."""
    rng = np.random.default_rng(0)
    for T in (1, 7, 64):
        lengths = sorted(rng.integers(1, T + 1, 300).tolist(), reverse=True)
        room: list[int] = []
        for length, row in zip(lengths, best_fit(lengths, T)):
            fits = [space for space in room if space >= length]
            if row == len(room):
                assert not fits
                room.append(T)
            else:
                assert room[row] == min(fits)
            room[row] -= length


def test_rows_hold_documents_of_one_window():
    rng = np.random.default_rng(0)
    T, lengths = 20, rng.integers(1, 21, 20_000)
    rows, placed = pack(lengths, T, rng.random(20_000))
    assert sorted(placed.tolist()) == list(range(20_000))
    assert (np.diff(rows[placed]) >= 0).all()
    assert (np.bincount(rows, lengths) <= T).all()
    assert lengths.sum() / ((rows.max() + 1) * T) > 0.99
    at = np.cumsum(lengths) / T  # the row of a document without padding
    assert np.abs(rows - at).max() < WINDOW * 1.1
    # Within a window, long documents come no sooner than short ones.
    inside = rows < WINDOW
    assert abs(np.corrcoef(rows[inside], lengths[inside])[0, 1]) < 0.05
    assert len(np.unique(lengths[rows < 50])) == 20


def test_packing_is_linear_in_the_number_of_documents():
    """By the number of executed lines, not by time."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += 1
        return trace

    counts = []
    for n in (2_000, 8_000):
        lengths, lines = np.random.default_rng(0).integers(1, 60, n), 0
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pack(lengths, 64, lengths)
        finally:
            sys.settrace(before)
        counts.append(lines / n)
    assert 1 < counts[1] < 1.2 * counts[0]


def test_epochs_rows_and_steps():
    batches = DataLoader(corpus_of([11] * 10), 4, 10, packing="none")
    assert batches.rows() == 10
    assert [batches.steps(epochs) for epochs in (0, 0.5, 1, 2, 2.5)] == [0, 2, 3, 5, 7]
    assert [batches.epoch(step) for step in (0, 2, 3, 5)] == [0, 0.8, 1.2, 2]
    first, second = batches.batch(2).tokens[:2], batches.batch(2).tokens[2:]
    rows = lambda epoch: [int(batches.plan(epoch).row(row)[0, 0]) * 11 + 1 for row in range(10)]  # noqa: E731
    assert first[:, 0].tolist() == rows(0)[8:]
    assert second[:, 0].tolist() == rows(1)[:2]
    whole = DataLoader(corpus_of(np.arange(2, 60)), 4, 64, packing="whole")
    assert whole.steps(7) == -(-sum(whole.rows(epoch) for epoch in range(7)) // 4)
    assert whole._place(sum(whole.rows(epoch) for epoch in range(7))) == (7, 0)


def test_the_last_batch_of_an_evaluation_is_padded():
    corpus = corpus_of([6] * 5)
    last = list(DataLoader(corpus, 4, 5, packing="none").once())
    assert len(last) == 2
    assert (last[1].pos >= 0).any(axis=1).tolist() == [True, False, False, False]


# Documents longer than a row


def test_long_documents_are_truncated_or_dropped_and_counted():
    corpus = corpus_of([5, 30, 8, 20])
    for packing in ("whole", "none"):
        batches = DataLoader(corpus, 2, 10, packing=packing)
        assert batches.counts == {"truncated": 2}
        assert batches.note.startswith("truncated 2 of 4 documents")
        assert "a.jsonl:2 has 29 tokens" in batches.note
        seen = sum((check(corpus, batch) for batch in batches.once()), Counter())
        assert sorted(seen) == [1, 2, 3, 4, *range(6, 16), *range(36, 43), *range(44, 54)]
        batches = DataLoader(corpus, 2, 10, packing=packing, long="drop")
        assert batches.counts == {"dropped": 2}
        seen = sum((check(corpus, batch) for batch in batches.once()), Counter())
        assert sorted(seen) == [1, 2, 3, 4, *range(36, 43)]
        with pytest.raises(ValueError, match=r"a.jsonl:2 has 29 tokens.*--data.long"):
            DataLoader(corpus, 2, 10, packing=packing, long="stop")
    batches = DataLoader(corpus, 2, 10, packing="split", long="stop")  # which loses nothing
    assert batches.counts == {}
    assert batches.note == ""


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_of_one_token_are_left_out_and_counted(packing):
    batches = DataLoader(corpus_of([5, 1, 1, 9, 1]), 2, 10, packing=packing)
    assert batches.counts == {"left out": 3}
    assert batches.note.startswith("left out 3 of 5 documents")
    assert "a.jsonl:2" in batches.note
    assert sum((check(batches.corpus, batch) for batch in batches.once()), Counter()) == pairs(batches.corpus)


def test_the_note_names_short_and_long_documents():
    batches = DataLoader(corpus_of([1, 30, 5]), 2, 10, packing="whole", long="drop")
    assert batches.counts == {"left out": 1, "dropped": 1}
    short, long = batches.note.split(". ")
    assert "left out 1 of 3" in short
    assert "dropped 1 of 3" in long


def test_a_truncated_document_with_an_empty_loss_mask_is_dropped():
    corpus = corpus_of([5, 30, 30])
    corpus.loss_mask = np.zeros(65, bool)
    corpus.loss_mask[[3, 5 + 11, 35 + 10]] = (
        True  # of the second the first target past the row, of the third the last in it
    )
    batches = DataLoader(corpus, 1, 10, packing="whole")
    assert batches.counts == {"truncated": 1, "dropped": 1}
    assert sum(batch.loss_mask.sum() for batch in batches.once()) == 2


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([5], {"B": 0}, "0 rows"),
        ([5], {"T": 0}, "0 tokens"),
        ([5], {"seed": -1}, "seed is -1"),
        ([5], {"packing": "best"}, r"packing is 'best' \(split, whole, none\)"),
        ([5], {"long": "cut"}, r"long 'cut' \(truncate, drop, stop\)"),
        ([1, 1], {}, "no document has two tokens"),
        (
            [20],
            {"long": "drop"},
            r"no document is left \(dropped 1 of 1 documents",
        ),
    ],
)
def test_arguments_without_batches(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        DataLoader(corpus_of(lengths), **{"B": 2, "T": 8, **options})


# The loss of packed rows


def test_packed_documents_have_the_loss_that_they_have_alone():
    import jax
    import jax.numpy as jnp

    corpus = corpus_of([7, 13, 24, 3, 9, 2, 17, 5])
    corpus.ids = corpus.ids * 29 % 199
    model = tiny("llama3")

    def losses(packing: str, positions=lambda pos: pos) -> dict[tuple[int, ...], float]:
        """Returns the log-probability of each target, by document and position."""
        batches, found = DataLoader(corpus, 2, 32, packing=packing), {}
        plan = batches.plan(0)
        for first, batch in zip(range(0, batches.rows(), 2), batches.once()):
            logits, _ = model.forward(jnp.asarray(batch.tokens), model.weights, None, jnp.asarray(positions(batch.pos)))
            logprobs = np.asarray(jax.nn.log_softmax(logits))
            for row in range(min(2, batches.rows() - first)):
                at = 0
                for document, begin, n in plan.row(first + row).tolist():
                    for i in range(n):
                        target = int(batch.targets[row, at + i])
                        found[document, begin + i] = float(logprobs[row, at + i, target])
                    at += n
        return found

    alone, packed = losses("none"), losses("whole")
    assert alone.keys() == packed.keys()
    assert len(alone) == sum(corpus.lengths - 1)
    worst = max(abs(alone[key] - packed[key]) for key in alone)
    assert worst < 1e-4
    # With positions that continue through a row, documents attend to each other.
    running = losses("whole", lambda pos: np.where(pos < 0, -1, np.arange(32, dtype=np.int32)))
    assert max(abs(alone[key] - running[key]) for key in alone) > 0.1
