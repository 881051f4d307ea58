"""The folder of published files (checkpoints, tokenizers, configs): ../shared/data, or what JAXLM_SHARED names."""

import os
from pathlib import Path

SHARED = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[3] / "shared" / "data")
TOKENIZERS = ["tokenizers/llama3", "tokenizers/qwen3", "tokenizers/olmo2", "checkpoints/stories260K"]
