"""Streaming detokenizer: token ids to text during generation. No incomplete character is emitted.

`tokenizers.decoders.DecodeStream` (tokenizers 0.23) has three defects that rule it out: it withholds a U+FFFD that the
model generated, because it takes every U+FFFD at the end for an incomplete character; it cannot be flushed at the end;
and some sequences of byte-fallback ids raise "Invalid prefix encountered".
"""

import codecs
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.processing.tokenizer import Tokenizer


class TextStream:
    """Detokenizes one sequence, one token at a time.

    The concatenated results of `push` and `flush` equal `tokenizer.decode(ids, skip_special)`, truncated before the
    first stop string. No result ends inside a character, but it may end between the code points of a joined emoji. The
    cost of a `push` does not depend on the length of the text.

    There is one difference from `decode`. If a run of byte-fallback tokens is not valid UTF-8 (such as an answer
    truncated by a token limit), `decode` replaces the whole run by U+FFFD. The stream has already returned the complete
    characters of the run, and replaces only the remaining bytes.

    Args:
        tokenizer: A `jaxlm.processing.tokenizer.Tokenizer`.
        stop: One or several stop strings. The text ends before the one that is completed first; of two completed by the
            same character, before the longer one. The result does not depend on token boundaries. Text that may be the
            beginning of a stop string is withheld until more text decides it.
        after: The token ids of the prompt, if the text continues it. The first word then keeps its leading space.
        skip_special: Omit special tokens from the text. Stop strings then cannot match them.

    Attributes:
        stopped: The stop string that was found, or None. After it, `push` and `flush` return "".

    Raises:
        ValueError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        stop: str | Sequence[str] = (),
        after: Sequence[int] = (),
        skip_special: bool = True,
    ):
        self.stopped: str | None = None
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("an empty stop string matches any text: remove it from stop (--stop)")
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._bytes_of = bytes_of_byte_level if is_byte_level(tokenizer.hf) else bytes_of_fallback
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before = [i for i in after[-1:] if i not in tokenizer.special_ids]  # the previous token in the text
        self._withheld = ""  # the end of the text, which may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Returns the text that this token completes, "" inside a character or after a stop string."""
        token_id = int(token_id)
        if self.stopped is not None or token_id in self._skipped:
            return ""
        token = self._tokenizer.hf.convert_ids_to_tokens(token_id)
        if token is None:  # padding of the vocabulary: the id has no text
            return ""
        raw = self._bytes_of(token)
        text = self._utf8.decode(raw or b"", final=raw is None)
        if raw is None:  # decode it with the previous token: decoders strip the leading space of a single token
            before = self._tokenizer.decode(self._before, skip_special=False)
            text += self._tokenizer.decode([*self._before, token_id], skip_special=False)[len(before) :]
        self._before = [token_id]
        return self._release(text)

    def flush(self) -> str:
        """Returns the withheld text at the end of the sequence. An incomplete character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        if self.stopped is None:
            text, self._withheld = text + self._withheld, ""
        return text

    def _release(self, new: str) -> str:
        """Adds new text, and returns the text that cannot be part of a stop string any more."""
        if not self._stop or not new:
            return new
        text = self._withheld + new
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            return text[:at]
        longest = min(len(text), max(map(len, self._stop)) - 1)
        tails = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        released = len(text) - next(tails, 0)
        self._withheld = text[released:]
        return text[:released]


def is_byte_level(hf: Any) -> bool:
    """Whether the characters of a transformers tokenizer's tokens stand for bytes (`byte_alphabet`)."""
    from tokenizers.decoders import ByteLevel

    return hf.is_fast and isinstance(hf.backend_tokenizer.decoder, ByteLevel)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Maps the characters of a byte-level vocabulary to bytes.

    Printable Latin-1 characters represent their own byte. The characters from U+0100 represent the other bytes, in
    order (GPT-2, Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def bytes_of_byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary."""
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # an added token is stored as plain text


def bytes_of_fallback(token: str) -> bytes | None:
    """The byte of a byte-fallback token ("<0xE4>"); None for other tokens."""
    return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else None
