"""Which layers of a model have the same type, so that they are computed by the same function and stacked together."""

from typing import Any

from jaxlm.nn.params import period


def per_layer(cfg: Any) -> dict[str, tuple[Any, ...]]:
    """The fields of a config that have one value per layer, such as `windows`: they set the layers apart."""
    return {name: value for name, value in vars(cfg).items() if isinstance(value, tuple) and len(value) == cfg.L}


def layer_period(cfg: Any) -> int:
    """Number of layers after which the types of layers repeat (Gemma 3: 6). Layers of equal type are computed by the
    same function and stacked together."""
    return len(period(list(zip(cfg.windows, *per_layer(cfg).values(), strict=True))))
