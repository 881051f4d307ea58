"""The architecture of a model family as data, read from the jaxpr of its forward function.

The functions of `jaxlm.nn` that a model file calls are traced as calls of their own. The jaxpr of `forward` and
`logits` then has one equation per norm, product, RoPE and attention, in the order of the computation. Which weight an
equation reads, over which values, with which window and rotary frequencies, follows from the jaxpr and the arguments.
A new family needs no line here. What this file does not know is a `ValueError` that names the family.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxlm import models, nn
from jaxlm.bench import published
from jaxlm.nn import params

RECORDED = (nn.embed, nn.einsum, nn.rms_norm, nn.apply_rope, nn.attend)
ACTIVATION_FUNCTIONS = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU"}  # of jax.nn
TARGET_SIZE = 32 * 4096**2  # L * D * D of the published models whose sizes are shown, or the nearest that there is
POSITIONS = object()  # stands for values that follow from `pos` alone


@dataclass(frozen=True)
class Node:
    """One step of the computation.

    Attributes:
        op: embed, product, norm, rope, attention, activation, multiply or scale.
        weight: Name of the weight in its layer, such as `q`; "" without a weight.
        letters: Letters of the weight.
        detail: What else the step does: the activation function, the factor, which axes a norm is over.
    """

    op: str
    weight: str = ""
    letters: str = ""
    detail: str = ""

    @property
    def shape(self) -> str:
        """`[N,H,D]`."""
        return f"[{','.join(self.letters)}]" if self.letters else ""


@dataclass(eq=False)
class Value:
    """An activation: the node that computes it, and the activations that this node reads."""

    node: Node | None = None
    inputs: list["Value"] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """What a layer adds to the residual stream: `before`, then parallel `branches`, then `after` where they join."""

    before: list[Node]
    branches: list[list[Node]]
    after: list[Node]

    def parts(self) -> list[list[Node]]:
        return [self.before, *self.branches, self.after]


@dataclass(frozen=True)
class LayerType:
    """A kind of layer: sliding window or None, RoPE in words or "" without it, and its blocks."""

    window: int | None
    rope: str
    blocks: list[Block]

    @property
    def words(self) -> str:
        window = "full attention" if self.window is None else f"sliding window of {self.window:,}"
        return f"{window}, {f'RoPE {self.rope}' if self.rope else 'no RoPE'}"


@dataclass(frozen=True)
class Architecture:
    """A family with the sizes of one published model.

    Attributes:
        name: Name of the family, from the docstring of its file.
        module: Name of its file without .py.
        model: Hub id of the published model.
        config: Its `Config`.
        stem: Steps from the tokens to the first layer.
        blocks: The blocks of a layer, with the steps of all layer types.
        top: Steps from the last layer to the logits.
        layer_types: The types of layers, in the order in which they appear.
        pattern: Index of the type of each layer.
        tied: Whether the head is the embedding, for each published model of the family.
    """

    name: str
    module: str
    model: str
    config: Any
    stem: list[Node]
    blocks: list[Block]
    top: list[Node]
    layer_types: list[LayerType]
    pattern: list[int]
    tied: list[bool]

    def types_with(self, block: int, part: int, node: Node) -> list[int]:
        """The indices of the layer types that have a node of `blocks`."""
        return [i for i, one in enumerate(self.layer_types) if node in one.blocks[block].parts()[part]]


def architectures() -> list[Architecture]:
    """The architectures of all families, in the order of `models.FAMILIES`."""
    return [architecture(family) for family in dict.fromkeys(models.FAMILIES.values())]


def architecture(family: Any) -> Architecture:
    """The architecture of a family.

    Raises:
        ValueError: The family has no published model, or its computation has a form that cannot be drawn.
    """
    module = family.__name__.rpartition(".")[2]
    model, config, tied = _published(family, module)
    stem, layers, top = _Trace(family, module, config).read()
    layer_types = list({layer.words: layer for layer in layers}.values())
    pattern = [[one.words for one in layer_types].index(layer.words) for layer in layers]
    if tuple(layer.window for layer in layers) != tuple(config.windows):
        raise ValueError(f"{module}: its layers do not have the sliding windows of Config.windows")
    blocks = max(layer_types, key=lambda one: sum(len(part) for block in one.blocks for part in block.parts())).blocks
    drawn = [part for block in blocks for part in block.parts()]
    for one in layer_types:
        own = [part for block in one.blocks for part in block.parts()]
        if len(own) != len(drawn) or any(not _is_part(few, many) for few, many in zip(own, drawn)):
            raise ValueError(f"{module}: a type of its layers ({one.words}) is not a part of another: draw them apart")
    read = {node.weight for part in [stem, *drawn, top] for node in part}
    if len({(one.window is None, bool(one.rope)) for one in layer_types}) < len(layer_types):
        raise ValueError(f"{module}: two types of layers have another window or RoPE only, and look the same")
    if missing := [path for path in family.PARAMS if path.rpartition(".")[2] not in read and path != "head"]:
        raise ValueError(f"{module}: the forward function does not read {', '.join(missing)}")
    name = re.split(r"[,(]", family.__doc__)[0].strip()
    return Architecture(name, module, model, config, stem, blocks, top, layer_types, pattern, tied)


def _is_part(few: list[Node], many: list[Node]) -> bool:
    """Whether the nodes of `few` are in `many`, in the same order."""
    rest = iter(many)
    return all(node in rest for node in few)


def _published(family: Any, module: str) -> tuple[str, Any, list[bool]]:
    """The hub id and the config of the published model nearest to TARGET_SIZE, of equals the one with the longest
    context; and whether each published model is tied."""
    found = []
    for id, model in published.MODELS.items():
        if models.family_of(model.config["model_type"]) is family:
            config = family.Config.from_hf(model.config)
            distance = abs(math.log(config.L * config.D**2 / TARGET_SIZE))
            found.append((distance, -config.context, id, config))
    if not found:
        raise ValueError(f"{module}: add a model of this family to jaxlm.bench.published")
    _, _, id, config = min(found, key=lambda one: one[:2])
    return id, config, [one[3].tied for one in found]


class _Trace:
    """The jaxpr of a family's forward function, with the calls of `jaxlm.nn` in it."""

    def __init__(self, family: ModuleType, module: str, config: Any) -> None:
        self.family, self.module, self.config = family, module, config
        self.calls: dict[str, tuple[str, dict[str, Any], list[str]]] = {}
        self.ropes: list[str] = []  # what the layer being read calls
        self.windows: list[int | None] = []
        self.layers: list[LayerType] = []

    def read(self) -> tuple[list[Node], list[LayerType], list[Node]]:
        """Stem, layers and top."""
        weights = params.shapes(self.family.PARAMS, self.config, jnp.float32)
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        replaced = {name: self._recorded(value) for name, value in vars(self.family).items() if _recorded_name(value)}

        def logits(weights: Any, tokens: jax.Array, pos: jax.Array) -> jax.Array:
            x, _ = self.family.forward(self.config, tokens, weights, None, pos)
            return self.family.logits(self.config, x, weights)

        functions = {name: self._recorded(getattr(jax.nn, name)) for name in ACTIVATION_FUNCTIONS}
        with patch.dict(vars(self.family), replaced), patch.multiple(jax.nn, **functions):
            jaxpr = jax.make_jaxpr(logits)(weights, tokens, tokens).jaxpr
        paths = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(weights)]
        start = Value()
        (end,) = self._values(jaxpr, [*paths, start, POSITIONS])
        chain = self._chain(end, start)
        places = [i for i, node in enumerate(chain) if node.op == "layer"]
        return chain[: places[0]], self.layers, chain[places[-1] + 1 :]

    def _recorded(self, function: Any) -> Callable[..., Any]:
        """The function, whose calls become equations of their own; arguments that are not arrays are kept aside."""
        keywords = function.keywords if isinstance(function, partial) else {}
        inner = function.func if isinstance(function, partial) else function

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(inner).bind(*args, **{**keywords, **kwargs})
            bound.apply_defaults()
            if isinstance(bound.arguments.get("spec"), tuple):  # several products with one input
                specs, x, weights, dtype = bound.args
                return tuple(call(spec, x, w, dtype) for spec, w in zip(specs, weights, strict=True))
            arrays = {name: value for name, value in bound.arguments.items() if isinstance(value, jax.Array)}
            settings = {name: value for name, value in bound.arguments.items() if name not in arrays}

            def run(arrays: dict[str, jax.Array]) -> Any:
                return inner(**arrays, **settings)

            run.__name__ = f"recorded_{len(self.calls)}"
            self.calls[run.__name__] = inner.__name__, settings, sorted(arrays)
            return jax.jit(run)(arrays)

        return call

    def _values(self, jaxpr: Any, inputs: Iterable[Any]) -> list[Any]:
        """The results of a jaxpr: a Value for each activation, a path for a weight, an array for a constant."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return np.asarray(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, results)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        name, activations = equation.params.get("name", ""), [x for x in operands if isinstance(x, Value)]
        if name in self.calls:
            return [self._call(*self.calls[name], operands)] + [None] * (len(equation.outvars) - 1)
        inner = equation.params.get("jaxpr")
        if inner is not None and any(isinstance(x, str) and x.startswith("layers.") for x in operands):
            return self._layer(inner.jaxpr, [*operands])
        if not activations and not any(isinstance(x, str) for x in operands):
            if any(x is POSITIONS for x in operands):
                return [POSITIONS] * len(equation.outvars)
            result = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
            return result if equation.primitive.multiple_results else [result]
        if equation.primitive.name == "convert_element_type":
            return operands
        return [self._elementwise(equation.primitive.name, operands, activations)]

    def _elementwise(self, primitive: str, operands: list[Any], activations: list[Value]) -> Value:
        if primitive == "mul" and len(activations) == 2:
            return Value(Node("multiply"), activations)
        if primitive == "add" and len(activations) == 2:
            return Value(Node("add"), activations)
        factors = [x for x in operands if isinstance(x, (np.ndarray, jax.Array)) and x.ndim == 0]
        if primitive == "mul" and len(activations) == len(factors) == 1:
            factor = float(factors[0])
            text = "√D" if math.isclose(factor, self.config.D**0.5, rel_tol=1e-6) else f"{factor:g}"
            return Value(Node("scale", detail=text), activations)
        raise ValueError(f"{self.module}: there is no picture of the operation {primitive!r} of this family")

    def _call(self, function: str, settings: dict[str, Any], names: list[str], operands: list[Any]) -> Value:
        """The result of a recorded call, whose array arguments have these names."""
        arrays = dict(zip(names, operands, strict=True))
        path = next((x for x in operands if isinstance(x, str)), "")
        inputs = [x for x in operands if isinstance(x, Value)]
        name = path.rpartition(".")[2]
        letters = self.family.PARAMS[path][0] if path else ""
        if function in ACTIVATION_FUNCTIONS:
            approximate = " (tanh)" if settings.get("approximate") else ""
            return Value(Node("activation", detail=ACTIVATION_FUNCTIONS[function] + approximate), inputs)
        if function == "embed":
            return Value(Node("embed", name, letters), inputs)
        if function == "einsum":
            return Value(Node("product", name, letters), inputs)
        if function == "rms_norm":
            over = {"H": "each head", "NH": "all heads", "KH": "all heads"}.get(letters, "")
            offset = f"weight + {settings['offset']:g}" if settings["offset"] else ""
            return Value(Node("norm", name, letters, ", ".join(filter(None, (over, offset)))), inputs)
        if function == "apply_rope":
            if not np.any(settings["freqs"].radians):
                return inputs[0]  # a rotation by nothing
            self.ropes.append(self._rope(settings["freqs"]))
            return Value(Node("rope"), inputs)
        self.windows.append(settings["window"])
        scale = settings["scale"]
        default = scale is None or math.isclose(scale, self.config.H**-0.5, rel_tol=1e-6)
        detail = "scale 1/√H" if default else f"scale 1/√{scale**-2:.6g}"
        return Value(Node("attention", detail=detail), [arrays["q"], arrays["k"], arrays["v"]])

    def _rope(self, freqs: nn.Frequencies) -> str:
        """The setting of the config that has these frequencies, in words."""
        for value in vars(self.config).values():
            if isinstance(value, nn.Rope) and np.array_equal(value.frequencies(self.config.H).radians, freqs.radians):
                extension = "" if value.type == "default" else f", {value.type} × {value.factor:g}"
                return f"θ {value.theta:,.0f}{extension}"
        raise ValueError(f"{self.module}: no Rope of its Config has the rotary frequencies of a layer")

    def _layer(self, jaxpr: Any, operands: list[Any]) -> list[Any]:
        """Reads one layer. Its result in the jaxpr of the whole model is a node `layer`."""
        self.ropes, self.windows = [], []
        before = next(x for x in operands if isinstance(x, Value))
        start = Value()
        inner = [start if x is before else re.sub(r"^layers\.\d+", "layers", x) if isinstance(x, str) else x
                 for x in operands]  # fmt: skip
        end = self._values(jaxpr, inner)[0]
        blocks = [self._block(added, stream) for stream, added in self._added(end, start)]
        if len(set(self.ropes)) > 1 or len(self.windows) != 1:
            raise ValueError(f"{self.module}: a layer has not one attention with one RoPE")
        self.layers.append(LayerType(self.windows[0], self.ropes[0] if self.ropes else "", blocks))
        return [Value(Node("layer"), [before])] + [None] * (len(jaxpr.outvars) - 1)

    def _added(self, value: Value, start: Value) -> list[tuple[Value, Value]]:
        """The residual stream before each addition on the way from `start` to `value`, and what is added."""
        if value is start:
            return []
        if value.node is None or value.node.op != "add":
            raise ValueError(f"{self.module}: its layer does not only add to the residual stream")
        for stream, added in (value.inputs, value.inputs[::-1]):
            if stream is start or (stream.node is not None and stream.node.op == "add"):
                return [*self._added(stream, start), (stream, added)]
        raise ValueError(f"{self.module}: its layer does not only add to the residual stream")

    def _block(self, value: Value, start: Value) -> Block:
        """The steps from the residual stream to what is added to it."""
        after: list[Node] = []
        while value is not start and len(value.inputs) == 1:
            after, value = [value.node, *after], value.inputs[0]
        if value is start:
            return Block([], [], after)
        ends = [self._branch(x, start) for x in value.inputs]
        fork = ends[0][0]
        if any(end is not fork for end, _ in ends):
            raise ValueError(f"{self.module}: the branches of a block begin at different values")
        return Block(self._chain(fork, start), [nodes for _, nodes in ends], [value.node, *after])

    def _branch(self, value: Value, start: Value) -> tuple[Value, list[Node]]:
        """The value where a branch begins, and its nodes. A branch begins with a product."""
        nodes: list[Node] = []
        while value is not start and len(value.inputs) == 1:
            nodes, value = [value.node, *nodes], value.inputs[0]
            if nodes[0].op == "product":
                return value, nodes
        raise ValueError(f"{self.module}: a branch of a block does not begin with a product")

    def _chain(self, value: Value, start: Value) -> list[Node]:
        """The nodes from start to value, one after the other."""
        nodes: list[Node] = []
        while value is not start:
            if len(value.inputs) != 1:
                raise ValueError(f"{self.module}: {value.node} is not one step after another")
            nodes, value = [value.node, *nodes], value.inputs[0]
        return nodes


def _recorded_name(value: Any) -> str:
    """The name of a function of RECORDED, or of a partial of one; "" for all else."""
    inner = value.func if isinstance(value, partial) else value
    return next((function.__name__ for function in RECORDED if inner is function), "")


def _path(keys: Any) -> str:
    """`layers.3.q` for the keys of a leaf of the weights."""
    return ".".join(str(key.key if hasattr(key, "key") else key.idx) for key in keys)
