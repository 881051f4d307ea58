"""The prompts of `jaxlm bench serve`: random words, or the lines of a file. All servers get the same ones.

No prompt begins as another one does, unless a file says so, so that caches of prompts do not help.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jaxlm.bench.serve_load import Prompt

STORIES = Path(__file__).parents[1] / "stories"
CHARACTERS = 4  # of a token of English text, on average
FEWEST_CHARACTERS = 2  # of a token, on average of a prompt
MOST_TOKENS = 2  # of a word


class Prompts(NamedTuple):
    """Prompts of a kind.

    Attributes:
        name: Their name in the tables: tokens of the prompt and of the answer.
        request: Returns the request of a number.
        longest: Tokens of a prompt and its answer at most, by a cautious estimate.
    """

    name: str
    request: Callable[[int], Prompt]
    longest: int


@cache
def words() -> list[str]:
    """The words of three letters and more in the vocabulary of the story model. Most vocabularies have a token for
    each."""
    vocabulary = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{3,}", token))


def random_words(length: int, max_tokens: int) -> Prompts:
    """Prompts of `length` words, which are about as many tokens."""

    def request(number: int) -> Prompt:
        return Prompt(" ".join(random.Random(number).choices(words(), k=length)), max_tokens)

    return Prompts(f"{length}+{max_tokens}", request, MOST_TOKENS * length + max_tokens)


def from_lines(name: str, lines: Sequence[tuple[str | list[int], str | None]], max_tokens: int | None) -> Prompts:
    """The prompts of a file in random order, which repeat after the last one.

    Args:
        name: The name of the file.
        lines: Prompts, and the answers beside them.
        max_tokens: Tokens to generate. None: about as many as the answer beside the prompt has.

    Raises:
        ValueError: max_tokens is None, and a prompt has no answer.
    """
    if max_tokens is None and not all(answer for _, answer in lines):
        raise ValueError(f"{name}: a line has no answer in the field completion: pass -n")
    order = random.Random(0).sample(range(len(lines)), len(lines))

    def tokens(answer: str | None) -> int:
        return max_tokens or max(1, len(answer or "") // CHARACTERS)

    def request(number: int) -> Prompt:
        text, answer = lines[order[number % len(lines)]]
        return Prompt(text, tokens(answer))

    longest = max(
        (len(text) // FEWEST_CHARACTERS if isinstance(text, str) else len(text)) + tokens(answer)
        for text, answer in lines
    )
    return Prompts(f"{name}+{max_tokens or 'answers'}", request, longest)
