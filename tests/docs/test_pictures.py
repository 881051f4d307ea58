"""The pictures of docs/pictures: they are those that the scripts draw now, and need nothing from the network."""

import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import pytest

from jaxlm import models
from jaxlm.models import llama3

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(DOCS / "scripts"))
    import architecture
    import architecture_pictures

    yield architecture, architecture_pictures
    sys.path.remove(str(DOCS / "scripts"))


def test_pictures_are_current(scripts):
    drawn = dict(scripts[1].pictures())
    assert {f"{family.__name__.rpartition('.')[2]}.svg" for family in models.FAMILIES.values()} < set(drawn)
    committed = {path.name: path.read_text("utf-8") for path in PICTURES if not path.name.startswith("terminal")}
    assert committed == drawn, "run docs/scripts/architecture_pictures.py"


@pytest.mark.parametrize("family", dict.fromkeys(models.FAMILIES.values()), ids=lambda family: family.__name__)
def test_every_weight_is_in_its_picture(family):
    root = ElementTree.parse(DOCS / "pictures" / f"{family.__name__.rpartition('.')[2]}.svg").getroot()
    texts = [text.text for text in root.iter(SVG + "text")]
    named = list(pairwise(texts))  # a shape follows its name
    for path, (letters, *_) in family.PARAMS.items():
        assert (path.rpartition(".")[2], f"[{','.join(letters)}]") in named, path


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_picture_is_readable_and_complete(path):
    root = ElementTree.parse(path).getroot()
    assert root.find(SVG + "title").text
    assert root.find(SVG + "desc").text
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    text = path.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not [word for word in ("xlink", "@import", "url(http", "src=", "<script", "<image") if word in text]
    assert path.stat().st_size < 100_000


def test_unread_weight_is_refused(scripts, monkeypatch):
    monkeypatch.setitem(llama3.PARAMS, "layers.q_bias", ("NH", "model.layers.{}.self_attn.q_proj.bias"))
    with pytest.raises(ValueError, match=r"llama3.*q_bias"):
        scripts[0].architecture(llama3)


def test_unknown_operation_is_refused(scripts, monkeypatch):
    layer = llama3.layer

    def capped(cfg, pos, freqs, x, w, cache):
        return layer(cfg, pos, freqs, jnp.tanh(x), w, cache)

    monkeypatch.setattr(llama3, "layer", capped)
    with pytest.raises(ValueError, match=r"llama3.*tanh"):
        scripts[0].architecture(llama3)


def test_picture_follows_the_model_file(scripts, monkeypatch):
    def swapped(cfg, pos, freqs, x, w, cache):  # the norms of Llama 3 the other way round, and no RoPE of the keys
        h = llama3.rms_norm(x, w["mlp_norm"], cfg.eps)
        q, k, v = (
            llama3.einsum(s, h, w[n])
            for s, n in (("BTD,NHD->BTNH", "q"), ("BTD,KHD->BTKH", "k"), ("BTD,KHD->BTKH", "v"))
        )
        a, cache = llama3.attend(llama3.apply_rope(q, pos, freqs), k, v, pos, cache, scale=0.25)
        x += llama3.einsum("BTNH,DNH->BTD", a, w["o"])
        h = llama3.rms_norm(x, w["attn_norm"], cfg.eps)
        gate, up = llama3.einsum(("BTD,FD->BTF", "BTD,FD->BTF"), h, (w["gate"], w["up"]))
        return x + llama3.einsum("BTF,DF->BTD", gate * llama3.jax.nn.relu(up), w["down"]), cache

    monkeypatch.setattr(llama3, "layer", swapped)
    attention, mlp = scripts[0].architecture(llama3).blocks
    assert [node.weight for node in (*attention.before, *mlp.before)] == ["mlp_norm", "attn_norm"]
    assert [[node.op for node in branch] for branch in attention.branches] == [
        ["product", "rope"],
        ["product"],
        ["product"],
    ]
    assert attention.after[0].detail == "scale 1/√16"
    assert [node.detail for branch in mlp.branches for node in branch] == ["", "", "ReLU"]
