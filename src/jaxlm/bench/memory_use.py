"""The most memory that was in use during a run."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm.devices import hardware

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Resets the peak of this process to its resident memory.

    Returns:
        Whether it was reset. Linux does this, but not in every sandbox.
    """
    with suppress(OSError):
        CLEAR.write_text("5")  # VmHWM becomes VmRSS: man 5 proc_pid_clear_refs
    high, now = _status("VmHWM:"), resident()
    return high is not None and now is not None and high - now < 1 << 25  # some sandboxes ignore the write


def peak(device: Any, was_reset: bool = True) -> int | None:
    """Peak memory in bytes: on CPU the resident memory of this process since `reset_peak`, elsewhere what arrays took
    of the device's memory since the process started. None if the device does not report it, or on CPU if the peak was
    not reset."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    if not was_reset:
        return None
    found = _status("VmHWM:")
    return hardware.peak_memory() if found is None else found


def resident() -> int | None:
    """The resident memory of this process in bytes; None on systems without /proc."""
    return _status("VmRSS:")


def _status(name: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None
