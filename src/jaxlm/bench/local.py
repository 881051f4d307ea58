"""The devices of this machine as a specification: published figures, or its own attributes and measured rates."""

import jax

from jaxlm.devices import hardware, host_memory, specs


def devices(count: int | None = None) -> tuple[specs.Spec, int]:
    """The specification of jax's devices, and their number.

    A device that devices/specs.py does not list gets the memory that it reports, and rates that are measured now: of
    reading memory, and of a matrix product in the faster of bfloat16 and float32. Links count as memory.

    Args:
        count: Use as many of them.

    Raises:
        ValueError: There are fewer devices, or the memory of a device is unknown.
    """
    found = jax.devices()
    if count is not None and not 1 <= count <= len(found):
        raise ValueError(f"--chips {count}: this machine has {len(found)} devices; name others with --device")
    device = found[0]
    spec = specs.of_device(device)
    if spec is not None:
        return spec, count or len(found)
    memory = host_memory.host_memory("MemTotal") if device.platform == "cpu" else hardware.available_memory(device)
    if memory is None:
        raise ValueError(
            f"{device.device_kind} does not report its memory: name a device with --device ({specs.names()})"
        )
    from jaxlm.bench import limits

    rates = limits.Rates()
    rates.measure(device, "bfloat16")
    kind, platform = device.device_kind, device.platform
    # CPU devices share one memory, and count as one.
    spec = specs.Spec(kind, kind, platform, memory, rates.read, rates.matmul, rates.read, 0, 1, "measured now")
    return spec, 1 if platform == "cpu" else count or len(found)
