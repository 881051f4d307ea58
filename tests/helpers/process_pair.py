"""Two processes of four virtual devices each, on loopback, and how they end."""

import os
import socket
import subprocess
import sys
from typing import Any

ENV = {key: value for key, value in os.environ.items() if key != "JAX_DEFAULT_DEVICE"}
HEARTBEAT = 5  # seconds
ENV["XLA_FLAGS"] = f"{ENV.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"  # of two, the last counts


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two(*commands: list[str], stdin: Any = (subprocess.DEVNULL,) * 2) -> list[Any]:
    pipes: Any = {"env": ENV, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([sys.executable, *c], stdin=s, **pipes) for c, s in zip(commands, stdin)]


def ended(started: list[Any], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each; a process that does not end fails the test."""
    try:
        out = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, out)]
