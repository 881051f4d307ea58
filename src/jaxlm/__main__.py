"""Runs the command line: `python -m jaxlm` is the same as `jaxlm`."""

from jaxlm.cli import entry

entry()
