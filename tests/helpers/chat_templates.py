"""Chat templates of the kinds that published models have: what they do with roles, tools and reasoning."""

from helpers.tiny_tokenizers import byte_fallback, byte_level, write_tiktoken

# A header in front of each turn. Answers are trimmed, calls of built-in tools end with a token of their own.
HEADERS = (
    "{% macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>\n\n{% endmacro %}"
    "{{ bos_token }}{{ head('system') }}The day is {{ date_string or strftime_now('%d %b %Y') }}."
    "{% if tools %} Functions: {{ tools | tojson }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{{ head('ipython' if m.role == 'tool' else m.role) }}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% if call.name in (builtin_tools or []) %}<|python_tag|>{{ call.name }}.call("
    "{% for name, value in call.arguments.items() %}{{ name }}={{ value | tojson }}{% endfor %})<|eom_id|>"
    "{% else %}{{ {'name': call.name, 'parameters': call.arguments} | tojson }}<|eot_id|>{% endif %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
# Reasoning is kept after the last question alone. An answer without it has an empty block.
THINKING = (
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\nFunctions: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set parts = (m.content or '').split('</think>') %}"
    "{% set thought = m.reasoning_content or (parts[0].replace('<think>', '') if parts | length > 1 else '') %}"
    "{% set answer = parts[-1].lstrip('\n') if parts | length > 1 else parts[0] %}"
    "{% if loop.index0 > last.question and (thought or loop.last) %}"
    "<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ answer }}{% for call in m.tool_calls or [] %}{{ '\n' if answer or loop.index0 }}<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# No tools. Answers end with EOS.
ROLES = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Users and models take turns. What the system says begins the first turn.
TURNS = (
    "{% set system = messages[0].content ~ '\n' if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') == (loop.index0 % 2 == 1) %}"
    "{{ raise_exception('the roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ system if loop.first }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS

# name -> the template, how a tokenizer with its tokens is written, and the token that ends an answer
MADE = {
    "headers": (HEADERS, write_tiktoken, "<|eot_id|>"),
    "thinking": (THINKING, byte_level, "<|im_end|>"),
    "roles": (ROLES, byte_level, "<|end|>"),
    "turns": (TURNS, byte_fallback, "<end_of_turn>"),
}
