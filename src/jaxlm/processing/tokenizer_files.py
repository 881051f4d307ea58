"""What is looked at in a tokenizer's files before transformers and tokenizers read them: nothing can stop them then."""

import json
import math
import re
from pathlib import Path
from typing import Any

SPECIAL = 10_000  # special tokens: adding one takes as long as there are others
GROWTH = 100  # times that a text may become longer on its way through the tokenizer
# As a value, or with letters written as escapes; most files have neither and need no parsing.
_GROWS = re.compile(rb':\s*"(Replace|TemplateProcessing)"|\\u00[4-7]')


def check_growth(path: Path) -> None:
    """ValueError for steps that together make a text many times longer: a dozen can make gigabytes of one letter."""
    data = path.read_bytes()
    if not _GROWS.search(data):
        return
    whole = json.loads(data)
    for name in ("normalizer", "decoder", "post_processor"):
        if (grown := _growth(whole.get(name))) > GROWTH:
            raise ValueError(f"its {name} may make a text {grown:,.0f} times longer, more than {GROWTH}")


def check_special(path: Path, content: dict[str, Any]) -> None:
    """ValueError for more special tokens than any model has, in the fields of a file or as its fields."""
    lists = [value for name, value in content.items() if name != "added_tokens_decoder"]
    if any(isinstance(value, list | dict) and len(value) > SPECIAL for value in [content, *lists]):
        raise ValueError(f"{path} names more than {SPECIAL:,} special tokens, or holds as many of something else")


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
