"""Views of objects in notebooks, as HTML. Colors are those of the notebook, light or dark."""

from collections.abc import Mapping, Sequence
from html import escape

_BOX = "border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: 6px; padding: 0.5em 0.8em; "
_SIZE = "display: inline-block; max-width: 60em; text-align: left; "
_TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; "
_FAINT = "opacity: 0.7; font-size: 0.85em; "


def table(title: str, rows: Mapping[str, str]) -> str:
    """A title and rows of names and values."""
    cells = "".join(
        f'<div style="{_FAINT}">{escape(name)}</div><div>{escape(value)}</div>' for name, value in rows.items()
    )
    grid = "display: grid; grid-template-columns: auto 1fr; column-gap: 1em; align-items: baseline; margin-top: 0.3em; "
    return f'<div style="{_BOX}{_SIZE}"><b>{escape(title)}</b><div style="{grid}">{cells}</div></div>'


def text(content: str, caption: str) -> str:
    """A text as it is, and a caption below it."""
    return (
        f'<div style="{_BOX}{_SIZE}"><div style="{_TEXT}">{escape(content)}</div>'
        f'<div style="{_FAINT}margin-top: 0.4em">{escape(caption)}</div></div>'
    )


def messages(title: str, turns: Sequence[tuple[str, str]]) -> str:
    """A title and the messages of a chat: pairs of a role and a text."""
    parts = "".join(
        f'<div style="margin-top: 0.5em"><div style="{_FAINT}">{escape(role)}</div>'
        f'<div style="{_TEXT}">{escape(content)}</div></div>'
        for role, content in turns
    )
    return f'<div style="{_BOX}{_SIZE}"><b>{escape(title)}</b>{parts}</div>'
