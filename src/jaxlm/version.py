"""The version of the package, apart from `jaxlm/__init__.py` so that modules of the package can import it."""

__version__ = "0.1.0"
