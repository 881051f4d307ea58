"""What model files are written in: products, norms, rotary positions, attention and the fold over layers.

Everything here takes arrays and scalars, never a config, and speaks the alphabet of docs/architecture.md.
"""

from jaxlm.nn.attention import attend
from jaxlm.nn.linear import einsum, embed
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.rope import Rope, apply_rope, frequencies
from jaxlm.nn.scan_layers import scan_layers

__all__ = ["Rope", "apply_rope", "attend", "einsum", "embed", "frequencies", "rms_norm", "scan_layers"]
