"""Families from outside the package, and `load` of a model file."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import checkpoint_files

import jaxlm
from jaxlm import models
from jaxlm.models import llama3, qwen3
from jaxlm.models.family import Config, Family

TOKENS = np.array([[1, 5, 9, 2]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint."""
    raw = checkpoint_files.LLAMA
    return checkpoint_files.folder(tmp_path_factory.mktemp("llama"), raw, checkpoint_files.tensors(raw))


@pytest.fixture
def outside() -> Iterator[ModuleType]:
    """A registered family that has what `Family` asks for, and no `load`."""
    module = ModuleType("outside_family")
    for name in ("Config", "PARAMS", "NORM_IDENTITY", "IGNORED_PREFIXES", "layer", "forward", "logits"):
        setattr(module, name, getattr(llama3, name))
    models.register("outside", module)  # pyright: ignore[reportArgumentType]
    yield module
    del models.FAMILIES["outside"]


def test_a_registered_family_needs_no_load(outside: ModuleType, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "outside")
    (copy / "config.json").write_text(json.dumps({**checkpoint_files.LLAMA, "model_type": "outside"}))
    model, expected = jaxlm.load(copy), jaxlm.load(folder)
    assert model.family is outside
    assert not hasattr(outside, "load")
    out, _ = model.forward(TOKENS, model.weights)
    np.testing.assert_array_equal(out, expected.forward(TOKENS, expected.weights)[0])


def test_load_of_a_model_file(folder: Path) -> None:
    assert llama3.load(folder).family is llama3
    with pytest.raises(ValueError, match="qwen3"):
        qwen3.load(folder)


@pytest.mark.parametrize("family", {id(f): f for f in models.FAMILIES.values()}.values(), ids=lambda f: f.__name__)
def test_every_family_has_the_attributes_of_the_protocols(family: Any) -> None:
    def members(protocol: type) -> set[str]:
        return {name for name in vars(protocol) if not name.startswith("_")}

    assert all(hasattr(family, name) for name in members(Family))
    fields = {*family.Config.__dataclass_fields__, *vars(family.Config)}
    assert members(Config) <= fields
