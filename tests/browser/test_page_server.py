"""The chat page with a model, and with a server that refuses, breaks or is gone."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from helpers.chat_page import Fake, Reply, Tab, error_text, expect_status, serving, text, user_texts
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.server.app import create_app
from jaxlm.server.state import Server

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def real():
    model = replace(tiny("llama3", max_position_embeddings=256), tokenizer=tokenizer_of(TEMPLATE))
    with quick_compilation():
        served = Server(model, jaxlm.Engine(model, 2), "org/tiny", max_waiting=1)
        with serving(create_app(served)) as url:
            yield served, url
        served.engine.close()


def change_requests(tab: Tab, **fields: Any) -> None:
    """Adds fields to the requests of the page."""

    def change(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields}))

    tab.page.route("**/v1/chat/completions", change)


def test_a_chat_with_a_model(real: tuple[Server, str], open_tab) -> None:
    """The regular expression makes the random model write this text."""
    tab = open_tab(real[1])
    change_requests(tab, regex=r"Sum: \*\*2\*\*", max_tokens=60)
    tab.page.set_default_timeout(60_000)
    tab.ask("hello")
    assert tab.answers() == ["Sum: 2"]
    assert tab.page.locator(".markdown strong").inner_text() == "2"
    assert tab.page.get_by_role("heading", name="org/tiny").is_visible()
    tab.ask("raise")
    assert len(tab.answers()) == 2


@pytest.mark.parametrize("how", ["button", "escape", "new chat", "leave"])
def test_stopping_frees_the_slot(real: tuple[Server, str], open_tab, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    served, url = real
    step = served.engine.steps.step
    monkeypatch.setattr(served.engine.steps, "step", lambda *args: time.sleep(0.3) or step(*args))
    tab = open_tab(url)
    change_requests(tab, ignore_eos=True, seed=1)
    tab.page.set_default_timeout(60_000)
    tab.send("hello")
    tab.page.wait_for_selector(".markdown > *")
    assert served.active == 1
    if how == "button":
        tab.page.get_by_role("button", name="Stop").click()
    elif how == "escape":
        tab.page.keyboard.press("Escape")
    elif how == "new chat":
        tab.page.get_by_role("button", name="New chat").click()
    else:
        tab.page.goto("about:blank")
    end = time.monotonic() + 3
    while (served.active or served.engine.is_busy) and time.monotonic() < end:
        tab.page.wait_for_timeout(10)
    assert served.active == 0
    assert not served.engine.is_busy
    if how in ("button", "escape"):
        assert "stopped" in tab.page.locator(".statistics").inner_text()
        assert 0 < len(tab.answers()[0]) < 200


def test_errors_of_a_server_that_runs(real: tuple[Server, str], open_tab) -> None:
    tab = open_tab(real[1])
    change_requests(tab, max_tokens=2)
    tab.ask("refuse")
    assert "no such words" in error_text(tab)
    tab.ask("a " * 500)
    assert "shorten the prompt" in error_text(tab)
    assert user_texts(tab) == ["refuse", ("a " * 500).strip()]
    expect_status(tab, 400, 400)


def test_a_model_without_a_chat_template(browser, open_tab) -> None:
    model = replace(tiny("llama3"), tokenizer=tokenizer_of(None))
    engine = jaxlm.Engine(model, 1, length=64)
    with serving(create_app(Server(model, engine, "base"))) as url:
        tab = open_tab(url)
        tab.ask("hello")
        assert "has no chat template" in error_text(tab)
        expect_status(tab, 400)
    engine.close()


def test_errors_keep_the_message_and_can_be_retried(fake: Fake, open_tab) -> None:
    tab = open_tab(fake.url)
    fake.replies = [
        Reply([{"content": "Half an"}], waits=True, breaks=True),
        Reply([{"content": "Half an"}], ends_early=True),
        Reply([{"content": "Half an"}], error="the request failed"),
        Reply(status=503, message="the server is shutting down"),
        text("Whole"),
        text("Later"),
    ]
    tab.send("one")
    tab.page.get_by_text("Half an").wait_for()  # what has not been read is lost with the connection
    fake.release.set()
    tab.wait_for_answer()
    assert "connection to the server was lost" in error_text(tab)
    assert tab.answers() == ["Half an"]
    for message in ("connection to the server was lost", "the request failed", "the server is shutting down"):
        tab.page.get_by_role("button", name="Retry").click()
        tab.wait_for_answer()
        assert message in error_text(tab)
    tab.page.get_by_role("button", name="Retry").click()
    tab.wait_for_answer()
    assert tab.answers() == ["Whole"]
    assert not tab.page.get_by_role("button", name="Retry").is_visible()
    assert [request["messages"] for request in fake.requests] == [[{"role": "user", "content": "one"}]] * 5
    assert [line for line in tab.console if "ERR_INCOMPLETE_CHUNKED_ENCODING" in line]
    tab.console[:] = [line for line in tab.console if "INCOMPLETE" not in line]
    expect_status(tab, 503)


def test_a_busy_server_is_asked_again(fake: Fake, open_tab) -> None:
    fake.replies = [
        Reply(status=429, message="too many requests wait", headers={"Retry-After": "1"}),
        text("Now"),
        *[Reply(status=429, message="too many requests wait", headers={"Retry-After": "30"})],
    ]
    tab = open_tab(fake.url)
    tab.send("Hi")
    tab.page.get_by_text("The server is busy: too many requests wait. Trying again in 1 s.").wait_for()
    tab.wait_for_answer()
    assert tab.answers() == ["Now"]
    tab.send("Hi")
    tab.page.get_by_text("Trying again in 30 s").wait_for()
    tab.page.keyboard.press("Escape")
    tab.wait_for_answer()
    assert len(fake.requests) == 3
    expect_status(tab, 429, 429)


def test_a_server_that_is_gone(open_tab) -> None:
    fake = Fake()
    with serving(fake.app()) as url:
        tab = open_tab(url)
        tab.wait_until("document.title === 'fake · jaxlm'")
    tab.ask("Hi")
    assert error_text(tab) == "The server does not answer. Check that jaxlm serve is running, then retry."
    assert user_texts(tab) == ["Hi"]
    assert all("ERR_CONNECTION_REFUSED" in line for line in tab.console)
    tab.console.clear()


def test_an_api_key_is_asked_for(fake: Fake, open_tab) -> None:
    fake.key = "secret"
    fake.replies = [text("Hello")]
    tab = open_tab(fake.url)
    field = tab.page.get_by_label("This server needs an API key.")
    field.fill("wrong")
    field.press("Enter")
    tab.wait_until("document.activeElement.id === 'key'")
    tab.send("Hi")
    tab.page.get_by_text("the API key is missing or wrong").wait_for()
    field.fill("secret")
    field.press("Enter")
    tab.page.get_by_text("Hello").wait_for()
    assert not field.is_visible()
    assert "secret" in tab.page.evaluate("Object.values(sessionStorage)")
    assert tab.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    tab.page.reload()
    tab.wait_until("document.title === 'fake · jaxlm'")
    assert not field.is_visible()
    expect_status(tab, 401, 401, 401)
