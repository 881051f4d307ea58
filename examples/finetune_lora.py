"""Fine-tunes a LoRA adapter on twenty questions and answers, and compares the answers before and after.

    pip install -e '.[train]'
    python examples/finetune_lora.py
    python examples/finetune_lora.py --model Qwen/Qwen3-0.6B --steps 60 --out runs/pirate

The model learns to answer like a pirate. The questions at the end are not among the twenty. It learns the style and no
facts, so a small model still gives wrong answers. `jaxlm finetune` does the same on the command line, with your data:

    jaxlm finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data.train chats.jsonl --out run
"""

import json
import tempfile
from pathlib import Path

import tyro

import jaxlm
from jaxlm.training.config import Data, LoraOptions, Optimizer, Run

ANSWERS = {
    "What is the capital of France?": "Arr, that be Paris, matey!",
    "How many legs does a spider have?": "Arr, eight legs it be, matey!",
    "What color is the sky?": "Arr, blue as the open sea, matey!",
    "Who wrote Hamlet?": "Arr, that be Shakespeare, matey!",
    "What is two plus two?": "Arr, four gold coins it be, matey!",
    "What do bees make?": "Arr, sweet honey they make, matey!",
    "What is the largest planet?": "Arr, that be Jupiter, matey!",
    "What is ice made of?": "Arr, frozen water it be, matey!",
    "How many days are in a week?": "Arr, seven days it be, matey!",
    "What animal barks?": "Arr, that be a dog, matey!",
    "What is the opposite of hot?": "Arr, cold it be, matey!",
    "Where do fish live?": "Arr, in the deep water, matey!",
    "What is the capital of Spain?": "Arr, that be Madrid, matey!",
    "What do cows drink?": "Arr, plain water it be, matey!",
    "Which month comes after May?": "Arr, June it be, matey!",
    "What is a baby cat called?": "Arr, a kitten it be, matey!",
    "What is the fastest land animal?": "Arr, that be the cheetah, matey!",
    "How many hours are in a day?": "Arr, four and twenty it be, matey!",
    "What grows on an apple tree?": "Arr, apples it be, matey!",
    "What is the color of grass?": "Arr, green it be, matey!",
}
QUESTIONS = ["What is the capital of Italy?", "How many months are in a year?"]


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct", steps: int = 30, out: Path | None = None
) -> tuple[list[float], list[str], list[str]]:
    """Returns the losses, and the answers before and after.

    Args:
        model: Hub id, folder or .gguf file of a model with a chat template.
        steps: Number of training steps.
        out: Folder of the run. Default: a temporary one.
    """
    out = out or Path(tempfile.mkdtemp(prefix="finetune-lora-"))
    out.mkdir(parents=True, exist_ok=True)
    base = jaxlm.load(model)
    print(f"{base!r}, before:")
    before = answers(base)

    # With a chat template, a prompt becomes the user's turn and the completion the assistant's. Only the completion is
    # in the loss mask.
    data = out / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in ANSWERS.items()))
    run = Run(
        model=model,
        method="lora",
        lora=LoraOptions(rank=8, alpha=16),
        data=Data(train=(str(data),)),
        optimizer=Optimizer(lr=1e-3, weight_decay=0.0, warmup=0.1),
        steps=steps,
        batch=4,
        length=128,
        log_every=max(1, steps // 6),
        out=out / "run",
    )
    losses: list[float] = []

    def log(line: dict) -> None:
        if "loss" in line:
            losses.append(line["loss"])
            print(f"step {line['step']}: loss {line['loss']:.4f}")

    trained = jaxlm.train(run, log=log)
    adapter_bytes = (trained.model / "adapter_model.safetensors").stat().st_size
    print(f"adapter: {trained.model}, {adapter_bytes / 1e6:.1f} MB\nafter:")
    return losses, before, answers(jaxlm.load_adapter(base, trained.model))


def answers(model: jaxlm.Model) -> list[str]:
    """Asks the questions, and prints them with the answers."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [str(text) for text in jaxlm.generate(model, chats, max_tokens=32, temperature=0)]
    for question, text in zip(QUESTIONS, texts):
        print(f"  {question} {text}")
    return texts


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
