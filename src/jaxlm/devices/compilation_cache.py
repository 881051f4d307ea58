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

    name = str(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla")
    path = Path(name).expanduser()
    is_local = "://" not in name  # a bucket, such as gs://name/xla, is for jax to open
    if is_local and not _is_writable(path):
        _log.warning("%s cannot be written, so compiled programs are not stored: set JAX_COMPILATION_CACHE_DIR", path)
        return path
    jax.config.update("jax_compilation_cache_dir", str(path) if is_local else name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    return path


def _is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, which is made if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
