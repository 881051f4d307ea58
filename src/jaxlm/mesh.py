"""The device mesh, and on which of its axes each letter of the alphabet lies.

Two axes: `data` holds the batch (and, in training, a part of every weight), `model` divides heads, the MLP's width and
the vocabulary. A letter whose size an axis does not divide is replicated there: each device then computes it whole.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"
# Letter -> axis. T, S, D and H are not divided when a model runs: attention and norms then need no exchange, and a
# layer's two sums over devices are those behind `o` and `down`.
ON: dict[str, str] = {"B": DATA, "N": MODEL, "K": MODEL, "F": MODEL, "V": MODEL}


def make(sizes: Mapping[str, int] | str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from {"data": 2, "model": 4} or "data=2,model=4"; an axis left out has size 1.

    ValueError when an axis is unknown, or the devices are fewer or more than the sizes multiply to.
    """
    sizes = parse(sizes) if isinstance(sizes, str) else dict(sizes)
    if unknown := set(sizes) - {DATA, MODEL}:
        raise ValueError(f"mesh: there is no axis {', '.join(sorted(unknown))}; the axes are {DATA} and {MODEL}")
    devices = jax.devices() if devices is None else list(devices)
    shape = (sizes.get(DATA, 1), sizes.get(MODEL, 1))
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {DATA}={shape[0]},{MODEL}={shape[1]} is for {math.prod(shape)} devices, but there are "
            f"{len(devices)}: the sizes must multiply to that"
        )
    return jax.make_mesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def parse(text: str) -> dict[str, int]:
    """ "data=2,model=4" -> {"data": 2, "model": 4}."""
    sizes = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not equals or not size.strip().isdigit() or int(size) < 1 or name.strip() in sizes:
            raise ValueError(f"mesh {text!r}: write {DATA}=2,{MODEL}=4 (each axis once, sizes of at least 1)")
        sizes[name.strip()] = int(size)
    return sizes


def default(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """For running a model: as many devices on `model` as divide its kv heads, heads, MLP width, the rest on `data`."""
    wide = max(n for n in range(1, len(devices) + 1) if not len(devices) % n and not any(sizes[x] % n for x in "NKF"))
    return make({DATA: len(devices) // wide, MODEL: wide}, devices)


def spec(letters: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The axis of each letter, None where it has none or its size is not divided. An axis of one device divides
    nothing, and is left out so that equal places have one name."""
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    axes = [ON.get(letter) for letter in letters]
    return PartitionSpec(*(a if a in sizes and not n % sizes[a] else None for a, n in zip(axes, shape, strict=True)))


def sharding(letters: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where an array of these letters and this shape lies."""
    return NamedSharding(mesh, spec(letters, shape, mesh))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Within `jax.set_mesh`, holds an activation to the axes of its letters; elsewhere does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(letters, x.shape, mesh))


def active() -> bool:
    """Whether the program that is being traced runs on a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def of(tree: Any) -> Mesh | None:
    """The mesh on which the arrays of a tree lie; None where they lie on one device."""
    leaf = jax.tree.leaves(tree)[0]
    if isinstance(leaf, Tracer):  # within another program, whose maker has said where it runs
        return None
    over = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return over if isinstance(over, Mesh) and over.size > 1 else None


def on(tree: Any) -> AbstractContextManager[Any]:
    """What is traced within runs on the mesh of these arrays."""
    mesh = of(tree)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(x: jax.Array, letters: str, mesh: Mesh | None) -> jax.Array:
    """Puts an array where its letters say."""
    return x if mesh is None else jax.device_put(x, sharding(letters, x.shape, mesh))
