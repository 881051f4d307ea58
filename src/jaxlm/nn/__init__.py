"""Building blocks of the model files: einsum with weights, norms, rotary position embedding, attention, the layer loop.

Functions take arrays and scalars, never a config. Shapes use the letters of docs/architecture.md. They are annotated
with jaxtyping, and the tests check them at run time (tests/conftest.py).
"""

from jaxlm.nn.attention import attend
from jaxlm.nn.kv_cache import KVCache
from jaxlm.nn.linear import einsum, embed
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.rope import Frequencies, Rope, apply_rope
from jaxlm.nn.scan_layers import scan_layers

__all__ = ["Frequencies", "KVCache", "Rope", "apply_rope", "attend", "einsum", "embed", "rms_norm", "scan_layers"]
