"""jaxlm's own programs compiled ahead of time: decode, prefill and training, for devices that are not here.

The compilers run on any Linux machine: `pip install "jax[tpu]"` or `pip install "jax[cuda13]"`. Weights, KV cache and
state are shapes with shardings on the devices; nothing is allocated. The programs are those that `generate` and `train`
run.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.bench import gpu_targets
from jaxlm.bench.plan_training import Training
from jaxlm.data.packing import Batch
from jaxlm.devices import hardware, mesh, specs, topology
from jaxlm.devices.specs import Spec
from jaxlm.inference import decoding, roofline
from jaxlm.inference.compilation import compile_program
from jaxlm.inference.prefill import empty_rows
from jaxlm.nn import attention_tpu, kv_cache, layer_types, params
from jaxlm.nn.quantize import stored

# libtpu asks the cloud for the machine type, warns if there is no answer, and can be loaded by one process only.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Setting(NamedTuple):
    """A model on devices.

    Attributes:
        family: The module of the architecture.
        cfg: The model's Config.
        over: The mesh; None on one device.
        batch: Rows.
        device: The device without a mesh.
        dtype: Of weights and activations.
        kv_dtype: Of the KV cache. None: that of the activations.
        quantize: The type of quantized weights (nn/quantize.py); None if they are not.
    """

    family: Any
    cfg: Any
    over: Any  # Mesh | AbstractMesh | None
    batch: int
    device: Any = None
    dtype: Any = jnp.bfloat16
    kv_dtype: Any = None
    quantize: str | None = None

    @property
    def data(self) -> int:
        """Number of parts that rows are divided into."""
        return self.over.shape[mesh.DATA] if self.over is not None else 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.over.size if self.over is not None else 1

    @property
    def platform(self) -> str:
        device = self.over.devices.flat[0] if isinstance(self.over, Mesh) else self.device
        return jax.default_backend() if device is None else device.platform

    def put(self, a: Any, letters: str) -> jax.ShapeDtypeStruct:
        """An array's shape and dtype, with the sharding that `mesh.place` would give it."""
        if self.over is None:
            sharding = None if self.device is None else jax.sharding.SingleDeviceSharding(self.device)
        else:
            sharding = mesh.sharding(letters, a.shape, self.over)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def tpu_slice(name: str) -> list[Any]:
    """The devices of a TPU slice such as "v6e:2x4", for compilation only."""
    from jax.experimental import topologies

    os.environ.update({name: value for name, value in NO_TPU.items() if name not in os.environ})
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def devices(spec: Spec, count: int) -> list[Any]:
    """The devices of a slice or of a GPU host, for compilation only.

    Raises:
        ValueError: The compiler for these devices is not installed, or there is no such slice.
    """
    if spec.platform == "gpu":
        return gpu_targets.devices(spec, count)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"the TPU compiler is not installed: pip install 'jax[tpu]' to compile for {spec.name}")
    found = tpu_slice(f"{spec.name}:{specs.slice_shape(spec, count)}")
    if len(found) != count:  # of v4 it describes cores, which are no devices of jax
        raise ValueError(f"the TPU compiler cannot compile for {spec.name} without one: leave out --compile")
    return found


def setting(
    family: Any,
    cfg: Any,
    on: list[Any],
    sizes: dict[str, int],
    batch: int,
    dtype: Any,
    quantize: str | None = None,
) -> Setting:
    """A model on devices `on`, sharded by a mesh with these axis sizes."""
    if len(on) == 1:
        return Setting(family, cfg, None, batch, on[0], dtype, quantize=quantize)
    return Setting(family, cfg, topology.make(sizes, cfg.K, on), batch, None, dtype, quantize=quantize)


def weights(where: Setting) -> Any:
    """The weights, sharded as `load` shards them."""
    found: dict[str, Any] = {}
    for row in params.tensors(where.family.PARAMS, where.cfg):
        leaf = stored(row, where.dtype, where.quantize, where.platform)
        params.put(found, row.path, jax.tree.map(where.put, leaf, params.letters_of(leaf, row.letters)))
    return found


def cache(where: Setting, context: int, chunk: int) -> kv_cache.KVCache:
    """The KV cache of all rows. chunk: tokens of the longest write."""
    cfg, length = where.cfg, decoding.bucket(context)
    made = partial(kv_cache.init, where.batch, length, cfg.windows, cfg.K, cfg.H, where.kv_dtype or where.dtype, chunk)
    return kv_cache.map_arrays(jax.eval_shape(made), where.put)


def state(where: Setting, context: int) -> decoding.State:
    """The state of a full batch, without penalties and logit biases."""

    def made() -> decoding.State:
        model: Any = SimpleNamespace(config=where.cfg, mesh=None, device=None)
        return empty_rows(model, where.batch, full=False)

    put: Any = where.put
    return decoding.constrain_state(jax.eval_shape(made), put)._replace(kv=cache(where, context, 1))


@contextmanager
def compiling_for(where: Setting) -> Iterator[None]:
    """Tells the attention of TPUs, within this context, for which devices it is compiled."""
    device = where.device if where.over is None else where.over.devices.flat[0]
    token = attention_tpu.compiling_for.set(device.device_kind)
    try:
        yield
    finally:
        attention_tpu.compiling_for.reset(token)


def decode(where: Setting, context: int, platform: str, logprobs: int | None = None) -> Any:
    """The compiled decode program. logprobs: number of top log-probabilities."""
    run = partial(decoding.step, where.family, where.cfg, logprobs, (), hardware.STEPS[platform])
    with compiling_for(where):
        return compile_program(run, (1,), (weights(where), state(where, context)))


def prefill(where: Setting, context: int, platform: str) -> Any:
    """The compiled program of one chunk of prefill for all rows."""
    chunk = min(roofline.prefill_tokens(where.batch, platform), decoding.bucket(context))
    ids = where.put(jax.ShapeDtypeStruct((where.batch, chunk), jnp.int32), "BT")
    last = where.put(jax.ShapeDtypeStruct((where.batch, where.cfg.D), where.dtype), "BD")
    args = (weights(where), cache(where, context, chunk), last, ids, ids)
    with compiling_for(where):
        return compile_program(partial(decoding.prefill, where.family, where.cfg), (1, 2), args)


class TrainingShapes(NamedTuple):
    """The optimizer, and the state and a batch as shapes with shardings."""

    tx: Any
    state: Any
    batch: Batch


def training_shapes(where: Setting, how: Training) -> TrainingShapes:
    """The shapes of a training step. where.batch is not used."""
    from jaxlm.training import optimizers, step  # needs optax, which generation does not
    from jaxlm.training.config import Optimizer

    family, cfg, over = where.family, where.cfg, where.over
    made = params.shapes(family.PARAMS, cfg, jnp.dtype(how.weight_dtype))
    made = jax.eval_shape(partial(params.stack, period=layer_types.layer_period(cfg)), made)
    tx = optimizers.make_optimizer(Optimizer(name=how.optimizer), 1000, params.letters(family.PARAMS, made))
    shapes = jax.eval_shape(partial(step.init_state, tx, moment_dtype=jnp.dtype(how.moment_dtype)), made)
    one = None if where.device is None else jax.sharding.SingleDeviceSharding(where.device)
    places = step.state_shardings(tx, shapes, over, family.PARAMS) if over else jax.tree.map(lambda a: one, shapes)
    shapes = jax.tree.map(lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), shapes, places)
    shape = (how.rows * where.data * how.accumulate, how.length)
    row, loss_mask = (where.put(jax.ShapeDtypeStruct(shape, dtype), "BT") for dtype in (jnp.int32, jnp.bool_))
    return TrainingShapes(tx, shapes, Batch(row, row, row, loss_mask))  # type: ignore[arg-type]


def train(where: Setting, how: Training) -> Any:
    """The compiled training step, as `training.loop` compiles it."""
    from jaxlm.training import step

    shapes = training_shapes(where, how)
    options: dict[str, Any] = {"accumulate": how.accumulate, "dtype": jnp.bfloat16, "remat": how.remat}
    run = step.make_step(where.family, where.cfg, shapes.tx, **options, grad_dtype=jnp.dtype(how.grad_dtype))
    with compiling_for(where), mesh.use_mesh(where.over):
        return jax.jit(run, donate_argnums=0).lower(shapes.state, shapes.batch, None).compile()


def share(tree: Any) -> int:
    """Bytes of a tree on one device, PRNG keys excluded."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(_share(leaf) for leaf in leaves)


def _share(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize


class Account(NamedTuple):
    """The compiler's account of a program's memory on one device, in bytes. aliased: of arguments that are donated to
    the output."""

    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        """Peak of the program."""
        return self.arguments + self.temporaries + self.output - self.aliased + self.code


def account(program: Any) -> Account:
    """The account of a compiled program."""
    found = program.memory_analysis()
    return Account(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def whole(compile: Callable[[Setting], Any], where: Setting) -> Account:
    """The account of a program, compiled with all layers."""
    return account(compile(where))


def of_all_layers(compile: Callable[[Setting], Any], where: Setting) -> Account:
    """The account of a program of all layers, from programs with one and with two periods of layers.

    Layers are unrolled, so that arguments and code grow by the same number of bytes with each period. Compiling the
    whole program takes up to 20 times as long.

    Args:
        compile: Compiles the program for a setting.
        where: The model with all its layers.
    """
    period = max(2, layer_types.layer_period(where.cfg))
    if 2 * period >= where.cfg.L:
        return whole(compile, where)
    one, two = (account(compile(with_layers(where, n * period))) for n in (1, 2))
    rest = where.cfg.L - period
    found = Account(*(a + (b - a) * rest // period for a, b in zip(one, two)))
    # More layers do not need fewer temporary arrays, but the compiler may choose others.
    return found._replace(temporaries=max(found.temporaries, one.temporaries, two.temporaries))


def with_layers(where: Setting, L: int) -> Setting:
    """The same setting for the first L layers of the model."""
    own = {name: values[:L] for name, values in layer_types.per_layer(where.cfg).items()}
    return where._replace(cfg=replace(where.cfg, L=L, **own))


def compiled_or_refused(compile: Callable[[], Any]) -> tuple[Any, str]:
    """The program, or None and the compiler's reason: newer compilers refuse programs that do not fit."""
    try:
        return compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0]
