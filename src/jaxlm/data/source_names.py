"""What the names of data sources say beside the source: weights of a mixture, and sets of validation data."""

import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from jaxlm.data.readers import READERS, kind


def parse_weights(names: Sequence[str]) -> list[tuple[str, float | None]]:
    """Returns the names of sources and their weights: "a.jsonl=0.7" has the weight 0.7. A file of this name has none.

    Raises:
        ValueError: A weight is not a positive number, or some of several names have none.
    """
    for name in names:
        _check_weight(name)
    found = [_weighted(name) for name in names]
    if (without := [name for name, weight in found if weight is None]) and len(without) < len(found):
        raise ValueError(f"{without[0]} has no weight: give each source one ({without[0]}=0.5), or none of them")
    return found


def _check_weight(name: str) -> None:
    """Raises ValueError for a source with a weight in another form, such as "a.jsonl=70%" or "a.jsonl:0.7"."""
    source, sign, weight = name.rpartition("=" if "=" in name else ":")
    is_source = kind(Path(source)) in READERS or (bool(source) and Path(source).expanduser().is_dir())
    is_weight = sign == "=" and _is_number(weight)
    if is_source and not is_weight and kind(Path(weight)) not in READERS and not _exists(name):
        raise ValueError(f"{name!r} is no file, and no name with a weight: write {source}=0.7")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _weighted(name: str) -> tuple[str, float | None]:
    source, equals, text = name.rpartition("=")
    if not equals or not _is_number(text) or _exists(name):
        return name, None
    weight = float(text)
    if not source or not 0 < weight < float("inf"):
        raise ValueError(f"the weight in {name!r} must be a positive number: write NAME=0.7")
    return source, weight


def group_named(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns validation sources by the name of their set: "code=code.jsonl" is of the set code. Sources without a name
    are of the set "". A file of this name is a source without a name.

    Raises:
        ValueError: A source has a weight.
    """
    sets: dict[str, list[str]] = {}
    for text in names:
        _check_weight(text)
        if _weighted(text)[1] is not None:
            raise ValueError(f"{text} has a weight, which only training data have: omit it")
        match = None if _exists(text) else re.fullmatch(r"([A-Za-z][\w-]*)=(.+)", text)
        name, source = (match[1], match[2]) if match else ("", text)
        sets.setdefault(name, []).append(source)
    return sets


def short_names(names: Sequence[str]) -> list[str]:
    """Returns distinct names of sources for metrics: "chat" for data/chat.jsonl."""
    short: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w-]+", "_", Path(name).name.partition(".")[0]).strip("_") or "data"
        numbered = (f"{plain}_{n}" for n in itertools.count(2))
        short.append(next(one for one in (plain, *itertools.islice(numbered, len(names))) if one not in short))
    return short


def _exists(name: str) -> bool:
    """Whether there is a file or folder of this name, or one that matches it."""
    path = Path(name).expanduser()
    return path.exists() or bool(glob.has_magic(name) and next(glob.iglob(str(path), recursive=True), None))
