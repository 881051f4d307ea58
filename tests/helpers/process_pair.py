"""Starts two processes of four virtual devices each, on loopback, and collects their results."""

import os
import socket
import subprocess
import sys
from typing import Any

ENV = {key: value for key, value in os.environ.items() if key != "JAX_DEFAULT_DEVICE"}
HEARTBEAT = 5  # seconds
ENV["XLA_FLAGS"] = f"{ENV.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"  # overrides an earlier one


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_processes(*commands: list[str], stdin: Any = (subprocess.DEVNULL,) * 2) -> list[Any]:
    """Starts the commands of python."""
    pipes: Any = {"env": ENV, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([sys.executable, *c], stdin=s, **pipes) for c, s in zip(commands, stdin)]


def wait_for(started: list[Any], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each process. A process that does not end in time fails the test."""
    try:
        out = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, out)]
