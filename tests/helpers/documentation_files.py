"""What the pages name: models of the hub, checkpoints, texts, chats. All are tiny, and made here."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

import jaxlm
from helpers import checkpoint_files, tiny_tokenizers
from helpers.random_weights import draw
from jaxlm import models
from jaxlm.nn import params

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
# Beginnings of names on the hub -> the config.json of a tiny model that takes the place of all of them.
HUB: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-": {"model_type": "qwen3", **SIZES},
    "meta-llama/": {"model_type": "llama", **SIZES},
    "HuggingFaceTB/SmolLM2-": {"model_type": "llama", **SIZES},
    "allenai/OLMo-2-": {"model_type": "olmo2", **SIZES},
    "google/gemma-3-": {
        "model_type": "gemma3_text", **SIZES, "query_pre_attn_scalar": 32, "sliding_window": 64,
        "layer_types": ["sliding_attention"],
    },
}  # fmt: skip
DEFAULT = "Qwen/Qwen3-0.6B"  # what MODEL, BASE and files without an organization stand for
NAME = re.compile("(?:" + "|".join(map(re.escape, HUB)) + r")[\w.-]*\w")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GGUF = ("model.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf")
COMMIT = "0" * 40
TOKENS = 8  # of an answer, unless a command or a call says otherwise
TEXTS = ["The quick brown fox jumps over the lazy dog. ", "Once upon a time there was a fox and a dog. "]
CHAT = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Air scatters blue."}]
PERSON = {"type": "object", "properties": {"age": {"enum": [1, 2]}}, "required": ["age"], "additionalProperties": False}


def given() -> dict[str, Any]:
    """Names that code on the pages takes from the reader. A random model fills in Person too, in a few tokens."""
    import pydantic

    person = pydantic.create_model("Person", name=Literal["Ada"], age=Literal[36])
    return {"__name__": "page", "Person": person, "messages": CHAT[:1]}


def remove(path: Path) -> None:
    """Removes a result that another command of the page has written, or a prepared file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint with random weights, a tokenizer of bytes and a chat template. It answers with TOKENS tokens."""
    family = models.family_of(config["model_type"])
    folder.mkdir(parents=True)
    rows = params.tensors(family.PARAMS, family.Config.from_hf(config))
    arrays = {row.names[0]: draw(row.names[0], row.stored_shape, 0, family.NORM_IDENTITY) for row in rows}
    checkpoint_files.folder(folder, config, arrays)
    tiny_tokenizers.byte_level(folder, eos_token="<|im_end|>", chat_template=TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": TOKENS}))
    return folder


def write_adapter(folder: Path, base: str, config: dict[str, Any]) -> None:
    """A LoRA adapter in PEFT's format, with factors of 0."""
    import jax

    from jaxlm.checkpoint import peft
    from jaxlm.nn import lora

    family = models.family_of(config["model_type"])
    cfg = family.Config.from_hf(config)
    rows = lora.targets(family.PARAMS, cfg, ["q_proj", "v_proj"])
    tree = jax.eval_shape(lambda: lora.init(rows, cfg.L, 2, 0.5, jax.random.key(0)))
    peft.write(folder, jax.tree.map(lambda a: np.zeros(a.shape, np.float32), tree), family.PARAMS, cfg, base=base)


class Hub:
    """A cache of huggingface_hub with tiny models under published names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}  # by the beginning of the name

    def gguf(self) -> Path:
        """A GGUF file of the default model."""
        path = self.folder / "model.gguf"
        if not path.exists():
            jaxlm.export(jaxlm.load(self.made["Qwen/Qwen3-"]), path)
        return path

    def add(self, text: str) -> None:
        """Puts every model into the cache whose name the text has."""
        for name in set(NAME.findall(text)):
            begin = next(begin for begin in HUB if name.startswith(begin))
            if begin not in self.made:
                self.made[begin] = write_model(self.folder / "made" / begin.strip("/-"), HUB[begin])
            repo = self.folder / "cache" / f"models--{name.replace('/', '--')}"
            if not repo.exists():
                (repo / "refs").mkdir(parents=True)
                (repo / "refs" / "main").write_text(COMMIT)
                (repo / "snapshots" / COMMIT).mkdir(parents=True)
                (repo / "trees").mkdir()
                files = list(self.made[begin].iterdir())
                for file in files:
                    (repo / "snapshots" / COMMIT / file.name).symlink_to(file)
                (repo / "trees" / f"{COMMIT}.json").write_text(json.dumps({"files": [file.name for file in files]}))


def write_files(folder: Path, hub: Hub) -> None:
    """Writes the files and folders that commands and code of the pages name."""
    hub.add(DEFAULT)
    model, config = hub.made["Qwen/Qwen3-"], next(iter(HUB.values()))
    for name in ("MODEL", "BASE", "checkpoint"):
        (folder / name).symlink_to(model)
    write_adapter(folder / "ADAPTER", DEFAULT, config)
    write_results(folder, hub)
    for name in GGUF:
        (folder / name).symlink_to(hub.gguf())
    lines = {
        "questions.jsonl": [{"prompt": "Why is the sky blue?"}, {"prompt": "Hello"}],
        "texts.jsonl": [{"text": text} for text in TEXTS],
        "chats.jsonl": [{"messages": CHAT}] * 8,
        "instruction-data.json": [{"instruction": "Say hello.", "input": "", "output": "Hello."}] * 8,
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts").mkdir()
    (folder / "build" / "stories").mkdir(parents=True)
    for name, text in zip(("texts/a.txt", "texts/b.txt", "build/stories/tiny.txt"), [*TEXTS, TEXTS[0]]):
        (folder / name).write_text(text * 20)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "person.json").write_text(json.dumps(PERSON))


def write_results(folder: Path, hub: Hub) -> None:
    """Writes what a run leaves, a model or an adapter, where no command of the page has left it."""
    (folder / "run").mkdir(exist_ok=True)
    if not (folder / "run" / "model").exists():
        (folder / "run" / "model").symlink_to(hub.made["Qwen/Qwen3-"])
    if not (folder / "run" / "adapter").exists():
        write_adapter(folder / "run" / "adapter", DEFAULT, next(iter(HUB.values())))
