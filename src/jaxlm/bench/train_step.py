"""Training steps, timed: the step of `jaxlm train` on rows of random tokens. Their contents do not change the speed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.bench import limits, memory_use
from jaxlm.data.packing import Batch
from jaxlm.devices import mesh
from jaxlm.nn import flops, layer_types, lora, params
from jaxlm.nn.quantized import is_quantized
from jaxlm.training import optimizers, step
from jaxlm.training.config import LoraOptions, Optimizer

if TYPE_CHECKING:
    from jaxlm.model import Model


@dataclass
class TrainRow:
    """The measurements of one batch size and row length.

    Attributes:
        batch: Rows per step.
        length: Tokens per row.
        operations: Model FLOPs of a step. Recomputation does not count.
        compile_seconds: Time spent compiling.
        seconds: Time of each step.
        peak_memory: The most bytes in use; None where it is not known.
    """

    batch: int
    length: int
    operations: float
    compile_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each step."""
        return [self.batch * self.length / seconds for seconds in self.seconds]

    @property
    def speed(self) -> float:
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0

    def limit(self, rates: limits.Rates) -> float:
        """Tokens per second at the matrix rate. `speed` over it is the MFU (model FLOPs utilization)."""
        return rates.matmul * rates.devices * self.batch * self.length / self.operations


@dataclass
class TrainSession:
    """The measurements of training a model. `rows` and `rates` hold what was measured so far.

    Attributes:
        model: The model. `run` frees its weights, which the state of the training step replaces.
        cases: Pairs of batch size and row length.
        steps: Timed steps of each case.
        method: "full" trains all weights in float32, "lora" an adapter on all matrices of the layers.
        rank: Rank of the adapter.
        dtype: The dtype of activations and products. Default: what `jaxlm train --dtype auto` chooses.
    """

    model: "Model"
    cases: list[tuple[int, int]]
    steps: int
    method: str = "full"
    rank: int = LoraOptions.rank
    dtype: str = ""
    rows: list[TrainRow] = field(default_factory=list)
    rates: limits.Rates = field(default_factory=limits.Rates)

    def run(self, progress: Callable[[str, float | None], None]) -> None:
        """Measures all cases.

        Raises:
            ValueError: A row is longer than the context of the model.
        """
        model = self.model
        for _, length in self.cases:
            if length > model.config.context:
                raise ValueError(f"rows of {length:,} tokens exceed the context length of {model.source}, "
                                 f"{model.config.context:,}: choose a smaller -p")  # fmt: skip
        self.rates.devices, device, where = limits.devices_of(model), model.device, model.mesh or model.device
        state, frozen, take, size = self._prepare()
        self.model = model = replace(model, weights=jax.eval_shape(lambda tree: tree, model.weights))
        for batch, length in self.cases:
            progress(f"batch {batch}, {length} tokens: compiling", None)
            operations = flops.training(model.family.PARAMS, model.config, length, size) * batch * length
            row = TrainRow(batch, length, operations)
            rows = self._batch(batch, length, where)
            was_reset = memory_use.reset_peak()
            begin = time.perf_counter()
            with mesh.use_mesh_of(state.weights):
                compiled = take.lower(state, rows, frozen).compile()
            row.compile_seconds = time.perf_counter() - begin
            self.rows.append(row)
            for number in range(self.steps + 1):  # the first step is not counted
                left = (self.steps - number + 1) * min(row.seconds, default=0.0) or None
                progress(f"batch {batch}, {length} tokens: step {number} of {self.steps}", left)
                begin = time.perf_counter()
                state, metrics = compiled(state, rows, frozen)
                jax.block_until_ready((state, metrics))
                if number:
                    row.seconds.append(time.perf_counter() - begin)
                    row.peak_memory = memory_use.peak(device, was_reset)
            self.rates.measure(device, self.dtype)

    def _prepare(self) -> tuple[step.State, Any, Any, int | None]:
        """The first state, the frozen weights of an adapter, the jitted step, and the size of the adapter."""
        model, of = self.model, Optimizer()
        self.dtype = self.dtype or ("float32" if model.device.platform == "cpu" else "bfloat16")
        family, cfg = model.family, model.config
        period = layer_types.layer_period(cfg)
        base, frozen, size = params.stack(model.weights, period), None, None
        if self.method == "lora":
            targets = lora.targets(family.PARAMS, cfg, ("all-linear",))
            scale = lora.scale(LoraOptions.alpha, self.rank, False)
            adapter = lora.init(targets, cfg.L, self.rank, scale, jax.random.key(0))
            frozen, weights, size = (
                _frozen(base, jnp.dtype(self.dtype)),
                params.stack(adapter, period),
                params.num_elements(adapter),
            )
        else:
            weights = step.cast(base, jnp.float32)
        tx = optimizers.make_optimizer(of, self.steps + 1, params.letters(family.PARAMS, weights))
        remat = "dots" if model.device.platform == "cpu" else "none"  # what --remat auto chooses
        take = jax.jit(step.make_step(family, cfg, tx, dtype=jnp.dtype(self.dtype), remat=remat), donate_argnums=0)
        init = partial(step.init_state, tx)
        shapes = jax.eval_shape(init, weights)
        one = jax.sharding.SingleDeviceSharding(model.device)
        over = model.mesh and step.state_shardings(tx, shapes, model.mesh, family.PARAMS)
        return jax.jit(init, out_shardings=over or one)(weights), frozen, take, size

    def _batch(self, batch: int, length: int, where: Any) -> Batch:
        tokens = np.random.default_rng(0).integers(0, self.model.config.V, (batch, length + 1)).astype(np.int32)
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
        arrays = Batch(tokens[:, :-1], tokens[:, 1:], pos, np.ones((batch, length), bool))
        placed: Any = [mesh.place(a, "BT", where) for a in arrays]
        return Batch(*placed)


def _frozen(base: Any, dtype: Any) -> Any:
    """The base of an adapter in the compute dtype. Quantized weights keep their numbers and scales, as in training."""

    def of(leaf: Any) -> Any:
        return replace(leaf, dtype=dtype, activations=False) if is_quantized(leaf) else step.cast(leaf, dtype)

    return jax.tree.map(of, base, is_leaf=is_quantized)
