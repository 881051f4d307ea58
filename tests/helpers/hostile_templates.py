"""Chat templates as programs: any expressions and statements, most of them too large, too long or senseless."""

import re

from hypothesis import strategies as st

ATOMS = [
    "messages", "messages[0].content", "messages[0]", "'a'", "'a\\nb'", "x", "y", "z", "ns.x", "ns", "1", "-3", "7",
    "99999", "999999999", "1.5", "range(99999)", "range(9)", "[x, y]", "(x, x)", "{'a': x, 'b': y}", "loop.index",
    "bos_token", "none", "''", "'%s'", "'%9999999d'", "'{:{}}'", "'{}'", "x[1:]", "y[::-1]", "dict(a=x, b=x)", "m(x)",
    "namespace(x=x)", "x.__class__", "loop(y)", "caller()", "strftime_now(x)", "[1] * 999", "'ab' * 9999",
]  # fmt: skip
OPERATORS = ["+", "*", "~", "%", "-", "//", "**", "==", "in", "<", "and"]
FILTERS = re.findall(r"\w+(?:\([^)]*\))?", """
    batch(9, 'x') batch(9999999) capitalize center(99) center(9999999) count default(x) dictsort escape first float
    format(x) format(x, y) groupby('a') indent(4) indent(9999999) indent(x) int int(base=16) items join join(x) last
    length list lower map('string') map('upper') map('replace', 'a', x) map(attribute='q', default=x) max min
    reject('equalto', x) replace('a', 'bb') replace('', x) replace(x, y) reverse round round(99999) round(2, 'ceil')
    safe select('in', y) selectattr('role', 'equalto', 'user') slice(3) slice(9999999) sort string sum sum(start=y)
    title tojson tojson(indent=9) tojson(indent=9999999) trim truncate(9) unique upper urlencode wordcount xmlattr
    attr('x')
""")  # fmt: skip
METHODS = re.findall(r"\w+\([^)]*\)", """
    capitalize() casefold() center(9999999) count('a') expandtabs(9999999) find(x) format(x) format(x, y) format_map(x)
    index('a') join(y) ljust(99) ljust(9999999) partition(x) replace('a', x) replace('', 'xyz') replace(x, y) rfind(x)
    rjust(9999999, 'x') rsplit(x) split() split('a') splitlines() startswith(x) strip(x) swapcase() title()
    translate(y) upper() zfill(9999999) items() keys() values() get('a', x) append(x) update(x) pop() copy()
""")  # fmt: skip

expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda x: st.one_of(
        st.builds("({} {} {})".format, x, st.sampled_from(OPERATORS), x),
        st.builds("({}|{})".format, x, st.sampled_from(FILTERS)),
        st.builds("{}.{}".format, x, st.sampled_from(METHODS)),
    ),
    max_leaves=5,
)
statements = st.recursive(
    st.builds("{{{{ {} }}}}".format, expressions)
    | st.builds("{{% set {} = {} %}}".format, st.sampled_from(["x", "y", "z", "ns.x", "ns.y"]), expressions),
    lambda s: st.one_of(
        st.lists(s, min_size=1, max_size=3).map("".join),
        st.builds("{{% for i in {} %}}{}{{% endfor %}}".format, expressions, s),
        st.builds("{{% for i in range(99999) %}}{}{{% endfor %}}".format, s),
        st.builds("{{% for i in range(9) if {} recursive %}}{}{{% endfor %}}".format, expressions, s),
        st.builds("{{% if {} %}}{}{{% endif %}}".format, expressions, s),
        st.builds("{{% set x %}}{}{{% endset %}}".format, s),
        st.builds("{{% macro m(x) %}}{}{{% endmacro %}}{{{{ m({}) }}}}".format, s, expressions),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), s),
    ),
    max_leaves=6,
)
templates = statements.map("{{% set ns = namespace(x='ab', y=[1]) %}}{{% set x = 'abc' %}}{{% set y = [x] %}}{}".format)
