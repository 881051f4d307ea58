"""Builds the device mesh: axis sizes from `--mesh`, the split of tensor parallelism by kv heads, and device order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from jaxlm.devices.mesh import DATA, GROUP, MODEL


def parse(text: str) -> dict[str, int]:
    """Parses "data=2,model=4" to {"data": 2, "model": 4}. A missing axis has size 1."""
    sizes = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"mesh {text!r}: write {DATA}=2,{MODEL}=4, each axis once, with sizes of at least 1")
        sizes[name] = int(size)
    if unknown := set(sizes) - {DATA, MODEL}:
        raise ValueError(f"mesh {text!r}: unknown axis {', '.join(sorted(unknown))}; the axes are {DATA} and {MODEL}")
    return {DATA: sizes.get(DATA, 1), MODEL: sizes.get(MODEL, 1)}


def default(letters: Mapping[str, int], count: int) -> dict[str, int]:
    """Axis sizes without knowledge of the device: tensor parallelism as far as N and F divide, the rest on `data`.

    Args:
        letters: Sizes of N and F.
        count: Number of devices.
    """
    tensor = max(n for n in range(1, count + 1) if not count % n and not any(letters[x] % n for x in "NF"))
    return {DATA: count // tensor, MODEL: tensor}


def factor_kv_heads(sizes: Mapping[str, int], K: int) -> dict[str, int]:
    """Splits `model` into `model` and `group` for a model with K kv heads: `model` becomes its largest divisor of K."""
    heads = math.gcd(sizes[MODEL], K)
    groups = {GROUP: sizes[MODEL] // heads} if heads < sizes[MODEL] else {}
    return {DATA: sizes[DATA], MODEL: heads, **groups}


def make(sizes: Mapping[str, int] | str, K: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for a model with K kv heads.

    Args:
        sizes: {"data": 2, "model": 4} or "data=2,model=4".
        K: Number of kv heads.
        devices: By default all of jax.devices(). A single process may use the first ones, as many as a divisor of their
            number.

    Raises:
        ValueError: An axis is unknown, or the product of the sizes does not match the number of devices.
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
            f"mesh {text} needs {count} devices, but there are {len(devices)}{several}: "
            f"choose sizes whose product is {len(devices)}"
        )
    mesh = Mesh(arrange_devices(devices[:count], axes[DATA]), (DATA, MODEL))
    return with_kv_groups(mesh, K)  # `group` is the innermost axis


def arrange_devices(devices: Sequence[Any], data: int) -> np.ndarray:
    """Arranges devices as [data, model] so that the devices of one tensor-parallel group are neighbors.

    jax.make_mesh rejects several GPU hosts, several TPU slices, and a `model` axis that takes a part of a slice's side
    (32 of the 16 x 16 chips of v6e).
    """
    slices: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: device.id):
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    parts = [slices[index] for index in sorted(slices)]
    if data % len(parts) or len(set(map(len, parts))) > 1:  # a tensor-parallel group spans slices
        return np.array([device for part in parts for device in part]).reshape(data, -1)
    shape = (data // len(parts), len(devices) // data)
    return np.concatenate([create_device_mesh(shape, part, allow_split_physical_axes=True) for part in parts])


def with_kv_groups(mesh: Mesh, K: int) -> Mesh:
    """A mesh with axes `data` and `model` (each may be missing), with `model` split by `factor_kv_heads`."""
    if unknown := set(mesh.axis_names) - {DATA, MODEL, GROUP}:
        raise ValueError(f"mesh: unknown axis {', '.join(sorted(unknown))}; the axes are {DATA} and {MODEL}")
    order = [mesh.axis_names.index(axis) for axis in (DATA, MODEL, GROUP) if axis in mesh.axis_names]
    axes = factor_kv_heads({DATA: mesh.shape.get(DATA, 1), MODEL: mesh.size // mesh.shape.get(DATA, 1)}, K)
    devices = mesh.devices.transpose(order).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
