"""A model family of one's own, from outside of the package: define, register, train, load and generate.

    pip install -e '.[train]'
    python examples/custom_model.py
    python examples/custom_model.py --data 'texts/*.txt' --steps 2000

The architecture is a Llama whose attention and MLP read the same normalized vector and are added together, as in GPT-J
and PaLM (arXiv:2204.02311, section 2). So a layer has one norm instead of two, and two products may run at a time.

A family is a module, or a file like this one, with Config, PARAMS, layer, forward, logits and two constants
(src/jaxlm/models/family.py). Loading, export, training, LoRA, generation and sharding follow from them. The default
data are the pages of docs/, which are too few for good text.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import tyro

import jaxlm
from jaxlm.models import llama3
from jaxlm.nn import apply_rope, attend, einsum, embed, rms_norm, scan_layers
from jaxlm.training.config import Data, Optimizer, Run

ROOT = Path(__file__).parents[1]
STORIES = ROOT / "src" / "jaxlm" / "stories"

# The family

Config = llama3.Config  # the same sizes and constants, read from the same fields of config.json
NORM_IDENTITY = 1.0
IGNORED_PREFIXES = ()
# One norm per layer. All else has the names and axes of Llama.
PARAMS = {path: row for path, row in llama3.PARAMS.items() if path != "layers.mlp_norm"}
logits = llama3.logits


def layer(cfg, pos, freqs, x, w, cache):
    h = rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = einsum(("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH"), h, (w["q"], w["k"], w["v"]))
    a, cache = attend(apply_rope(q, pos, freqs), apply_rope(k, pos, freqs), v, pos, cache)
    gate, up = einsum(("BTD,FD->BTF", "BTD,FD->BTF"), h, (w["gate"], w["up"]))
    x += einsum("BTNH,DNH->BTD", a, w["o"])
    return x + einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, w["down"]), cache


def forward(cfg, tokens, w, cache, pos, **options):
    layers = [partial(layer, cfg, pos, cfg.frequencies())]
    x, cache = scan_layers(layers, embed(tokens, w["embed"]), w["layers"], cache, pos, **options)
    return rms_norm(x, w["norm"], cfg.eps), cache


# Its use

CONFIG = {
    "model_type": "parallel_llama",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def main(
    data: str = str(ROOT / "docs" / "*.md"), steps: int = 200, out: Path | None = None
) -> tuple[list[float], jaxlm.Model]:
    """Returns the losses and the trained model.

    Args:
        data: Text files to train on.
        steps: Number of training steps.
        out: Folder of the run. Default: a temporary one.
    """
    jaxlm.models.register(CONFIG["model_type"], sys.modules[__name__])

    out = out or Path(tempfile.mkdtemp(prefix="custom-model-"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
    texts = out / "texts.txt"
    folder, pattern = Path(data).parent, Path(data).name
    texts.write_text("\n<|endoftext|>\n".join(path.read_text() for path in sorted(folder.glob(pattern))))
    losses: list[float] = []

    def log(line: dict) -> None:
        if "loss" in line:
            losses.append(line["loss"])
            print(f"step {line['step']}: loss {line['loss']:.4f}")

    run = Run(
        shape=out / "config.json",
        tokenizer=STORIES,
        data=Data(train=(str(texts),)),
        optimizer=Optimizer(lr=3e-3),
        steps=steps,
        batch=8,
        length=128,
        out=out / "run",
    )
    trained = jaxlm.train(run, log=log)
    model = jaxlm.load(trained.model)  # by the model_type of its config.json
    print(f"{model!r} in {trained.model}")
    print(jaxlm.generate(model, "jaxlm", max_tokens=48, seed=0))
    return losses, model


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
