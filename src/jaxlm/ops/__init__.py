"""What model files are written in: products, norms, rotary positions, attention and the fold over layers.

Everything here takes arrays and scalars, never a config, and speaks the alphabet of docs/architecture.md.
"""

from jaxlm.ops.attention import attend
from jaxlm.ops.folding import fold
from jaxlm.ops.norm import rms_norm
from jaxlm.ops.products import einsum, embed
from jaxlm.ops.rotary import Rope, frequencies, rope

__all__ = ["Rope", "attend", "einsum", "embed", "fold", "frequencies", "rms_norm", "rope"]
