"""Errors that name what failed, where, and how to fix it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explain_errors(
    what: str, hint: str = "", on: type[BaseException] | tuple[type[BaseException], ...] = ValueError
) -> Iterator[None]:
    """Re-raises errors of the types `on` with what failed and how to fix it.

    The message is `what (reason): hint`, or `what: reason` without a hint. An OSError keeps its type; any other error
    becomes a ValueError.

        with explain_errors(f"{path} is not valid JSON", "download it again"):
            return json.loads(path.read_text())
    """
    try:
        yield
    except on as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        message = f"{what} ({reason}): {hint}" if hint else f"{what}: {reason}"
        raise (type(error) if isinstance(error, OSError) else ValueError)(message) from None


@contextmanager
def explain_missing_package(what: str, install: str, package: str = "") -> Iterator[None]:
    """ValueError instead of an ImportError: what needs the package, and what to pip install."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what} needs {package or error.name}: pip install '{install}'") from None
