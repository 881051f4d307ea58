"""What model files are written in: einsum with weights, norms, rotary positions, attention and the layer loop.

Functions take arrays and scalars, never a config. Shapes use the alphabet of docs/architecture.md; their annotations
are jaxtyping's, checked at run time by the tests (tests/conftest.py).
"""

from jaxlm.nn.attention import attend
from jaxlm.nn.kv_cache import KVCache
from jaxlm.nn.linear import einsum, embed
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.rope import Frequencies, Rope, apply_rope
from jaxlm.nn.scan_layers import scan_layers

__all__ = ["Frequencies", "KVCache", "Rope", "apply_rope", "attend", "einsum", "embed", "rms_norm", "scan_layers"]
