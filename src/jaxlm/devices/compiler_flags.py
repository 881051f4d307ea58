"""Flags of XLA's compiler that no compiler option of jax sets. They hold for the whole process."""

import importlib.metadata
import importlib.util
import os
import platform

# LLVM fills its vectors with the smallest numbers of a loop, not with the largest. The products of bytes of a single
# row read their weights 1.3 times as fast (docs/performance.md).
OPTION = "--xla_backend_extra_options"
VECTORS = f"{OPTION}=--vectorizer-maximize-bandwidth"
NOT_TESTED = (0, 13)  # the first version of jax without a test of the flag. XLA ends a process that has unknown flags.


def use_compiler_flags() -> None:
    """Sets XLA_FLAGS for a process that computes on an x86 CPU. The commands do this by themselves.

    Call it before jax uses a device for the first time: XLA reads the flags once. `import jaxlm` does not do it,
    because the flags hold for all programs of the process. Flags that are set already are kept. Nothing is set if
    JAX_PLATFORMS names an accelerator, or if jax's package for one is installed: its compiler would get the flags too.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    version = tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
    if platform.machine() not in ("x86_64", "AMD64") or version >= NOT_TESTED or not _only_cpu():
        return
    if OPTION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {VECTORS}".strip()


def _only_cpu() -> bool:
    """Whether jax can compute on CPU only, by its settings or its packages."""
    if wanted := os.environ.get("JAX_PLATFORMS"):
        return wanted == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("jax_plugins", "libtpu"))
