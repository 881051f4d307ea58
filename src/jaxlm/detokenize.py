"""Token ids to text while they are being generated: nothing half-finished is shown, nothing shown is taken back.

`tokenizers.decoders.DecodeStream` does not serve here: it takes every trailing U+FFFD for an unfinished character, so
that one which the model really wrote is withheld, it has no way to ask for the rest at the end, and with byte-fallback
vocabularies some sequences of ids make it raise "Invalid prefix encountered" (tokenizers 0.23).
"""

import codecs
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, a token at a time.

    The pieces that `push` and `flush` return add up to `tokenizer.decode(ids, skip_special)`, cut before the first
    stop string. A piece never ends inside a character; it may end between the code points of a joined emoji. A `push`
    costs the same however long the text has become. One exception to the equality: where ids of a byte-fallback
    vocabulary are no valid UTF-8 (a text cut short by max_tokens, say), `decode` replaces the whole run of byte tokens
    by U+FFFD; the stream has shown the valid characters of that run by then and replaces the invalid bytes alone.

    Args:
        tokenizer: a `jaxlm.tokenizer.Tokenizer`.
        stop: one string or several. The text ends before the stop string that is complete first; of two that end
            at the same place, before the longer. Which tokens carry the text makes no difference. Text that may turn out to
            begin a stop string is withheld until that is decided.
        skip_special: leave special tokens out of the text (stop strings are then not looked for in them).

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: "Tokenizer", stop: str | Sequence[str] = (), skip_special: bool = True):
        self.stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stops:
            raise ValueError("an empty stop string would end every text before it begins: leave it out")
        self.stopped: str | None = None  # the stop string that ended the text
        self._pieces = _byte_pieces(tokenizer) if tokenizer.byte_level else _Pieces(tokenizer)
        self._visible = tokenizer.token_filter(skip_special)
        self._held = ""  # the end of the text so far, if it may begin a stop string

    def push(self, token_id: int) -> str:
        """The text that this token makes certain: often a word, "" inside a character or after the end."""
        if self.stopped is not None or not self._visible(int(token_id)):
            return ""
        return self._release(self._pieces.push(int(token_id)))

    def flush(self) -> str:
        """The rest at the end of the ids: what was withheld, with U+FFFD for a character that never became complete."""
        if self.stopped is not None:
            return ""
        text = self._release(self._pieces.flush())
        text, self._held = text + self._held, ""
        return text
