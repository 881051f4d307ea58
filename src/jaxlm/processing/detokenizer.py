"""Token ids to text while they are being generated: nothing half-finished is shown, nothing shown is taken back.

`tokenizers.decoders.DecodeStream` does not serve here (tokenizers 0.23): it takes every U+FFFD at the end for an
unfinished character and so withholds one that the model really wrote, it cannot be asked for the rest at the end, and
some sequences of byte-fallback ids make it raise "Invalid prefix encountered".
"""

import codecs
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.processing.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, a token at a time.

    What `push` and `flush` return adds up to `tokenizer.decode(ids, skip_special)`, cut before the first stop string.
    No piece ends inside a character (it may end between the code points of a joined emoji), and a `push` costs the same
    however long the text has become. The one difference from `decode`: where a run of byte-fallback tokens is not valid
    UTF-8 (an answer cut short by a token limit), `decode` replaces all of the run by U+FFFD. The stream has shown the
    run's whole characters by then, and replaces the rest alone.

    Args:
        tokenizer: a `jaxlm.processing.tokenizer.Tokenizer`.
        stop: one string or several. The text ends before the one that is complete first, and of two complete at once,
            before the longer: how tokens divide the text makes no difference. Text that may begin a stop string is
            withheld until that is decided.
        after: the prompt's ids, when the text continues them: its first word then keeps the space before it.
        skip_special: leave special tokens out of the text; a stop string cannot match them then.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        stop: str | Sequence[str] = (),
        after: Sequence[int] = (),
        skip_special: bool = True,
    ):
        self.stopped: str | None = None
        """The stop string that was met. Nothing is shown from it on."""
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("an empty stop string would end every text at once: leave it out")
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._bytes_of = _byte_level if _is_byte_level(tokenizer.hf) else _byte_fallback
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before = [i for i in after[-1:] if i not in tokenizer.special_ids]  # the last visible token
        self._held = ""  # the end of the text, where it may begin a stop string

    def push(self, token_id: int) -> str:
        """Text that this token makes certain: often a word, and "" inside a character or once `stopped` is set."""
        token_id = int(token_id)
        if self.stopped is not None or token_id in self._skipped:
            return ""
        token = self._tokenizer.hf.convert_ids_to_tokens(token_id)
        if token is None:  # models pad their vocabulary: such ids have no text
            return ""
        raw = self._bytes_of(token)
        text = self._utf8.decode(raw or b"", final=raw is None)
        if raw is None:  # a token's text is what it adds to its neighbor's: decoders strip the space of a lone token
            before = self._tokenizer.decode(self._before, skip_special=False)
            text += self._tokenizer.decode([*self._before, token_id], skip_special=False)[len(before) :]
        self._before = [token_id]
        return self._release(text)

    def flush(self) -> str:
        """The text withheld so far, at the end of the ids. A character that never became whole is U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        """Take in new text; give back what no stop string can claim any more."""
        if not self._stop or not new:
            return new
        text = self._held + new
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            return text[:at]
        longest = min(len(text), max(map(len, self._stop)) - 1)
        tails = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        shown = len(text) - next(tails, 0)
        self._held = text[shown:]
        return text[:shown]


def _is_byte_level(hf: Any) -> bool:
    from tokenizers.decoders import ByteLevel

    return hf.is_fast and isinstance(hf.backend_tokenizer.decoder, ByteLevel)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order
    (GPT-2, Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # an added token, spelled as it is


def _byte_fallback(token: str) -> bytes | None:
    """The byte of "<0xE4>"; None for a token that has a text of its own."""
    return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else None
