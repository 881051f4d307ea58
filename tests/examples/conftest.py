"""Loads the examples as modules, and writes a tiny chat model for them, in place of a real checkpoint."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from helpers.tiny_chat import TEMPLATE, model_of, tokenizer_of

import jaxlm
from jaxlm.models import llama3

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = {
    "model_type": "llama", "vocab_size": 168, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """Loads a script of examples/ by its name, as a module that does not run."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a Llama with two layers, random weights and a chat template. transformers and Meta's code can
    compute it too."""
    path = tmp_path_factory.mktemp("examples") / "tiny"
    model = model_of(llama3, llama3.Config.from_hf(CONFIG), tokenizer_of(TEMPLATE))
    jaxlm.export(model, path, config=CONFIG)
    return str(path)
