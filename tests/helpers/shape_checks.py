"""The type checker of jaxtyping's import hook (tests/conftest.py): beartype, with int accepted for float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
