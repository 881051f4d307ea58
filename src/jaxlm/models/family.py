"""The interface of a model family: the `Config` and `Family` protocols.

Every model file in this folder is a Family, and so is any module passed to `jaxlm.models.register`. Loading, export,
sharding, LoRA, generation and training use only this interface.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from jaxtyping import Array, Float, Int

from jaxlm.nn import Frequencies, KVCache, Rope
from jaxlm.nn.params import Table


class Config(Protocol):
    """The sizes and constants of one model: a frozen, hashable dataclass.

    Fields are named by the letters of the alphabet, so that `getattr(cfg, letter)` is the size of an axis. A family may
    have more fields (Gemma's `scale`). A tuple of L values, such as `windows`, has one value per layer: layers with
    equal values in all such fields have one type (`layer_types.layer_period`).
    """

    @property
    def V(self) -> int:
        """Vocabulary size."""
        ...

    @property
    def D(self) -> int:
        """Model width."""
        ...

    @property
    def F(self) -> int:
        """MLP width."""
        ...

    @property
    def L(self) -> int:
        """Number of layers."""
        ...

    @property
    def N(self) -> int:
        """Number of query heads, a multiple of K."""
        ...

    @property
    def K(self) -> int:
        """Number of key/value heads."""
        ...

    @property
    def H(self) -> int:
        """Head width."""
        ...

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        ...

    @property
    def context(self) -> int:
        """Context length in tokens (`max_position_embeddings`)."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding (`tie_word_embeddings`)."""
        ...

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, in tokens; None for full attention. Determines the size of the KV cache."""
        ...

    @property
    def rope(self) -> Rope:
        """Rotary position embedding of full-attention layers. verification replaces it by a `FixedRope`."""
        ...

    def frequencies(self, window: int | None = None) -> Frequencies:
        """Rotary frequencies of the layers with this sliding window."""
        ...

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], allow: Collection[str] = ()) -> "Config":
        """Creates the config from a Hugging Face config.json.

        Args:
            hf: The fields of config.json.
            allow: Names of fields to ignore that would be refused (`--allow-field`).

        Raises:
            ValueError: A field is missing, invalid, or not supported by the family.
        """
        ...


class Family(Protocol):
    """One architecture: a module of pure functions, and the table of its weights."""

    @property
    def __name__(self) -> str:
        """Name for messages and reports, of which the last part (`qwen3`) is shown."""
        ...

    @property
    def Config(self) -> Any:
        """The class of the family's `Config`s."""
        ...

    @property
    def PARAMS(self) -> Table:
        """Path of each weight -> its letters and its names in a checkpoint: see jaxlm.nn.params."""
        ...

    @property
    def NORM_IDENTITY(self) -> float:
        """The value of a norm weight without effect: 1, or 0 if weights are stored as w - 1."""
        ...

    @property
    def IGNORED_PREFIXES(self) -> tuple[str, ...]:
        """Prefixes of known checkpoint tensors that are not loaded."""
        ...

    @property
    def layer(self) -> Callable[..., Any]:
        """One layer. The last three arguments are x [B,T,D], the weights of the layer, and its `LayerCache` or None.
        Further leading arguments are specific to the family and bound by `forward`. Returns x and the LayerCache."""
        ...

    def forward(
        self,
        cfg: Any,
        tokens: Int[Array, "B T"],
        w: Any,
        cache: KVCache | None,
        pos: Int[Array, "B T"],
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Computes the last hidden states, normalized, and the updated KV cache.

        Args:
            cfg: A `Config` of this family.
            tokens: Token ids.
            w: Weights: {"embed": ..., "layers": a list or stacked layers, "norm": ..., "head": ... unless tied}.
            cache: The KV cache, or None.
            pos: Position of each token in its sequence, -1 for padding.
            options: Passed to `scan_layers` (remat, hidden).
        """
        ...

    def logits(self, cfg: Any, x: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"]:
        """Computes float32 logits from hidden states. Of the weights, only the output head is used."""
        ...


def check_family(family: Any) -> None:
    """Checks that an object has the attributes of `Family`, its Config those of `Config`, and the form of its PARAMS.

    Raises:
        ValueError: It does not. The message names everything that is missing or wrong.
    """
    name = getattr(family, "__name__", type(family).__name__)
    wrong = [f"it lacks {each}" for each in _members(Family) if not hasattr(family, each)]
    config, table = getattr(family, "Config", None), getattr(family, "PARAMS", None)
    fields: set[str] = set()
    if isinstance(config, type):
        fields = {*dir(config), *getattr(config, "__dataclass_fields__", ())}  # not all fields are attributes
        wrong += [f"its Config lacks {each}" for each in _members(Config) if each not in fields]
    if isinstance(table, Mapping):
        wrong += [f"PARAMS lacks the row {path!r}" for path in ("embed", "norm") if path not in table]
        wrong += [fault for path, row in table.items() for fault in _faults(path, row, fields)]
    elif table is not None:
        wrong.append("PARAMS is not a dict of rows")
    if wrong:
        raise ValueError(f"{name} is not a model family (jaxlm.models.family): {'; '.join(wrong)}")


def _members(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]


def _faults(path: Any, row: Any, fields: Collection[str]) -> list[str]:
    """What is wrong with a row of PARAMS: path -> (letters, checkpoint name, aliases ...)."""
    if not isinstance(row, tuple | list) or len(row) < 2 or not all(isinstance(text, str) for text in (path, *row)):
        return [f"PARAMS[{path!r}] must be (letters, checkpoint name, aliases ...)"]
    letters, *names = row
    wrong = [f"PARAMS[{path!r}]: Config has no size {letter}" for letter in letters if fields and letter not in fields]
    if path.startswith("layers."):
        wrong += [f"PARAMS[{path!r}]: {name!r} needs {{}} for the layer" for name in names if name.count("{}") != 1]
    return wrong
