"""The files of the chat page: headers, API keys, and that they are complete. tests/browser runs them."""

import re
from dataclasses import replace

import pytest
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import tiny
from starlette.testclient import TestClient

import jaxlm
from jaxlm.server.app import create_app
from jaxlm.server.state import Server
from jaxlm.server.static_files import FOLDER

pytestmark = pytest.mark.smoke  # with the wheel: its package data


@pytest.fixture(scope="module")
def http():
    model = replace(tiny("llama3"), tokenizer=tokenizer_of(TEMPLATE))
    served = Server(model, jaxlm.Engine(model, 1, length=64), "tiny", keys=["one"])
    with TestClient(create_app(served)) as http:
        yield http


def references(http) -> set[str]:
    """The paths that the page and its modules name, beginning with the page itself."""
    found, waiting = set(), {"/"}
    while waiting:
        path = waiting.pop()
        found.add(path)
        text = http.get(path).text
        names = re.findall(r'(?:src|href)="(page/[^"]+)"', text) + re.findall(r'from "\.(/[^"]+)"', text)
        waiting |= {name.replace("page/", "/page/") if "page/" in name else f"/page{name}" for name in names} - found
    return found


def test_the_page_and_all_that_it_names_need_no_key(http) -> None:
    paths = references(http)
    assert len(paths) == len([*FOLDER.iterdir()]) > 5
    for path in paths:
        for answer in (http.get(path), http.head(path)):
            assert answer.status_code == 200, path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            policy = answer.headers["content-security-policy"].split("; ")
            assert {"default-src 'self'", "require-trusted-types-for 'script'", "frame-ancestors 'none'"} <= {*policy}
            assert "unsafe" not in answer.headers["content-security-policy"]
    assert http.get("/page/app.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_a_current_etag_is_answered_without_the_file(http) -> None:
    etag = http.get("/").headers["etag"]
    for value in (etag, f"W/{etag}", f'"other", {etag}'):
        again = http.get("/", headers={"If-None-Match": value})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert http.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_only_reading_the_page_needs_no_key(http) -> None:
    for method, path in (
        ("POST", "/"),
        ("DELETE", "/page/app.js"),
        ("GET", "/v1/models"),
        ("GET", "/page"),
        ("GET", "/x"),
    ):
        assert http.request(method, path).status_code == 401, (method, path)
    for path in ("/page/", "/page/none.js", "/page/../v1/models", "/page/%2e%2e/app.py", "/page//v1/models"):
        assert http.get(path).status_code in (401, 404), path
    key = {"Authorization": "Bearer one"}
    assert http.post("/", headers=key).status_code == 405


def test_files_name_no_other_host() -> None:
    """Other than the names of standards."""
    for path in FOLDER.iterdir():
        hosts = set(re.findall(r"(?:https?:)?//([\w.-]+\.\w+)", path.read_text()))
        assert hosts <= {"www.w3.org", "spec.commonmark.org"}, path.name
        assert "innerHTML" not in path.read_text()
        assert len(path.read_text().splitlines()) <= 400
