"""Log-probabilities in the forms of the protocol: one entry per token in chats, columns in completions."""

from collections.abc import Sequence
from typing import Any

from jaxlm.inference.requests import Logprobs
from jaxlm.processing.detokenizer import TextStream
from jaxlm.processing.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf
Scores = Sequence[Logprobs | None]


def chat_logprobs(scores: Scores | None, tokens: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Log-probabilities in the form of chats. Bytes that are only a part of a character are escaped in `token`."""
    if scores is None:
        return None

    def entry(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="backslashreplace"), "logprob": max(value, LOWEST), "bytes": [*data]}

    return {
        "content": [
            entry(token, s.chosen) | {"top_logprobs": [entry(i, v) for i, v in s.top]}
            for token, s in zip(tokens, scores, strict=True)
            if s is not None
        ]
    }


class CompletionLogprobs:
    """Log-probabilities of one choice of a completion, chunk by chunk.

    `text_offset` is the number of characters of the text before a token. A token that continues a character has the
    offset of that character. A special token that is not in the text has the offset of the next token.
    """

    def __init__(self, tokenizer: Tokenizer | None, ids: Sequence[int], at: int):
        """
        Args:
            tokenizer: The tokenizer. Without one, tokens are named by their ids.
            ids: Token ids of the prompt.
            at: Number of characters of the text before the answer.
        """
        self._tokenizer: Tokenizer | None = tokenizer
        self._stream: TextStream | None = None if tokenizer is None else TextStream(tokenizer, after=ids)
        self._at: int = at
        self._names: dict[int, str] = {}

    def add(self, scores: Scores, tokens: Sequence[int], length: int) -> dict[str, Any]:
        """The columns of the next tokens of the answer. length: characters of the text up to their end."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(min(self._at, length))  # the tokens of a stop string are not in the text
            self._at += 0 if self._stream is None else len(self._stream.push(token))
        return self.columns(scores, tokens, offsets)

    def columns(self, scores: Scores, tokens: Sequence[int], offsets: list[int]) -> dict[str, Any]:
        """The columns of tokens with known offsets."""
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [None if s is None else max(s.chosen, LOWEST) for s in scores],
            "top_logprobs": [None if s is None else self._top(token, s) for token, s in zip(tokens, scores)],
            "text_offset": offsets,
        }

    def _top(self, token: int, scores: Logprobs) -> dict[str, float]:
        """The most likely tokens, and the token itself. Of tokens with the same text, the most likely one counts."""
        found: dict[str, float] = {}
        for i, value in [*scores.top, (token, scores.chosen)]:
            found.setdefault(self._name(i), max(value, LOWEST))
        return found

    def _name(self, token: int) -> str:
        """The text of a token, or its bytes if they are only a part of a character."""
        if token not in self._names:
            self._names[token] = _name_of(self._tokenizer, token)
        return self._names[token]


def _name_of(tokenizer: Tokenizer | None, token: int) -> str:
    if tokenizer is None:
        return f"token_id:{token}"
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + data.decode(errors="backslashreplace")


def echoed(tokenizer: Tokenizer | None, prompt: str | Sequence[int], ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of a prompt, and the offset of each of its tokens.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt as it was given. Token ids are decoded with their special tokens.
        ids: Its token ids, which may begin with a BOS token that is not in the text.
    """
    if tokenizer is None:
        return "", [0] * len(ids)
    stream = TextStream(tokenizer, skip_special=False)
    pieces = [*map(stream.push, ids), stream.flush()]
    text = decoded = "".join(pieces)
    if isinstance(prompt, str):
        text = prompt
    at = len(text) - len(decoded) if decoded.endswith(text) else 0
    offsets = []
    for piece in pieces[:-1]:
        offsets.append(min(max(at, 0), len(text)))
        at += len(piece)
    return text, offsets
