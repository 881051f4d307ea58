"""lm-eval's classes for OpenAI-compatible servers give the scores of `jaxlm eval`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import lm_eval_tasks
from helpers.lm_eval_tasks import NAMES, ROWS, requests, write_tasks
from helpers.serving import serving
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import tiny
from oracle import reference

import jaxlm
from jaxlm.server.state import Server

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*")]
LENGTH = 128
LIMIT = {"rel": 1e-5, "abs": 1e-4}
PAIRS = [(row["question"], answer) for row in ROWS for answer in row["answers"]]


class Served(NamedTuple):
    model: jaxlm.Model
    engine: jaxlm.Engine
    url: str
    tokenizer: str  # its folder


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokenizer = tokenizer_of(TEMPLATE.replace("{{ bos_token }}", ""))
    if request.param == "no BOS":
        tokenizer.hf.backend_tokenizer.post_processor = None
        tokenizer.hf.bos_token = None
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.hf.save_pretrained(folder)
    model = replace(tiny("llama3", max_position_embeddings=LENGTH), tokenizer=tokenizer)
    engine = jaxlm.Engine(model, 4)
    with reference.quickly(), serving(Server(model, engine, "tiny")) as url:
        yield Served(model, engine, url, str(folder))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval_tasks.offline(monkeypatch)


def harness(served: Served, name: str, path: str, **options: Any) -> Any:
    """lm-eval's class for a server."""
    from lm_eval.api.registry import get_model

    given = {"model": "tiny", "base_url": served.url + path, "max_length": LENGTH, "max_retries": 1, **options}
    return get_model(name)(**given)


def completions(served: Served, **options: Any) -> Any:
    """The class for completions, with the tokenizer in a folder. As in `jaxlm eval`, BOS is added if there is one."""
    bos = served.model.tokenizer.hf.bos_token is not None
    given = {"tokenizer_backend": "huggingface", "tokenizer": served.tokenizer, "add_bos_token": bos, **options}
    return harness(served, "local-completions", "/v1/completions", **given)


@pytest.mark.parametrize("how", [{"batch_size": 4}, {"num_concurrent": 4}])
def test_log_likelihoods(served: Served, how: dict[str, Any]) -> None:
    from jaxlm.evaluation.lm_eval import Harness

    ours, theirs = Harness(served.model), completions(served, **how)
    ids = ours.tok_encode("Lily saw a")
    greedy = [token for piece in served.engine.stream(ids, max_tokens=3, temperature=0) for token in piece.tokens]
    texts = requests("loglikelihood", *PAIRS)
    likely_and_not = [(None, ids, greedy), (None, ids, greedy[::-1])]
    found, expected = (
        [*one.loglikelihood(texts, disable_tqdm=True), *one._loglikelihood_tokens(likely_and_not, disable_tqdm=True)]
        for one in (theirs, ours)
    )
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], **LIMIT)
    assert [likely for _, likely in found] == [likely for _, likely in expected]
    assert [likely for _, likely in found[-2:]] == [True, False]


def test_the_scores_of_jaxlm_eval(served: Served, tmp_path: Path) -> None:
    same_results(served, completions(served, batch_size=4), NAMES, write_tasks(tmp_path))


@pytest.mark.parametrize("served", ["no BOS"], indirect=True)
@pytest.mark.parametrize("tokenized", [True, False])
def test_the_tokenizer_of_the_server(served: Served, tmp_path: Path, tokenized: bool) -> None:
    """The default of lm-eval is to ask the server for token ids; prompts are sent as ids, or as texts."""
    theirs = harness(served, "local-completions", "/v1/completions", tokenized_requests=tokenized)
    assert theirs.tokenizer_backend == "remote"
    same_results(served, theirs, NAMES, write_tasks(tmp_path))


@pytest.mark.parametrize("served", ["no BOS"], indirect=True)
def test_chats(served: Served, tmp_path: Path) -> None:
    theirs = harness(served, "local-chat-completions", "/v1/chat/completions", eos_string="<end>")
    same_results(served, theirs, ["jaxlm_written"], write_tasks(tmp_path), chat=True)


def same_results(served: Served, theirs: Any, names: list[str], tasks: Path, chat: bool = False) -> None:
    """Runs the tasks with a class of lm-eval and with `jaxlm eval`."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from jaxlm.evaluation.lm_eval import BOOTSTRAP, run

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options: dict[str, Any] = {"apply_chat_template": chat, "bootstrap_iters": BOOTSTRAP, "log_samples": True}
    found = simple_evaluate(theirs, tasks=names, task_manager=manager, **options)
    expected = run(served.model, names, folder=tasks, chat=chat)
    assert found is not None
    for name in names:
        words = {key: value for key, value in expected["results"][name].items() if isinstance(value, str)}
        numbers = {key: value for key, value in expected["results"][name].items() if key not in words}
        assert {key: found["results"][name][key] for key in words} == words
        assert {key: found["results"][name][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
        for one, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            if name == "jaxlm_written":  # answers: texts
                assert one["resps"] == other["resps"]
                assert one["resps"][0][0]
