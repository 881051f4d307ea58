"""The command line: one module a command, each a dataclass whose fields are the flags and whose `run` does the work.

Nothing here imports jax at the top: `jaxlm --help` must answer at once.
"""

import os
import signal
import sys
import traceback
from typing import Any, NoReturn

from jaxlm.cli.errors import explain
from jaxlm.version import __version__

ABOUT = "Language models in pure JAX: load Hugging Face checkpoints, generate, chat."


def main(argv: list[str] | None = None) -> int:
    """Runs a command; -> 0 done, 1 failed, 2 wrong usage, 130 interrupted (128 + the signal)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--version"], ["-V"]):
        print(f"jaxlm {__version__}")
        return 0
    command = None
    try:
        command = parse(argv or ["--help"])
        return command.run() or 0
    except KeyboardInterrupt as error:
        return end(command, f"\n{str(error) or 'interrupted'}", 128 + getattr(error, "signal", signal.SIGINT))
    except BrokenPipeError:  # the reader of stdout has left; a flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return end(command, "", 0)
    except Exception as error:
        if command is None or (command.debug and command.is_single_process):
            raise
        trace = traceback.format_exc() if command.debug else ""
        return end(command, f"{trace}jaxlm: {explain(error, command)}", 1)


def entry() -> NoReturn:
    """The `jaxlm` command. After an interruption threads may still compute, and would fall over a normal end."""
    status = main()
    if status > 128:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def end(command: Any, text: str, status: int) -> int:
    """Tells why the command ends. One of several processes ends at once: a normal end would wait for the others, and
    they for this one."""
    alone = command is None or command.is_single_process
    if text:
        from jaxlm.devices.distributed import process_index

        who = "" if alone or process_index() is None else f"process {process_index()}: "
        print(f"{who}{text.strip() if who else text}", file=sys.stderr if alone else sys.__stderr__, flush=True)
    if not alone:
        os._exit(status)
    return status


def parse(argv: list[str]) -> Any:
    """The command that the arguments describe; exits with 2 where they describe none."""
    import tyro

    from jaxlm.cli.chat import Chat
    from jaxlm.cli.eval import Eval
    from jaxlm.cli.export import Export
    from jaxlm.cli.fuse import Fuse
    from jaxlm.cli.generate import Generate
    from jaxlm.cli.info import Info
    from jaxlm.cli.tokenizer import Tokenizer
    from jaxlm.cli.train import Finetune, Train, with_file
    from jaxlm.cli.verify import Verify

    commands = {"generate": Generate, "chat": Chat, "info": Info, "verify": Verify, "export": Export}
    commands |= {"train": Train, "finetune": Finetune, "fuse": Fuse, "eval": Eval, "tokenizer": Tokenizer}
    markers: tuple[Any, ...] = (tyro.conf.UseAppendAction,)
    markers += (tyro.conf.DisallowNone,)  # a flag that is not given is None; nobody types it
    if argv[0] in ("train", "finetune"):  # each flag has its --no-: a file may have said yes
        argv = [argv[0], *with_file(argv[1:])]
    else:
        markers += (tyro.conf.FlagCreatePairsOff,)
    if argv[0] in commands:  # by itself, so that errors point to the help of the command
        return tyro.cli(commands[argv[0]], prog=f"jaxlm {argv[0]}", args=argv[1:], config=markers)
    return tyro.extras.subcommand_cli_from_dict(commands, prog="jaxlm", description=ABOUT, args=argv, config=markers)
