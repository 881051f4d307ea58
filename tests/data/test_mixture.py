"""Weighted mixtures, documents that are held out, and the names of sources with weights and sets."""

from collections import Counter

import numpy as np
import pytest
from data.test_packing import check, corpus_of, pairs, same

from jaxlm.data.mixture import BLOCK, Mixture, rows_of_block
from jaxlm.data.packing import DataLoader, held_out
from jaxlm.data.source_names import group_named, parse_weights, short_names

PACKINGS = ["split", "whole", "none", None]
SIZES = {"a": np.arange(2, 60), "b": np.arange(300) % 37 + 2, "c": np.full(9, 64)}


def corpora() -> dict:
    found = {name: corpus_of(lengths) for name, lengths in SIZES.items()}
    for i, corpus in enumerate(found.values()):  # ids tell the sources apart
        corpus.ids = corpus.ids + 100_000 * i
    return found


def mixture_of(weights=(0.7, 0.2, 0.1), B=8, T=64, seed=3, packing=None, share=None) -> Mixture:
    loaders = [DataLoader(corpus, B, T, seed, packing, share) for corpus in corpora().values()]
    return Mixture(list(SIZES), loaders, weights)


def sources_of(batch) -> list[int]:
    return (batch.tokens[:, 0] // 100_000).tolist()


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_have_the_proportions_at_any_step(packing):
    mixture = mixture_of(packing=packing)
    counts = np.zeros(3)
    for step in range(200):
        counts += np.bincount(sources_of(mixture.batch(step)), minlength=3)
        assert np.abs(counts - (step + 1) * 8 * np.array([0.7, 0.2, 0.1])).max() < 4
    orders = {tuple(sources_of(mixture.batch(step))) for step in range(200)}
    assert len(orders) > 20  # at random
    assert not same(mixture.batch(7), mixture_of(packing=packing, seed=4).batch(7))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_source_is_read_as_if_it_were_alone(packing):
    """Its rows are those of its own data loader, in order and without gaps, over its epochs and over blocks."""
    mixture = mixture_of(packing=packing)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for row in range(2 * BLOCK + 50):
        source, number = mixture._place(row)
        seen[source].append(number)
    for source, numbers in seen.items():
        assert numbers == list(range(len(numbers)))
        assert len(numbers) == mixture._drawn(2 * BLOCK + 50)[source]
    assert mixture._drawn(2 * BLOCK).tolist() == [14_000, 4_000, 2_000]
    step = 31
    batch = mixture.batch(step)
    for i, row in enumerate(range(step * 8, step * 8 + 8)):
        source, number = mixture._place(row)
        alone = mixture.loaders[source].take([number])
        assert all(np.array_equal(a[i], b[0]) for a, b in zip(batch, alone))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_is_a_function_of_seed_and_step_and_is_shared(packing):
    whole = mixture_of(packing=packing)
    for step in (2500, 0, 40):  # 2500 begins the third block
        wanted = whole.batch(step)
        assert same(mixture_of(packing=packing).batch(step), wanted)
        parts = [mixture_of(packing=packing, share=slice(i, i + 2)).batch(step) for i in (0, 2, 4, 6)]
        assert same(type(wanted)(*map(np.concatenate, zip(*parts))), wanted)
    for batch, step in zip(whole.iterate(17), range(17, 22)):
        assert same(batch, whole.batch(step))


def test_the_order_is_the_same_with_every_numpy():
    """Sources of the rows at the time of writing."""
    mixture = mixture_of()
    assert [sources_of(mixture.batch(step)) for step in (0, 1, 1250)] == [
        [0, 1, 0, 0, 0, 0, 0, 1],
        [2, 0, 0, 1, 0, 0, 0, 1],
        [0, 1, 0, 0, 2, 0, 0, 0],
    ]


def test_epochs():
    """As many rows as the first epochs of all sources."""
    mixture = mixture_of(packing="none")
    rows = sum(map(len, SIZES.values()))
    assert mixture.rows() == rows
    assert mixture.steps(1) == -(-rows // 8)
    assert mixture.steps(2.5) == -(-rows * 5 // 16)
    assert mixture.epoch(mixture.steps(1)) == pytest.approx(1, abs=8 / rows)
    drawn = mixture._drawn(800)
    epochs = [drawn[i] / len(lengths) for i, lengths in enumerate(SIZES.values())]
    text = ", ".join(f"{n:.2f} of {name}" for n, name in zip(epochs, SIZES))
    assert mixture.describe_epochs(100) == f"{800 / rows:.2f} epochs ({text})"
    assert 0 < mixture.fill() < 1
    assert mixture.describe()[0].startswith("70.0% a: 58 documents (messages)")


def test_proportions():
    assert rows_of_block("ab", (7, 3)).tolist() == rows_of_block("ab", (0.7, 0.3)).tolist() == [7000, 3000]
    assert rows_of_block("abc", (1, 1, 1)).tolist() == [3334, 3333, 3333]
    assert rows_of_block("a", (5,)).tolist() == [BLOCK]
    with pytest.raises(ValueError, match="weight of b is less than 1 in 10,000"):
        rows_of_block("ab", (1, 1e-6))
    assert mixture_of((7, 2, 1)).digest == mixture_of((0.7, 0.2, 0.1)).digest
    assert mixture_of((6, 3, 1)).digest != mixture_of((7, 2, 1)).digest
    loaders = [DataLoader(corpus, B, 64) for corpus, B in zip(corpora().values(), (4, 4, 8))]
    with pytest.raises(ValueError, match="same B, T, seed"):
        Mixture("abc", loaders, (1, 1, 1))


# Documents that are held out


@pytest.mark.parametrize("packing", ["split", "whole", "none"])
def test_held_out_documents_are_those_that_are_not_trained_on(packing):
    corpus = corpus_of(SIZES["b"])
    out = held_out(len(corpus), 0.1, seed=5)
    train, valid = (DataLoader(corpus, 4, 64, 5, packing, kept=kept) for kept in (~out, out))
    seen = [sum((check(corpus, batch) for batch in loader.once()), Counter()) for loader in (train, valid)]
    assert not seen[0] & seen[1]
    assert seen[0] + seen[1] == pairs(corpus)
    assert train.note == f"{300 - out.sum()} of these documents are used"
    alone = DataLoader(corpus, 4, 64, 5, packing)
    assert len({train.digest, valid.digest, alone.digest}) == 3
    assert alone.digest == corpus.about["digest"] == "d"
    for step in range(100):
        assert not set(check(corpus, train.batch(step))) & set(seen[1])


def test_the_choice_depends_on_seed_and_document_alone():
    chosen = held_out(10_000, 0.05, seed=1)
    assert 400 < chosen.sum() < 600
    assert np.array_equal(held_out(20_000, 0.05, seed=1)[:10_000], chosen)
    assert (held_out(10_000, 0.06, seed=1) >= chosen).all()
    assert not np.array_equal(held_out(10_000, 0.05, seed=2), chosen)
    assert np.flatnonzero(chosen)[:5].tolist() == [3, 5, 24, 28, 42]
    for documents, fraction in ((1, 0.5), (20, 1e-9), (20, 1 - 1e-9)):
        with pytest.raises(ValueError, match=f"holds out .* of {documents} documents"):
            held_out(documents, fraction, seed=1)


# Names


def test_names_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_weights(["a.jsonl=0.7", "org/name=3", "x/*.txt=1e-1"]) == [
        ("a.jsonl", 0.7), ("org/name", 3.0), ("x/*.txt", 0.1),
    ]  # fmt: skip
    assert parse_weights(["a.jsonl", "b=c.jsonl"]) == [("a.jsonl", None), ("b=c.jsonl", None)]
    (tmp_path / "a=1").mkdir()
    (tmp_path / "b=0.5").write_text("x")
    assert parse_weights(["a=1", "b=0.5", "./b=*5"]) == [("a=1", None), ("b=0.5", None), ("./b=*5", None)]
    assert parse_weights(["a=1=2", "b=0.5=1"]) == [("a=1", 2.0), ("b=0.5", 1.0)]
    with pytest.raises(ValueError, match=r"b.jsonl has no weight: give each source one \(b.jsonl=0.5\)"):
        parse_weights(["a.jsonl=0.5", "b.jsonl"])
    for name in ("a.jsonl=0", "a.jsonl=-1", "a.jsonl=nan", "a.jsonl=inf", "=1"):
        with pytest.raises(ValueError, match="must be a positive number"):
            parse_weights([name])
    (tmp_path / "c.jsonl").write_text("{}")
    for name in ("a.jsonl=70%", "a.jsonl=", "c.jsonl=abc", "c.jsonl:0.7"):
        with pytest.raises(ValueError, match=f"write {name[:7]}=0.7"):
            parse_weights([name])
    with pytest.raises(ValueError, match=r"write b\.jsonl=0\.7"):
        group_named(["b.jsonl=70%"])
    (tmp_path / "code").mkdir()
    with pytest.raises(ValueError, match=r"write code=0\.7"):
        parse_weights(["code=half"])
    assert parse_weights(["code=code.jsonl"]) == [("code=code.jsonl", None)]
    (tmp_path / "d.jsonl=x").write_text("")
    assert parse_weights(["d.jsonl=x"]) == [("d.jsonl=x", None)]
    assert parse_weights(["org/name=abc", "s3:x"]) == [("org/name=abc", None), ("s3:x", None)]


def test_names_of_validation_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert group_named(["code=a.jsonl", "chat=org/name", "b.jsonl", "code=c/*.txt"]) == {
        "code": ["a.jsonl", "c/*.txt"], "chat": ["org/name"], "": ["b.jsonl"],
    }  # fmt: skip
    (tmp_path / "year=2020").mkdir()
    (tmp_path / "year=2020/a.txt").write_text("x")
    assert group_named(["year=2020", "year=2020/*.txt", "./x=y"]) == {"": ["year=2020", "year=2020/*.txt", "./x=y"]}
    with pytest.raises(ValueError, match=r"a.jsonl=0.5 has a weight"):
        group_named(["a.jsonl=0.5"])


def test_short_names_of_sources():
    names = ["data/chat.jsonl", "x/chat.jsonl.gz", "org/some.name", "a b/*.txt", "chat"]
    assert short_names(names) == ["chat", "chat_2", "some", "data", "chat_3"]
