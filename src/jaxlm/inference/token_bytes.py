"""The bytes of every token, for grammars over bytes. Special and added tokens have no text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlm.processing.detokenizer import byte_alphabet

if TYPE_CHECKING:
    from jaxlm.processing.tokenizer import Tokenizer

SPECIAL = b"\xff"  # llguidance's mark before the name of a special token; no UTF-8 text has this byte
SPACE = "▁"  # in SentencePiece's tokens
UTF8_BYTES = frozenset(bytes([byte]) for byte in [*range(0xC0), *range(0xC2, 0xF5)])  # the others are in no text
PROBE = 'A probe: {"name": [1, 23.5, -4e10], "ok": true}\n'


def table(tokenizer: "Tokenizer", size: int, stop_ids: Sequence[int] = ()) -> list[bytes]:
    """The bytes of the tokens 0 to `size` - 1. Ids without a token have none.

    Special tokens, stop tokens and added tokens are SPECIAL and their name. Added tokens that are blanks are text:
    Gemma has runs of spaces and of line breaks.

    Raises:
        ValueError: The tokenizer is neither byte-level BPE nor SentencePiece's.
    """
    hf = tokenizer.hf
    is_byte_level = _is_byte_level(hf)
    added = hf.added_tokens_decoder
    text_of = str.encode if is_byte_level else _sentencepiece  # of an added token
    special = {*stop_ids, *hf.all_special_ids}
    special |= {i for i, token in added.items() if token.special or text_of(token.content).strip()}
    tokens = [b""] * size
    for name, i in [*hf.get_vocab().items(), *((token.content, i) for i, token in added.items())]:
        if 0 <= i < size:
            bytes_of = text_of if i in added else _byte_level if is_byte_level else _sentencepiece
            tokens[i] = SPECIAL + name.encode() if i in special else bytes_of(name)
    _check(hf, tokens)
    return tokens


def _is_byte_level(hf: Any) -> bool:
    """Whether the decoder, or a part of it, is that of byte-level BPE."""
    return hf.is_fast and "ByteLevel" in str(hf.backend_tokenizer.decoder)


def _byte_level(token: str) -> bytes:
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])  # byte fallback
        except ValueError:
            pass
    return token.replace(SPACE, " ").encode()


def _check(hf: Any, tokens: list[bytes]) -> None:
    """Checks that the tokens of a text make the text."""
    kind = type(hf).__name__
    if hf.is_fast:
        ids = hf.backend_tokenizer.encode(PROBE, add_special_tokens=False).ids
        made = b"".join(tokens[i] for i in ids if i < len(tokens))
        if made.removeprefix(b" ") == PROBE.encode() or hf.unk_token_id in ids:
            return
        kind = type(hf.backend_tokenizer.model).__name__
    raise ValueError(
        f"structured output does not support this kind of tokenizer ({kind}), but byte-level BPE and SentencePiece"
    )


class Encoder:
    """Tokenizes texts that a grammar leaves no choice about, for llguidance.

    Attributes:
        tokens: Bytes by id.
        eos_token_id, bos_token_id, special_token_ids: Read by llguidance.
    """

    def __init__(self, tokenizer: "Tokenizer", tokens: list[bytes], eos_token_id: int):
        self.tokens, self.eos_token_id = tokens, eos_token_id
        self.bos_token_id: int | None = None
        self.special_token_ids: list[int] = []  # they are marked in `tokens`
        self._backend = tokenizer.hf.backend_tokenizer
        texts = ((token, i) for i, token in enumerate(tokens) if token and not token.startswith(SPECIAL))
        self._ids = dict(reversed(list(texts)))  # the first of equal tokens counts
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Ids whose bytes are exactly `text`: the tokenizer's own where it adds no space and sees no special token,
        else the longest token at each position. No exception is raised: llguidance would panic."""
        try:
            ids = self._backend.encode(text.decode(), add_special_tokens=False).ids
        except Exception:
            ids = []
        size = len(self.tokens)
        if ids and max(ids) < size and b"".join([self.tokens[i] for i in ids]) == text:
            return ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids
