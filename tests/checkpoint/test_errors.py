"""Errors say what failed, why and how to fix it."""

import json

import pytest

from jaxlm.checkpoint.errors import explain_errors, explain_missing_package


def test_a_reason_with_a_hint_and_without():
    message = r"^x\.json is not valid JSON \(Expecting value.*\): download it again$"
    with pytest.raises(ValueError, match=message), explain_errors("x.json is not valid JSON", "download it again"):
        json.loads("?")
    with pytest.raises(ValueError, match=r"^x\.json: no$"), explain_errors("x.json"):
        raise ValueError("no")


def test_types(tmp_path):
    """OSErrors keep theirs, others become ValueErrors; types that are not listed pass."""
    expected = (OSError, KeyError)
    message = r"^x cannot be read \(No such file or directory\): check it$"
    with pytest.raises(FileNotFoundError, match=message), explain_errors("x cannot be read", "check it", expected):
        (tmp_path / "x").read_text()
    with pytest.raises(ValueError, match=r"^x: 'key'$"), explain_errors("x", on=expected):
        raise KeyError("key")
    with pytest.raises(TypeError, match=r"^bare$"), explain_errors("x", on=expected):
        raise TypeError("bare")


def test_a_missing_package():
    message = r"^training needs absent_package: pip install 'jaxlm\[train\]'$"
    with pytest.raises(ValueError, match=message), explain_missing_package("training", "jaxlm[train]"):
        import absent_package  # noqa: F401  # pyright: ignore[reportMissingImports]
