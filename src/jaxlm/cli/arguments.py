"""Checks a command line before tyro parses it, so that errors are one line with the name of the correct flag.

A flag that takes a list accepts several values (`--stop a b`), and may be repeated (`--stop a --stop b`). It takes all
values up to the next flag if no positional argument can follow: the command has none, they were given before the flag,
or `--` stands before them. Otherwise it takes one value, and the next one is the positional argument. So
`jaxlm generate --stop a "prompt"` has one stop text; `jaxlm generate "prompt" --stop a b` and
`jaxlm generate --stop a b -- "prompt"` have two.
"""

from collections import deque
from typing import Any, Literal, get_args, get_origin

from jaxlm.cli.errors import usage
from jaxlm.cli.flags import Flag
from jaxlm.cli.suggestions import translation, unknown_flag


class Arguments:
    """Reads the arguments of one command."""

    def __init__(self, command: str, flags: list[Flag], negations: bool = False):
        """negations: whether every switch has a `--no-` form."""
        self.command, self.flags = command, flags
        self.positional = [flag for flag in flags if flag.positional]
        self.named = {name: flag for flag in flags if not flag.positional for name in (flag.name, *flag.aliases)}
        if negations:
            self.named |= {flag.negated(): flag for flag in flags if not (flag.types or flag.positional)}
        self.out: list[str] = []  # flags
        self.free: list[str] = []  # values of positional arguments
        self.rest: deque[str] = deque()

    def normalize(self, argv: list[str]) -> list[str]:
        """Normalizes arguments for tyro: `--flag=value` for each value, then positional arguments after `--`.

        Exits with status 2 for unknown flags, missing or wrong values, and too many positional arguments.
        """
        self.rest = deque(argv)
        unknown = []
        while self.rest:
            arg = self.rest.popleft()
            if arg == "--":
                self.free += self.rest
                break
            if not looks_like_flag(arg):
                self.free.append(arg)
                continue
            name, flag, value = self.match(arg)
            if flag is None:
                unknown.append(unknown_flag(name, self.command, self.flags))
            elif not flag.types:
                if value is not None:
                    usage(f"{name} is a switch and takes no value")
                self.out.append(name)
            else:
                self.take(name, flag, value)
        if unknown:
            usage(*unknown)
        self.check_positional()
        return self.out + (["--", *self.free] if self.free else [])

    def match(self, arg: str) -> tuple[str, Flag | None, str | None]:
        """The name in an argument, the flag of that name, and the value after `=`."""
        name, separator, value = arg.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        flag = self.named.get(name)
        if flag is not None:
            return name, flag, value if separator else None
        short = self.named.get(arg[:2])
        if short is not None and short.types and not translation(name, self.flags):  # -mNAME, but not -max-tokens
            return arg[:2], short, arg[2:]
        return arg.partition("=")[0], None, None

    def take(self, name: str, flag: Flag, value: str | None) -> None:
        """Reads the values of a flag; `value` is the one that `=` attached."""
        width = len(flag.types)
        values = [] if value is None else [value]
        several = flag.repeats and value is None and ("--" in self.rest or not self.can_follow())
        while len(values) % width or not values or several:
            if not self.rest or self.rest[0] == "--" or looks_like_flag(self.rest[0]):
                break
            values.append(self.rest.popleft())
        if len(values) % width or not values:
            usage(f"{name} needs a value: {name} {flag.metavar} (jaxlm {self.command} --help)")
        for start in range(0, len(values), width):
            group = values[start : start + width]
            group = [self.checked_value(name, text, kind) for text, kind in zip(group, flag.types)]
            self.out += [f"{flag.name}={group[0]}", *group[1:]]

    def can_follow(self) -> bool:
        """Whether a positional argument may follow."""
        return bool(self.positional) and len(self.free) < len(self.positional)

    def checked_value(self, name: str, text: str, kind: Any) -> str:
        """The text of a value; a choice in the case in which it is listed. Exits with status 2 if it is not of the
        type."""
        if get_origin(kind) is Literal:
            choices = {choice.lower(): choice for choice in get_args(kind)}
            if text.lower() not in choices:
                usage(f"{name} must be one of {', '.join(get_args(kind))}, not {text!r} (jaxlm {self.command} --help)")
            return choices[text.lower()]
        if kind in (int, float):
            try:
                kind(text)
            except ValueError:
                what = "an integer" if kind is int else "a number"
                usage(f"{name} takes {what}, not {text!r} (jaxlm {self.command} --help)")
        return text

    def check_positional(self) -> None:
        """Exits with status 2 for too many positional arguments or an invalid value of one."""
        for number, (flag, text) in enumerate(zip(self.positional, self.free)):
            self.free[number] = self.checked_value(flag.metavar, text, flag.types[0])
        if len(self.free) > len(self.positional) and not any(flag.repeats for flag in self.positional):
            extra = self.free[len(self.positional)]
            line = " ".join(["jaxlm", self.command, *(flag.metavar for flag in self.positional), "[flags]"])
            quote = "; quote a text with spaces" if self.positional else ""
            takes_model = "-m" in self.named and not any(arg.startswith("--model=") for arg in self.out)
            model = f"; a model is named with -m {extra}" if takes_model and not self.positional else ""
            usage(f"unexpected argument {extra!r}. Usage: {line}{quote}{model}")


def looks_like_flag(arg: str) -> bool:
    """Whether an argument is a flag: dashes and a letter, except numbers such as -inf."""
    body = arg.lstrip("-")
    if arg.startswith("-") and not arg.startswith("--") and body.lower() in ("inf", "infinity", "nan"):
        return False
    return arg.startswith("-") and body[:1].isalpha()
