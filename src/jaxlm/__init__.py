"""jaxlm: language models in pure JAX. See docs/architecture.md for the alphabet and the map of the package."""

from typing import TYPE_CHECKING, Any

from jaxlm.version import __version__

if TYPE_CHECKING:
    from jaxlm.adapters import fuse as fuse
    from jaxlm.devices.compilation_cache import use_compilation_cache as use_compilation_cache
    from jaxlm.devices.compiler_flags import use_compiler_flags as use_compiler_flags
    from jaxlm.evaluation.perplexity import evaluate as evaluate
    from jaxlm.exporting import export as export
    from jaxlm.inference.conversation import Conversation as Conversation
    from jaxlm.inference.engine import Engine as Engine
    from jaxlm.inference.generation import generate as generate
    from jaxlm.inference.generation import stream as stream
    from jaxlm.inference.sampling_params import SamplingParams as SamplingParams
    from jaxlm.loading import load as load
    from jaxlm.loading import load_adapter as load_adapter
    from jaxlm.model import Model as Model
    from jaxlm.training.loop import train as train
    from jaxlm.verification import verify as verify

_HOME = {
    "Conversation": "jaxlm.inference.conversation",
    "Engine": "jaxlm.inference.engine",
    "Model": "jaxlm.model",
    "SamplingParams": "jaxlm.inference.sampling_params",
    "evaluate": "jaxlm.evaluation.perplexity",
    "export": "jaxlm.exporting",
    "fuse": "jaxlm.adapters",
    "generate": "jaxlm.inference.generation",
    "load": "jaxlm.loading",
    "load_adapter": "jaxlm.loading",
    "stream": "jaxlm.inference.generation",
    "train": "jaxlm.training.loop",
    "use_compilation_cache": "jaxlm.devices.compilation_cache",
    "use_compiler_flags": "jaxlm.devices.compiler_flags",
    "verify": "jaxlm.verification",
}
__all__ = [
    "Conversation", "Engine", "Model", "SamplingParams", "__version__", "evaluate", "export", "fuse", "generate",
    "load", "load_adapter", "stream", "train", "use_compilation_cache", "use_compiler_flags", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports attributes lazily, so that `import jaxlm` does not import jax."""
    if name not in _HOME:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
