"""The chat page, used as people use it."""

import json
import re

import pytest
from helpers.chat_page import Fake, Reply, Tab, expect_status, serving, text, user_texts
from starlette.applications import Starlette
from starlette.routing import Mount

pytestmark = pytest.mark.oracle

LONG = "\n\n".join(f"Paragraph {n} of a long answer, which is wider than a narrow window is." for n in range(60))
RICH = (
    "# Title\n\n" + "word" * 60 + "\n\n```python\n" + "x = 1  # " + "long " * 60 + "\n```\n\n"
    "| a | b |\n| - | - |\n| 1 | " + "cell" * 40 + " |\n\nA [link](https://a.b) and `code`.\n\n> quote\n\n- item"
)
LOOKS = [("narrow", "light"), ("narrow", "dark"), ("wide", "light"), ("wide", "dark")]


def accessibility(tab: Tab) -> list[str]:
    """What axe-core finds: labels, names, roles, contrast, focusable scroll areas."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{rule['id']}: {node['html'][:120]} {node.get('failureSummary', '')}"
        for rule in Axe().run(tab.page).response["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize(("size", "theme"), LOOKS)
def test_every_state_fits_and_is_accessible(fake: Fake, open_tab, size: str, theme: str) -> None:
    tab = open_tab(fake.url, size, color_scheme=theme, reduced_motion="reduce")
    tab.wait_until("document.title === 'fake · jaxlm'")
    assert tab.page.locator("html").get_attribute("data-theme") == theme
    assert accessibility(tab) == []
    fake.replies = [
        Reply([{"reasoning_content": "Thinking " * 40}, {"content": RICH}]),
        Reply(status=400, message="the prompt is too long: " + "shorten " * 20),
    ]
    tab.ask("word" * 60)
    tab.page.locator("summary").click()
    tab.ask("next")
    assert accessibility(tab) == []
    assert tab.overflow() == 0
    code = tab.page.locator("pre").first
    code.press("ArrowRight")  # wide code is scrolled
    tab.wait_until("document.querySelector('pre').scrollLeft > 0")
    tab.page.set_viewport_size({"width": 320, "height": 600})
    assert tab.overflow() == 0
    tab.page.get_by_role("button", name="Settings").click()
    assert accessibility(tab) == []
    assert tab.overflow() == 0
    expect_status(tab, 400)


def test_an_answer_streams(fake: Fake, open_tab) -> None:
    fake.replies = [
        Reply([{"content": "Hel"}, {"content": "lo **you**"}], waits=True),
        Reply([{"content": "Again"}], finish_reason="length"),
    ]
    tab = open_tab(fake.url)
    tab.send("Hi")
    tab.page.wait_for_selector(".markdown strong")
    assert tab.answers() == ["Hello you"]
    assert tab.page.get_by_role("button", name="Stop").is_visible()
    assert tab.page.locator(".answer").get_attribute("aria-busy") == "true"
    tab.page.get_by_label("Message", exact=True).fill("typed meanwhile")
    tab.page.keyboard.press("Enter")  # neither sends nor stops
    assert user_texts(tab) == ["Hi"]
    fake.release.set()
    tab.wait_for_answer()
    assert tab.page.get_by_label("Message", exact=True).input_value() == "typed meanwhile"
    assert tab.page.get_by_role("status").inner_text() == "The answer is complete."
    found = tab.page.locator(".statistics").inner_text()
    assert re.fullmatch(r"2 tokens · [\d.]+ tokens/s · first token after \d\.\d\d s", found)
    tab.ask("More")
    assert "ended at the token limit" in tab.page.locator(".statistics").last.inner_text()
    first, second = fake.requests
    assert first == {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert second["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello **you**"},
        {"role": "user", "content": "More"},
    ]


def test_reasoning_and_tool_calls(fake: Fake, open_tab) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    fake.replies = [
        Reply([{"reasoning_content": "First"}], waits=True),
        Reply([{"reasoning_content": "First"}, {"content": "Then"}, {"tool_calls": [call], "content": None}]),
    ]
    tab = open_tab(fake.url)
    tab.send("Hi")
    tab.page.get_by_text("Thinking…").wait_for()
    assert not tab.page.locator(".reasoning-text").is_visible()
    fake.release.set()
    tab.wait_for_answer()
    tab.page.get_by_role("button", name="Regenerate answer").click()
    tab.wait_for_answer()
    assert tab.page.locator("summary").inner_text().startswith("Thought for 0.")
    tab.page.locator("summary").click()
    assert tab.page.locator(".reasoning-text").inner_text() == "First"
    assert tab.page.locator(".calls").inner_text() == 'Tool call: add\n{"a": 1}'
    assert "First" not in json.dumps(fake.requests[1])


def test_a_reload_keeps_the_chat_and_new_chat_ends_it(fake: Fake, open_tab) -> None:
    fake.replies = [text("**First**"), text("Sec", waits=True)]
    tab = open_tab(fake.url)
    tab.ask("one")
    tab.send("two")
    tab.page.get_by_text("Sec").wait_for()
    tab.page.reload()
    assert user_texts(tab) == ["one", "two"]
    assert tab.answers() == ["First", "Sec"]
    assert "stopped" in tab.page.locator(".statistics").last.inner_text()
    tab.page.get_by_role("button", name="New chat").click()
    assert user_texts(tab) == []
    assert tab.page.get_by_role("heading", name="What is on your mind?").is_visible()
    tab.page.reload()
    assert user_texts(tab) == []


def test_with_the_keyboard_alone(fake: Fake, open_tab) -> None:
    fake.replies = [text("Hello"), text("Again")]
    tab = open_tab(fake.url)
    press, focused = tab.page.keyboard.press, "document.activeElement.ariaLabel ?? document.activeElement.id"
    assert tab.page.evaluate(focused) == "message"
    tab.page.keyboard.type("a")
    press("Shift+Enter")
    tab.page.keyboard.type("b")
    for options in ("isComposing: true", "keyCode: 229"):  # Enter ends the composition of a word
        event = f"new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, {options}}})"
        tab.page.evaluate(f"document.activeElement.dispatchEvent({event})")
    assert fake.requests == []
    press("Enter")
    tab.page.get_by_text("Hello").wait_for()
    tab.wait_for_answer()
    assert fake.requests[0]["messages"] == [{"role": "user", "content": "a\nb"}]
    press("Enter")  # nothing to send
    order = []
    for _ in range(3):
        press("Shift+Tab")
        order.append(tab.page.evaluate(focused))
        outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        opacity = tab.page.evaluate("getComputedStyle(document.activeElement).opacity")
        assert (outline, opacity) == ("solid", "1")
    assert order == ["Regenerate answer", "Copy answer", "Edit message"]
    press("Tab")
    press("Tab")
    press("Enter")
    tab.page.get_by_text("Again").wait_for()
    tab.wait_for_answer()
    for _ in range(8):
        press("Shift+Tab")
        if tab.page.evaluate(focused) == "Settings":
            break
    press("Enter")
    assert tab.page.evaluate("document.activeElement.closest('dialog').open")
    press("Escape")
    assert tab.page.evaluate(focused) == "Settings"


def test_settings_are_sent(fake: Fake, open_tab) -> None:
    fake.replies = [text("a"), text("b"), text("c")]
    tab = open_tab(fake.url)
    settings = {"Temperature": "0.5", "Top-p": "0.9", "Max tokens": "12", "Seed": "0", "System message": "Be brief."}
    tab.page.get_by_role("button", name="Settings").click()
    for name, value in settings.items():
        tab.page.get_by_label(name).fill(value)
    tab.page.get_by_role("button", name="Done").click()
    tab.ask("Hi")
    tab.page.reload()
    tab.ask("Hi")
    for request in fake.requests:
        assert request["messages"][0] == {"role": "system", "content": "Be brief."}
        assert [request[k] for k in ("temperature", "top_p", "max_tokens", "seed")] == [0.5, 0.9, 12, 0]
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_label("Top-p").fill("2")
    tab.page.get_by_role("button", name="Done").click()
    assert tab.page.locator("dialog").is_visible()  # the field is wrong
    tab.page.get_by_role("button", name="Reset").click()
    tab.page.get_by_role("button", name="Done").click()
    tab.page.get_by_role("button", name="New chat").click()
    tab.ask("Hi")
    assert {*fake.requests[2]} == {"model", "messages", "stream", "stream_options"}


def test_scrolling_up_ends_following(fake: Fake, open_tab) -> None:
    first, second = LONG[: len(LONG) // 2], LONG[len(LONG) // 2 :]
    fake.replies = [Reply([*text(first, 40).deltas, *text(second, 2).deltas])]
    tab = open_tab(fake.url, "narrow")
    bottom = "Math.abs(document.documentElement.scrollHeight - innerHeight - scrollY) < 2"
    tab.send("Hi")
    tab.page.get_by_text("Paragraph 20").wait_for()
    assert tab.page.evaluate(bottom)
    tab.page.mouse.move(200, 300)
    tab.page.mouse.wheel(0, -400)
    tab.page.get_by_role("button", name="Scroll to the end").wait_for()
    where = tab.page.evaluate("scrollY")
    tab.page.get_by_text("Paragraph 40").wait_for(state="attached")
    assert tab.page.evaluate("scrollY") == where
    assert tab.page.get_by_role("button", name="Stop").is_visible()  # it still streamed
    tab.page.get_by_role("button", name="Scroll to the end").click()
    tab.wait_for_answer()
    assert tab.page.evaluate(bottom)


def test_messages_are_edited_and_answers_regenerated(fake: Fake, open_tab) -> None:
    fake.replies = [text("a1"), text("b1"), text("b2"), text("a2")]
    tab = open_tab(fake.url)
    tab.ask("first")
    tab.ask("second")
    assert tab.page.get_by_role("button", name="Regenerate answer").count() == 1
    tab.page.get_by_role("button", name="Regenerate answer").click()
    tab.page.get_by_text("b2").wait_for()
    tab.wait_for_answer()
    assert fake.requests[2] == fake.requests[1]
    field = tab.page.get_by_label("Message", exact=True)
    field.fill("a draft")
    tab.page.get_by_role("button", name="Edit message").first.click()
    assert field.input_value() == "first"
    tab.page.keyboard.press("Escape")
    assert field.input_value() == "a draft"
    tab.page.get_by_role("button", name="Edit message").first.click()
    tab.ask("changed")
    assert (user_texts(tab), tab.answers()) == (["changed"], ["a2"])
    assert fake.requests[3]["messages"] == [{"role": "user", "content": "changed"}]


@pytest.mark.parametrize("is_secure", [True, False])
def test_copying(fake: Fake, open_tab, is_secure: bool) -> None:
    """Without a secure context, as on another machine, there is no Clipboard API."""
    fake.replies = [text("Use **this**:\n\n```\nx = 1\n```")]
    tab = open_tab(fake.url, permissions=["clipboard-read", "clipboard-write"])
    read = "navigator.clipboard.readText()"
    if not is_secure:
        tab.page.evaluate("window.kept = navigator.clipboard")
        tab.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        read = "window.kept.readText()"
    tab.ask("Hi")
    tab.page.get_by_role("button", name="Copy code").click()
    tab.page.get_by_text("Copied.").wait_for(state="attached")
    assert tab.page.evaluate(read) == "x = 1"
    tab.page.get_by_role("button", name="Copy answer").click()
    tab.wait_until(f"{read}.then((copied) => copied.startsWith('Use **this**'))")


def test_several_models(fake: Fake, open_tab) -> None:
    fake.models = ["org/base", "org/adapter"]
    fake.replies = [text("a"), text("b")]
    tab = open_tab(fake.url, "narrow")
    tab.page.get_by_label("Model", exact=True).select_option("org/adapter")
    tab.ask("Hi")
    tab.page.reload()
    tab.ask("Hi")
    assert [request["model"] for request in fake.requests] == ["org/adapter"] * 2


def test_the_theme_is_kept(fake: Fake, open_tab) -> None:
    tab = open_tab(fake.url, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = tab.page.evaluate(background)
    tab.page.get_by_role("button", name="Dark theme").click()
    light = tab.page.evaluate(background)
    assert light != dark
    tab.page.reload()
    assert tab.page.evaluate(background) == light
    tab.page.get_by_role("button", name="Dark theme").click()
    assert tab.page.evaluate("localStorage.length") == 0  # that of the system again
    tab.page.emulate_media(color_scheme="light")
    tab.wait_until(f"{background} === '{light}'")


def test_nothing_moves_where_people_want_that(fake: Fake, open_tab) -> None:
    for motion, running in (("no-preference", True), ("reduce", False)):
        fake.replies = [Reply(waits=True)]
        tab = open_tab(fake.url, reduced_motion=motion)
        tab.send("Hi")
        tab.page.wait_for_selector(".waiting i")
        assert (tab.page.evaluate("document.getAnimations().length") > 0) == running


def test_behind_the_path_of_a_proxy(open_tab) -> None:
    fake = Fake()
    fake.replies = [text("Hello")]
    with serving(Starlette(routes=[Mount("/some/path", fake.app())])) as url:
        tab = open_tab(f"{url}some/path/")
        tab.ask("Hi")
        assert tab.answers() == ["Hello"]


def test_an_idle_page_asks_nothing(fake: Fake, open_tab) -> None:
    fake.replies = [text("Hello")]
    tab = open_tab(fake.url)
    tab.ask("Hi")
    before = [*tab.requests]
    tab.page.wait_for_timeout(1500)
    assert tab.requests == before
    paths = [url.removeprefix(fake.url) for url in before]
    assert sorted(p for p in paths if p.startswith("v1")) == ["v1/chat/completions", "v1/models"]
