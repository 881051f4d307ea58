"""The limits of a device, measured now, and the speed that they allow a model: the roofline of prefill and decoding."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxlm.devices import hardware, mesh
from jaxlm.inference import memory, roofline
from jaxlm.inference.roofline import Layout
from jaxlm.nn import params

if TYPE_CHECKING:
    from jaxlm.model import Model

READ_BYTES = 1 << 30  # of the array that is read: more than any cache holds
MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
REPEATS = 3


class Limit(NamedTuple):
    """The fastest that a device can be.

    Attributes:
        seconds: The least time.
        bound: "memory" or "compute": what takes that time.
    """

    seconds: float
    bound: str


@dataclass
class Rates:
    """The best rates measured so far.

    Attributes:
        devices: Number of devices whose rates add up. Virtual CPU devices share one CPU and count as one.
        read: Bytes per second read from memory by one device.
        matmul: FLOP/s of a large matrix product on one device, in the faster of float32 and the model's dtype.
        matmul_dtype: The dtype of that product.
    """

    devices: int = 1
    read: float = 0.0
    matmul: float = 0.0
    matmul_dtype: str = ""
    timed: int = field(default=0, repr=False)

    def measure(self, device: Any, dtype: Any) -> None:
        """Measures again. A busy machine is slower, so the best rate counts."""
        self.read = max(self.read, read_rate(device))
        for kind in dict.fromkeys(("float32", jnp.dtype(dtype).name)):
            self.matmul, self.matmul_dtype = max((self.matmul, self.matmul_dtype), (matmul_rate(device, kind), kind))
        self.timed += 1

    def limit(self, nbytes: float, operations: float) -> Limit:
        """The least time for reading these bytes and computing these FLOPs, divided over all devices."""
        return self.limit_of_one(nbytes / self.devices, operations / self.devices)

    def limit_of_one(self, nbytes: float, operations: float) -> Limit:
        """The least time of one device for reading these bytes and computing these FLOPs, which overlap."""
        memory, compute = nbytes / self.read, operations / self.matmul
        return Limit(max(memory, compute), "memory" if memory >= compute else "compute")


def read_rate(device: Any) -> float:
    """Bytes per second at which a device reads an array of READ_BYTES from its memory."""
    free = hardware.available_memory(device)
    nbytes = READ_BYTES if free is None else min(READ_BYTES, free // 4)
    with jax.default_device(device):
        x = jnp.ones((1024, nbytes // 4096), jnp.float32)
        seconds = _best(jax.jit(lambda x: jnp.max(x, axis=1)), x)
    return x.nbytes / seconds


def matmul_rate(device: Any, dtype: str) -> float:
    """FLOP/s of a large square matrix product."""
    n = MATMUL_SIZE[device.platform]
    with jax.default_device(device):
        a = jnp.ones((n, n), dtype)
        seconds = _best(jax.jit(lambda a: a @ a), a)
    return 2 * n**3 / seconds


def _best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """The least seconds of several calls."""
    function(x).block_until_ready()
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return best


def devices_of(model: "Model") -> int:
    """The number of devices whose memory and arithmetic a model uses."""
    return 1 if model.mesh is None or model.device.platform == "cpu" else model.mesh.size


def layout_of(model: "Model") -> Layout:
    """The model on the devices whose memory and arithmetic count (`devices_of`), for bytes and FLOPs of one device."""
    sizes = dict(model.mesh.shape) if model.mesh is not None and devices_of(model) > 1 else {mesh.DATA: 1}
    over = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    itemsize, leaf = np.dtype(model.dtype).itemsize, partial(_leaf, model.weights)
    return Layout(model.family.PARAMS, model.config, over, itemsize, model.cache_dtype, leaf=leaf)


def _leaf(weights: Any, row: params.TensorSpec) -> Any:
    return params.get(weights, row.path)


def _read(model: "Model", of: Layout, batch: int, length: int) -> float:
    """Bytes that one device reads for a step of `batch` rows, each with `length` tokens."""
    heads = model.config.K // mesh.num_shards("K", (model.config.K,), of.over)
    kept = memory.kv_bytes(model, length) * heads // model.config.K
    return roofline.read_bytes(of) + -(-batch // of.data) * kept


def prefill_limit(model: "Model", rates: Rates, batch: int, tokens: int, depth: int) -> Limit:
    """The limit of the prefill of `batch` rows of `tokens` tokens behind `depth` tokens in the KV cache, up to the
    logits of the last token."""
    of = layout_of(model)
    operations = roofline.forward_flops(of, tokens, depth, head=False) + roofline.head_flops(of)
    return rates.limit_of_one(_read(model, of, batch, depth), -(-batch // of.data) * operations)


def decode_limit(model: "Model", rates: Rates, batch: int, tokens: int, depth: int) -> Limit:
    """The limit of `tokens` decoding steps of `batch` rows, of which the first attends to `depth` tokens and itself."""
    of, total, bounds = layout_of(model), 0.0, []
    for length in range(depth + 1, depth + tokens + 1):
        operations = -(-batch // of.data) * roofline.forward_flops(of, 1, length - 1)
        step = rates.limit_of_one(_read(model, of, batch, length), operations)
        total += step.seconds
        bounds.append(step.bound)
    return Limit(total, max(set(bounds), key=bounds.count))
