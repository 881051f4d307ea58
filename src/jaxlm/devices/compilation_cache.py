"""The cache of compiled programs on disk, with which a program is compiled once per machine, not once per process."""

import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)
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

    If the folder cannot be written, one line is logged, and programs are compiled in every process.

    Returns:
        The folder.
    """
    import jax

    path = Path(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(path, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable and "://" not in str(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        _log.warning("%s cannot be written, so compiled programs are not stored: set JAX_COMPILATION_CACHE_DIR", path)
        return path
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    return path
