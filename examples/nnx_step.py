"""Trains a model as a Flax NNX module, with an optimizer of NNX.

    pip install -e '.[flax]'
    python examples/nnx_step.py
    python examples/nnx_step.py --model Qwen/Qwen3-0.6B --steps 5

The module has the weights of the model as nnx.Param and the same forward function, so that transformations,
optimizers and checkpoints of Flax work. Here it learns three sentences by heart.
"""

from pathlib import Path

import jax
import optax
import tyro
from flax import nnx

import jaxlm
import jaxlm.nnx

STORIES = Path(__file__).parents[1] / "src" / "jaxlm" / "stories"
TEXT = "Ada was a fox who could count. She counted one moon, two rivers and three owls. Then she fell asleep."


@nnx.jit
def train_step(module: jaxlm.nnx.Module, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """Updates the module in place. Returns the loss before the update."""

    def loss(module):
        logits, _ = module(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(module)
    optimizer.update(module, gradient)
    return value


def main(model: str = str(STORIES), steps: int = 10, lr: float = 1e-3) -> tuple[list[float], str]:
    """Returns the loss of each step, and what the trained model writes.

    Args:
        model: Hub id, folder or .gguf file.
        steps: Number of training steps.
        lr: Learning rate.
    """
    loaded = jaxlm.load(model, dtype="float32")
    begin = TEXT.split(".")[0]
    print("before:", jaxlm.generate(loaded, begin, max_tokens=24, temperature=0))

    module = jaxlm.nnx.Module(loaded)
    optimizer = nnx.Optimizer(module, optax.adamw(lr), wrt=nnx.Param)
    tokens = jax.numpy.array([loaded.tokenizer.encode(TEXT)])
    losses = []
    for step in range(1, steps + 1):
        losses.append(float(train_step(module, optimizer, tokens)))
        print(f"step {step}: loss {losses[-1]:.4f}")

    # The trained weights as a model again, for jaxlm.generate, jaxlm.export and everything else.
    text = jaxlm.generate(module.to_model(), begin, max_tokens=24, temperature=0)
    print("after:", text)
    return losses, text


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
