"""`jaxlm chat`: a conversation in the terminal, or with lines from a pipe."""

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxlm.cli.answer import print_answer, statistics
from jaxlm.cli.common import ModelFlags, note
from jaxlm.cli.errors import explain
from jaxlm.cli.generate import SamplingFlags, template_args, warn_ignored
from jaxlm.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxlm.inference.conversation import Conversation
    from jaxlm.inference.generation import CompletionChunk

CHATTING = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B-Instruct", "google/gemma-3-1b-it",
            "allenai/OLMo-2-0425-1B-Instruct")  # fmt: skip


@dataclass(frozen=True)
class Chat(SamplingFlags, ModelFlags):
    """Talk with a model; /help lists what can be typed besides messages.

    Only the new words of each message are computed. Ctrl-C stops an answer, Ctrl-D ends the chat. Lines from a pipe are
    answered one by one.
    """

    system: str | None = None
    """System message, for models with a chat template."""
    no_think: bool = False
    """Ask a thinking model to answer at once."""
    template_arg: tuple[str, ...] = ()
    """KEY=VALUE for the chat template (VALUE is JSON, or a text)."""

    def run(self) -> int:
        self.validate()
        if not self.is_single_process:
            raise ValueError("a chat is with one process: use jaxlm generate, which reads many prompts from --prompts")
        model = self.load()
        args = template_args(model, self.template_arg, self.no_think)
        warn_ignored(model)
        from jaxlm.inference.conversation import Conversation

        talk = Talk(Conversation(model, template_args=args, **self.sampling()), self.debug)
        if self.system is not None:
            talk.set_system(self.system)
        return talk.run()


class Talk:
    """Reads lines, shows answers. Answers go to stdout, all else to stderr."""

    def __init__(self, conversation: "Conversation", debug: bool = False):
        self.conversation, self.debug = conversation, debug
        self.model = conversation.model
        self.chats = conversation.tokenizer.has_template
        self.failed = False
        self.interactive = sys.stdin.isatty()
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "show this", self.help),
            "/system": ("TEXT", "change the system message; without TEXT there is none", self.set_system),
            "/set": ("NAME VALUE", "change an option (/set temperature 0.7); without NAME show all", self.set_option),
            "/retry": ("", "answer the last message again", lambda rest: self.show(conversation.retry())),
            "/save": ("FILE", "write the conversation as JSON", self.save),
            "/load": ("FILE", "go on with a conversation that was saved", self.load),
            "/reset": ("", "forget all messages", self.reset),
            "/exit": ("", "leave; so does Ctrl-D", self.exit),
        }

    def run(self) -> int:
        """The whole chat; -> 1 if something failed and nobody was there to see it."""
        if self.interactive:
            self.greet()
        try:
            while True:
                self.turn()
        except EOFError:
            if self.interactive:
                note("")
            return int(self.failed and not self.interactive)

    def turn(self) -> None:
        """One line and what it asks for; EOFError at the end."""
        try:
            self.take(self.ask())
        except EOFError:
            raise
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print(flush=True)
            self.conversation.stop()
            note("/retry answers again, /exit or Ctrl-D ends the chat")
        except Exception as error:
            self.fail(error)

    def greet(self) -> None:
        if self.chats:
            note(f"{self.model.source}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat")
        else:
            note(
                f"{self.model.source} has no chat template: it continues what you write. Some models that chat: "
                f"{', '.join(CHATTING)}. /help lists the commands, Ctrl-C stops, Ctrl-D ends"
            )
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 (gives input() line editing and the lines typed before)

    def ask(self) -> str:
        """The next line. Where stdout is no terminal, nothing but answers goes there."""
        if self.interactive and sys.stdout.isatty():
            return input("> ")
        if self.interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def take(self, line: str) -> None:
        """A line that was typed: a command, or a message to answer."""
        word, _, rest = line.strip().partition(" ")
        if line.startswith("/"):
            if word not in self.commands:
                raise ValueError(
                    f"there is no command {word}: {', '.join(self.commands)} (a message that begins with / needs a "
                    "space before it)"
                )
            self.commands[word][2](rest.strip())
        elif line.strip() or not (self.chats or not self.conversation.messages):
            self.show(self.conversation.send(line))

    def show(self, pieces: "Iterator[CompletionChunk]") -> None:
        """Streams an answer, then says what is to be said of it."""
        piece = print_answer(pieces, self.conversation.tokenizer, self.conversation.opened)
        if piece is None:
            return
        note(statistics(piece, self.conversation.prefilled))
        if piece.prompt_tokens + piece.generation_tokens >= self.model.config.context:
            note(f"the context of {self.model.config.context:,} tokens is full: /reset begins anew")
        elif piece.finish_reason == "length" and self.chats:
            note("cut off at max_tokens: /set max_tokens VALUE allows more")

    def fail(self, error: Exception) -> None:
        """What went wrong in a turn; the chat goes on."""
        self.failed = True
        if self.debug:
            traceback.print_exception(error)
        text = str(error) if isinstance(error, TypeError) else explain(error)
        print(f"jaxlm: {text}", file=sys.stderr, flush=True)

    def help(self, rest: str) -> None:
        width = max(len(f"{name} {argument}") for name, (argument, _, _) in self.commands.items())
        for name, (argument, text, _) in self.commands.items():
            note(f"{f'{name} {argument}':{width}}  {text}")
        note("All else is a message. Ctrl-C stops an answer." + ("" if self.chats else " An empty line goes on."))

    def exit(self, rest: str) -> None:
        raise EOFError

    def reset(self, rest: str) -> None:
        self.conversation.reset()
        note("all messages are forgotten")

    def set_system(self, text: str) -> None:
        if not self.chats:
            raise ValueError(f"a system message needs a chat template; {self.model.source} has none")
        self.conversation.system = text or None
        note(f"system message from the next turn on: {text or 'none'}")

    def set_option(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name = name.replace("-", "_")
        if name and not value:
            raise ValueError("expected /set NAME VALUE (none gives the option back to the model), or /set alone")
        if name:
            self.conversation.set(name, parse(name, value.strip()))
        given = self.conversation.options
        resolved = given.resolve(self.model.generation_config)
        for field in dataclasses.fields(SamplingParams):
            if name in ("", field.name):
                own = getattr(given, field.name) == field.default
                note(f"{field.name} {shown(getattr(resolved, field.name))}{' (by default)' if own else ''}")

    def save(self, path: str) -> None:
        if not path:
            raise ValueError("expected /save FILE")
        self.conversation.save(path)
        note(f"saved to {path}")

    def load(self, path: str) -> None:
        if not path:
            raise ValueError("expected /load FILE")
        self.conversation.load(path)
        for message in self.conversation.messages:
            note(f"{'> ' if message['role'] == 'user' else ''}{message['content']}")
        note(f"{len(self.conversation.messages)} messages from {path}")


def parse(name: str, value: str) -> Any:
    """The value of an option as it is typed: JSON, "none", or a text."""
    if value.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[value.lower()]
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return value
    if name == "stop" and not isinstance(parsed, str | list):
        return value  # digits are a text here
    if name == "logit_bias" and isinstance(parsed, dict):
        return {int(token) if token.isdecimal() else token: bias for token, bias in parsed.items()}
    return parsed


def shown(value: Any) -> str:
    """An option's value as it would be typed."""
    if value is None or value == ():
        return "none"
    return json.dumps(value)
