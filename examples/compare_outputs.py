"""Compares the tokens of jaxlm on one device and on a mesh with those of transformers and of Meta's code.

    pip install torch==2.13.0 compressed-tensors tiktoken pydantic pillow
    pip install --no-deps llama-models==0.3.0 fairscale==0.4.13
    python examples/compare_outputs.py
    python examples/compare_outputs.py --model meta-llama/Llama-3.1-8B --scripts single_device mesh reference

Each generate_*.py runs in a process of its own. The exit status is 1 if the tokens differ. `jaxlm verify` compares
more: rotary frequencies, hidden states and logits, with a limit for each.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro

EXAMPLES = Path(__file__).parent
STORIES = EXAMPLES.parent / "src" / "jaxlm" / "stories"
Script = Literal["single_device", "mesh", "reference", "meta"]


def main(
    model: str = str(STORIES),
    prompt: str = "Once upon a time",
    max_tokens: int = 32,
    scripts: tuple[Script, ...] = ("single_device", "mesh", "reference", "meta"),
) -> int:
    """Prints a table of the tokens, one column per script. Returns the exit status.

    Args:
        model: Hub id or folder that all scripts can load.
        prompt: Text to continue.
        max_tokens: Number of tokens to generate.
        scripts: Which of the scripts generate_*.py to run.
    """
    columns = {name: run(name, model, prompt, max_tokens) for name in scripts}
    print("token " + "".join(f"{name:>15}" for name in columns))
    for number, row in enumerate(zip(*columns.values(), strict=True), 1):
        print(f"{number:5} " + "".join(f"{token:>15}" for token in row) + ("" if len(set(row)) == 1 else "  differ"))
    first, *others = columns
    wrong = [name for name in others if columns[name] != columns[first]]
    print(f"{', '.join(wrong)}: not the tokens of {first}." if wrong else f"All {max_tokens} tokens agree.")
    return 1 if wrong else 0


def run(name: str, model: str, prompt: str, max_tokens: int) -> list[int]:
    """The tokens that a script prints in its last line."""
    print(f"generate_{name}.py …", flush=True)
    flags = ["--model", model, "--prompt", prompt, "--max-tokens", str(max_tokens)]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"generate_{name}.py"), *flags], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"generate_{name}.py failed with the error above: --scripts chooses other ones.")
    *_, text, tokens = done.stdout.splitlines()
    print(f"  {text}")
    return json.loads(tokens.removeprefix("tokens: "))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
