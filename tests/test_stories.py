"""The story model in the package: its size, its type, and that it learned what its card says."""

import re

import jax
import jax.numpy as jnp
import pytest

import jaxlm
from jaxlm.cli.common import STORIES
from jaxlm.nn import params
from jaxlm.nn.quantized import is_quantized

pytestmark = pytest.mark.smoke

TEXT = """Once upon a time, there was a little boy named Tom. He loved to play with his red ball in the park. One day,
the ball rolled under a big tree. Tom was sad. "Where is my ball?" he asked. A bird looked down and said, "It is here!"
Tom was so happy that he hugged his mom."""  # ours


@pytest.fixture(scope="module")
def model() -> jaxlm.Model:
    return jaxlm.load(STORIES, dtype="float32")


def test_it_fits_in_the_package(model) -> None:
    assert sum(path.stat().st_size for path in STORIES.iterdir()) <= 8_000_000
    assert params.count(model.family.PARAMS, model.config) == 7_572_864
    model = jaxlm.load(STORIES)
    assert model.dtype == jnp.bfloat16
    leaves = [leaf for leaf in jax.tree.leaves(model.weights, is_leaf=is_quantized) if leaf.ndim > 1]
    assert len(leaves) == 1 + 7 * model.config.L
    assert all(is_quantized(leaf) and leaf.kind == "int8" and not leaf.activations for leaf in leaves)


def test_it_knows_stories(model, tmp_path) -> None:
    """Random weights would need 3 bits for a byte of a new story. One wrong matrix costs a quarter of a bit."""
    (tmp_path / "story.txt").write_text(TEXT)
    assert jaxlm.evaluate(model, tmp_path / "story.txt").bits_per_byte < 0.85


@pytest.mark.slow
def test_what_its_card_says(model, shared, tmp_path) -> None:
    """Of the stories that were held out."""
    stories = (shared / "corpora/stories/tinystories.txt").read_text().split("<|endoftext|>")
    stories = [story.strip() for story in stories if story.strip()][-220:]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    found = jaxlm.evaluate(model, tmp_path / "stories.txt")
    told = re.search(r"story model \| ([\d.]+) \|", (STORIES / "README.md").read_text())
    assert told
    assert found.bits_per_byte == pytest.approx(float(told[1]), abs=1e-3)  # the fixture computes in float32
