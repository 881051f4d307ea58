"""Meta's tokenizer.model of Llama 3: a line a token (base64, rank); its special tokens and its chat are not in it."""

import base64
from pathlib import Path
from typing import Any

from jaxlm.detokenize import byte_alphabet

LONGEST = 128  # bytes of a token, as in Meta's; its merges take as much room as its square

NAMES = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id
reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag""".split()  # noqa: SIM905
SPECIAL = [f"<|{name}|>" for name in NAMES] + [f"<|reserved_special_token_{n}|>" for n in range(3, 248)]
# How a text is cut into pieces, each of which is merged by itself: Meta's `pat_str`.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
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


def merges(found: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs of tokens that are joined, the earliest first. What two tokens make has the rank of the whole; of the ways
    to make one token, the pair whose own ranks are lowest comes first."""
    pairs = []
    for token in sorted(found, key=found.__getitem__):
        cut = ((token[:at], token[at:]) for at in range(1, len(token)))
        both = [(left, right) for left, right in cut if left in found and right in found]
        pairs += sorted(both, key=lambda pair: (found[pair[0]], found[pair[1]]))
    return pairs


def from_tiktoken(path: Path) -> Any:
    """The tokenizer of transformers that reads as this file's does.

    Source: `Tokenizer` and `ChatFormat` in meta-llama/llama-models, models/llama3; special tokens named as in 3.1.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    from jaxlm.tokenizer import import_transformers

    found = ranks(path)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    names = {token: "".join(map(letters.__getitem__, token)) for token in found}
    joined = [(names[left], names[right]) for left, right in merges(found)]
    vocabulary = {names[token]: rank for token, rank in found.items()}
    # A piece that is a token is that token, whatever merges would make of it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=joined, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    bos, eos = SPECIAL[:2]
    tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = import_transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=CHAT)
