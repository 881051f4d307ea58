"""Sharding: the device mesh, and the logical axis rules that map the letters of the alphabet to mesh axes.

A mesh has two axes, sometimes three. `data` is data parallelism: it shards the batch and, in training, every matrix
with an axis D or V that it divides (FSDP). `model` is tensor parallelism: it shards heads, the MLP width and the
vocabulary. A letter whose size an axis does not divide is replicated over that axis.

If `model` does not divide the number of kv heads (8 heads on 16 devices), it is factored into `model` and `group`.
Query heads, the MLP width and the vocabulary are sharded over both, kv heads over `model` alone. Each kv head is then
on the devices whose query heads read it.

What is sent with tensor parallelism: two all-reduces per layer and forward pass (OLMo 2 has more, for its norm of q and
k over all heads), one for the embedding if V is sharded, and reductions of scalars per row for sampling. Over `data`:
in generation a prompt's KV cache when its row joins the batch, and the sampled tokens; in training each weight that it
shards before its use (all-gather), and gradients (reduce-scatter or all-reduce). Log-probabilities and scores of an
evaluation add small gathers.

By default, `load` uses all devices, with the sizes that decode a full batch fastest by arithmetic
(inference/roofline.py). Training puts all devices on `data` (training/setup.py). Several processes run the same program
(distributed.py). Each reads the blocks of the weights that its devices hold (checkpoint/hf.py). docs/architecture.md,
"On a mesh", has the details.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, MODEL, GROUP = "data", "model", "group"
TENSOR_AXES = (MODEL, GROUP)  # axes of tensor parallelism
Rules = Mapping[str, tuple[str, ...]]
# Logical axis rules: letter -> mesh axes, of which it takes the longest prefix that divides its size. T, S, D and H are
# not sharded: attention and norms need no communication (but a norm over all heads, as in OLMo 2, does), and a layer
# has two all-reduces, after `o` and after `down`.
RULES: Rules = {"B": (DATA,), "K": (MODEL,), "N": TENSOR_AXES, "F": TENSOR_AXES, "V": TENSOR_AXES}
# FSDP (arXiv:2304.11277): in training, weights (trained or frozen) and optimizer state of the same shape are also
# sharded over `data`. Weights are all-gathered before each use. Embedding and head are sharded along V where it
# divides: TPUs then reduce-scatter their gradients in more cases (docs/scaling.md).
FSDP_RULES: Rules = {**RULES, "V": (*TENSOR_AXES, DATA), "D": (DATA,)}


def spec(letters: str, shape: Sequence[int], mesh: Any, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of an array with these letters.

    Equal shardings get equal specs: mesh axes of size 1 and trailing replicated axes are left out.

    Args:
        letters: Letters of the leading axes; further axes are replicated.
        shape: Sizes of all axes.
        mesh: A Mesh or AbstractMesh. Axes that a surrounding shard_map has made manual are not used.
        rules: Logical axis rules.
    """
    names = letters.ljust(len(shape), " ")
    free = {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}
    axes: list[tuple[str, ...]] = []
    for letter, n in zip(names, shape, strict=True):
        axes.append(_axes(rules.get(letter, ()), n, free))
        free = {axis: size for axis, size in free.items() if axis not in axes[-1]}
    while axes and not axes[-1]:  # as in the shardings of jax's outputs
        axes.pop()
    return PartitionSpec(*[group if len(group) > 1 else next(iter(group), None) for group in axes])


def _axes(rule: tuple[str, ...], n: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The longest prefix of a rule whose mesh axes divide n."""
    axes = tuple(axis for axis in rule if sizes.get(axis, 1) > 1)
    while axes and n % math.prod(sizes[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def num_shards(letters: str, shape: Sequence[int], mesh: Any) -> int:
    """Number of shards of an array; each device holds one."""
    axes = [axis for axes in spec(letters, shape, mesh) for axis in ([axes] if isinstance(axes, str) else axes or ())]
    return math.prod(mesh.shape[axis] for axis in axes)


def sharding(letters: str, shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The sharding of an array with these letters."""
    return NamedSharding(mesh, spec(letters, shape, mesh, rules))


def constrain(x: jax.Array, letters: str, rules: Rules = RULES) -> jax.Array:
    """Constrains the sharding of an array within `use_mesh`; does nothing elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, spec(letters, x.shape, mesh, rules))


def traced_spec(letters: str, shape: Sequence[int]) -> PartitionSpec:
    """The PartitionSpec of an array in the program that is being traced; an empty one on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec() if mesh.empty else spec(letters, shape, mesh)


def local_size(letters: str, shape: Sequence[int]) -> int:
    """Elements of an array per device in the program that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(shape) // (1 if mesh.empty else num_shards(letters, shape, mesh))


def heads_are_aligned(N: int, K: int) -> bool:
    """Whether each device has the kv heads of its query heads, in their order: it has one kv head, or both are sharded
    alike."""
    local = local_size("N", (N,)), local_size("K", (K,))
    return local[1] == 1 or N // local[0] == K // local[1]


def per_device(run: Callable[..., jax.Array], arrays: Sequence[Any], letters: Sequence[str]) -> jax.Array:
    """`run(*arrays)` on each device's part of the arrays, without communication; directly on a single device.

    For kernels, which the compiler cannot partition.

    Args:
        run: A function of the parts.
        arrays: Trees of arrays, each with one set of letters. The result has the shape and sharding of the first.
        letters: Letters of each.
    """
    if not active():
        return run(*arrays)
    specs = tuple(traced_spec(name, jax.tree.leaves(tree)[0].shape) for name, tree in zip(letters, arrays, strict=True))
    return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def active() -> bool:
    """Whether the program that is being traced runs on a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of a tree's arrays; None on a single device."""
    leaf = next(iter(jax.tree.leaves(tree)), None)
    if leaf is None or traced(leaf):  # within another program, which has set its own mesh
        return None
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def traced(x: Any) -> bool:
    """Whether x is a tracer, which has no sharding, rather than an array."""
    return not hasattr(x, "sharding")


def use_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """`use_mesh` with the mesh of a tree's arrays."""
    return use_mesh(mesh_of(tree))


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context in which programs are traced for this mesh; None for a single device."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def round_up_batch(rows: int, mesh: Mesh | None) -> int:
    """The batch size, rounded up to a multiple of `data`."""
    multiple = 1 if mesh is None else mesh.shape[DATA]
    return -(-rows // multiple) * multiple


def place(x: Any, letters: str, mesh: Any) -> jax.Array:
    """Shards an array (the same in every process) over a mesh, or puts it on a device; None: the default device."""
    if not isinstance(mesh, Mesh):
        return jax.device_put(x, mesh)  # jnp.asarray would compile a program for each shape
    if is_key := jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    where = sharding(letters, x.shape, mesh)
    if where.is_fully_addressable:
        out = jax.device_put(x, where)
    else:  # device_put would compare the values across processes every time
        host = np.asarray(x)
        out = jax.make_array_from_callback(x.shape, where, lambda index: host[index])
    return jax.random.wrap_key_data(out) if is_key else out


def platform(sharding: Any) -> str:
    """The platform of a sharding's devices: "cpu", "gpu" or "tpu"."""
    return next(iter(sharding.device_set)).platform


def local_blocks(where: Any, shape: tuple[int, ...]) -> list[tuple[tuple[slice, ...], list[Any]]]:
    """The distinct blocks of an array on this process's devices, each with the devices that hold it."""
    found: dict[str, tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        found.setdefault(str(index), (index, []))[1].append(device)
    return list(found.values())
