"""The command line: one module per command. A command is a dataclass whose fields are the flags; `run` executes it.

No command imports jax at the top level, so that `jaxlm --help` is fast. This file imports nothing that takes time,
so that Ctrl-C is handled from the beginning.
"""

import contextlib
import itertools
import os
import signal
import sys
import time
from typing import Any, NoReturn

from jaxlm.cli import interrupts
from jaxlm.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Command-line arguments. Default: sys.argv[1:].

    Returns:
        The exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted (128 + the signal).
    """
    argv = sys.argv[1:] if argv is None else argv
    with interrupts.ends_at_once():
        from jaxlm.cli import terminal

    if sys.stdout is None:
        terminal.say("jaxlm: stdout is closed: redirect it to a file, or to /dev/null")
        return 1
    terminal.use_any_encoding()
    command = None
    try:
        with interrupts.ends_at_once():
            command = parse(argv or ["--help"])
        terminal.set_quiet(command.quiet if hasattr(command, "quiet") else False)
        status = command.run() or 0
        sys.stdout.flush()
        return status
    except SystemExit as error:  # --help, or wrong usage
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt as error:
        return end(command, f"\n{str(error) or 'interrupted'}", 128 + getattr(error, "signal", signal.SIGINT))
    except Exception as error:
        return fail(command, error)


def fail(command: Any, error: Exception) -> int:
    """Prints the message for an error and returns the exit status."""
    import traceback

    from jaxlm.cli import terminal
    from jaxlm.cli.errors import explain

    if isinstance(error, BrokenPipeError):  # the reader closed stdout
        terminal.drop_stdout()
        return end(command, "", 0)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        terminal.drop_stdout()
    if command is None and not isinstance(error, OSError):
        raise error
    trace = ""
    if command is not None and command.debug:
        if command.is_single_process:
            raise error
        trace = traceback.format_exc()
    return end(command, f"{trace}jaxlm: {explain(error, command)}", 1)


def entry() -> NoReturn:
    """The entry point of `jaxlm`. After an interrupt, threads may still compute, and a normal exit could crash."""
    interrupts.install()
    status = main()
    if status > 128:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would interrupt the end
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def end(command: Any, text: str, status: int) -> int:
    """Prints a message and returns the exit status. A process of a distributed run skips the normal exit, which waits
    for the other processes, because they may wait for this one. The others are aborted when the coordinator exits:
    after an error it leaves them time to print their own."""
    single = command is None or command.is_single_process
    if text:
        from jaxlm.cli.terminal import devnull
        from jaxlm.devices.distributed import ERROR_GRACE, process_index

        prefix = "" if single or process_index() is None else f"process {process_index()}: "
        text = f"{prefix}{text.strip() if prefix else text}"
        with contextlib.suppress(OSError):  # stderr is closed or full
            print(text, file=(sys.stderr if single else sys.__stderr__) or devnull(), flush=True)
        if status == 1 and prefix and process_index() == 0:
            time.sleep(ERROR_GRACE)
    if not single:
        os._exit(status)
    return status


def commands() -> dict[str, type]:
    """The commands by name."""
    from jaxlm.cli.bench import Bench
    from jaxlm.cli.chat import Chat
    from jaxlm.cli.check import Check
    from jaxlm.cli.eval import Eval
    from jaxlm.cli.export import Export
    from jaxlm.cli.fuse import Fuse
    from jaxlm.cli.generate import Generate
    from jaxlm.cli.info import Info
    from jaxlm.cli.plan import Plan
    from jaxlm.cli.serve import Serve
    from jaxlm.cli.tokenizer import Tokenizer
    from jaxlm.cli.train import Finetune, Train
    from jaxlm.cli.verify import Verify

    known = {"generate": Generate, "chat": Chat, "serve": Serve, "info": Info, "verify": Verify, "export": Export}
    known |= {"train": Train, "finetune": Finetune, "fuse": Fuse, "eval": Eval, "tokenizer": Tokenizer}
    return known | {"bench": Bench, "plan": Plan, "check": Check}


def parse(argv: list[str]) -> Any:
    """Parses a command line to a command. Exits with status 0 after --help and 2 for wrong usage."""
    if argv in (["--version"], ["-V"]):
        print(f"jaxlm {__version__}", flush=True)
        raise SystemExit(0)
    import tyro

    from jaxlm.cli import help
    from jaxlm.cli.arguments import Arguments
    from jaxlm.cli.errors import usage
    from jaxlm.cli.flags import flags_of
    from jaxlm.cli.suggestions import unknown_command

    name, *args = argv
    known = commands()
    # DisallowNone: an absent flag is None. "None" is not accepted as a value.
    markers: tuple[Any, ...] = (tyro.conf.UseAppendAction, tyro.conf.DisallowNone)
    if name.startswith("--tyro-"):  # shell completion: --tyro-write-completion SHELL FILE
        return tyro.extras.subcommand_cli_from_dict(known, prog="jaxlm", args=argv, config=markers)
    if name in ("-h", "--help"):
        print(help.overview(known), flush=True)
        raise SystemExit(0)
    if name.startswith("-"):
        usage(f"the command comes before the flags: jaxlm COMMAND {name} (jaxlm --help)")
    if name not in known:
        usage(unknown_command(name, list(known)))
    negations = name in ("train", "finetune")  # switches have a --no- form, to override the YAML file
    if {"-h", "--help"} & set(itertools.takewhile(lambda arg: arg != "--", args)):
        print(help.of_command(name, known[name], negations), flush=True)
        raise SystemExit(0)
    if negations:
        from jaxlm.cli.train import with_file

        args = with_file(args)
    else:
        markers += (tyro.conf.FlagCreatePairsOff,)
    args = Arguments(name, flags_of(known[name]), negations).normalize(args)
    return tyro.cli(known[name], prog=f"jaxlm {name}", args=args, config=markers)
