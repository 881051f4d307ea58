"""Perplexity and bits per byte, compared with simple loops over single tokens, and every error."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_files as bytes_model
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import tiny
from hypothesis import given
from hypothesis import strategies as st

import jaxlm
from jaxlm.data import readers
from jaxlm.devices import mesh, topology
from jaxlm.evaluation import perplexity, scoring
from jaxlm.evaluation.perplexity import SpecialTokens, evaluate
from jaxlm.evaluation.scoring import ScoreRequest, scores, windows
from jaxlm.nn import lora, params
from jaxlm.nn.chunked_logits import CHUNK

PLAIN, CHATTING = tokenizer_of(None), tokenizer_of(TEMPLATE)
TEXTS = [
    "The rat sat on the mat.",
    "No.",
    "A rat and a ram ran to a tree; it is said that the rat had not seen the ram before.",
]


def model_of(family: str = "llama3", tokenizer: Any = PLAIN, **fields: Any) -> jaxlm.Model:
    return replace(tiny(family, **fields), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model() -> jaxlm.Model:
    return model_of()


@pytest.fixture(scope="module")
def uniform(tmp_path_factory) -> jaxlm.Model:
    """A model in which 258 tokens (bytes, <begin> and <end>) are equally likely."""
    folder = tmp_path_factory.mktemp("uniform")
    bytes_model.write(folder)
    model = jaxlm.load(folder)
    return replace(model, weights=jax.tree.map(jnp.zeros_like, model.weights))


def file(folder: Path, *values: Any) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"text": value} if isinstance(value, str) else value for value in values]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def nats(model: jaxlm.Model, context: list[int], target: int, room: int = 96) -> float:
    """Returns the negative log-likelihood of one token, by a forward pass over its context."""
    tokens, pos = np.zeros((1, room), np.int32), np.full((1, room), -1, np.int32)
    tokens[0, : len(context)], pos[0, : len(context)] = context, np.arange(len(context))
    logits, _ = model.forward(tokens, model.weights, None, pos)
    return -float(jax.nn.log_softmax(logits[0, len(context) - 1])[target])


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
@pytest.mark.parametrize(("length", "stride"), [(96, 48), (12, 5), (12, 12), (7, 1)])
def test_windows_equal_a_loop_over_single_tokens(family, length, stride, tmp_path) -> None:
    model = model_of(family)
    expected, count = 0.0, 0
    for text in TEXTS:
        ids = PLAIN.encode(text)  # with BOS
        for i in range(1, len(ids)):
            begin = 0 if i <= length else -(-(i - length) // stride) * stride
            assert i <= length or length - stride <= i - begin <= length
            expected += nats(model, ids[begin:i], ids[i])
            count += 1
    found = evaluate(model, file(tmp_path, *TEXTS), length=length, stride=stride)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.documents) == (count, 3)
    assert found.bytes == sum(map(len, TEXTS))
    assert found.perplexity == pytest.approx(math.exp(expected / count), rel=1e-4)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 20), st.data())
def test_every_counted_token_is_scored_once(counts, length, data) -> None:
    stride = data.draw(st.integers(1, length))
    ids = np.arange(len(counts))  # ids are positions
    seen: list[int] = []
    for piece in windows(ids, np.array(counts), length, stride):
        assert 1 <= len(piece.tokens) <= length
        read = piece.tokens[piece.positions]
        assert (read + 1 == piece.targets).all()
        least = np.where(piece.targets <= length, piece.targets, length - stride)
        assert (piece.positions + 1 >= least).all()
        seen += piece.targets.tolist()
    assert seen == [i for i in range(1, len(counts)) if counts[i]]


def requests() -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    made = []
    for n in (1, 30, 2, 17, 17, 32, 5, 8):
        at = np.sort(rng.integers(0, n, 5))  # positions may repeat
        made.append(ScoreRequest(rng.integers(0, 168, n), at, rng.integers(0, 168, len(at))))
    return made


def test_packed_requests_have_the_scores_that_they_have_alone(model) -> None:
    together = dict(scores(model, requests()))
    assert len(scoring.pack_rows([len(piece.tokens) for piece in requests()], 32)) == 4  # rows are shared
    assert sorted(together) == list(range(8))
    for i, piece in enumerate(requests()):
        ((_, alone),) = scores(model, [piece])
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, rtol=1e-5)
        assert (alone.greedy == together[i].greedy).all()
    one_by_one = dict(scores(model, requests(), batch=1))
    assert all(np.allclose(one_by_one[i].logprobs, together[i].logprobs, rtol=1e-5) for i in together)


def test_requests_that_attend_to_each_other_have_other_scores(model) -> None:
    """The fault that the test above would find: positions that continue from one request to the next."""
    a, b = requests()[1], requests()[5]
    joined = ScoreRequest(np.concatenate([a.tokens, b.tokens]), b.positions + len(a.tokens), b.targets)
    ((_, wrong),), ((_, right),) = scores(model, [joined]), scores(model, [b])
    assert np.abs(wrong.logprobs - right.logprobs).max() > 0.1


def test_the_most_likely_token(model, uniform) -> None:
    tokens = np.arange(1, 9)
    logits, _ = model.forward(tokens[None], model.weights)
    best = np.asarray(logits[0].argmax(-1))
    ((_, found),) = scores(
        model, [ScoreRequest(np.repeat(tokens, 1), np.repeat(np.arange(8), 2), np.stack([best, best + 1], 1).ravel())]
    )
    assert found.greedy.tolist() == [True, False] * 8
    ((_, found),) = scores(uniform, [ScoreRequest(tokens, np.array([3, 3]), np.array([0, 1]))])
    assert found.greedy.tolist() == [True, False]  # the first of equals


def test_the_logits_of_all_positions_never_exist(model) -> None:
    shapes = [jax.ShapeDtypeStruct((8, n), np.int32) for n in (16, 16, 1024, 1024)]
    compiled = jax.jit(partial(scoring.score, model.family, model.config)).lower(model.weights, *shapes).compile()
    found = {part.split("]")[0] for part in compiled.as_text().split("f32[")[1:]}
    largest = max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found)
    assert CHUNK * model.config.V <= largest < 8 * 1024 * model.config.V


def test_bits_per_byte_by_hand(uniform, tmp_path) -> None:
    """<begin> and <end> around each text are not scored, nor are those in its text."""
    texts = ["é", "abc<end>d", "日本"]
    found = evaluate(uniform, file(tmp_path, *texts), length=4, stride=2)
    assert (found.bytes, found.tokens, found.documents) == (12, 12, 3)
    assert found.nats == pytest.approx(12 * math.log(258))
    assert found.bits_per_byte == pytest.approx(math.log2(258))
    assert found.perplexity == pytest.approx(258)


def test_an_infinite_perplexity() -> None:
    found = perplexity.Evaluation(1e6, 10, 10, 1, {})
    assert found.perplexity == math.inf
    assert found.bits_per_byte == pytest.approx(1e5 / math.log(2))


def test_the_first_token_is_predicted_whatever_the_tokenizer_adds(tmp_path) -> None:
    """From BOS; from EOS without a BOS; without either it is not scored, and its bytes do not count."""
    text = "ottoman"  # whose first token is two letters
    assert PLAIN.decode(PLAIN.encode(text)[1:2]) == "ot"
    found = {}
    for name, bos, eos in (("bos", "<bos>", "<end>"), ("eos", None, "<end>"), ("none", None, None)):
        tokenizer = tokenizer_of(None)
        tokenizer.hf.bos_token, tokenizer.hf.eos_token = bos, eos
        if bos is None:
            tokenizer.hf.backend_tokenizer.post_processor = None
        model = model_of(tokenizer=tokenizer)
        found[name] = evaluate(model, file(tmp_path, text))
        ids = PLAIN.encode(text, add_special_tokens=False)
        first = {"bos": tokenizer.convert_tokens_to_ids("<bos>"), "eos": tokenizer.convert_tokens_to_ids("<end>")}
        ids = [first[name], *ids] if name in first else ids
        assert found[name].nats == pytest.approx(
            sum(nats(model, ids[:i], ids[i]) for i in range(1, len(ids))), rel=1e-5
        )
    assert [found[name].bytes for name in found] == [7, 7, 5]
    assert found["none"].tokens == found["bos"].tokens - 1 == found["eos"].tokens - 1
    assert found["bos"].nats != found["eos"].nats


def test_unknown_tokens_are_scored() -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.hf.unk_token = "<system>"
    unknown = tokenizer.convert_tokens_to_ids("<system>")
    assert unknown in SpecialTokens(PLAIN).ids
    assert unknown not in SpecialTokens(tokenizer).ids
    assert SpecialTokens(tokenizer).names.sub("", "<system>a<end>") == "<system>a"
    tokenizer.hf.unk_token = "<end>"  # EOS too
    assert SpecialTokens(tokenizer).ids.tolist() == SpecialTokens(PLAIN).ids.tolist()
    assert SpecialTokens(tokenizer).names.sub("", "<system>a<end>") == "a"


def test_assistant_turns_of_a_chat_are_scored(tmp_path) -> None:
    model = model_of(tokenizer=CHATTING)
    turns = [("user", "Is it so?"), ("assistant", "It is."), ("user", "Now?"), ("assistant", "No.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = evaluate(model, file(tmp_path, row))
    ids = CHATTING.chat(row["messages"], add_generation_prompt=False)
    text = [CHATTING.decode(ids[:i], skip_special=False) for i in range(len(ids) + 1)]
    special = CHATTING.special_ids
    spoken = [
        i for i in range(len(ids)) if text[i].rfind("<assistant>") > text[i].rfind("<user>") and ids[i] not in special
    ]
    assert CHATTING.decode([ids[i] for i in spoken]) == "It is.No."
    assert found.nats == pytest.approx(sum(nats(model, ids[:i], ids[i]) for i in spoken), rel=1e-5)
    assert (found.tokens, found.bytes) == (len(spoken), 9)
    last = evaluate(model, file(tmp_path, row), train_on="completion")
    whole = evaluate(model, file(tmp_path, row), train_on="all")
    assert (last.bytes, whole.bytes) == (3, sum(len(content) for _, content in turns))
    assert last.nats < found.nats < whole.nats


def test_text_in_parts_and_in_blocks_gives_the_same(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join([" ".join(TEXTS * 3), *TEXTS]))
    whole, calls = evaluate(model, path, length=32), []
    monkeypatch.setattr(readers, "PART", 50)
    monkeypatch.setattr(perplexity, "BLOCK", 100)
    parts = evaluate(model, path, length=32, progress=lambda *counts: calls.append(counts))
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)
    assert parts[1:] == whole[1:]
    assert calls[-1] == (4, whole.tokens)
    assert len({documents for documents, _ in calls}) > 1
    assert calls == sorted(calls)


def test_what_a_folder_leaves_out_is_noted(model, tmp_path) -> None:
    for name in ("test.txt", "notes.txt"):
        (tmp_path / name).write_text(TEXTS[0])
    found = evaluate(model, tmp_path)
    assert found.documents == 1
    assert found.notes[0].startswith(f"left out of {tmp_path}: notes.txt")


@pytest.mark.parametrize("spec", ["data=4,model=2", "data=8", "model=8"])
def test_on_a_mesh(spec, tmp_path) -> None:
    model = model_of(num_attention_heads=8, num_key_value_heads=4, hidden_size=64, vocab_size=200)
    path = file(tmp_path, *TEXTS, *TEXTS)
    alone, over = evaluate(model, path, length=32), topology.make(spec, model.config.K)
    letters = params.letters(model.family.PARAMS, model.weights)
    placed = jax.tree.map(lambda w, letters: mesh.place(w, letters, over), model.weights, letters)
    model = replace(model, weights=placed)
    assert model.mesh is not None
    spread = evaluate(model, path, length=32)
    assert spread.nats == pytest.approx(alone.nats, rel=1e-6)
    assert spread[1:] == alone[1:]
    piece = [
        ScoreRequest(
            np.arange(1, 9), np.arange(8), np.asarray(model.forward([range(1, 9)], model.weights)[0][0].argmax(-1))
        )
    ]
    assert next(scores(model, piece))[1].greedy.all()


def test_with_an_adapter(model, tmp_path) -> None:
    rows = lora.targets(model.family.PARAMS, model.config, ["all-linear"])
    adapter = lora.init(rows, model.config.L, 2, 2.0, jax.random.key(0))
    for number, (_, leaf) in enumerate(lora.leaves(adapter)):
        path = next(p for p in jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lora.is_lora) if p[1] is leaf)[0]
        b = jax.random.normal(jax.random.key(number), leaf.b.shape) * 0.1
        adapter["layers"][path[1].idx][path[2].key] = replace(leaf, b=b)
    adapted = replace(model, weights=lora.join(model.weights, adapter))
    fused = replace(model, weights=lora.fused(adapted.weights))
    values = [evaluate(one, file(tmp_path, *TEXTS)).nats for one in (adapted, fused, model)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert abs(values[0] - values[2]) > 1


def test_a_trained_model(shared, tmp_path) -> None:
    """Published for stories260K: 1.2968 nats per token on other stories."""
    stories = (shared / "corpora/stories/tinystories.txt").read_text().split("\n<|endoftext|>\n")[:-1:400]
    found = evaluate(jaxlm.load(shared / "checkpoints/stories260K"), file(tmp_path, *stories))
    assert found.documents == len(stories) == 23
    assert found.bytes == sum(len(story.encode()) for story in stories)
    assert found.nats / found.tokens == pytest.approx(1.2968, abs=0.05)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": 40_000}, "length is 40,000"),
        ({"length": 8, "stride": 9}, "stride is 9"),
        ({"stride": 0}, "stride is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"on_bad": "maybe"}, "on_bad is 'maybe'"),
        ({"format": "poem"}, "format is 'poem'"),
    ],
)
def test_arguments_out_of_range(how, message, model, tmp_path) -> None:
    with pytest.raises(ValueError) as error:
        evaluate(model, file(tmp_path, "a"), **how)
    assert message in str(error.value)


def test_invalid_rows(model, tmp_path) -> None:
    path = file(tmp_path, "The rat", {"txt": "a"}, "", "sat.")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*txt.*on_bad=skip"):
        evaluate(model, path)
    found = evaluate(model, path, on_bad="skip")
    assert (found.documents, found.bytes) == (2, 11)
    assert found.dropped == {"missing fields": 1, "empty text": 1}
    with pytest.raises(ValueError, match="2 empty text"):
        evaluate(model, file(tmp_path, "", " "))
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        evaluate(model, tmp_path / "no.txt")


def test_models_that_cannot_be_evaluated(model, tmp_path) -> None:
    path = file(tmp_path, *TEXTS)
    with pytest.raises(ValueError, match=r"jaxlm.load\('gpt'\)"):
        evaluate("gpt", path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no tokenizer"):
        evaluate(tiny("llama3"), path)
    with pytest.raises(ValueError, match=r"token id 1\d\d.*vocab_size .* is 50"):
        evaluate(model_of(vocab_size=50), path)
    broken = replace(model, weights={**model.weights, "norm": model.weights["norm"] * jnp.nan})
    with pytest.raises(ValueError, match="NaN"):
        evaluate(broken, path)
