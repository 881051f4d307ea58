"""The most memory that was in use during a run."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm.devices import hardware

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Lets the peak of this process begin now. Linux only; elsewhere the peak is that of the whole process."""
    with suppress(OSError):
        CLEAR.write_text("5")  # VmHWM becomes VmRSS: man 5 proc_pid_clear_refs


def peak(device: Any) -> int | None:
    """Peak memory in bytes: on CPU the resident memory of this process since `reset_peak`, elsewhere what arrays took
    of the device's memory since the process started. None if the device does not report it."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return hardware.peak_memory()


def resident() -> int | None:
    """The resident memory of this process in bytes; None on systems without /proc."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None
