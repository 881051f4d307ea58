"""Meta's tokenizer.model of Llama 3: a line a token (base64, rank); its special tokens and its chat are not in it."""

import base64
from pathlib import Path
from typing import Any

LONGEST = 128  # bytes of a token, as in Meta's; its merges take as much room as its square

NAMES = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id
reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag""".split()  # noqa: SIM905
SPECIAL = [f"<|{name}|>" for name in NAMES] + [f"<|reserved_special_token_{n}|>" for n in range(3, 248)]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def ranks(path: Path) -> dict[bytes, int]:
    """The tokens, with the rank of each, which is its id; ValueError for a file that no merges can be made of."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        found = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{path} has lines that are not a token and its rank: download it again") from None
    if sorted(found.values()) != list(range(len(pairs))) or not {bytes([i]) for i in range(256)} <= found.keys():
        raise ValueError(f"{path} lacks tokens, or has some twice: download it again")
    if max(map(len, found)) > LONGEST:
        raise ValueError(f"{path} has a token of more than {LONGEST:,} bytes: download it again")
    return found


def from_tiktoken(path: Path) -> Any:
    """The tokenizer of transformers that reads as this file's does.

    Source: `Tokenizer` and `ChatFormat` in meta-llama/llama-models, models/llama3; special tokens named as in 3.1.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from jaxlm.processing.tokenizer import import_transformers

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(path: str) -> dict[bytes, int]:  # transformers' own wants the tiktoken package for this
            return ranks(Path(path))

    tokenizer = Converter(str(path), extra_special_tokens=SPECIAL).converted()
    bos, eos = SPECIAL[:2]
    tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = import_transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=CHAT)
