"""Bounds of chat templates: what they cost that no single step shows."""

import time
import tracemalloc

import pytest
from helpers.tiny_chat import tokenizer_of

from jaxlm.processing import template_sandbox

USER = [{"role": "user", "content": "Hi"}]
LIST = "{% set l = ['a' * 150000] %}"
LOOP = "{% for i in range(99999) %}{{ l }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% macro m() %}" + LOOP + "{% endmacro %}{{ m() }}",
        "{% set x %}" + LOOP + "{% endset %}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}" + LOOP + "{% endcall %}",
        "{% filter upper %}" + LOOP + "{% endfilter %}",
        "{% for i in range(99999) recursive %}{{ l }}{% endfor %}",
        "{% set x %}{% autoescape true %}" + LOOP + "{% endautoescape %}{% endset %}",
        "{% set x %}" + LOOP.replace("{{ l }}", "{{ l }}, {{ l }}") + "{% endset %}",
    ],
)
def test_output_is_paid_for_when_it_is_made(template, monkeypatch):
    """A list has a new text each time; within a macro or a captured block these wait until its end."""
    monkeypatch.setattr(template_sandbox, "SECONDS", 2.0)
    tok = tokenizer_of(LIST + template)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="limit on output and steps"):
            tok.render(USER)
        assert tracemalloc.get_traced_memory()[1] < 10 * template_sandbox.LIMIT
    finally:
        tracemalloc.stop()


def test_what_is_captured_is_as_it_was():
    tok = tokenizer_of(
        "{% macro m(x) %}{{ x }}, {{ [x, 1] }}{% endmacro %}{% set y %}<{{ m('a&') }}>{% endset %}{{ y }}"
        "{% set z %}{% autoescape true %}{{ '<' }}{{ bos_token }}{% endautoescape %}{% endset %}{{ z }}"
    )
    assert tok.render(USER) == "<a&, ['a&', 1]>&lt;&lt;bos&gt;"


@pytest.mark.parametrize("constant", [
    "('a' * 500000000)|length", "(7 ** 3000000) % 3", "99999 ** 999999999", "'a'|center(500000000)", "'%500000000d' % 1"
])  # fmt: skip
def test_names_are_found_without_computing_constants(constant):
    tok = tokenizer_of(f"{{{{ {constant} }}}}{{{{ wanted }}}}{{% autoescape {constant} %}}{{% endautoescape %}}")
    began = time.process_time()
    tracemalloc.start()
    try:
        assert tok.template_accepts("wanted")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2


def test_names_that_a_template_sets_itself():
    tok = tokenizer_of(
        "{% set a = a or 1 %}{% if not b is defined %}{% set b = 1 %}{% endif %}{% set c = 1 %}{{ b }}{{ c }}"
        "{% for d in messages %}{% generation %}{{ d }}{{ loop.index }}{{ e }}{% endgeneration %}{% endfor %}"
        "{% macro m(f) %}{{ f }}{% endmacro %}{{ raise_exception }}"
    )
    assert {name for name in [*"abcdefm", "loop", "raise_exception"] if tok.template_accepts(name)} == set("abe")


def test_names_of_a_template_that_is_too_long():
    tok = tokenizer_of("{{ x }}" * 20_000)
    with pytest.raises(ValueError, match="it has 140,000 characters, more than 100,000"):
        tok.template_accepts("x")
