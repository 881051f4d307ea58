"""Twenty short chats, and a run in which stories260K, a base model without chat template, learns them."""

import json
from pathlib import Path
from typing import Any

from jaxlm.training.config import Data, Optimizer, Run

ANSWERS = {
    "Who is the girl?": "Lily", "Who is the boy?": "Tom", "What barks?": "a dog", "What says meow?": "a cat",
    "What color is an apple?": "red", "What color is the sky?": "blue", "What is hot?": "the sun",
    "What flies?": "a bird", "What do you drink?": "milk", "What is sweet?": "cake", "What do you kick?": "a ball",
    "Where do you play?": "the park", "What has leaves?": "a tree", "Where do you sleep?": "home",
    "What is one and one?": "two", "What is one and two?": "three", "Is ice cold?": "yes", "Is fire cold?": "no",
    "What falls from clouds?": "rain", "What floats?": "a boat",
}  # fmt: skip


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_chats(path: Path, answers: dict[str, str] = ANSWERS) -> str:
    """Writes chats as rows of messages."""
    chats = [[*question(text), {"role": "assistant", "content": answer}] for text, answer in answers.items()]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return str(path)


def run_of(shared: Path, folder: Path, **fields: Any) -> Run:
    """Returns a run after which greedy answers are those of ANSWERS. A step is a pass over all of them."""
    data = Data(train=(write_chats(folder / "chats.jsonl"),))
    optimizer = Optimizer(lr=5e-3, weight_decay=0.0, warmup=0.05)
    sizes: dict[str, Any] = {"steps": 30, "batch": 4, "length": 184, "save_every": 100, "eval_every": 0}
    names: dict[str, Any] = {"model": str(shared / "checkpoints/stories260K"), "chat_template": "chatml"}
    return Run(**{**names, **sizes, "out": folder / "run", "data": data, "optimizer": optimizer, **fields})
