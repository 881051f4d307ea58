"""From what a user says to a mesh of devices: sizes of the axes, how they go with a model's heads, and which device
stands where."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from jaxlm.devices.mesh import DATA, GROUP, MODEL


def parse(text: str) -> dict[str, int]:
    """ "data=2,model=4" -> {"data": 2, "model": 4}; an axis left out has size 1."""
    sizes = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"mesh {text!r}: write {DATA}=2,{MODEL}=4 (each axis once, sizes of at least 1)")
        sizes[name] = int(size)
    if unknown := set(sizes) - {DATA, MODEL}:
        raise ValueError(
            f"mesh {text!r}: there is no axis {', '.join(sorted(unknown))}; the axes are {DATA} and {MODEL}"
        )
    return {DATA: sizes.get(DATA, 1), MODEL: sizes.get(MODEL, 1)}


def default(letters: Mapping[str, int], count: int) -> dict[str, int]:
    """For running a model on so many devices: as many on `model` as divide its heads and MLP width, the rest on
    `data`. letters: the sizes of N and F."""
    wide = max(n for n in range(1, count + 1) if not count % n and not any(letters[x] % n for x in "NF"))
    return {DATA: count // wide, MODEL: wide}


def factor_kv_heads(sizes: Mapping[str, int], K: int) -> dict[str, int]:
    """The axes with which a model of K kv heads runs: what does not divide them goes from `model` to `group`."""
    wide = math.gcd(sizes[MODEL], K)
    groups = {GROUP: sizes[MODEL] // wide} if wide < sizes[MODEL] else {}
    return {DATA: sizes[DATA], MODEL: wide, **groups}


def make(sizes: Mapping[str, int] | str, K: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from {"data": 2, "model": 4} or "data=2,model=4" for a model of K kv heads, over all devices; one process
    may take the first of its devices where the sizes multiply to a divisor of their number.

    ValueError when an axis is unknown, or the sizes do not multiply to what there is.
    """
    if not isinstance(sizes, str | Mapping):
        raise ValueError(f'mesh {sizes!r}: give "{DATA}=2,{MODEL}=4", {{"{DATA}": 2, "{MODEL}": 4}} or a jax Mesh')
    text = sizes if isinstance(sizes, str) else ",".join(f"{name}={size}" for name, size in sizes.items())
    axes = factor_kv_heads(parse(text), K)
    devices = jax.devices() if devices is None else list(devices)
    count = math.prod(axes.values())
    if count > len(devices) or len(devices) % count or (jax.process_count() > 1 and count != len(devices)):
        several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise ValueError(
            f"mesh {text} is for {count} devices, but there are {len(devices)}{several}: "
            "the sizes must multiply to that"
        )
    return with_kv_groups(
        Mesh(arrange_devices(devices[:count], axes[DATA]), (DATA, MODEL)), K
    )  # `group`: innermost part of `model`


def arrange_devices(devices: Sequence[Any], data: int) -> np.ndarray:
    """Devices [data, model], neighbors along `model`. jax.make_mesh would refuse several hosts of GPUs and several
    slices of TPUs, and a slice of which `model` takes a part of a side (32 of v6e's 16 x 16 chips)."""
    slices: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: device.id):
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    parts = [slices[index] for index in sorted(slices)]
    if data % len(parts) or len(set(map(len, parts))) > 1:  # `model` reaches from one into the next
        return np.array([device for part in parts for device in part]).reshape(data, -1)
    shape = (data // len(parts), len(devices) // data)
    return np.concatenate([create_device_mesh(shape, part, allow_split_physical_axes=True) for part in parts])


def with_kv_groups(over: Mesh, K: int) -> Mesh:
    """A mesh with axes `data` and `model` (each may be missing), `model` split as `split` says."""
    if unknown := set(over.axis_names) - {DATA, MODEL, GROUP}:
        raise ValueError(f"mesh: there is no axis {', '.join(sorted(unknown))}; the axes are {DATA} and {MODEL}")
    order = [over.axis_names.index(axis) for axis in (DATA, MODEL, GROUP) if axis in over.axis_names]
    axes = factor_kv_heads({DATA: over.shape.get(DATA, 1), MODEL: over.size // over.shape.get(DATA, 1)}, K)
    devices = over.devices.transpose(order).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
