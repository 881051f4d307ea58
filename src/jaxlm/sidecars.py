"""The files of a checkpoint beside the weights: config.json, the tokenizer's files, generation_config.json."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import quantized
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.gguf_files import is_gguf
from jaxlm.checkpoint.hub import CONFIG, OPTIONAL, TOKENIZER_FILES
from jaxlm.loading.resolving import loaded_generation_config
from jaxlm.model import Model

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
MODEL_FILES = (GENERATION, "preprocessor_config.json", "processor_config.json")  # other OPTIONAL files: tokenizer
SidecarFiles = dict[str, Any]  # file name -> JSON contents, text, or path of the file to copy


def sidecar_files(model: Model) -> SidecarFiles:
    """Files of the checkpoint to copy: tokenizer, chat template, generation_config.json."""
    checkpoint = model.checkpoint
    sidecars: SidecarFiles = {}
    if checkpoint is not None:
        folder = checkpoint.tokenizer or checkpoint.folder  # the tokenizer may be in another folder
        paths = {name: (checkpoint.folder if name in MODEL_FILES else folder) / name for name in OPTIONAL}
        if folder.is_file() and not is_gguf(folder):
            paths["tokenizer.model"] = folder
        sidecars = {name: path for name, path in paths.items() if path.is_file()}
    if model.tokenizer is not None and model.tokenizer.has_new_tokens:
        sidecars = {name: path for name, path in sidecars.items() if name not in TOKENIZER_FILES}
    template = None if model.tokenizer is None else model.tokenizer.hf.chat_template
    if model.tokenizer is not None and isinstance(template, str) and template != model.tokenizer.loaded_template:
        sidecars.pop("chat_template.json", None)
        sidecars[TEMPLATE] = template
    generation_config = {k: v for k, v in model.generation_config.items() if v not in (None, [])}
    if checkpoint is None or checkpoint.format != "hf":  # there is no such file
        sidecars |= {GENERATION: generation_config} if generation_config and GENERATION not in sidecars else {}
    elif model.generation_config != loaded_generation_config(checkpoint):
        sidecars[GENERATION] = generation_config
    return sidecars


def tokenizer_files(model: Model) -> SidecarFiles:
    """Files of the tokenizer and the chat template, to be written beside an adapter."""
    return {name: content for name, content in sidecar_files(model).items() if name not in MODEL_FILES}


def write_sidecars(folder: Path, sidecars: SidecarFiles, model: Model) -> None:
    """Copies and writes the sidecar files. The tokenizer is saved if its files cannot be copied."""
    if model.tokenizer is not None and lacks_tokenizer(model, sidecars):
        model.tokenizer.hf.save_pretrained(folder)
        sidecars.pop("tokenizer.model", None)  # in Meta's format, which transformers would read as SentencePiece
    for name, content in sidecars.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        elif isinstance(content, str):
            (folder / name).write_text(content, "utf-8")
        else:
            files.write_json(folder / name, content)


def lacks_tokenizer(model: Model, sidecars: SidecarFiles) -> bool:
    """Whether the model has a tokenizer and no sidecar file has it in a format that transformers reads."""
    checkpoint = model.checkpoint
    if model.tokenizer is None or checkpoint is None or model.tokenizer.has_new_tokens:
        return model.tokenizer is not None
    return (checkpoint.format != "hf" or checkpoint.tokenizer is not None) and "tokenizer.json" not in sidecars


def config_json(
    model: Model, config: dict[str, Any] | None, dtype: str | None, quantization: dict[str, Any] | None = None
) -> SidecarFiles:
    """config.json as a sidecar file.

    Args:
        model: The model.
        config: Contents to write. None: those of the checkpoint.
        dtype: dtype to set in the file; None does not change it.
        quantization: `quantization_config` to set in the file.

    Raises:
        ValueError: The contents are missing or do not describe the model.
    """
    checkpoint = model.checkpoint
    if config is None and checkpoint is None:
        raise ValueError(
            f"{model} has no checkpoint, so there is no config.json to write: pass its contents in the format of "
            "`Config.from_hf` as export(model, out, config={...})"
        )
    raw = config if config is not None else checkpoint.config if checkpoint else {}
    # Unknown fields were checked when the model was loaded.
    allow = _field_names(raw) if config is None else ()
    if difference := _difference(model.config, model.family.Config.from_hf(raw, allow)):
        raise ValueError(
            f"config.json does not describe this model ({difference}): pass the correct contents as config="
        )
    written = quantized.without_section(raw)  # that of the weights that were read
    unchanged = dtype is None and quantization is None and written == raw
    if config is None and unchanged and checkpoint and checkpoint.format == "hf":
        return {CONFIG: checkpoint.folder / CONFIG}  # unchanged, so the file is copied
    raw = written if dtype is None else _with_dtype(written, dtype)
    return {CONFIG: raw if quantization is None else {**raw, "quantization_config": quantization}}


def _difference(ours: Any, theirs: Any) -> str:
    """The fields in which two Configs of a family differ, as text."""
    names = [name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)]
    return ", ".join(f"{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here" for name in names)


def _field_names(value: Any) -> Collection[str]:
    """The names of all fields, including nested ones."""
    return set(value).union(*map(_field_names, value.values())) if isinstance(value, dict) else set()


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A config with another dtype, in the field `dtype` or `torch_dtype`, also in its text_config."""
    fields = [field for field in ("dtype", "torch_dtype") if field in config] or ["dtype"]
    config = {**config, **dict.fromkeys(fields, name)}
    if text := config.get("text_config"):
        config["text_config"] = {**text, **{field: name for field in ("dtype", "torch_dtype") if field in text}}
    return config
