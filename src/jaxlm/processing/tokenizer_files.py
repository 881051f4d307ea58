"""Reads tokenizer files. They are checked first, because transformers and tokenizers do not limit memory or time."""

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

_log = logging.getLogger(__name__)
MAX_SPECIAL_TOKENS = 10_000  # the time to add special tokens is quadratic in their number
MAX_GROWTH = 100  # factor by which a tokenizer may lengthen a text
# The steps that lengthen a text, as JSON values or with escaped letters. Most files have none and need no parsing.
_GROWS = re.compile(rb':\s*"(Replace|TemplateProcessing)"|\\u00[4-7]')


def check_growth(path: Path) -> None:
    """Checks how much a tokenizer.json can lengthen a text. A dozen steps can turn one character into gigabytes.

    Raises:
        ValueError: The factor exceeds MAX_GROWTH.
    """
    data = path.read_bytes()
    if not _GROWS.search(data):
        return
    content = json.loads(data)
    for name in ("normalizer", "decoder", "post_processor"):
        if (growth := _growth(content.get(name))) > MAX_GROWTH:
            raise ValueError(f"its {name} can make a text {growth:,.0f} times longer (limit: {MAX_GROWTH})")


def check_special(path: Path, content: dict[str, Any]) -> None:
    """Checks the number of special tokens, which are items of a field or fields of the file.

    Raises:
        ValueError: There are more than MAX_SPECIAL_TOKENS.
    """
    lists = [value for name, value in content.items() if name != "added_tokens_decoder"]
    if any(isinstance(value, list | dict) and len(value) > MAX_SPECIAL_TOKENS for value in [content, *lists]):
        raise ValueError(f"{path} has more than {MAX_SPECIAL_TOKENS:,} special tokens or entries")


def _growth(step: Any) -> float:
    """The factor by which a step, or a list of steps, can lengthen a text."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    if step.get("type") == "Replace":
        old, new = step["pattern"], step["content"]
        # A regular expression can match at every position.
        return max(1, len(new) / len(old["String"])) if old.get("String") else 1 + len(new)
    if step.get("type") == "TemplateProcessing":
        return max(1, sum("Sequence" in piece for piece in step["single"]))
    return math.prod(map(_growth, step.values()))


# Meta's tokenizer.model of Llama 3 has one token per line (base64, rank). The special tokens and the chat template are
# not in the file.
MAX_TOKEN_BYTES = 128  # bytes of a token, as in Meta's file; the size of its merges is quadratic in this
META_SPECIAL_NAMES = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag""".split()  # noqa: SIM905
META_SPECIAL_TOKENS = [f"<|{name}|>" for name in META_SPECIAL_NAMES] + [
    f"<|reserved_special_token_{n}|>" for n in range(3, 248)
]
# The pre-tokenizer's regular expression: Meta's `pat_str`.
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
    """Reads the tokens of a tiktoken file and their ranks, which are the token ids.

    Raises:
        ValueError: The file is damaged or is not a tiktoken file.
    """
    with explain_errors(f"{path} has lines that are not a token and its rank", "download it again"):
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(len(pairs))) or not {bytes([i]) for i in range(256)} <= ranks.keys():
        raise ValueError(f"{path} has missing or duplicate tokens: download it again")
    if max(map(len, ranks)) > MAX_TOKEN_BYTES:
        raise ValueError(f"{path} has a token of more than {MAX_TOKEN_BYTES:,} bytes: download it again")
    return ranks


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """BPE merges from tiktoken ranks, in order of priority.

    A merge has the rank of the token that it produces. Merges that produce the same token are ordered by the ranks of
    their parts.
    """
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        valid = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs += sorted(valid, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def from_tiktoken(path: Path) -> Any:
    """Converts a tiktoken file of Llama 3 to a transformers tokenizer.

    Source: `Tokenizer` and `ChatFormat` in meta-llama/llama-models, models/llama3. Special tokens have the names of
    Llama 3.1.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    ranks = tiktoken_ranks(path)
    characters = {byte: character for character, byte in byte_alphabet().items()}
    names = {token: "".join(map(characters.__getitem__, token)) for token in ranks}
    pairs = [(names[left], names[right]) for left, right in merges(ranks)]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    # ignore_merges: as in tiktoken, a word that is a token is not split.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(META_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in META_SPECIAL_TOKENS])
    bos, eos = META_SPECIAL_TOKENS[:2]
    tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = import_transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=Uncopied(tokenizer), bos_token=bos, eos_token=eos, chat_template=META_CHAT_TEMPLATE)


def import_transformers() -> ModuleType:
    """Imports transformers without its warning that PyTorch is not installed."""

    is_wanted = lambda record: not record.getMessage().startswith("PyTorch was not found")  # noqa: E731
    logger = logging.getLogger("transformers")
    logger.addFilter(is_wanted)
    try:
        import transformers
    finally:
        logger.removeFilter(is_wanted)
    return transformers


class Uncopied:
    """Stands for a tokenizer that transformers copies (copy.deepcopy): its copy is the tokenizer itself.

    A real copy is written as JSON and parsed. For 262,144 tokens that took half of the time and 300 MB.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: Any) -> Any:
        return self.tokenizer


def leading_id(hf: Any) -> int | None:
    """The id that the tokenizer puts before every text; None if there is none."""
    ids = hf.encode("a")
    return ids[0] if ids[:1] != hf.encode("a", add_special_tokens=False)[:1] else None


def eos_ids(*configs: Mapping[str, Any]) -> list[int]:
    """The union of `eos_token_id` of several configs, sorted. The field is an id, a list of ids, or null.

    Raises:
        ValueError: A value is not a token id.
    """
    lists = [ids if isinstance(ids, list) else [ids] for config in configs for ids in [config.get("eos_token_id")]]
    token_ids = [token_id for ids in lists for token_id in ids if token_id is not None]
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise ValueError(
                f"config.json or generation_config.json: {reprlib.repr(token_id)} in eos_token_id is not a token id"
            )
    return sorted(set(token_ids))


def read_json_if_present(path: Path) -> dict:
    """The contents of a JSON file; empty if the file does not exist."""
    return read_json(path) if path.exists() else {}


def load_tokenizer(folder: Path) -> Any:
    """Loads the transformers tokenizer of a folder that has tokenizer.json, tokenizer.model or vocab.json.

    Raises:
        ValueError: A file is invalid or exceeds a limit; the message has its name.
    """
    transformers = import_transformers()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        # Read here too, because the errors of transformers do not name the file.
        check_special(folder / name, read_json_if_present(folder / name))
    if (path := folder / "tokenizer.json").exists():
        # AutoTokenizer may choose a class that replaces the pre-tokenizer of the file.
        with naming_errors(f"{path}, or another tokenizer file in the folder, cannot be read: download it again"):
            check_growth(path)
            hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            ids = hf.encode("a")  # some errors occur only when a text is encoded
        _name_ignored(read_json_if_present(folder / "tokenizer_config.json"), hf, ids)
        return hf
    if (path := folder / "tokenizer.model").exists():
        return from_tokenizer_model(path)
    with naming_errors(f"no tokenizer can be built from {folder / 'vocab.json'}"):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _name_ignored(config: Mapping[str, Any], hf: Any, ids: list[int]) -> None:
    """Logs the fields of tokenizer_config.json that ask for other ids than tokenizer.json gives. transformers 4 applied
    them in the classes of some models; transformers 5 does not where there is a tokenizer.json."""
    plain = hf.encode("a", add_special_tokens=False)
    added = {"add_bos_token": ids[:1] != plain[:1], "add_eos_token": ids[-1:] != plain[-1:]}
    tokens = {"add_bos_token": hf.bos_token_id, "add_eos_token": hf.eos_token_id}
    for name, is_added in added.items():
        if tokens[name] is not None and isinstance(config.get(name), bool) and config[name] != is_added:
            does = "adds" if is_added else "does not add"
            _log.warning(
                "tokenizer_config.json: %s is %s, but tokenizer.json %s this token. tokenizer.json is used",
                name, str(config[name]).lower(), does,
            )  # fmt: skip


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Converts errors of the tokenizers library to ValueError, including PanicException, a BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what} ({type(error).__name__}: {str(error)[:300]})") from error
        raise


def from_tokenizer_model(path: Path) -> Any:
    """Loads a tokenizer.model, in tiktoken format (Llama 3) or SentencePiece's."""
    is_tiktoken = path.read_bytes().startswith(b"IQ== ")  # "!", the first token of such vocabularies
    return from_tiktoken(path) if is_tiktoken else _from_sentencepiece(path)


def _from_sentencepiece(path: Path) -> Any:
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"reading {path} needs two more packages: pip install sentencepiece protobuf") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(str(path))
        hf = import_transformers().AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again, or use a tokenizer.json") from error
    # transformers 5.23 ignores the file's treatment of spaces unless tokenizer_config.json names the right class.
    probe = "Once upon a time, 12 naïve words\nand a line"
    if hf.encode(probe, add_special_tokens=False) != processor.encode(probe):
        raise ValueError(f"transformers and SentencePiece disagree on {path}: use a tokenizer.json instead")
    return hf
