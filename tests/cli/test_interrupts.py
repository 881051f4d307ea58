"""Ctrl-C ends a command, whatever runs at that moment."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from helpers import tiny_files

BEGIN = """
import gc, os, signal, sys, threading, time
from jaxlm.cli import interrupts
interrupts.install()
def interrupt(*ignored):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
"""
# A program, and what it prints before it ends with status 130, or None if it ends with "reached".
DROPPED = """
class Finalized:
    __del__ = interrupt
try:
    Finalized()
    time.sleep(20)
    print("lost")
except KeyboardInterrupt:
    print("reached")
"""
COLLECTED = """
armed = [True]
def callback(phase, info):
    if armed:
        armed.clear()
        interrupt()
gc.callbacks.append(callback)
try:
    gc.collect()
    time.sleep(20)
    print("lost")
except KeyboardInterrupt:
    print("reached")
"""
AT_ONCE = """
with interrupts.ends_at_once():
    try:
        interrupt()
        time.sleep(20)
    except BaseException:
        print("an exception")
"""
AGAIN = """
import hashlib
threading.Timer(0.3, interrupt).start()
threading.Timer(0.6, interrupt).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # Python handles no signal before its end
"""
ONE_AT_A_TIME = """
for _ in range(3):
    try:
        interrupt()
        time.sleep(20)
    except KeyboardInterrupt:
        time.sleep(0.05)
print("reached")
"""
FORKED = """
if not os.fork():
    for _ in range(5):
        try:
            interrupt()
            time.sleep(20)
        except KeyboardInterrupt:
            pass
    os._exit(0)
os.wait()
time.sleep(0.05)
print("reached")
"""


def run(code: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code], capture_output=True, text=True, timeout=15
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("code", [DROPPED, COLLECTED, ONE_AT_A_TIME, FORKED])
def test_an_interrupt_becomes_one_exception_also_where_python_drops_it(code):
    assert run(code) == (0, "reached\n", "")


@pytest.mark.parametrize("code", [AT_ONCE, AGAIN])
def test_the_process_ends_at_once(code):
    assert run(code) == (130, "", "\ninterrupted\n")


def test_an_ignored_interrupt_stays_ignored():
    code = BEGIN.replace("interrupts.install()", "signal.signal(signal.SIGINT, signal.SIG_IGN); interrupts.install()")
    done = subprocess.run(
        [sys.executable, "-c", code + "interrupt()\nprint('reached')"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "reached\n")


@pytest.mark.slow
def test_no_interrupt_is_lost_while_a_chat_starts(tmp_path):
    """Ctrl-C at 60 times from the start to the first prompt. 5 minutes."""
    tiny_files.write(tmp_path)
    start = time.monotonic()
    status, seconds, _ = chat(tmp_path, None)
    ready = time.monotonic() - start
    for number in range(60):
        delay = 0.1 + (ready - 0.1) * number / 60
        status, seconds, shown = chat(tmp_path, delay)
        if b"ends the chat" in shown:
            continue  # it was ready sooner than the first time
        # The interpreter itself ends with the signal while it starts, which a shell also shows as 130.
        assert status == 130 or (status == -signal.SIGINT and delay < 0.5), (delay, shown)
        assert seconds < 2, (number, shown)
        assert shown.count(b"\n") <= 3, shown  # no traceback


def chat(folder, delay: float | None) -> tuple[int, float, bytes]:
    """Starts a chat and sends Ctrl-C after a time, or when it is ready. Returns the status, the seconds from Ctrl-C to
    the end, and the output."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "JAX_PLATFORMS": "cpu"}
        os.execv(sys.executable, [sys.executable, "-m", "jaxlm", "chat", "-m", str(folder)])
    shown, end = b"", time.monotonic() + (60 if delay is None else delay)
    while time.monotonic() < end and b"ends the chat" not in shown:
        if select.select([fd], [], [], 0.01)[0]:
            shown += os.read(fd, 65536)
    if b"ends the chat" in shown:
        os.kill(pid, signal.SIGKILL)
    else:
        os.write(fd, b"\x03")
    sent = time.monotonic()
    while time.monotonic() < sent + 5:
        if select.select([fd], [], [], 0.01)[0]:
            try:
                shown += os.read(fd, 65536)
            except OSError:  # the terminal has no program any more
                time.sleep(0.01)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            os.close(fd)
            return os.waitstatus_to_exitcode(status), time.monotonic() - sent, shown
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(fd)
    raise AssertionError(f"Ctrl-C after {delay} s was lost: {shown[-500:]!r}")
