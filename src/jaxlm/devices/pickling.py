"""What pickle stores in place of arrays and of modules.

jax pickles an array without its sharding, and cannot pickle a mesh. An array is stored with the ids of its devices, so
that a process with the same devices gets the same sharding. A module is stored by its name.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.devices.mesh import traced


@dataclass(frozen=True)
class HostArray:
    """An array on the host.

    Attributes:
        value: The values.
        device_ids: Ids of the devices, in the order of the mesh. Empty if the array was committed to none.
        axes: Names, sizes and types of the mesh axes; empty for a single device.
        spec: The PartitionSpec on the mesh.
    """

    value: np.ndarray
    device_ids: tuple[int, ...] = ()
    axes: tuple[tuple[str, int, Any], ...] = ()
    spec: PartitionSpec | None = None


def to_host(tree: Any) -> Any:
    """The tree with a HostArray in place of each array. Other leaves, and PRNG keys, which pickle as they are, stay.

    Raises:
        TypeError: An array is traced, or is sharded over several processes.
    """
    return jax.tree.map(_to_host, tree)


def _to_host(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if traced(leaf):
        raise TypeError("traced arrays cannot be pickled: pickle the model outside of jax.jit, jax.grad and jax.vmap")
    if not leaf.is_fully_addressable:
        raise TypeError("a model that is sharded over several processes cannot be pickled: write it with jaxlm.export")
    where = leaf.sharding
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        mesh = where.mesh
        axes = tuple(zip(mesh.axis_names, mesh.devices.shape, mesh.axis_types))
        return HostArray(np.asarray(leaf), tuple(device.id for device in mesh.devices.flat), axes, where.spec)
    return HostArray(np.asarray(leaf), tuple(device.id for device in where.device_set) if leaf.committed else ())


def to_devices(tree: Any) -> Any:
    """The inverse of `to_host`. What was on one device that this process does not have goes to the default device.

    Raises:
        ValueError: This process lacks devices of the mesh.
    """
    known = {device.id: device for device in jax.local_devices()}
    meshes: dict[Any, Mesh] = {}

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, HostArray):
            return leaf
        if not leaf.axes:
            device = known.get(*leaf.device_ids) if leaf.device_ids else None
            return jax.device_put(leaf.value, device and SingleDeviceSharding(device))
        if missing := set(leaf.device_ids) - known.keys():
            raise ValueError(
                f"the model was pickled on a mesh of {len(leaf.device_ids)} devices, of which this process lacks "
                f"{len(missing)}: load it here with jaxlm.load"
            )
        key = leaf.device_ids, leaf.axes
        if key not in meshes:
            names, sizes, types = zip(*leaf.axes)
            devices = np.array([known[number] for number in leaf.device_ids]).reshape(sizes)
            meshes[key] = Mesh(devices, names, axis_types=types)
        return jax.device_put(leaf.value, NamedSharding(meshes[key], leaf.spec or PartitionSpec()))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, HostArray))


@dataclass(frozen=True)
class ModuleName:
    """A module by its name."""

    name: str


def to_name(value: Any) -> Any:
    """The ModuleName of a module. Other objects stay.

    Raises:
        TypeError: The module cannot be imported by its name.
    """
    if not isinstance(value, ModuleType):
        return value
    if sys.modules.get(value.__name__) is not value:
        raise TypeError(f"the module {value.__name__} cannot be pickled, because it cannot be imported by this name")
    return ModuleName(value.__name__)


def to_module(value: Any) -> Any:
    """The inverse of `to_name`."""
    return import_module(value.name) if isinstance(value, ModuleName) else value
