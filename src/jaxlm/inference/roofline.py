"""The roofline of generation: bytes and FLOPs of a decode step on a mesh, and the time that a device needs for them.

Everything follows from PARAMS, a Config and published figures (devices/specs.py). Nothing is allocated or compiled. A
predicted time is a lower bound: no program is faster.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from jaxlm.devices import hardware, mesh, specs, topology
from jaxlm.inference import decoding
from jaxlm.nn import flops, kv_cache, params
from jaxlm.nn.quantize import stored
from jaxlm.nn.quantized_kv import head_bytes as kv_head_bytes

# Seconds that a hop takes between neighbors of a TPU slice, and a small all-reduce between GPUs of a host. Assumed, and
# in no predicted time: they decide between meshes, where many small all-reduces stand against fewer bytes.
HOP, GPU_ALL_REDUCE = 1e-6, 10e-6
# Of the memory: what the runtime and other programs leave.
USABLE = 0.95
# Tokens per row of the default mesh, if the model has as many. The batch size is that of the platform.
CONTEXT = 4096
LANES = 128  # of a TPU's registers: arrays whose last axis is narrower take as much memory within programs
COPIED = {"cpu": 0.0, "gpu": 0.0, "tpu": 0.012}  # the part of the weights that a decode step copies to another layout


class Layout(NamedTuple):
    """A model on a mesh.

    Attributes:
        table: PARAMS of the family.
        cfg: The model's Config.
        over: The mesh, of which only the sizes matter.
        itemsize: Bytes of an activation, and of a weight without a form.
        kv_dtype: dtype of the KV cache. None: its numbers have `itemsize` bytes, as those of the activations.
        quantize: The type of quantized weights, as in `jaxlm.load`; None if they are not quantized.
        leaf: For a model that exists, a function from a row of PARAMS to its weight, an array or a WeightForm.
        platform: "cpu", "gpu" or "tpu", on which the layout of quantized weights depends.
    """

    table: Any
    cfg: Any
    over: AbstractMesh
    itemsize: int
    kv_dtype: Any = None
    quantize: str | None = None
    leaf: Callable[[params.TensorSpec], Any] | None = None
    platform: str = "cpu"

    @property
    def head_bytes(self) -> int:
        """Bytes of the keys of one token and kv head in the KV cache."""
        return self.cfg.H * self.itemsize if self.kv_dtype is None else kv_head_bytes(self.kv_dtype, self.cfg.H)

    @property
    def data(self) -> int:
        """Number of parts that rows are divided into."""
        return self.over.shape[mesh.DATA]

    @property
    def tensor(self) -> int:
        """Number of devices of a tensor-parallel group."""
        return self.over.size // self.data


def layout(
    table: Any,
    cfg: Any,
    sizes: Mapping[str, int],
    itemsize: int = 2,
    *,
    kv_dtype: Any = None,
    quantize: str | None = None,
    platform: str = "cpu",
) -> Layout:
    """The layout for axis sizes such as {"data": 2, "model": 4}. The other arguments are those of Layout."""
    axes = topology.factor_kv_heads(sizes, cfg.K)
    over = AbstractMesh(tuple(axes.values()), tuple(axes))
    return Layout(table, cfg, over, itemsize, kv_dtype=kv_dtype, quantize=quantize, platform=platform)


def weight_bytes(of: Layout) -> int:
    """Bytes of the weights on one device."""
    return sum(row_bytes(of, row) for row in params.tensors(of.table, of.cfg))


def row_bytes(of: Layout, row: params.TensorSpec) -> int:
    """Bytes of one weight on one device. A quantized weight knows its arrays."""
    if of.leaf is not None:
        return _leaf_bytes(of.leaf(row), row.letters, of.over)
    if of.quantize is not None:
        alike = row._replace(path="layers" if row.path.startswith("layers.") else row.path, names=())
        return _quantized_bytes(alike, of.quantize, of.itemsize, of.over, of.platform)
    return of.itemsize * _elements(of, row)


@lru_cache(maxsize=1024)
def _quantized_bytes(row: params.TensorSpec, name: str, itemsize: int, over: AbstractMesh, platform: str) -> int:
    # Of the dtype only the size matters: that of the weights that are not quantized.
    return _leaf_bytes(stored(row, f"float{8 * itemsize}", name, platform), row.letters, over)


def _leaf_bytes(leaf: Any, own: str, over: AbstractMesh) -> int:
    pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(params.letters_of(leaf, own)), strict=True)
    return sum(params.nbytes(a) // mesh.num_shards(letters, a.shape, over) for a, letters in pairs)


def _elements(of: Layout, row: params.TensorSpec) -> int:
    return math.prod(row.shape) // mesh.num_shards(row.letters, row.shape, of.over)


def read_bytes(of: Layout) -> int:
    """Bytes of the weights that a decode step reads on one device: all but an untied embedding, of which it reads rows
    of tokens."""
    rows = params.tensors(of.table, of.cfg)
    return sum(row_bytes(of, row) for row in rows if of.cfg.tied or row.path != "embed")


def cache_bytes(of: Layout, rows: int, length: int, chunk: int = 1) -> int:
    """Bytes on one device of a KV cache of `rows` rows (of all devices) and `length` positions.

    Args:
        of: The model and the mesh.
        rows: Rows B.
        length: Positions per row.
        chunk: Tokens of the longest write, for which a sliding window has more slots.
    """
    slots = kv_cache.slot_counts(length, of.cfg.windows, min(chunk, length))
    heads = of.cfg.K // mesh.num_shards("K", (of.cfg.K,), of.over)
    stored = 2 * sum(slots) * heads * of.head_bytes
    return -(-rows // of.data) * (stored + 4 * sum(set(slots)))  # positions are int32


def temporaries(of: Layout, platform: str, rows: int, length: int, program: str) -> int:
    """Bytes of a program's temporary arrays on one device, an estimate.

    Prefill has the activations of a chunk, on GPUs also a layer's keys and values. Decoding has logits, and what the
    compilers copy to another layout: on a mesh, TPU programs copy `o`, and GPU programs the KV cache if a device has a
    single row or a single kv head, but not both. On TPU, arrays whose last axis is narrower than LANES are padded:
    heads of width 64 are computed in padded copies of the KV cache.
    """
    cfg, here = of.cfg, -(-rows // of.data)
    tpu, gpu = platform == "tpu", platform == "gpu"
    kept = cache_bytes(of, rows, length)
    padded = LANES / cfg.H if tpu and cfg.H < LANES else 0
    if program == "prefill":
        chunk = prefill_tokens(rows, platform)
        width = 2 * (cfg.F + cfg.N * cfg.H) // of.tensor + 4 * cfg.D
        total = here * chunk * width * of.itemsize
        if tpu and of.tensor == 1:
            total += int(2.5 * padded * kept / cfg.L)
            weights = cfg.V * -(-cfg.D // LANES) * LANES + 2 * cfg.L * cfg.N * cfg.H * cfg.D
            total += of.itemsize * weights if cfg.D % LANES else 0  # embedding, `q` and `o` are padded too
        if gpu:  # keys and values of a layer, and scores where cuDNN does not apply
            heads = cfg.K // mesh.num_shards("K", (cfg.K,), of.over)
            total += 2 * here * length * heads * cfg.H * of.itemsize
            total += 4 * here * chunk * length * cfg.N // of.tensor if cfg.H > LANES else 0
        return total
    total = 2 * 4 * here * cfg.V // mesh.num_shards("V", (cfg.V,), of.over)
    total += int(COPIED[platform] * weight_bytes(of) + 0.97 * padded * kept)
    if of.tensor > 1 and tpu and not padded:
        total += of.itemsize * cfg.L * cfg.N * cfg.H * cfg.D // of.tensor
    heads = cfg.K // mesh.num_shards("K", (cfg.K,), of.over)
    if gpu and of.over.size > 1 and mesh.GROUP not in of.over.shape and (here == 1) != (heads == 1):
        total += kept
    return total


class Roof(NamedTuple):
    """Times that a program needs at least on one device, in seconds.

    Attributes:
        memory: To read weights and KV cache.
        compute: For the products.
        links: For the all-reduces.
    """

    memory: float
    compute: float
    links: float

    @property
    def seconds(self) -> float:
        """The whole step: memory and arithmetic overlap, all-reduces do not."""
        return max(self.memory, self.compute) + self.links

    @property
    def bound(self) -> str:
        """What takes the most time."""
        names = {"memory": "memory bandwidth", "compute": "compute", "links": "interconnect"}
        return names[max(names, key=lambda name: getattr(self, name))]


def decode(of: Layout, spec: specs.Spec, rows: int, context: int) -> Roof:
    """A decode step of `rows` rows (of all devices) whose KV caches hold `context` tokens."""
    here = -(-rows // of.data)
    nbytes = read_bytes(of) + cache_bytes(of, rows, context)
    flops = here * forward_flops(of, 1, context)
    links = all_reduces(of) * all_reduce(spec, of.tensor, here * of.cfg.D * of.itemsize)
    return Roof(nbytes / spec.bandwidth, flops / spec.flops, links)


def prefill(of: Layout, spec: specs.Spec, rows: int, tokens: int) -> Roof:
    """Prefill of `rows` prompts (of all devices) of `tokens` tokens."""
    here = -(-rows // of.data)
    flops = here * (forward_flops(of, tokens, 0, head=False) + head_flops(of))
    links = all_reduces(of) * all_reduce(spec, of.tensor, here * tokens * of.cfg.D * of.itemsize)
    return Roof((read_bytes(of) + cache_bytes(of, rows, tokens)) / spec.bandwidth, flops / spec.flops, links)


def prefill_rows(rows: int, data: int) -> int:
    """Rows of the batch in which the engine prefills `rows` prompts: a power of two, and a multiple of `data`."""
    rounded = 1 << (rows - 1).bit_length()
    return -(-rounded // data) * data


def prefill_tokens(rows: int, platform: str) -> int:
    """Tokens per row of one chunk of prefill, if all rows are prefilled together, as the engine passes them."""
    return decoding.chunk_sizes(platform, rows)[0]


def head_flops(of: Layout) -> float:
    """FLOPs of the logits of one token on one device."""
    return 2 * of.cfg.D * of.cfg.V / mesh.num_shards("V", (of.cfg.V,), of.over)


def forward_flops(of: Layout, T: int, depth: int, head: bool = True) -> float:
    """FLOPs of `T` tokens of one row on one device, after `depth` tokens in the KV cache.

    Two per multiplied weight and token, and 4 N H per token and key: products with keys and with values.
    """
    cfg = of.cfg
    layers = sum(_elements(of, row) for row in params.tensors(of.table, cfg) if row.path not in ("embed", "head"))
    pairs = sum(flops.attended_pairs(T, depth, window) for window in cfg.windows)
    heads = cfg.N / mesh.num_shards("N", (cfg.N,), of.over)
    return T * (2 * layers + head * head_flops(of)) + 4 * heads * cfg.H * pairs


def all_reduces(of: Layout) -> int:
    """Number of all-reduces of activations in a forward pass: two per layer, and one for the embedding."""
    return 2 * of.cfg.L + 1


def all_reduce(spec: specs.Spec, n: int, nbytes: int) -> float:
    """Seconds that the bytes of an all-reduce over n devices take at least, over all links of a device."""
    return 2 * (n - 1) / n * nbytes / spec.link


def latency(of: Layout, spec: specs.Spec) -> float:
    """Seconds that the all-reduces of a forward pass take whatever their size, as assumed above."""
    if of.tensor == 1:
        return 0.0
    return all_reduces(of) * (GPU_ALL_REDUCE if spec.platform == "gpu" else of.tensor * HOP)


def meshes(cfg: Any, count: int) -> list[dict[str, int]]:
    """Axis sizes for `count` devices: `model` divides the number of query heads and the MLP width."""
    sizes = [n for n in range(1, count + 1) if not count % n and not cfg.N % n and not cfg.F % n]
    return [{mesh.DATA: count // n, mesh.MODEL: n} for n in sizes]


def best_mesh(
    table: Any,
    cfg: Any,
    spec: specs.Spec,
    count: int,
    rows: int,
    context: int,
    itemsize: int = 2,
    host: int = 0,
    kv_dtype: Any = None,
    quantize: str | None = None,
) -> dict[str, int]:
    """The mesh with the shortest predicted decode step, of those that fit. Latency of all-reduces is included.

    Weights and two KV caches of all rows must fit: new prompts have one of their own. If nothing fits, the mesh that
    needs the least memory per device.

    Args:
        table: PARAMS of the family.
        cfg: The model's Config.
        spec: The device.
        count: Number of devices.
        rows: Rows that are decoded together.
        context: Tokens per row.
        itemsize: Bytes of an activation, and of a weight that is not quantized.
        host: Number of devices that have fast links to each other: GPUs of a host, TPUs of a slice. A tensor-parallel
            group is larger only if the model does not fit otherwise. 0: all devices.
        kv_dtype: As in Layout.
        quantize: As in Layout.

    Returns:
        {"data": ..., "model": ...}.
    """
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "quantize": quantize, "platform": spec.platform}
    found = [(sizes, layout(table, cfg, sizes, itemsize, **options)) for sizes in meshes(cfg, count)]
    length = decoding.bucket(context)
    needed = [
        weight_bytes(of) + cache_bytes(of, rows, length) + cache_bytes(of, prefill_rows(rows, of.data), length)
        for _, of in found
    ]
    fits = [i for i, nbytes in enumerate(needed) if nbytes <= USABLE * spec.memory]
    near = [i for i in fits if not host or found[i][1].tensor <= host]
    if not fits:
        return found[min(range(len(found)), key=needed.__getitem__)][0]

    def seconds(i: int) -> float:
        return decode(found[i][1], spec, rows, context).seconds + latency(found[i][1], spec)

    return found[min(near or fits, key=seconds)][0]


def default_mesh(table: Any, cfg: Any, quantize: str | None = None) -> dict[str, int]:
    """The default mesh of `load` for all devices of jax, for weights of this type.

    On accelerators that devices/specs.py lists, the best for a full batch of the platform's default size. Elsewhere
    tensor parallelism, as far as heads and MLP width divide.
    """
    device, count = jax.devices()[0], jax.device_count()
    spec = specs.of_device(device)
    if spec is None:
        return topology.default({"N": cfg.N, "F": cfg.F}, count)
    # A host of GPUs is a slice to jax. Local devices are those of a process, which may be one GPU of a host.
    host = min(Counter(getattr(device, "slice_index", 0) for device in jax.devices()).values())
    rows = hardware.BATCH[device.platform]
    return best_mesh(table, cfg, spec, count, rows, min(cfg.context, CONTEXT), host=host, quantize=quantize)
