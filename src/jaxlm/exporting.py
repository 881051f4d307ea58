"""`export`: writes a model as a Hugging Face checkpoint."""

import itertools
import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import adapters
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.atomic import staged
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.hub import CONFIG, OPTIONAL, TOKENIZER_FILES
from jaxlm.checkpoint.safetensors import DTYPES, listed
from jaxlm.checkpoint.source import ModelSource
from jaxlm.checkpoint.writer import Entry
from jaxlm.devices import distributed
from jaxlm.loading import loaded_generation_config, loading_bar, resolve, wanted_dtype
from jaxlm.model import Model
from jaxlm.nn import lora, params

SMALL = 32 << 20  # bytes of disk space for headers and for a tokenizer that cannot be copied
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
MODEL_FILES = (GENERATION, "preprocessor_config.json", "processor_config.json")  # other OPTIONAL files: tokenizer
SidecarFiles = dict[str, Any]  # file name -> JSON contents, text, or path of the file to copy


class Exported(NamedTuple):
    """The result of `export`: the folder, the number of tensors, and their size in bytes."""

    folder: Path
    tensors: int
    nbytes: int


def export(
    model: Model,
    out: str | Path,
    *,
    format: str = "hf",
    dtype: Any = None,
    force: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> Exported:
    """Writes a model as a Hugging Face checkpoint. The folder appears at `out` only when it is complete.

    Tensors keep the dtypes of the model's checkpoint, even if it was loaded in another dtype, and in Hugging Face's
    format their names. Tensors that are not loaded (vision) and tokenizer files are copied. If the weights are sharded
    over several processes, all of them must call this function; the coordinator writes.

    Args:
        model: The model.
        out: Folder to write.
        format: "hf" (Hugging Face).
        dtype: "float32", "bfloat16" or "float16" for all loaded tensors. None or "auto": the dtype in the file.
        force: Replace an existing checkpoint folder at `out`.
        config: Contents of config.json, for a model without a checkpoint (`Model.init`).
        progress: Show a progress bar on stderr. Default: only on a terminal.

    Returns:
        The folder, the number of tensors and their size in bytes.

    Raises:
        ValueError: The model has an adapter, an argument is invalid, or the config does not describe the model.
        FileExistsError: `out` exists and is not a checkpoint, or `force` is False.
        OSError: The disk is full, or a file cannot be written. Nothing is left at `out`.
    """
    check_format(format)
    if lora.count(model.weights):
        raise ValueError(f"{model.source} has an adapter: merge it first, with jaxlm.fuse(model) or `jaxlm fuse`")
    out = Path(os.path.realpath(os.path.expanduser(out)))
    check = partial(files.check_target, out, sources(model.checkpoint), force)
    _check_everywhere(check, model.is_multiprocess)
    wanted = None if dtype is None or str(dtype) == "auto" else wanted_dtype(dtype, np.dtype(np.float32), "cpu")
    sidecars = sidecar_files(model) | config_json(model, config, _config_dtype(model, wanted))
    entries = _entries(model, wanted)
    nbytes = sum(entry.nbytes for entry in entries)
    needed = nbytes + SMALL + sum(path.stat().st_size for path in sidecars.values() if isinstance(path, Path))
    if not model.is_multiprocess or distributed.is_coordinator():
        with staged(out, needed, force, check) as folder, loading_bar(nbytes, progress, "writing") as advance:
            write_sidecars(folder, sidecars, model)
            files.write_weights(folder, entries, advance)
    else:
        _gather_for_coordinator(entries)
    if model.is_multiprocess:
        distributed.gather("written")
    return Exported(out, len(entries), nbytes)


def check_format(format: str) -> None:
    """Raises ValueError for a format that cannot be written."""
    if format == "meta":
        raise ValueError(
            "export cannot write Meta's format, only Hugging Face's, which other tools read: omit format= (--format)"
        )
    if format != "hf":
        raise ValueError(f"unknown format {format!r}: the only format that export writes is hf")


def _check_everywhere(check: Callable[[], None], is_multiprocess: bool) -> None:
    """Runs a check. If it fails in one of several processes, all of them raise its OSError. A collective."""
    failure = None
    try:
        check()
    except OSError as error:
        failure = error
    failures = distributed.gather(str(failure or "")) if is_multiprocess else []
    if failure:
        raise failure
    for number, text in enumerate(failures):
        if text:
            raise OSError(f"process {number}: {text}")


def _gather_for_coordinator(entries: list[Entry]) -> None:
    """Takes part in the collectives that gather sharded tensors, in the order of the coordinator."""
    for entry in itertools.chain(*files.in_files(entries)):
        if entry.spread:
            for _ in entry.chunks():
                pass


def open_model(source: ModelSource, *, fuse: bool = False) -> Model:
    """Opens a model for export. Its weights are LazyTensors, which are read from disk in slices while they are written.

    Args:
        source: The checkpoint.
        fuse: Merge the adapter into the weights as they are read.

    Raises:
        ValueError: `fuse` is set and there is no adapter, or it is not set and there is one.
    """
    resolved = resolve(source)
    checkpoint, name = resolved.checkpoint, source.name
    if fuse and checkpoint.adapter is None:
        raise ValueError(f"{name} is not an adapter: pass one (jaxlm fuse -m {name} --adapter ADAPTER --out FOLDER)")
    if checkpoint.adapter is not None and not fuse:
        raise ValueError(f"{source} has an adapter: use jaxlm fuse, which merges it and writes one checkpoint")
    weights: dict[str, Any] = {}
    for row, tensor in checkpoint.tensors.pairs:
        params.put(weights, row.path, files.LazyTensor(tensor, row.shape))
    model = Model(
        family=resolved.family,
        config=resolved.config,
        weights=adapters.fused_on_disk(weights, checkpoint),
        tokenizer=resolved.tokenizer,
        generation_config=resolved.generation_config,
        source=str(name),
        checkpoint=adapters.without_adapter(checkpoint),
    )
    return adapters.with_stop_ids(model) if fuse else model


def sources(checkpoint: Checkpoint | None) -> set[Path]:
    """The folders and files of a checkpoint, with symbolic links resolved."""
    if checkpoint is None:
        return set()
    tensors = checkpoint.tensors
    read = [*(tensor for _, tensor in tensors.pairs), *tensors.heads, *tensors.ignored]
    paths = {part.file for tensor in read for part in getattr(tensor, "parts", (tensor,))} | {checkpoint.folder}
    return {path.resolve() for path in paths | ({checkpoint.tokenizer} if checkpoint.tokenizer else set())}


# Tensors


def _entries(model: Model, wanted: np.dtype | None) -> list[Entry]:
    """The tensors to write, with the names and dtypes of the checkpoint unless `wanted` is given."""
    leaves, checkpoint = _leaves(model), model.checkpoint
    tensors = {row.path: tensor for row, tensor in checkpoint.tensors.pairs} if checkpoint else {}
    entries = []
    for row in params.tensors(model.family.PARAMS, model.config):
        tensor, leaf = tensors.get(row.path), leaves[row.path]
        name = tensor.name if tensor and tensor.name in row.names else row.names[0]
        entries.append(files.array_entry(name, leaf, row.stored_shape, wanted or _file_dtype(tensor, leaf)))
    if checkpoint and checkpoint.format == "hf":
        for head in checkpoint.tensors.heads:  # a stored copy of the embedding is written too
            dtype = wanted or _file_dtype(head, leaves["embed"])
            entries.append(files.array_entry(head.name, leaves["embed"], leaves["embed"].shape, dtype))
        entries += map(files.copied_entry, checkpoint.tensors.ignored)
    return entries


def _file_dtype(tensor: Any, leaf: Any) -> np.dtype:
    """The dtype of the checkpoint's tensor; without a checkpoint, that of the array."""
    dtype = DTYPES[tensor.dtype] if tensor else np.dtype(leaf.dtype)
    if dtype not in files.KINDS:
        known = ", ".join(dtype.name for dtype in files.KINDS)
        raise ValueError(f"a weight has dtype {dtype}: choose the dtype to write (dtype=, --dtype): {known}")
    return dtype


def _config_dtype(model: Model, wanted: np.dtype | None) -> str | None:
    """The dtype to set in config.json; None if the checkpoint's config.json already has it."""
    checkpoint = model.checkpoint
    if wanted is None and (checkpoint is None or checkpoint.format != "hf"):
        wanted = _file_dtype(checkpoint.tensors.pairs[0][1] if checkpoint else None, model.weights["embed"])
    return None if wanted is None else wanted.name


def _leaves(model: Model) -> dict[str, Any]:
    """The weights by path. Raises ValueError if they do not match the config."""
    weights = model.weights
    if isinstance(weights["layers"], dict):  # stacked for scan_layers
        weights = params.unstack(weights)
    leaves = {path: leaf for path, leaf in weights.items() if path != "layers"}
    for i, layer in enumerate(weights["layers"]):
        leaves |= {f"layers.{i}.{name}": leaf for name, leaf in layer.items()}
    shapes = {row.path: row.shape for row in params.tensors(model.family.PARAMS, model.config)}
    faults = [f"{path} missing" for path in shapes.keys() - leaves.keys()]
    faults += [f"{path} unknown" for path in leaves.keys() - shapes.keys()]
    for path in shapes.keys() & leaves.keys():
        shape = getattr(leaves[path], "shape", None)
        if shape != shapes[path]:
            faults.append(f"{path} has shape {shape} instead of {shapes[path]}")
    if faults:
        raise ValueError(f"the weights do not match the config: {listed(sorted(faults))}")
    return leaves


# Sidecar files: config.json, the tokenizer's files, generation_config.json


def sidecar_files(model: Model) -> SidecarFiles:
    """Files of the checkpoint to copy: tokenizer, chat template, generation_config.json."""
    checkpoint = model.checkpoint
    sidecars: SidecarFiles = {}
    if checkpoint is not None:
        folder = checkpoint.tokenizer or checkpoint.folder  # the tokenizer may be in another folder
        paths = {name: (checkpoint.folder if name in MODEL_FILES else folder) / name for name in OPTIONAL}
        if folder.is_file() and folder.suffix != ".gguf":
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


def config_json(model: Model, config: dict[str, Any] | None, dtype: str | None) -> SidecarFiles:
    """config.json as a sidecar file.

    Args:
        model: The model.
        config: Contents to write. None: those of the checkpoint.
        dtype: dtype to set in the file; None does not change it.

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
    if config is None and dtype is None and checkpoint and checkpoint.format == "hf":
        return {CONFIG: checkpoint.folder / CONFIG}  # unchanged, so the file is copied
    return {CONFIG: raw if dtype is None else _with_dtype(raw, dtype)}


def _difference(ours: Any, theirs: Any) -> str:
    names = [name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)]
    return ", ".join(f"{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here" for name in names)


def _field_names(value: Any) -> Collection[str]:
    """The names of all fields, including nested ones."""
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(_field_names, value.values()))


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A config with another dtype, in the field `dtype` or `torch_dtype`, also in its text_config."""
    fields = [field for field in ("dtype", "torch_dtype") if field in config] or ["dtype"]
    config = {**config, **dict.fromkeys(fields, name)}
    if text := config.get("text_config"):
        config["text_config"] = {**text, **{field: name for field in ("dtype", "torch_dtype") if field in text}}
    return config
