"""Chat templates from strangers: what they may not do ends with a message, soon, and with nothing touched."""

import time
import tracemalloc

import pytest
from helpers.chat_templates import MADE, NO_SYSTEM
from helpers.tiny_chat import tokenizer_of

from jaxlm.processing import template_sandbox
from jaxlm.processing.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello\nyou"},
    {"role": "user", "content": "1 + 1?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
NS = "{% set ns = namespace(x='a', y=[1], n=3) %}"
MUCH = "it exceeds the limit on output and steps"


def render(template: str, **options) -> str:
    return tokenizer_of(template).render(CHAT, **options)


def grown(step: str, use: str) -> str:
    """A template that takes a step 99 times and then uses what it made."""
    return f"{NS}{{% for i in range(99) %}}{step}{{% endfor %}}{use}"


OUT_OF_BOUNDS = {
    # out of the sandbox
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.__class__.__base__ }}": "is unsafe",
    "{{ ''['__class__'].__mro__ }}": "is unsafe",
    "{{ (''|attr('__class__')).__mro__ }}": "is unsafe",
    "{{ raise_exception.__globals__.os }}": "is unsafe",
    "{{ namespace.__init__.__globals__ }}": "is unsafe",
    "{{ cycler.__init__.__globals__.os.system('id') }}": "is unsafe",
    "{{ self.__init__.__globals__ }}": "is unsafe",
    "{{ ('{0.__class__.__mro__}').format(messages) }}": "is unsafe",
    "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}": "is unsafe",
    "{{ namespace(__class__=1) }}": "underscore-prefixed",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ messages[0].update(role='x') }}": "access to attribute 'update' of 'dict' object is unsafe",
    "{% include 'secret' %}": "no loader for this environment",
    "{% import 'secret' as x %}{{ x }}": "no loader for this environment",
    "{% extends 'secret' %}": "no loader for this environment",
    "{{ raise_exception('no such words') }}": "no such words",
    # loops and recursion
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": MUCH,
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}": MUCH,
    "{% for a in [1] recursive %}{{ loop([1] * 9) }}{% endfor %}": "maximum recursion depth",
    "{% for a in range(9) recursive %}{% if loop.depth < 9 %}{{ loop(range(999)) }}{% endif %}{% endfor %}": MUCH,
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "maximum recursion depth",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}": MUCH,
    "{% block a %}{{ self.a() }}{% endblock %}": "maximum recursion depth",
    "{{ range(99999) | map('string') | map('list') | map('join') | map('list') | list }}": MUCH,
    # texts, numbers and lists without end, in one step
    "{{ 'a' * 10**10 }}": MUCH,
    "{{ 9999999999 * ['a'] }}": MUCH,
    "{{ 99999 ** 999999999 }}": MUCH,
    "{{ 'a' | center(9999999999) }}": MUCH,
    "{{ 'a'.ljust(9999999999) }}": MUCH,
    "{{ 'a'.zfill(9999999999) }}": MUCH,
    "{{ '\\t'.expandtabs(9999999999) }}": MUCH,
    "{{ 'a\\nb' | indent(9999999999) }}": MUCH,
    "{{ [1] | batch(9999999999, 'x') | list }}": MUCH,
    "{{ [1] | slice(9999999999) | list }}": MUCH,
    "{{ messages | tojson(indent=9999999999) }}": MUCH,
    "{{ '%9999999999d' % 1 }}": "a format with a width above 9,999",
    "{{ '%*d' % (999999999, 1) }}": "a format with a width above 9,999 or a computed width",
    "{{ '%9999999999d' | format(1) }}": "a format with a width above 9,999",
    "{{ '{:9999999999}'.format(1) }}": "a format with a width above 9,999",
    "{{ '{:{}}'.format(1, '9999999999') }}": "or a computed width",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}": MUCH,
    "{{ ('a' * 9999) | replace('', 'b' * 9999) }}": MUCH,
    "{{ range(9999) | join('a' * 9999) }}": MUCH,
    "{{ range(9999) | map('string') | join('a' * 9999) }}": MUCH,
    "{{ range(9999) | map(attribute='x', default='a' * 9999) | join }}": MUCH,
    "{{ ([[1]] * 999) | sum(start=[]) }}": MUCH,
    "{{ range(8000) | select('gt', 9999) | list }}": MUCH,
    "{{ ('%s' * 9999) % (('a' * 9999,) * 9999) }}": MUCH,
    "{{ 1 | round(-9999999999) }}": "rounds to more than 300 digits",
    "{{ strftime_now('%c' * 9999) }}": MUCH,
    "{{ (1).to_bytes(9999999999) }}": "access to attribute 'to_bytes' of 'int' object is unsafe",
    "{{ 'a'.encode('idna') }}": "access to attribute 'encode' of 'str' object is unsafe",
    "{{ lipsum(999999) }}": "'lipsum' is undefined",
    "{{ messages | pprint }}": "No filter named 'pprint'",
    "{{ ('f' * 999) | int(base=16) }}": "a number of more than 1,000 bits",
    "{% filter center(9999999999) %}x{% endfilter %}": MUCH,
    # and in many
    grown("{% set ns.x = ns.x ~ ns.x %}", "{{ ns.x }}"): MUCH,
    grown("{% set ns.x = ns.x + ns.x %}", "{{ ns.x }}"): MUCH,
    grown("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}", "{{ ns.x }}"): MUCH,
    grown("{% set ns.x = ns.x.replace('a', 'aa') %}", "{{ ns.x }}"): MUCH,
    grown("{% set ns.n = ns.n * ns.n %}", "{{ ns.n }}"): "a number of more than 1,000 bits",
    grown("{% set ns.y = [ns.y, ns.y] %}", "{{ ns.y | tojson }}"): MUCH,
    grown("{% set ns.y = (ns.y, ns.y) %}", "{{ ns.y | length }}"): MUCH,
    grown("{% set ns.y = {'a': ns.y, 'b': ns.y} %}", "{{ ns.y }}"): MUCH,
    grown("{% set ns.y = dict(a=ns.y, b=ns.y) %}", "{{ ns.y }}"): MUCH,
    grown("{% set ns.y = ns.y + ns.y %}", "{{ ns.y }}"): MUCH,
    "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}": MUCH,
    "{% set x = 'a' * 9999 ~ messages[0].content %}" + "{{ x }}" * 999: MUCH,
    "{% set x = 'a' * 99999 %}" + "".join(f"{{% set x{i} = x[{i}:] %}}" for i in range(299)): MUCH,
    # not even well-formed
    "{{ 1 / 0 }}": "division by zero",
    "{{ 'a'.index('b') }}": "substring not found",
    "{{ messages[9].content.x }}": "has no element 9",
    "{% break %}": "outside loop",
    "{% if 1 %}" * 200 + "{% endif %}" * 200: "too many levels of indentation",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "too many statically nested blocks",
    "{{ " + "(" * 9999: "maximum recursion depth",
    "{{ 1" + " + 1" * 9999 + " }}": "maximum recursion depth",
    "a" * 100_001: "it has 100,001 characters, more than 100,000",
}


@pytest.mark.parametrize("template", OUT_OF_BOUNDS, ids=lambda template: template[:60])
def test_what_a_template_may_not_do(template, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template_sandbox, "LIMIT", 500_000)  # a tenth, which tracing makes as slow as all of it
    chat = [dict(message) for message in CHAT]
    tokenizer, began = tokenizer_of(template), time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="the chat template cannot render these messages: ") as caught:
            tokenizer.render(chat)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert OUT_OF_BOUNDS[template] in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - began < 10
    assert chat == CHAT


def test_namespaces_in_each_other_are_not_written_out():
    """Each twice in the one before: the last would be written four million times."""
    chain = "".join(f"{{% set n{i} = namespace() %}}" for i in range(23))
    links = "".join(f"{{% set n{i}.a = n{i + 1} %}}{{% set n{i}.b = n{i + 1} %}}" for i in range(22))
    began = time.process_time()
    assert render(chain + links + "{{ n0 }}") == "<namespace>"
    assert time.process_time() - began < 2


def test_time_ends_what_steps_do_not(monkeypatch):
    monkeypatch.setattr(template_sandbox, "LIMIT", 10**9)  # some ten seconds
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"exceeds the time limit of 0.2 seconds"):
        render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    grown("{% set ns.y = [ns.y, ns.y] %}", "{{ ns.y }}"),
    grown("{% set ns.x = ns.x ~ ns.x %}", "{{ ns.x }}"),
])  # fmt: skip
def test_bounds_are_met_soon(template):
    """As they are, and with nothing traced: a fraction of a second on a machine with nothing else to do."""
    began = time.process_time()
    with pytest.raises(ValueError, match=MUCH):
        render(template)
    assert time.process_time() - began < 5


def test_a_template_that_refuses_everything_leaves_the_rest_alone(monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    tokenizer = tokenizer_of("{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(60) }}")
    assert tokenizer.stop_ids == (tokenizer.eos_token_id,)
    assert tokenizer.encode("Hi") == tokenizer.hf.encode("Hi")


# What templates do, and may

ORDINARY = {
    "texts": """
    {{ 'a' ~ 1 ~ none ~ [1, 'b'] }}{{ '-' * 80 }}{{ 'a' + 'b' }}{{ 'x%sy%5.2f' % ('z', 1.5) }}{{ '%d' % 1700000000 }}
    {{ '{}|{:>5}|{a}'.format(1, 'b', a=2) }}{{ '%s %s' | format(1, 2) }}{{ 'a,b'.split(',')[-1] }}{{ ' a '.strip() }}
    {{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ 'a b'.title() }}{{ 'abab'.replace('a', 'cc', 1) }}{{ '-'.join(['a', 'b']) }}
    {{ 'a'.ljust(5) }}{{ 'x'.startswith(('x', 'y')) }}{{ 'a' | center(9) }}{{ 'x' if messages else 'y' }}""",
    "numbers": """
    {{ 2 ** 10 }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 1.5 * 2 }}{{ 1700000000 * 1000 }}{{ 3.14159 | round(2) }}{{ '12' | int }}
    {{ -1 }}{{ 3 is divisibleby(3) }}{{ 1 < 2 <= 3 }}{{ [1, 2] | max }}{{ 10 | float }}{{ true and 5 }}""",
    "loops": """
    {% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} {{ loop.revindex0 }}
    {{ loop.cycle('a', 'b') }}{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if not loop.last }}
    {{ loop.changed(m.role) }};{% else %}none{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}
    {% for x in missing %}{% endfor %}{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }}{% endfor %}
    {% for a, (b, c) in [(1, (2, 3))] %}{{ c }}{% endfor %}{% for c in 'abc' %}{% continue %}{% endfor %}
    {% for m in messages if m.role == 'user' %}{{ m.content }}{{ loop.length }}{% break %}{% endfor %}
    {% for x in [1, [2, [3]]] recursive %}{{ x if x is number else '<' ~ loop(x) ~ '>' }}{% endfor %}
    {% for i in range(3, 0, -1) %}{{ i }}{% endfor %}{% for m in messages[::-1] %}{{ m.role }}{% endfor %}""",
    "names": """
    {% set ns = namespace(a=1, b=[]) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}
    {% set ns.b = ns.b + [m.role] %}{% endfor %}{{ ns.a }}{{ ns.b }}{% set a, b = 1, 2 %}{{ a }}{{ b }}
    {% set c %}x{{ a }}{% endset %}{{ c | upper }}{{ dict(a=1).a }}{{ missing is defined }}
    {% macro m(x, y=2) -%} {{ x }}{{ y }}{{ caller() if caller }} {%- endmacro %}{{ m(1) }}{{ m(y=5, x=4) }}
    {% call m(1, y=3) %}in{% endcall %}{% if messages is defined and x is not defined %}yes{% endif %}
    {% filter upper %}abc{% endfilter %}{% generation %}made{% endgeneration %}{% with z = 3 %}{{ z }}{% endwith %}""",
    "lists": """
    {{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list }}
    {{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | map('trim') | first }}
    {{ [3, 1] | sort }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2, 3] | sum }}{{ [1, 1] | unique | list }}
    {{ messages | groupby('role') | map('first') | list }}{{ [1, 2, 3] | batch(2) | list }}{{ messages[1:] | length }}
    {{ messages | last | tojson }}{{ tools | tojson(indent=4) }}{{ {'a': 1} | tojson | indent(2) }}{{ 'x' in ['x'] }}
    {{ messages[-1]['content'] }}{{ [[1], [2]] | sum(start=[]) }}{{ none | default('x', true) }}""",
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_templates_are_rendered_as_by_transformers(kind):
    tokenizer = tokenizer_of(ORDINARY[kind])
    theirs = tokenizer.hf.apply_chat_template(CHAT, tokenize=False, tools=TOOLS, add_generation_prompt=True)
    assert len(theirs) > 20
    assert tokenizer.render(CHAT, tools=TOOLS) == theirs


@pytest.mark.parametrize("templates", ["made", "published"])
def test_templates_take_little_of_what_they_may(templates, request, monkeypatch):
    """A hundredth of it would do for this chat. test_template_rendering.py has their texts."""
    monkeypatch.setattr(template_sandbox, "LIMIT", template_sandbox.LIMIT // 100)
    monkeypatch.setattr(template_sandbox, "SHARE", template_sandbox.SHARE // 100)
    if templates == "made":
        found = {name: template for name, (template, _, _) in MADE.items()} | {"gemma-2": NO_SYSTEM}
    else:
        paths = sorted((request.getfixturevalue("shared") / "chat_templates").glob("*.jinja"))
        found = {path.name: path.read_text() for path in paths}
        assert len(found) > 10
    for name, template in found.items():
        tokenizer = tokenizer_of(template)
        for tools in (None, TOOLS):
            assert tokenizer.render(CHAT[1:] if "gemma-2" in name else CHAT, tools=tools), name


def test_long_chats_have_room(monkeypatch):
    """Bounds grow with the messages: a text of a million characters, and ten thousand messages."""
    picked = "messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | list"
    template = (
        "{% set ns = namespace(all='') %}{% for m in messages %}{% set text = m.content | trim %}"
        "{{ '<' + m.role + '>' + text.split('</think>')[-1].replace('\\n', ' ') ~ '<end>' }}{% endfor %}"
        f"{{{{ {picked} | join('; ') | length }}}}{{{{ messages | tojson(indent=4) | length }}}}"
    )
    tokenizer = tokenizer_of(template)
    for chat in ([{"role": "user", "content": "word " * 200_000}], [{"role": "user", "content": "a b"}] * 10_000):
        assert tokenizer.render(chat).startswith("<user>")


def test_transformers_own_rendering_stays_as_it_is():
    """A program may use transformers beside jaxlm: our bounds hold for our rendering alone."""
    tokenizer = tokenizer_of("{{ 'a' | wordwrap(9) }}{{ lipsum(1) | length > 1 }}")
    with pytest.raises(ValueError, match="No filter named 'wordwrap'"):
        tokenizer.render(CHAT)
    assert tokenizer.hf.apply_chat_template(CHAT, tokenize=False) == "aTrue"


def test_a_tokenizer_of_ones_own():
    """Anything with transformers' interface is bounded, whoever made it."""
    tokenizer = Tokenizer(tokenizer_of("{{ 'a' * 10**10 }}").hf)
    with pytest.raises(ValueError, match=MUCH):
        tokenizer.chat(CHAT)
