"""Capturing and patching activations, for interpretability research: `Model.activations`.

The model files know nothing of it. The forward pass is traced to a jaxpr, in which each activation is one variable:

- The residual stream is the list that `scan_layers` fills (`hidden`).
- What attention and MLP contribute is what a layer adds to the residual stream, in this order.
- The output of a product is marked by its weight: a `WeightForm` around it names the result.

The jaxpr is then evaluated piece by piece. A piece ends where an activation is computed, so that it can be read or
replaced there. The pieces are compiled, and are the same whatever is captured or patched. Layers of one type share
them. Nothing is compiled again for another patch, and a patch that changes nothing gives identical results.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jaxlm.nn import params
from jaxlm.nn.linear import WeightForm, einsum

# A function of an activation, or what takes its place.
Patch = Callable[[jax.Array], Any] | jax.Array | np.ndarray | float
MARK = "activation: "  # the beginning of the names of marked products in a jaxpr
CONTRIBUTIONS = ("attention", "mlp")  # what a layer adds to the residual stream, in this order
BETWEEN = "residual_mid"


@partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["name", "has_input"])
@dataclass(frozen=True)
class MarkedWeight(WeightForm):
    """A weight whose products have its name in the jaxpr; with has_input also what it is multiplied with."""

    w: Any
    name: str
    has_input: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        if self.has_input:
            x = checkpoint_name(x, f"{MARK}{self.name}.input")
        y = checkpoint_name(einsum(spec, x, self.w), MARK + self.name)
        return y.astype(jnp.float32)  # einsum converts it back to x's dtype

    def letters(self, own: str) -> "MarkedWeight":
        """The letters of the weight."""
        return replace(self, w=params.letters_of(self.w, own))


def products(table: params.Table) -> dict[str, bool]:
    """The names of the weights of a layer that are multiplied with activations, and whether these activations have a
    name too: those that are not D wide, such as the outputs of heads and the neurons of the MLP."""
    found = {}
    for path, (letters, *_) in table.items():
        place, _, name = path.partition(".")
        if place == "layers" and letters not in params.NORMS:
            found[name] = params.summed_letters(letters) != "D"
    return found


def marked(table: params.Table, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights, with the layers unstacked and every weight of `products` as a MarkedWeight."""
    listed = params.unstack(dict(weights)) if isinstance(weights["layers"], dict) else weights
    has_input = products(table)
    layers = [
        {name: MarkedWeight(w, name, has_input[name]) if name in has_input else w for name, w in layer.items()}
        for layer in listed["layers"]
    ]
    return {**listed, "layers": layers}


def names_of(table: params.Table, L: int) -> tuple[str, ...]:
    """Names of all activations of a model of L layers."""
    of_products = [n for name, has_input in products(table).items() for n in [f"{name}.input"] * has_input + [name]]
    of_layer = (*of_products, CONTRIBUTIONS[0], BETWEEN, CONTRIBUTIONS[1], "residual")
    return ("embedding", *(f"layers.{i}.{name}" for i in range(L) for name in of_layer))


def matching(known: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """The known names that match these names and patterns, without duplicates.

    Raises:
        ValueError: Nothing matches a pattern.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if pattern in known else [name for name in known if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, known, 3, 0.5)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise ValueError(f"no activation is named {pattern!r}: {hint}model.activation_names lists all names")
        found |= dict.fromkeys(matches)
    return list(found)


def run(
    program: Any, arguments: tuple[Any, ...], names: Collection[str], patch: Mapping[str, Patch]
) -> tuple[Any, dict[str, jax.Array]]:
    """Runs a program, capturing and patching activations.

    Args:
        program: A jitted function whose result is (anything, residual stream before the first and after each layer).
        arguments: Its arguments, with weights as `marked` returns them within the program.
        names: Names of the activations to capture.
        patch: Functions or arrays by name.

    Returns:
        The first part of the program's result, and the activations by name.

    Raises:
        ValueError: A patch has the wrong shape, or the layers of the model do not have an activation.
    """
    traced = program.trace(*arguments)
    jaxpr, consts = traced.jaxpr.jaxpr, traced.jaxpr.consts
    structure = jax.tree.structure(traced.out_info)
    _, residual = jax.tree.unflatten(structure, jaxpr.outvars)
    layer_of = {variable: i for i, variable in enumerate(residual[1:])}
    found: dict[str, jax.Array] = {}
    visited: set[str] = set()

    def visit(place: str, own_name: str, value: jax.Array) -> jax.Array:
        name = place + own_name
        visited.add(name)
        value = _patched(name, value, patch[name]) if name in patch else value
        if name in names:
            found[name] = value
        return value

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *jax.tree.leaves(arguments)], strict=True))
    for piece in _pieces(jaxpr, frozenset(residual), frozenset(layer_of)):
        inputs = [values[variable] for variable in piece.inputs]
        i = next((layer_of[variable] for variable in piece.outputs if variable in layer_of), None)
        if i is None:
            outputs = piece.run(*inputs)
        else:
            of_layer = partial(visit, f"layers.{i}.")
            outputs = _layer(piece, residual[i], residual[i + 1], inputs, of_layer)
        values |= zip(piece.outputs, outputs)
        if residual[0] in piece.outputs:
            values[residual[0]] = visit("", "embedding", values[residual[0]])
    if absent := sorted({*names, *patch} - visited):
        raise ValueError(f"the layers of this model have no activation {absent[0]!r}, at least not in a known form")
    out = [variable.val if isinstance(variable, Literal) else values[variable] for variable in jaxpr.outvars]
    return jax.tree.unflatten(structure, out)[0], {name: found[name] for name in names}


def _patched(name: str, value: jax.Array, patch: Patch) -> jax.Array:
    """The activation that a patch puts in the place of `value`, in its dtype."""
    new: Any = patch(value) if callable(patch) else patch
    shape = None if new is None else jnp.shape(new)
    if shape is None or (callable(patch) and shape != value.shape):
        what = "None" if shape is None else f"shape {shape}"
        raise ValueError(f"the patch of {name} must return an array of shape {value.shape}, not {what}")
    try:
        return jnp.broadcast_to(jnp.asarray(new).astype(value.dtype), value.shape)
    except ValueError:
        raise ValueError(f"the patch of {name} has shape {shape}, which does not fit {value.shape}") from None


class Piece(NamedTuple):
    """A part of a jaxpr: its equations, the variables that it reads, those that are read later, and the function."""

    equations: Sequence[Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    run: Callable[..., Any]


@lru_cache(maxsize=512)
def _pieces(jaxpr: Any, ends: frozenset[Any], alone: frozenset[Any] = frozenset()) -> list[Piece]:
    """Divides a jaxpr after each equation that computes a variable of `ends`. An equation that computes one of `alone`
    is a piece of its own."""
    groups: list[list[Any]] = [[]]
    for equation in jaxpr.eqns:
        if alone & set(equation.outvars):
            groups.append([])
        groups[-1].append(equation)
        if ends & set(equation.outvars):
            groups.append([])
    pieces: list[Piece] = []
    read_later = set(_variables(jaxpr.outvars))
    for equations in filter(None, reversed(groups)):
        computed = dict.fromkeys(variable for equation in equations for variable in equation.outvars)
        read = dict.fromkeys(variable for equation in equations for variable in _variables(equation.invars))
        inputs = [variable for variable in read if variable not in computed]
        outputs = [variable for variable in computed if variable in read_later]
        read_later |= set(inputs)
        run = jax.jit(partial(_evaluate, equations, inputs, outputs))
        pieces.append(Piece(equations, inputs, outputs, run))
    return pieces[::-1]


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _evaluate(equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], *values: Any) -> list[Any]:
    """Evaluates equations; see "Writing custom Jaxpr interpreters" in the documentation of JAX."""
    known = dict(zip(inputs, values, strict=True))
    for equation in equations:
        operands = [atom.val if isinstance(atom, Literal) else known[atom] for atom in equation.invars]
        result = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
        known |= zip(equation.outvars, result if equation.primitive.multiple_results else [result])
    return [known[variable] for variable in outputs]


def _layer(piece: Piece, before: Any, after: Any, inputs: Sequence[Any], visit: Callable[..., jax.Array]) -> list[Any]:
    """Evaluates a layer, which is one jitted function and so one equation of the outer jaxpr.

    Args:
        piece: The piece with its equation.
        before, after: The variables of the residual stream in the outer jaxpr.
        inputs: Values of the piece's inputs.
        visit: Function of the name and the value of each activation of the layer, which returns the value to use.

    Returns:
        Values of the piece's outputs.
    """
    (equation,) = piece.equations
    closed = equation.params["jaxpr"]
    inner, outer = closed.jaxpr, dict(zip(piece.inputs, inputs))
    first = inner.invars[equation.invars.index(before)]
    last = inner.outvars[equation.outvars.index(after)]
    names = _names_in_layer(inner, first, last)
    operands = [atom.val if isinstance(atom, Literal) else outer[atom] for atom in equation.invars]
    values = dict(zip([*inner.constvars, *inner.invars], [*closed.consts, *operands], strict=True))
    for part in _pieces(inner, frozenset(names)):
        values |= zip(part.outputs, part.run(*[values[variable] for variable in part.inputs]))
        for variable in part.outputs:
            for name in names.get(variable, ()):
                values[variable] = visit(name, values[variable])
    results = dict(zip(equation.outvars, inner.outvars))
    return [values[results[variable]] for variable in piece.outputs]


@lru_cache(maxsize=512)
def _names_in_layer(jaxpr: Any, first: Any, last: Any) -> dict[Any, list[str]]:
    """The names of the variables of a layer's jaxpr that are activations.

    Args:
        jaxpr: The jaxpr.
        first, last: The variables of the residual stream before and after the layer.
    """
    names: dict[Any, list[str]] = {}
    for equation in jaxpr.eqns:
        name = equation.params.get("name") if equation.primitive.name == "name" else None
        if isinstance(name, str) and name.startswith(MARK):
            names[equation.outvars[0]] = [name.removeprefix(MARK)]
    added = _added({variable: equation for equation in jaxpr.eqns for variable in equation.outvars}, first, last) or []
    if len(added) == len(CONTRIBUTIONS):
        for name, (contribution, _) in zip(CONTRIBUTIONS, added):
            names.setdefault(contribution, []).append(name)
        names.setdefault(added[0][1], []).append(BETWEEN)
    names.setdefault(last, []).append("residual")
    return names


def _added(computed_by: Mapping[Any, Any], first: Any, last: Any) -> list[tuple[Any, Any]] | None:
    """What is added to the variable `first` on the way to `last`, each with the sum; None if there is no such way."""
    if last is first:
        return []
    equation = None if isinstance(last, Literal) else computed_by.get(last)
    if equation is None or equation.primitive.name != "add":
        return None
    one, other = equation.invars
    for stream, added in ((one, other), (other, one)):
        if (below := _added(computed_by, first, stream)) is not None:
            return [*below, (added, last)]
    return None
