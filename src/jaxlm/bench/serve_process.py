"""Servers in processes of their own: `jaxlm serve` and the server of llama.cpp. The process is this module.

A server writes its address to stderr when it is ready. It ends when its standard input does: it does not outlive the
process that started it.
"""

import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from jaxlm.bench import rivals

ADDRESS = re.compile(r"http://[\d.]+:\d+")
PAUSE = 0.1  # seconds between two looks for the address
END = 15.0  # seconds that a server has to end


class ServerProcess:
    """The process of a server.

    Attributes:
        name: The name of the server.
        url: Its base URL.
    """

    def __init__(self, name: str, *arguments: str):
        """Starts the server, and waits until it answers.

        Args:
            name: The name.
            arguments: Of `main`.

        Raises:
            ValueError: The process ends; the message has the last line of its stderr.
        """
        self.name = name
        self.errors = tempfile.NamedTemporaryFile("rb")  # noqa: SIM115  `close` closes it
        command = [sys.executable, "-m", "jaxlm.bench.serve_process", *arguments]
        with open(self.errors.name, "wb") as out:
            # In a session of its own, so that Ctrl-C does not reach it.
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=out,
                                            start_new_session=True)  # fmt: skip
        try:
            self.url = f"{self._address()}/v1"
        except BaseException:
            self.close()
            raise

    def _address(self) -> str:
        while True:
            status = self.process.poll()
            text = Path(self.errors.name).read_text(errors="replace")
            if found := ADDRESS.search(text):
                return found[0]
            if status is not None:
                lines = [line for line in text.splitlines() if line.strip()]
                last = lines[-1].removeprefix("jaxlm: ") if lines else "it says nothing"
                raise ValueError(f"{self.name} ended with status {status}: {last}")
            time.sleep(PAUSE)

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.errors.close()


def start_jaxlm(flags: Sequence[str], slots: int, length: int) -> ServerProcess:
    """Starts `jaxlm serve` on the loopback address, with all programs compiled.

    Args:
        flags: Flags of the model.
        slots: Number of requests that are decoded together.
        length: Maximum number of tokens of a prompt and its answer.
    """
    return ServerProcess("jaxlm", "jaxlm", "serve", *flags, "--port", "0", "--slots", str(slots),
                         "--max-length", str(length), "--prepare")  # fmt: skip


def start_llama_cpp(file: Path, slots: int, length: int) -> ServerProcess:
    """Starts the server of llama.cpp with a GGUF file. The other arguments are those of `start_jaxlm`."""
    return ServerProcess("llama.cpp", "llama.cpp", str(file), str(slots), str(length))


# The process


def serve_jaxlm(*arguments: str) -> None:
    """Runs the command line."""
    sys.argv = ["jaxlm", *arguments]
    runpy.run_module("jaxlm", run_name="__main__", alter_sys=True)


def serve_llama_cpp(file: str, slots: str, length: str) -> None:
    """Runs the server until the process ends."""
    server = rivals.llama_cpp_server(file, int(slots), int(length))
    print(server.listening_address, file=sys.stderr, flush=True)
    threading.Event().wait()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(name: str, *arguments: str) -> None:
    """Runs a server. Ends when standard input does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    {"jaxlm": serve_jaxlm, "llama.cpp": serve_llama_cpp}[name](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
