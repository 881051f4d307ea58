"""jaxlm.evaluation.lm_eval gives the scores, answers and tables of lm-eval's own class for transformers models."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import lm_eval_tasks
from helpers.lm_eval_tasks import NAMES, ROWS, requests, write_tasks
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from oracle import reference

import jaxlm
from jaxlm.cli import main

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*")]
LENGTH = 64  # context of both models: short, so that few programs are compiled
LIMIT = {"rel": 1e-5, "abs": 1e-4}
LONG = "The cat and the dog ran to the park and saw a big red ball. " * 60


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with reference.quickly():
        yield


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    lm_eval_tasks.offline(monkeypatch)


@pytest.fixture(scope="module", params=["stories260K", "qwen3"])
def folder(request, tmp_path_factory, shared) -> Path:
    """A trained model whose tokenizer adds BOS, and a random one without BOS and with a chat template."""
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "stories260K":
        shutil.copytree(shared / "checkpoints/stories260K", folder)
        folder.chmod(0o755)
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": LENGTH}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        # The harness's own class needs these names.
        names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        return folder
    with reference.quiet():
        reference.save(reference.build("qwen3", max_position_embeddings=LENGTH, eos_token_id=156), folder)
    tokenizer = tokenizer_of(TEMPLATE.replace("{{ bos_token }}", ""))
    tokenizer.hf.backend_tokenizer.post_processor = None
    tokenizer.hf.bos_token = None
    assert tokenizer.hf.eos_token_id == 156
    tokenizer.hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder) -> tuple[Any, Any]:
    """Returns our class and the harness's own."""
    from lm_eval.models.huggingface import HFLM

    from jaxlm.evaluation.lm_eval import Harness

    with reference.quiet():
        theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return Harness(jaxlm.load(folder)), theirs


def test_special_tokens_and_encoding(pair) -> None:
    ours, theirs = pair
    assert ours.max_length == theirs.max_length == LENGTH
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    begin = theirs.tokenizer.decode([theirs.prefix_token_id])
    for text in ("Once upon a time", " a ", "", f"{begin}Once", begin):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
        assert ours._encode_pair(text or "x", " b") == theirs._encode_pair(text or "x", " b")


def test_tokenizers_without_named_special_tokens(shared) -> None:
    """BOS and EOS come from the configuration files, or from what is added to a text. Without either it is an error."""
    from jaxlm.evaluation.lm_eval import Harness

    model = jaxlm.load(shared / "checkpoints/stories260K")
    model.tokenizer.hf.bos_token = model.tokenizer.hf.eos_token = None
    assert (Harness(model).prefix_token_id, Harness(model).eot_token_id) == (1, 2)
    model.tokenizer.eos_ids = frozenset()
    with pytest.raises(ValueError, match="eos_token"):
        Harness(model)


PAIRS = [
    ("", "Once upon a time"),
    ("Once upon a time,", " there was a girl"),
    ("Once upon a time, ", "there was a girl"),
    *(("Lily saw a", answer) for answer in (" dog", " cat", " big", " big dog", " a")),
    (LONG, " And then"),
    (LONG[: len(LONG) // 2], " The dog was sad."),
    ("The cat", " and the dog ran to the park and saw a"),
]


def test_log_likelihoods(pair) -> None:
    ours, theirs = pair
    asked = requests("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], **LIMIT)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    ours.tok_encode = lambda text, **kwargs: type(ours).tok_encode(ours, text, **kwargs)[1:]  # a planted fault
    wrong = ours.loglikelihood(asked[1:8], disable_tqdm=True)
    del ours.tok_encode
    assert max(abs(one - right) for (one, _), (right, _) in zip(wrong, expected[1:])) > 0.1


def test_greedy_continuations(pair) -> None:
    ours, theirs = pair
    context = "Once upon a time"
    (text,) = theirs.generate_until(
        requests("generate_until", (context, {"until": [], "max_gen_toks": 6})), disable_tqdm=True
    )
    ids = ours.tok_encode(context)
    tokens = jaxlm.generate(ours.model, ids, max_tokens=6, temperature=0).tokens
    asked = [(None, ids, tokens), (None, ids, tokens[:1]), (None, ids, [*tokens[:3], 5, *tokens[4:]])]
    for one in (ours, theirs):
        assert [greedy for _, greedy in one._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, True, False]
    assert ours.tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_rolling_log_likelihoods(pair) -> None:
    ours, theirs = pair
    asked = requests("loglikelihood_rolling", ("Once upon a time",), (LONG,), ("A",), (LONG[:700],))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, **LIMIT)


def test_evaluate_agrees_with_the_harness(pair, tmp_path) -> None:
    """For texts that fit the context: from BOS or EOS, without an EOS at the end."""
    ours, theirs = pair
    texts = [row["question"] for row in ROWS]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    asked = [(None, [theirs.prefix_token_id], theirs.tok_encode(text, add_special_tokens=False)) for text in texts]
    nats = -sum(one for one, _ in theirs._loglikelihood_tokens(asked, disable_tqdm=True))
    found = jaxlm.evaluate(ours.model, tmp_path / "a.txt")
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert found.tokens == sum(len(ids) for *_, ids in asked)


def test_answers(pair) -> None:
    ours, theirs = pair
    contexts = ["Once upon a time", "Lily", "The cat sat on the mat. It", LONG]
    kwargs: list[dict[str, Any]] = [
        {"until": ["."], "max_gen_toks": 20},
        {"until": ["\n\n", " the"], "max_gen_toks": 20, "do_sample": False},
        {"until": "t", "max_new_tokens": 20, "temperature": 0.0},
        {"max_gen_toks": 20, "repetition_penalty": 1.3, "num_beams": 1},
    ]
    pairs = [(context, dict(how)) for how in kwargs for context in contexts]
    asked = requests("generate_until", *pairs)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert len(set(expected)) > 8
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    drawn = requests("generate_until", *[(context, how) for context in ["Once"] * 3 + [LONG]])  # the shapes from above
    texts = ours.generate_until(drawn, disable_tqdm=True)
    assert len(set(texts[:3])) == 3
    assert ours.generate_until(drawn, disable_tqdm=True) == texts


def test_chats(pair) -> None:
    ours, theirs = pair
    if not ours.model.tokenizer.has_template:
        with pytest.raises(ValueError, match="no chat template"):
            ours.apply_chat_template([{"role": "user", "content": "Hi"}])
        return
    chat = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is"}]
    for history, opens in ((chat[:1], True), (chat, True), (chat, False)):
        assert ours.apply_chat_template(history, opens) == theirs.apply_chat_template(history, opens)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name
    refused = [{"role": "system", "content": "refuse"}, *chat[:1]]
    assert ours.apply_chat_template(refused) == ours.apply_chat_template(chat[:1])
    with pytest.raises(ValueError, match="no such words"):
        ours.apply_chat_template([{"role": "user", "content": "refuse"}])


@pytest.fixture
def tasks(tmp_path) -> Path:
    return write_tasks(tmp_path)


SHOTS = {"num_fewshot": 1, "limit": 3, "apply_chat_template": True}


@pytest.mark.parametrize(
    ("folder", "how"),
    [
        ("stories260K", {}),
        pytest.param("stories260K", SHOTS, marks=pytest.mark.slow),
        ("qwen3", {}),
        ("qwen3", SHOTS),
    ],
    indirect=["folder"],
)
def test_the_same_results(how, pair, tasks) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from jaxlm.evaluation.lm_eval import BOOTSTRAP, run

    ours, theirs = pair
    if how and not ours.model.tokenizer.has_template:
        how = {**how, "apply_chat_template": False}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=NAMES, task_manager=manager, bootstrap_iters=BOOTSTRAP, **how)
    given = {"shots": how.get("num_fewshot"), "limit": how.get("limit"), "chat": how.get("apply_chat_template", False)}
    found = run(ours.model, ["jaxlm_*"], folder=tasks, **given)
    assert found["n-samples"] == expected["n-samples"]
    assert list(found["results"]) == NAMES
    for name, scores in expected["results"].items():
        words = {key: value for key, value in scores.items() if isinstance(value, str)}
        numbers = {key: value for key, value in scores.items() if key not in words}
        assert {key: found["results"][name].pop(key) for key in words} == words
        assert found["results"][name] == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("folder", [pytest.param("stories260K", marks=pytest.mark.slow), "qwen3"], indirect=True)
def test_the_command(pair, tasks, capsys) -> None:
    model = ["-m", pair[0].model.source, "--tasks-folder", str(tasks)]
    assert main(["eval", *model, "--tasks", "jaxlm_choices,jaxlm_rolling", "--limit", "2"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("|    Tasks    |Version|Filter|n-shot|    Metric     |")
    assert [line.split("|")[5].strip() for line in lines[2:]] == [
        "acc", "acc_norm", "bits_per_byte", "byte_perplexity", "word_perplexity",
    ]  # fmt: skip
    assert main(["eval", *model, "--tasks", "jaxlm_written", "--json", "--shots", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n-shot"] == {"jaxlm_written": 1}
    assert 0 <= result["results"]["jaxlm_written"]["exact_match,none"] <= 1


def test_errors(pair, tasks, capsys) -> None:
    from jaxlm.evaluation.lm_eval import Harness, run

    model = pair[0].model
    small = Harness(model, length=16)
    with pytest.raises(ValueError, match="answers of 16 tokens"):
        small.generate_until(requests("generate_until", ("Once", {"max_gen_toks": 16})))
    for how, name in (({"num_beams": 4}, "num_beams"), ({"max_length": 20}, "max_length")):
        with pytest.raises(ValueError, match=f"generation_kwargs have {name}"):
            small.generate_until(requests("generate_until", ("Once", {"max_gen_toks": 2, **how})))
    for continuation in ([], [5] * 17):
        with pytest.raises(ValueError, match=f"continuation of {len(continuation)} tokens"):
            small._loglikelihood_tokens([(None, [3], continuation)])
    with pytest.raises(ValueError, match="no tokenizer"):
        Harness(jaxlm.Model(model.family, model.config, model.weights))
    with pytest.raises(ValueError, match="did you mean jaxlm_choices"):
        run(model, ["jaxlm_choice"], folder=tasks)
    with pytest.raises(ValueError, match=r"no\.such"):
        run(model, ["jaxlm_choice"], folder="no.such")
    if not model.tokenizer.has_template:
        assert main(["eval", "-m", model.source, "--tasks", "jaxlm_choices", "--chat"]) == 1
        assert "chat template" in capsys.readouterr().err
