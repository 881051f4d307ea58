"""What is looked at in a tokenizer's files before transformers and tokenizers read them: nothing can stop them then."""

import base64
import json
import logging
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.checkpoint.safetensors import read_json
from jaxlm.processing.detokenizer import byte_alphabet

MAX_SPECIAL_TOKENS = 10_000  # special tokens: adding one takes as long as there are others
MAX_GROWTH = 100  # times that a text may become longer on its way through the tokenizer
# As a value, or with letters written as escapes; most files have neither and need no parsing.
_GROWS = re.compile(rb':\s*"(Replace|TemplateProcessing)"|\\u00[4-7]')


def check_growth(path: Path) -> None:
    """ValueError for steps that together make a text many times longer: a dozen can make gigabytes of one letter."""
    data = path.read_bytes()
    if not _GROWS.search(data):
        return
    whole = json.loads(data)
    for name in ("normalizer", "decoder", "post_processor"):
        if (grown := _growth(whole.get(name))) > MAX_GROWTH:
            raise ValueError(f"its {name} may make a text {grown:,.0f} times longer, more than {MAX_GROWTH}")


def check_special(path: Path, content: dict[str, Any]) -> None:
    """ValueError for more special tokens than any model has, in the fields of a file or as its fields."""
    lists = [value for name, value in content.items() if name != "added_tokens_decoder"]
    if any(isinstance(value, list | dict) and len(value) > MAX_SPECIAL_TOKENS for value in [content, *lists]):
        raise ValueError(
            f"{path} names more than {MAX_SPECIAL_TOKENS:,} special tokens, or holds as many of something else"
        )


def _growth(step: Any) -> float:
    """How many times longer a step, or several one after the other, can make a text."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    if step.get("type") == "Replace":
        old, new = step["pattern"], step["content"]
        # An expression may match at every place.
        return max(1, len(new) / len(old["String"])) if old.get("String") else 1 + len(new)
    if step.get("type") == "TemplateProcessing":
        return max(1, sum("Sequence" in piece for piece in step["single"]))
    return math.prod(map(_growth, step.values()))


# Meta's tokenizer.model of Llama 3: a line a token (base64, rank); its special tokens and chat template are not in it.
MAX_TOKEN_BYTES = 128  # bytes of a token, as in Meta's; its merges take as much room as its square


META_SPECIAL_NAMES = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag""".split()  # noqa: SIM905


META_SPECIAL_TOKENS = [f"<|{name}|>" for name in META_SPECIAL_NAMES] + [
    f"<|reserved_special_token_{n}|>" for n in range(3, 248)
]


# How a text is cut into pieces, each of which is merged by itself: Meta's `pat_str`.
META_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
META_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """The tokens, with the rank of each, which is its id; ValueError for a file that no merges can be made of."""
    with explain_errors(f"{path} has lines that are not a token and its rank", "download it again"):
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        found = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(found.values()) != list(range(len(pairs))) or not {bytes([i]) for i in range(256)} <= found.keys():
        raise ValueError(f"{path} lacks tokens, or has some twice: download it again")
    if max(map(len, found)) > MAX_TOKEN_BYTES:
        raise ValueError(f"{path} has a token of more than {MAX_TOKEN_BYTES:,} bytes: download it again")
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

    found = tiktoken_ranks(path)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    names = {token: "".join(map(letters.__getitem__, token)) for token in found}
    joined = [(names[left], names[right]) for left, right in merges(found)]
    vocabulary = {names[token]: rank for token, rank in found.items()}
    # A piece that is a token is that token, whatever merges would make of it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=joined, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(META_WORDS), behavior="isolated")
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in META_SPECIAL_TOKENS])
    bos, eos = META_SPECIAL_TOKENS[:2]
    tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = import_transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=META_CHAT_TEMPLATE)


def import_transformers() -> ModuleType:
    """transformers, without the advice to install PyTorch that it logs when imported where there is none."""

    is_wanted = lambda record: not record.getMessage().startswith("PyTorch was not found")  # noqa: E731
    logger = logging.getLogger("transformers")
    logger.addFilter(is_wanted)
    try:
        import transformers
    finally:
        logger.removeFilter(is_wanted)
    return transformers


def leading_id(hf: Any) -> int | None:
    """The id that this tokenizer puts in front of every text."""
    ids = hf.encode("a")
    return ids[0] if ids[:1] != hf.encode("a", add_special_tokens=False)[:1] else None


def eos_ids(*configs: Mapping[str, Any]) -> list[int]:
    """The ids in the `eos_token_id` of any of these, which may be an id, a list or null; sorted."""
    given = [ids if isinstance(ids, list) else [ids] for config in configs for ids in [config.get("eos_token_id")]]
    found = [token_id for ids in given for token_id in ids if token_id is not None]
    for token_id in found:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise ValueError(
                f"config.json or generation_config.json: {reprlib.repr(token_id)} in eos_token_id is no token id"
            )
    return sorted(set(found))


def read_json_if_present(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def load_tokenizer(folder: Path) -> Any:
    transformers = import_transformers()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        check_special(
            folder / name, read_json_if_present(folder / name)
        )  # transformers reads these itself; its errors name no file
    if (path := folder / "tokenizer.json").exists():
        # AutoTokenizer would choose a class that rebuilds the pre-tokenizer from rules of its own.
        with naming_errors(f"{path}, or a file beside it, cannot be read: download it again"):
            check_growth(path)
            hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            hf.encode("a")  # what is wrong may not show before
            return hf
    if (path := folder / "tokenizer.model").exists():
        return from_tokenizer_model(path)
    with naming_errors(f"no tokenizer can be made of {folder / 'vocab.json'}"):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """ValueError for whatever the tokenizers library raises: bare Exceptions, and PanicExceptions that are none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what} ({type(error).__name__}: {str(error)[:300]})") from error
        raise


def from_tokenizer_model(path: Path) -> Any:
    is_tiktoken = path.read_bytes().startswith(b"IQ== ")  # "!", the first token of such vocabularies
    return from_tiktoken(path) if is_tiktoken else _from_sentencepiece(path)


def _from_sentencepiece(path: Path) -> Any:
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"reading {path} takes two more packages: pip install sentencepiece protobuf") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(str(path))
        hf = import_transformers().AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again, or a tokenizer.json") from error
    # transformers 5.23 loses what the file says about spaces unless tokenizer_config.json names the right class.
    probe = "Once upon a time, 12 naïve words\nand a line"
    if hf.encode(probe, add_special_tokens=False) != processor.encode(probe):
        raise ValueError(f"transformers does not read {path} as SentencePiece does: a tokenizer.json is needed")
    return hf
