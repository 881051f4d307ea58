"""The device mesh, and on which of its axes each letter of the alphabet lies.

Two axes: `data` holds the batch (and, in training, a part of every weight), `model` divides heads, the MLP's width and
the vocabulary. A letter whose size an axis does not divide is replicated there: each device then computes it whole.

More devices on `model` than kv heads (8 heads over 16 devices) go in groups: `model` is split into `model` times
`group`, kv heads lie on the first alone, so that each is kept by the devices whose query heads read it and by no other.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, MODEL, GROUP = "data", "model", "group"
# Letter -> axes: as many, from the first on, as divide its size. T, S, D and H are not divided when a model runs:
# attention and norms then need no exchange, and a layer's two sums over devices are those behind `o` and `down`.
TENSOR_AXES = (MODEL, GROUP)
Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {"B": (DATA,), "K": (MODEL,), "N": TENSOR_AXES, "F": TENSOR_AXES, "V": TENSOR_AXES}
# Weights that are trained, and what the optimizer keeps of them, are also divided over `data` (FSDP, arXiv:2304.11277):
# each is gathered before it is used. Embedding and head along V where that goes: TPUs then scatter their gradients in
# more cases (docs/scaling.md).
FSDP_RULES: Rules = {**RULES, "V": (*TENSOR_AXES, DATA), "D": (DATA,)}


def spec(letters: str, shape: Sequence[int], mesh: Any, on: Rules = RULES) -> PartitionSpec:
    """The axes of each letter, None where it has none or they do not divide its size; axes beyond the letters are not
    divided. An axis of one device divides nothing, and is left out so that equal places have one name; so is one that
    shard_map has divided already."""
    names = letters.ljust(len(shape), " ")
    free = {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}
    axes: list[tuple[str, ...]] = []
    for letter, n in zip(names, shape, strict=True):
        axes.append(_axes(on.get(letter, ()), n, free))
        free = {axis: size for axis, size in free.items() if axis not in axes[-1]}
    while axes and not axes[-1]:  # as jax names the places of what its programs give
        axes.pop()
    return PartitionSpec(*[found if len(found) > 1 else next(iter(found), None) for found in axes])


def _axes(of_letter: tuple[str, ...], n: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    axes = tuple(axis for axis in of_letter if sizes.get(axis, 1) > 1)
    while axes and n % math.prod(sizes[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def num_shards(letters: str, shape: Sequence[int], mesh: Any) -> int:
    """Into how many parts an array is divided: each device holds one."""
    axes = [axis for axes in spec(letters, shape, mesh) for axis in ([axes] if isinstance(axes, str) else axes or ())]
    return math.prod(mesh.shape[axis] for axis in axes)


def sharding(letters: str, shape: Sequence[int], mesh: Mesh, on: Rules = RULES) -> NamedSharding:
    """Where an array of these letters and this shape lies."""
    return NamedSharding(mesh, spec(letters, shape, mesh, on))


def constrain(x: jax.Array, letters: str, on: Rules = RULES) -> jax.Array:
    """Within `jax.set_mesh`, holds an array to the axes of its letters; elsewhere does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, spec(letters, x.shape, mesh, on))


def traced_spec(letters: str, shape: Sequence[int]) -> PartitionSpec:
    """The axes of each letter in the program that is being traced; none where it runs on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec() if mesh.empty else spec(letters, shape, mesh)


def local_size(letters: str, shape: Sequence[int]) -> int:
    """How many numbers of such an array one device holds in the program that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(shape) // (1 if mesh.empty else num_shards(letters, shape, mesh))


def active() -> bool:
    """Whether the program that is being traced runs on a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which the arrays of a tree lie; None where they lie on one device."""
    leaf = jax.tree.leaves(tree)[0]
    if traced(leaf):  # within another program, whose maker has said where it runs
        return None
    over = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return over if isinstance(over, Mesh) and over.size > 1 else None


def traced(x: Any) -> bool:
    """Whether an array stands for one in a program that is being traced: it lies nowhere."""
    return not hasattr(x, "sharding")


def use_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """What is traced within runs on the mesh of these arrays."""
    return use_mesh(mesh_of(tree))


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """What is traced within runs on this mesh, or on one device."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def round_up_batch(rows: int, mesh: Mesh | None) -> int:
    """As many rows, or a few more, so that `data` divides them."""
    each = 1 if mesh is None else mesh.shape[DATA]
    return -(-rows // each) * each


def place(x: Any, letters: str, mesh: Mesh | None) -> jax.Array:
    """Puts an array (jax's or numpy's, the same in every process) where its letters say."""
    if mesh is None:
        return jnp.asarray(x)
    if is_key := jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    where = sharding(letters, x.shape, mesh)
    if where.is_fully_addressable:
        out = jax.device_put(x, where)
    else:  # device_put would ask all processes whether they have the same values, each time
        host = np.asarray(x)
        out = jax.make_array_from_callback(x.shape, where, lambda index: host[index])
    return jax.random.wrap_key_data(out) if is_key else out
