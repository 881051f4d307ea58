"""Chat templates for tokenizers without one: ChatML, Llama 3 and Gemma, with the special tokens that they need.

The templates mark the answers with {% generation %} tags, so that transformers' apply_chat_template finds them too
(return_assistant_tokens_mask). They write BOS only where the tokenizer does before every text.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.processing.template_sandbox import check_syntax
from jaxlm.processing.tokenizer_files import leading_id

BOS = "{{ bos_token }}"


class ChatFormat(NamedTuple):
    """A chat template, and the special tokens that it needs."""

    template: str
    tokens: tuple[str, ...] = ()


# Sources of the formats: OpenAI's ChatML, as in Qwen's models; `ChatFormat` in meta-llama/llama-models, models/llama3;
# "Formatting for Gemma" at ai.google.dev/gemma/docs.
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{{ '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content }}{{ '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim }}{{ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Gemma has no system turn: the text of a system message stands before that of the next turn.
GEMMA = """
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = ns.system + (message.content | trim) + '\\n\\n' %}
    {%- elif message.role == 'user' %}
        {{- '<start_of_turn>user\\n' + ns.system }}{{ message.content | trim }}{{ '<end_of_turn>\\n' }}
        {%- set ns.system = '' %}
    {%- elif message.role == 'assistant' %}
        {{- '<start_of_turn>model\\n' + ns.system }}
        {%- generation %}{{ message.content | trim }}{{ '<end_of_turn>' }}{% endgeneration %}
        {{- '\\n' }}
        {%- set ns.system = '' %}
    {%- else %}
        {{- raise_exception('the roles of this chat template are system, user and assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
FORMATS = {
    "chatml": ChatFormat(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": ChatFormat(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": ChatFormat(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}


def chat_format(name: str, hf: Any) -> ChatFormat:
    """Returns the chat template of a name of FORMATS, for a transformers tokenizer, or that in a file.

    Raises:
        ValueError: The name is unknown and no file, or the file is not a template.
    """
    if name in FORMATS:
        template, tokens = FORMATS[name]
        return ChatFormat((BOS if leading_id(hf) is not None else "") + template.strip(), tokens)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template is {name!r}, which is neither a file nor one of {', '.join(FORMATS)}")
    try:
        template = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file: a chat template is a jinja template") from None
    if not template.strip():
        raise ValueError(f"{path} is empty: a chat template is a jinja template")
    with explain_errors(f"{path} is not a valid jinja template"):
        check_syntax(template)
    return ChatFormat(template)
