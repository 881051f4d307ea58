"""What the rest of the package relies on: the `Config` and `Family` protocols.

Every model file of this folder is a Family, and so is any module that `jaxlm.models.register` accepts. Loading, export,
sharding, LoRA, generation and training use nothing else of it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from jaxtyping import Array, Float, Int

from jaxlm.nn import Frequencies, KVCache, Rope
from jaxlm.nn.params import Table


class Config(Protocol):
    """The sizes and constants of one model: a frozen, hashable dataclass.

    Fields are named by the letters of the alphabet, so that `getattr(cfg, letter)` is the size of an axis. A family may
    have more fields (Gemma's `local_rope` and `scale`).
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
        """Longest sequence the model was made for, in tokens (`max_position_embeddings`)."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding (`tie_word_embeddings`)."""
        ...

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, in tokens; None for full attention. Sizes the KV cache."""
        ...

    @property
    def rope(self) -> Rope:
        """Rotary position embedding of full-attention layers. verification puts a `FixedRope` in its place."""
        ...

    def frequencies(self, window: int | None = None) -> Frequencies:
        """Rotary frequencies of the layers with this sliding window."""
        ...

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], allow: Collection[str] = ()) -> "Config":
        """The config of a Hugging Face config.json.

        Args:
            hf: The fields of config.json.
            allow: Names of fields that may pass although the code does not know them (`--allow-field`).

        Raises:
            ValueError: A field asks for what the family does not compute, or is missing or malformed.
        """
        ...


class Family(Protocol):
    """One architecture: a module of pure functions, and the table of its weights."""

    @property
    def __name__(self) -> str:
        """Name in messages and reports; of a module, its last part (`qwen3`)."""
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
        """The value of a norm weight that changes nothing: 1, or 0 where weights are stored as w - 1."""
        ...

    @property
    def IGNORED_PREFIXES(self) -> tuple[str, ...]:
        """Prefixes of checkpoint tensors that are known and not used."""
        ...

    @property
    def layer(self) -> Callable[..., Any]:
        """One layer. The leading arguments are the family's own, bound by `forward`; the last three are x [B,T,D], the
        layer's weights, and its `LayerCache` or None. Returns x and the LayerCache."""
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
        """Last hidden states, normalized, and the updated KV cache.

        Args:
            cfg: A `Config` of this family.
            tokens: Token ids.
            w: Weights: {"embed": ..., "layers": a list or stacked layers, "norm": ..., "head": ... unless tied}.
            cache: KV cache, None without one.
            pos: Position of each token in its sequence, -1 for padding.
            options: Passed to `scan_layers` (remat, hidden).
        """
        ...

    def logits(self, cfg: Any, x: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states; of the weights it needs the output head alone."""
        ...
