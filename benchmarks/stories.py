"""Short runs around the first story model (3.2 million parameters): another shape, tokenizer, optimizer, other texts.

    python benchmarks/stories.py [--steps 150] [--out build/stories_compared]

Needs the files that examples/stories/config.yaml names in build/stories, with a tokenizer of 2,048 tokens in
build/stories/tokenizer_2048. Every run has the same number of steps of 32 x 256 tokens. Bits per byte of the held-out
stories are comparable between all runs. A finished run is not repeated.
"""

import argparse
import json
from pathlib import Path

import jaxlm
from jaxlm.cli import main as command
from jaxlm.nn import flops, params

STORIES = Path("build/stories")
FIRST = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 7,
         "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32,
         "max_position_embeddings": 256}  # fmt: skip
SHAPE = json.loads(Path("examples/stories/shape.json").read_text()) | FIRST
SHAPES = {
    "first story model": {},
    "wider, fewer layers": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
                            "num_attention_heads": 8, "num_key_value_heads": 4},
    "narrower, more layers": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 16,
                              "num_attention_heads": 4, "num_key_value_heads": 2},
    "vocabulary 4,096": {"vocab_size": 4096, "num_hidden_layers": 6},
    "with books": {},
    "adamw": {},
    "vocabulary 1,024": {"vocab_size": 1024, "num_hidden_layers": 8},
}  # fmt: skip


def run(name: str, fields: dict[str, int], steps: int, out: Path) -> str:
    """Trains a variant and evaluates it. Returns a row of the table."""
    folder = out / name.replace(",", "").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    shape, size = {**SHAPE, **fields}, fields.get("vocab_size", SHAPE["vocab_size"])
    (folder / "shape.json").write_text(json.dumps(shape))
    tokenizer = STORIES / "tokenizer_2048" if size == SHAPE["vocab_size"] else folder / "tokenizer"
    if not tokenizer.exists():
        assert command(["tokenizer", "train", str(STORIES / "tiny.txt"), "--vocab-size", str(size), "--out",
                        str(tokenizer)]) == 0  # fmt: skip
    if not (folder / "run/model").exists():
        names = ["tiny.txt", "books.txt"] if name == "with books" else ["tiny.txt"]
        texts = [f"--data.train={STORIES / text}" for text in names]
        how = ["muon", "0.004"] if name != "adamw" else ["adamw", "0.004"]
        assert command(["train", "-c", "examples/stories/config.yaml", "--steps", str(steps), "--shape",
                        str(folder / "shape.json"), "--tokenizer", str(tokenizer), *texts,
                        "--optimizer.name", how[0], "--optimizer.lr", how[1], "--optimizer.warmup", "30",
                        "--optimizer.weight-decay", "0.1", "--batch", "32", "--length", "256", "--eval-every", "0",
                        "--sample-tokens", "1", "--out", str(folder / "run")]) == 0  # fmt: skip
    model = jaxlm.load(folder / "run/model")
    found = jaxlm.evaluate(model, STORIES / "valid.txt")
    count = params.count(model.family.PARAMS, model.config)
    cost = flops.training(model.family.PARAMS, model.config, 256)
    each = found.bytes / found.tokens
    return f"| {name} | {count / 1e6:.2f} | {cost / 1e6:.1f} | {each:.2f} | {found.bits_per_byte:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("build/stories_compared"))
    args = parser.parse_args()
    rows = [run(name, fields, args.steps, args.out) for name, fields in SHAPES.items()]
    print(
        "| | parameters, M | MFLOP per token | bytes per token | bits per byte, held out |\n"
        "| --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
