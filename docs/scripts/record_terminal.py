"""Records docs/pictures/terminal_*.svg from real runs of the commands in a terminal.

    PYTHONPATH=src python docs/scripts/record_terminal.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs the package pyte, a terminal emulator. `jaxlm` must be on PATH. Each recording is a bash in a pseudo-terminal,
into which the input is typed. What it shows at its end becomes the SVG, with the colors of the program. The text
appears in the order in which it was printed, with shorter waits. What a program erases, such as a progress bar, does
not appear. The script fails if a command does not end with status 0.
"""

import json
import os
import pty
import select
import shutil
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fcntl import ioctl
from html import escape
from pathlib import Path
from typing import NamedTuple

import pyte

PICTURES = Path(__file__).parents[1] / "pictures"
PROMPT = "$ "
KEY = 0.035  # seconds between typed keys
LONGEST_WAIT = 0.5  # seconds, in the animation
LONGEST = 8.0  # seconds of an animation; a longer one is faster
TIMEOUT = 300.0
PAUSE = 0.4  # seconds after a prompt, before the next line is typed
# 80 columns would be letters of 7 pixels on a phone.
COLUMNS, ROWS = 60, 60
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Recording:
    """One picture.

    Attributes:
        name: Its file is terminal_<name>.svg.
        title: The title of the window, and the first words for screen readers.
        command: The lines of the command that is typed.
        input: Lines typed into the command, each when it shows its prompt `>`.
    """

    name: str
    title: str
    command: tuple[str, ...]
    input: tuple[str, ...] = ()


RECORDINGS = (
    Recording("generate", "jaxlm generate", ('jaxlm generate "Once upon a time"',)),
    Recording(
        "chat",
        "jaxlm chat",
        (f"jaxlm chat -m {MODEL}",),
        ("What is the capital of France?", "Write one sentence about the moon.", "/exit"),
    ),
    Recording(
        "dry_run",
        "jaxlm finetune --dry-run",
        (
            f"jaxlm finetune -m {MODEL} \\",
            "  --data.train chats.jsonl --data.packing none \\",
            "  --length 64 --dry-run",
        ),
    ),
)
QUESTIONS = {"What is the capital of Italy?": "Rome.", "How many legs does a spider have?": "Eight."}


class Cell(NamedTuple):
    """A character of the screen with its style, and when it was printed."""

    char: str
    color: str
    dim: bool
    bold: bool
    time: float


class Screen(pyte.Screen):
    """A screen whose characters remember that they are dim, which pyte does not."""

    def select_graphic_rendition(self, *attributes: int, private: bool = False) -> None:
        super().select_graphic_rendition(*attributes)
        style = self.cursor.attrs
        if 2 in attributes:
            self.cursor.attrs = style._replace(blink=True)  # nothing here blinks
        elif 0 in attributes or 22 in attributes or not attributes:
            self.cursor.attrs = style._replace(blink=False)


@dataclass
class Terminal:
    """A bash in a pseudo-terminal, and what it shows."""

    columns: int
    rows: int
    folder: Path
    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    clock: float = 0.0  # of the animation
    last: float = 0.0  # when something was printed last

    def __post_init__(self) -> None:
        self.screen = Screen(self.columns, self.rows)
        self.stream = pyte.ByteStream(self.screen)
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(self.folder)
            environment = {**os.environ, "TERM": "xterm-256color", "PS1": PROMPT, "PS2": "> ", "HISTFILE": "/dev/null"}
            environment.pop("NO_COLOR", None)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"], environment)
        ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", self.rows, self.columns, 0, 0))
        self.last = time.monotonic()

    def read(self, seconds: float) -> bool:
        """Shows what is printed within this time. False if nothing is."""
        if not select.select([self.file], [], [], seconds)[0]:
            return False
        data = os.read(self.file, 65536)
        now = time.monotonic()
        self.clock += min(now - self.last, LONGEST_WAIT)
        self.last = now
        self.stream.feed(data)
        for y in self.screen.dirty:
            for x in range(self.columns):
                self._update(x, y)
        self.screen.dirty.clear()
        return True

    def _update(self, x: int, y: int) -> None:
        char = self.screen.buffer[y][x]
        new = Cell(char.data, char.fg, char.blink, char.bold, self.clock)
        old = self.cells.get((x, y))
        if old is None or old[:4] != new[:4]:
            self.cells[x, y] = new

    def wait(self, done: Callable[[str], bool]) -> None:
        """Waits until the line with the cursor is that for which `done` is true, and nothing more is printed."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if not self.read(0.2) and done(self.screen.display[self.screen.cursor.y].rstrip()):
                return
        raise TimeoutError("the terminal shows:\n" + "\n".join(line.rstrip() for line in self.screen.display))

    def type(self, line: str) -> None:
        """Types a line key by key."""
        self.clock += PAUSE
        for key in line + "\r":
            os.write(self.file, key.encode())
            self.last = time.monotonic() - KEY
            self.read(1.0)

    def status(self) -> int:
        """Ends the shell with the status of its last command."""
        os.write(self.file, b"exit $?\r")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def record(recording: Recording, folder: Path, columns: int, rows: int) -> Terminal:
    """Runs a recording.

    Raises:
        RuntimeError: The command did not end with status 0.
    """
    terminal = Terminal(columns, rows, folder)
    terminal.wait(lambda line: line == PROMPT.strip())
    for line in recording.command[:-1]:
        terminal.type(line)
        terminal.wait(lambda line: line == ">")
    terminal.type(recording.command[-1])
    for line in recording.input:
        terminal.wait(lambda line: line == ">")
        terminal.type(line)
    terminal.wait(lambda line: line == PROMPT.strip())
    cells = dict(terminal.cells)
    if status := terminal.status():
        raise RuntimeError(f"{recording.title} ended with status {status}")
    terminal.cells = cells
    return terminal


class Run(NamedTuple):
    """Characters of one line with one style, printed at one time."""

    x: int
    y: int
    text: str
    cell: Cell


def runs(cells: dict[tuple[int, int], Cell], columns: int, rows: int) -> Iterator[Run]:
    """The text of a screen as runs, without spaces at their ends."""
    for y in range(rows):
        x = 0
        while x < columns:
            first = cells.get((x, y))
            end = x + 1
            if first is None or first.char == " ":
                x = end
                continue
            while end < columns and (next_cell := cells.get((end, y))) is not None and next_cell[1:] == first[1:]:
                end += 1
            text = "".join(cells[i, y].char for i in range(x, end))
            yield Run(x, y, text.rstrip(), first)
            x = end


WIDTH, HEIGHT, SIZE, MARGIN, TOP = 8.4, 19.0, 14.0, 18.0, 46.0
STYLE = (
    """
.page { fill: #10151c; stroke: #3d444d }
text { font: %gpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d7dde5;
  white-space: pre }
.title { fill: #9198a1; text-anchor: middle }
.dim { fill: #9aa4af }
.bold { font-weight: 700 }
.green, .brightgreen { fill: #56d364 }
.cyan, .brightcyan { fill: #56d4dd }
.red, .brightred { fill: #ff8a80 }
.brown, .yellow, .brightyellow { fill: #e3b341 }
.blue, .brightblue { fill: #79c0ff }
.magenta, .brightmagenta { fill: #e2a5ff }
.brightblack { fill: #9198a1 }
@media (prefers-reduced-motion: no-preference) {
  .t { animation: show 0.01s both }
  @keyframes show { from { visibility: hidden } to { visibility: visible } } }
""".strip()
    % SIZE
)


def svg(terminal: Terminal, title: str) -> str:
    """The SVG of what a terminal shows."""
    lines = [line.rstrip() for line in terminal.screen.display]
    shown = list(runs(terminal.cells, terminal.columns, terminal.rows))
    rows = max(run.y for run in shown) + 1
    width, height = 2 * MARGIN + terminal.columns * WIDTH, TOP + rows * HEIGHT + MARGIN - 4
    elements, speed = [], min(1.0, LONGEST / terminal.clock)
    for run in shown:
        style = ["t", *(["dim"] if run.cell.dim else []), *(["bold"] if run.cell.bold else [])]
        style += [] if run.cell.color == "default" else [run.cell.color]
        x, y = MARGIN + run.x * WIDTH, TOP + run.y * HEIGHT + 14
        elements.append(
            f'<text x="{x:.5g}" y="{y:g}" textLength="{len(run.text) * WIDTH:.5g}" class="{" ".join(style)}" '
            f'style="animation-delay:{run.cell.time * speed:.2f}s">{escape(run.text)}</text>'
        )
    body, content = "\n".join(elements), escape("\n".join(lines[:rows]))
    circles = "".join(f'<circle cx="{22 + 18 * i}" cy="22" r="5.5" fill="#3d444d"/>' for i in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="title text">\n'
        f'<title id="title">{escape(title)} in a terminal</title>\n<desc id="text">{content}</desc>\n'
        f"<style>\n{STYLE}\n</style>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="10" class="page"/>\n'
        f'{circles}\n<text x="{width / 2:g}" y="27" class="title">{escape(title)}</text>\n{body}\n</svg>\n'
    )


def main(model: str, names: list[str]) -> None:
    """Records all pictures, or those of these names.

    Args:
        model: The GGUF file of the chat model.
        names: Names of recordings.
    """
    for recording in RECORDINGS:
        if names and recording.name not in names:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / MODEL).symlink_to(Path(model).absolute())
            rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS.items()]
            (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows * 100))
            terminal = record(recording, folder, COLUMNS, ROWS)
        path = PICTURES / f"terminal_{recording.name}.svg"
        path.write_text(svg(terminal, recording.title), encoding="utf-8")
        print(path, f"{path.stat().st_size:,} bytes, {terminal.clock:.1f} s")


if __name__ == "__main__":
    if shutil.which("jaxlm") is None:
        sys.exit("jaxlm is not on PATH")
    main(sys.argv[1], sys.argv[2:])
