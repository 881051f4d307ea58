"""`jaxlm chat`: a conversation in the terminal, or with piped input."""

import dataclasses
import difflib
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxlm.cli import line_input, terminal
from jaxlm.cli.answer import print_answer, statistics
from jaxlm.cli.common import STORIES, GenerationFlags
from jaxlm.cli.errors import explain
from jaxlm.cli.flags import flags_of
from jaxlm.cli.generate import SamplingFlags, template_args
from jaxlm.cli.interrupts import ends_at_once
from jaxlm.cli.suggestions import unknown_option
from jaxlm.cli.terminal import OutputError, note, say
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.processing.chat_template import parse_value

if TYPE_CHECKING:
    from jaxlm.inference.completion import CompletionChunk
    from jaxlm.inference.conversation import Conversation

# Chat models that need no license: parameters, and memory for bfloat16 weights and the KV cache of 4,096 tokens.
CHAT_MODELS = {
    "Qwen/Qwen3-0.6B": ("0.6B", "1.7 GB"),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("1.7B", "4.2 GB"),
    "Qwen/Qwen3-4B": ("4.0B", "8.6 GB"),
}


@dataclass(frozen=True)
class Chat(SamplingFlags, GenerationFlags):
    """Chat with a model in the terminal. /help lists the commands of a chat.

    The KV cache is kept between turns, so that each turn prefills only its new tokens. Ctrl-C stops an answer, Ctrl-D
    ends the chat. Pasted lines are one message, and so are lines between triple quotes. Piped input is answered line by
    line: answers go to stdout, everything else to stderr.

    Sampling parameters that are not given come from the model's generation_config.json; /set changes them.
    """

    system: str | None = None
    """System message. Needs a chat template."""
    no_think: bool = False
    """Turn off the reasoning of a reasoning model."""
    template_arg: tuple[str, ...] = ()
    """Variables of the chat template, KEY=VALUE. VALUE is true, false or none (in any case), JSON or text."""

    def run(self) -> int:
        self.validate()
        if not self.is_single_process:
            raise ValueError("chat runs in a single process; jaxlm generate --prompts FILE.jsonl runs in several")
        model = self.load()
        args = template_args(model, self.template_arg, self.no_think)
        from jaxlm.inference.conversation import Conversation

        if self.system is not None:
            line_input.check_text(self.system, "--system")
        session = ChatSession(Conversation(model, template_args=args, **self.sampling()), self.debug)
        if self.system is not None:
            session.set_system(self.system)
        return session.run()


class ChatSession:
    """The loop of a chat: reads messages, prints answers to stdout and everything else to stderr."""

    def __init__(self, conversation: "Conversation", debug: bool = False):
        self.conversation, self.debug = conversation, debug
        self.model = conversation.model
        self.has_template = conversation.tokenizer.has_template
        self.failed = False
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self.reading = False  # whether a message is read
        with ends_at_once():
            self.read = line_input.reader()
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "show this help", self.help),
            "/system": ("TEXT", "set the system message; without TEXT remove it", self.set_system),
            "/set": ("NAME VALUE", "set a sampling parameter (/set temperature 0.7); without NAME show all",
                     self.set_option),
            "/retry": ("", "generate another answer to the last message", lambda rest: self.show(conversation.retry())),
            "/save": ("FILE", "write the conversation as JSON", self.save),
            "/load": ("FILE", "resume a saved conversation", self.load),
            "/reset": ("", "delete all messages", self.reset),
            "/exit": ("", "end the chat (Ctrl-D)", self.exit),
        }  # fmt: skip

    def run(self) -> int:
        """Runs the chat to its end. Returns 1 if a line of piped input failed, else 0."""
        if self.interactive:
            self.greet()
        try:
            while True:
                self.turn()
        except EOFError:
            return int(self.failed and not self.interactive)

    def turn(self) -> None:
        """Reads and handles one message. Raises EOFError at the end of input."""
        try:
            self.reading = True
            text = line_input.check_text(self.read(), "the message")
            self.reading = False
            with terminal.typing_ahead():
                self.take(text)
        except (EOFError, BrokenPipeError, OutputError):
            raise
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            terminal.end_line()
            self.conversation.stop()
            note(("" if self.reading else "stopped; /retry answers again, ") + "/exit or Ctrl-D ends the chat")
        except Exception as error:
            self.fail(error)

    def greet(self) -> None:
        keys = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat"
        if self.has_template:
            note(f"{self.model.source}: {keys}")
            return
        if self.model.source == str(STORIES):
            note("The story model has 8 million parameters. It cannot answer questions, follow instructions or chat.")
        else:
            note(f"{self.model.source} has no chat template: it continues your text.")
        note("Chat models, with the memory that weights and 4,096 tokens take:")
        for name, (parameters, memory) in CHAT_MODELS.items():
            note(f"  -m {name:36} {parameters} parameters, {memory}")
        note(keys)

    def take(self, text: str) -> None:
        """Handles a command, or answers a message."""
        word, rest = line_input.split_message(text)
        if word:
            if word not in self.commands:
                close = difflib.get_close_matches(word, self.commands, n=1)
                hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(self.commands)}"
                raise ValueError(f"unknown command {word}: {hint} (put a space before a message that begins with /)")
            self.commands[word][2](rest)
        elif rest.strip() or not (self.has_template or not self.conversation.messages):
            self.show(self.conversation.send(rest))

    def show(self, chunks: "Iterator[CompletionChunk]") -> None:
        """Streams an answer, then prints its counts and, if it was truncated, the reason."""
        chunk = print_answer(chunks, self.conversation.tokenizer, self.conversation.opened)
        if chunk is None:
            return
        note(statistics(chunk, self.conversation.prefilled))
        if chunk.prompt_tokens + chunk.generation_tokens >= self.model.config.context:
            note(f"the context of {self.model.config.context:,} tokens is full: /reset starts over")
        elif chunk.finish_reason == "length" and self.has_template:
            note("stopped at max_tokens: /set max_tokens VALUE allows more")

    def fail(self, error: Exception) -> None:
        """Prints the error of a turn. The chat continues."""
        self.failed = True
        if self.debug:
            traceback.print_exception(error)
        say(f"jaxlm: {explain(error)}")

    def help(self, rest: str) -> None:
        width = max(len(f"{name} {argument}") for name, (argument, _, _) in self.commands.items())
        for name, (argument, text, _) in self.commands.items():
            self.reply(f"{f'{name} {argument}':{width}}  {text}")
        self.reply('Any other line is a message. Pasted lines are one message. """ begins a message of several lines, '
                   'which ends with """. Ctrl-C stops an answer.'
                   + ("" if self.has_template else " An empty line continues the text."))  # fmt: skip

    def reply(self, text: str) -> None:
        """Prints what a command was asked for, also with --quiet."""
        say(terminal.dim(text, sys.stderr))

    def exit(self, rest: str) -> None:
        raise EOFError

    def reset(self, rest: str) -> None:
        self.conversation.reset()
        note("all messages deleted")

    def set_system(self, text: str) -> None:
        if not self.has_template:
            raise ValueError(f"a system message needs a chat template; {self.model.source} has none")
        self.conversation.system = text or None
        note(f"system message for the next turns: {text or 'none'}")

    def set_option(self, text: str) -> None:
        match = re.match(r"([^\s=]*)\s*[\s=]\s*(.*)", text, re.DOTALL)
        name, value = match.groups() if match else (text, "")
        name = name.lstrip("-").replace("-", "_")
        if name:
            self.check_option(name)
            if not value:
                raise ValueError(
                    "expected /set NAME VALUE (VALUE none restores the default of the model), or /set alone"
                )
            self.change_option(name, value)
        options = self.conversation.options
        resolved = options.resolve(self.model.generation_config)
        for field in dataclasses.fields(SamplingParams):
            if name in ("", field.name):
                suffix = " (default)" if getattr(options, field.name) == field.default else ""
                line = f"{field.name} {shown(getattr(resolved, field.name))}{suffix}"
                note(line) if name else self.reply(line)

    def check_option(self, name: str) -> None:
        """Raises ValueError for an unknown sampling parameter, with the name that was meant."""
        if name not in [field.name for field in dataclasses.fields(SamplingParams)]:
            raise ValueError(unknown_option(name, flags_of(Chat)))

    def change_option(self, name: str, value: str) -> None:
        try:
            self.conversation.set(name, parse(name, value.strip()))
        except (ValueError, TypeError) as error:
            why = str(error).removesuffix(f" (--{name.replace('_', '-')})").rpartition(": ")[2]
            raise ValueError(f"/set {name} {value.strip()}: {why}") from error

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
            self.reply(f"{'> ' if message['role'] == 'user' else ''}{message['content']}")
        note(f"{len(self.conversation.messages)} messages from {path}")


def parse(name: str, value: str) -> Any:
    """The value of a sampling parameter from its text: none, true, false, JSON, or a string."""
    parsed = parse_value(value)
    if parsed is None or isinstance(parsed, bool):
        return parsed
    if name == "stop" and not isinstance(parsed, str | list):
        return value.strip()  # digits are a string here
    if name == "logit_bias" and isinstance(parsed, dict):
        return {int(token) if token.isdecimal() else token: bias for token, bias in parsed.items()}
    return parsed


def shown(value: Any) -> str:
    """The value of a sampling parameter as `parse` reads it."""
    if value is None or value == ():
        return "none"
    return json.dumps(value)
