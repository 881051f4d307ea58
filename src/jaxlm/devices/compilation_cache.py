"""The cache of compiled programs on disk, with which a program is compiled once per machine, not once per process."""

import os
from pathlib import Path

SECONDS = 0.2  # programs that compile faster are not stored


def cache_folder() -> Path:
    """The cache folder of jaxlm: $XDG_CACHE_HOME/jaxlm or ~/.cache/jaxlm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def use_compilation_cache(folder: str | Path | None = None) -> Path:
    """Makes jax store compiled programs on disk, for this process. The commands do this by themselves.

    Call it before the first program is compiled. It changes jax's configuration of the whole process, so `import jaxlm`
    does not do it.

    Args:
        folder: The folder of the cache. Default: JAX_COMPILATION_CACHE_DIR, or "xla" in the cache folder of jaxlm.

    Returns:
        The folder.
    """
    import jax

    path = Path(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    return path
