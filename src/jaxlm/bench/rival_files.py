"""The files that rivals read: the model's weights as a Hugging Face folder for transformers, as GGUF for llama.cpp.

They are written once, to the user's cache folder, and have the dtype that the weights have here.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.bench import rivals
from jaxlm.bench.cases import Case
from jaxlm.devices import hardware, host_memory
from jaxlm.devices.compilation_cache import cache_folder
from jaxlm.exporting import export, sources
from jaxlm.nn import params
from jaxlm.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxlm.model import Model

GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
Note = Callable[[str], None]


def folder_for_transformers(model: "Model", raw: dict[str, Any] | None, note: Note) -> Path:
    """A checkpoint folder in Hugging Face's format: that of the model, or one that is written now.

    Args:
        model: The model.
        raw: Contents of config.json, for a model with random weights.
        note: Called with a line for the user.
    """
    checkpoint = model.checkpoint
    if checkpoint is not None and checkpoint.format == "hf" and checkpoint.adapter is None:
        return checkpoint.folder
    out = _place(model, raw)
    if not out.exists():
        _announce(model, out, "transformers", note)
        config = raw if checkpoint is None else None
        export(replace(model, tokenizer=None), out, dtype=model.dtype.name, config=config)
    return out


def gguf_for_llama_cpp(model: "Model", raw: dict[str, Any] | None, note: Note) -> Path:
    """A GGUF file of the model with a placeholder tokenizer, because prompts are token ids and llama.cpp does not start
    without one. The arguments are those of `folder_for_transformers`.

    Raises:
        ValueError: GGUF cannot express the config, or the vocabulary has less than 257 tokens.
    """
    out = _place(model, raw, ".gguf")
    if not out.exists():
        _announce(model, out, "llama.cpp", note)
        export(replace(model, tokenizer=placeholder_tokenizer(model.config.V)), out, type=GGUF_TYPES[model.dtype.name])
    return out


def gguf_for_server(model: "Model", note: Note) -> Path:
    """A GGUF file of the model with float16 weights and the model's own tokenizer, because prompts are texts.

    Args:
        model: The model, of `exporting.open_model`: its weights are read while they are written.
        note: Called with a line for the user.

    Raises:
        ValueError: GGUF cannot express the config or the tokenizer.
    """
    out = _place(model, None, ".gguf", "f16")
    if not out.exists():
        _announce(model, out, "llama.cpp", note)
        export(model, out, type="f16", progress=False)
    return out


def placeholder_tokenizer(vocabulary: int) -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes and an EOS token."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 257:
        raise ValueError(
            f"--against llama.cpp needs a vocabulary of at least 257 tokens, and this model has {vocabulary}"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>"), [256])


def _place(model: "Model", raw: dict[str, Any] | None, suffix: str = "", dtype: str | None = None) -> Path:
    """The path in the cache: a readable name, and a digest of what determines the weights, whose default dtype is that
    of the model."""
    dtype = dtype or model.dtype.name
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(sources(model.checkpoint))]
    identity = json.dumps([stats, raw, repr(model.config), dtype], default=str)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "-", Path(model.source).name.removesuffix(".gguf"))
    return cache_folder() / "bench" / f"{name}-{dtype}-{digest}{suffix}"


def _announce(model: "Model", out: Path, rival: str, note: Note) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    note(f"writing the weights for {rival}, once: {out} ({hardware.gigabytes(params.nbytes(model.weights))}) …")


def start_rivals(
    names: Sequence[str], model: "Model", raw: dict[str, Any] | None, cases: Sequence[Case], note: Note
) -> list[rivals.Rival]:
    """Starts the contestants of these rivals. Those whose weights do not fit in memory are left out, with a note.

    Args:
        names: Keys of rivals.PACKAGES.
        model: The model.
        raw: Contents of config.json, for a model with random weights.
        cases: What they will run.
        note: Called with a line for the user.

    Raises:
        ValueError: A rival cannot run the model.
    """
    started: list[rivals.Rival] = []
    count, platform = params.count(model.family.PARAMS, model.config), model.device.platform
    starts: list[tuple[str, int, Callable[[], rivals.Rival]]] = []
    if "transformers" in names:
        folder = folder_for_transformers(model, raw, note)
        for name, (dtype, _) in rivals.TRANSFORMERS.items():
            start = partial(rivals.start_transformers, name, folder, platform)
            starts.append((name, count * (4 if dtype == "float32" else 2), start))
    if "llama.cpp" in names:
        file = gguf_for_llama_cpp(model, raw, note)
        slots = max(case.batch for case in cases)
        context = max(case.prompt_tokens + case.max_tokens for case in cases) + 16
        start = partial(rivals.start_llama_cpp, file, model.dtype.name, slots, context)
        starts.append(("llama.cpp", params.nbytes(model.weights), start))
        if platform != "cpu":
            note("llama.cpp: the package xllamacpp may compute on the CPU, while jaxlm uses the accelerator")
    try:
        for name, nbytes, start in starts:
            free = host_memory.available()
            if free is not None and nbytes > free:
                note(f"{name} is left out: it needs {hardware.gigabytes(nbytes)}, {hardware.gigabytes(free)} are free")
                continue
            note(f"starting {name} …")
            started.append(start())
    except BaseException:
        close_all(started)
        raise
    return started


def close_all(started: Sequence[rivals.Rival]) -> None:
    """Ends the processes of rivals."""
    for rival in started:
        rival.close()
