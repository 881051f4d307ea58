"""`export`: writes a model as a Hugging Face checkpoint or as a GGUF file."""

import itertools
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import adapters
from jaxlm.checkpoint import gguf_writer, quantized
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.atomic import staged, staged_file
from jaxlm.checkpoint.gguf_files import SUFFIX, is_gguf
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.hub import CONFIG, OPTIONAL, TOKENIZER_FILES
from jaxlm.checkpoint.safetensors import DTYPES, listed
from jaxlm.checkpoint.source import ModelSource
from jaxlm.checkpoint.writer import Entry
from jaxlm.devices import distributed
from jaxlm.loading import loading_bar, wanted_dtype
from jaxlm.loading.resolving import loaded_generation_config, resolve
from jaxlm.model import Model, require_model
from jaxlm.nn import lora, params
from jaxlm.processing.gguf_tokenizer_writer import tokenizer_metadata, without_row
from jaxlm.processing.tokenizer_files import eos_ids

SMALL = 32 << 20  # bytes of disk space for headers and for a tokenizer that cannot be copied
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
MODEL_FILES = (GENERATION, "preprocessor_config.json", "processor_config.json")  # other OPTIONAL files: tokenizer
SidecarFiles = dict[str, Any]  # file name -> JSON contents, text, or path of the file to copy


class Exported(NamedTuple):
    """The result of `export`: the folder or file, the number of tensors, their size in bytes, and what it lacks."""

    folder: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()


def export(
    model: Model,
    out: str | Path,
    *,
    format: str = "hf",
    dtype: Any = None,
    type: str | None = None,
    force: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> Exported:
    """Writes a model as a Hugging Face checkpoint, or as one GGUF file for llama.cpp if `out` ends in .gguf. The folder
    or file appears at `out` only when it is complete.

    Tensors keep the dtypes of the model's checkpoint, even if it was loaded in another dtype, and in Hugging Face's
    format their names. Tensors that are not loaded (vision) and tokenizer files are copied. If the weights are sharded
    over several processes, all of them must call this function; the coordinator writes.

    A GGUF file has the weights of the language model, the config, the tokenizer and the chat template. Norms are
    float32. Sampling parameters of generation_config.json are not in it.

    Args:
        model: The model.
        out: Folder or .gguf file to write.
        format: "hf" (Hugging Face). A name that ends in .gguf selects GGUF.
        dtype: "float32", "bfloat16" or "float16" for all loaded tensors. None or "auto": the dtype in the file. For a
            folder only.
        type: "f32", "f16", "bf16", "q8_0" or "q4_0" for the matrices of a GGUF file. None: as in the checkpoint. The
            output head, and an embedding that is tied to it, are q8_0 in a q4_0 file.
        force: Replace an existing checkpoint folder or GGUF file at `out`.
        config: Contents of config.json, for a model without a checkpoint (`Model.init`). For a folder only.
        progress: Show a progress bar on stderr. Default: only on a terminal.

    Returns:
        The folder or file, the number of tensors, their size in bytes, and notes on what is not in a GGUF file.

    Raises:
        ValueError: The model has an adapter, an argument is invalid, the config does not describe the model, or GGUF
            cannot express the config or the tokenizer.
        FileExistsError: `out` exists and is not a checkpoint, or `force` is False.
        OSError: The disk is full, or a file cannot be written. Nothing is left at `out`.
    """
    require_model(model, "export")
    check_format(out, format, dtype, type)
    if lora.count(model.weights):
        raise ValueError(f"{model.source} has an adapter: merge it first, with jaxlm.fuse(model) or `jaxlm fuse`")
    out = Path(os.path.realpath(os.path.expanduser(out)))
    if is_gguf(out):
        if config is not None:
            raise ValueError("config= applies to a folder: a GGUF file is written from model.config; omit it")
        return _export_gguf(model, out, type, force, progress)
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
        _gather_for_coordinator(itertools.chain(*files.in_files(entries)))
    if model.is_multiprocess:
        distributed.gather("written")
    return Exported(out, len(entries), nbytes)


def _export_gguf(model: Model, out: Path, type: str | None, force: bool, progress: bool | None) -> Exported:
    """Writes a model as a GGUF file. The arguments are those of `export`."""
    check = partial(gguf_writer.check_target, out, sources(model.checkpoint), force)
    _check_everywhere(check, model.is_multiprocess)
    family, cfg = model.family, model.config
    name, leaves = gguf_writer.architecture_of(family), _leaves(model)
    metadata = gguf_writer.model_metadata(name, family, cfg)
    metadata |= {"general.type": "model", "general.name": Path(model.source).name.removesuffix(SUFFIX)}
    if model.tokenizer is None:
        metadata["tokenizer.ggml.model"] = "none"
    else:
        ends = {*eos_ids(model.generation_config), *model.tokenizer.stop_ids}
        metadata |= tokenizer_metadata(model.tokenizer.hf, ends, cfg.V)
    tensors = _tensors(model)
    own = {path: files.KINDS[_file_dtype(tensors.get(path), leaf)] for path, leaf in leaves.items()}
    entries = gguf_writer.entries(name, family, cfg, leaves, own if type is None else type)
    metadata |= gguf_writer.type_metadata(entries)
    nbytes = sum(entry.nbytes for entry in entries)
    if not model.is_multiprocess or distributed.is_coordinator():
        with staged_file(out, nbytes + SMALL, check) as file, loading_bar(nbytes, progress, "writing") as advance:
            gguf_writer.write(file, metadata, entries, advance)
    else:
        _gather_for_coordinator(entries)
    if model.is_multiprocess:
        distributed.gather("written")
    return Exported(out, len(entries), nbytes, _left_out(model))


def _left_out(model: Model) -> tuple[str, ...]:
    """What a GGUF file does not have."""
    notes = []
    if model.ignored:
        notes.append(f"{len(model.ignored)} tensors of the vision tower are not in the file: text only")
    if model.tokenizer is None:
        notes.append("the model has no tokenizer: llama.cpp takes token ids only")
    elif lost := without_row(model.tokenizer.hf, model.config.V):
        notes.append(f"the embedding has no rows for tokens of the tokenizer, which are left out: {listed(lost)}")
    return tuple(notes)


def check_format(out: str | Path, format: str, dtype: Any, type: str | None) -> None:
    """Raises ValueError for a format that cannot be written, and for a type that does not apply to it."""
    if format == "meta":
        raise ValueError(
            "export cannot write Meta's format, only Hugging Face's, which other tools read: omit format= (--format)"
        )
    if format != "hf":
        raise ValueError(
            f"unknown format {format!r}: a folder has the format hf, and a file name that ends in .gguf selects GGUF"
        )
    to_gguf, types = is_gguf(Path(out)), ", ".join(gguf_writer.CHOICES)
    if type is not None and not to_gguf:
        raise ValueError(f"--type {type} (type=) applies to a GGUF file, and {out} is a folder: choose a name that "
                         "ends in .gguf, or --dtype (dtype=), which applies to a folder")  # fmt: skip
    if to_gguf and dtype is not None and str(dtype) != "auto":
        raise ValueError(f"--dtype {dtype} (dtype=) applies to a folder, and {out} is a GGUF file: choose a --type "
                         f"(type=) of {types}")  # fmt: skip
    if type is not None and type not in gguf_writer.CHOICES:
        raise ValueError(f"unknown type {type!r}: choose one of {types}")


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


def _gather_for_coordinator(entries: Iterable[Entry | gguf_writer.Entry]) -> None:
    """Takes part in the collectives that gather sharded tensors, in the order of the coordinator."""
    for entry in entries:
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
        raise ValueError(f"{name} is not an adapter: pass one (jaxlm fuse -m {name} --adapter ADAPTER --out OUT)")
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
    leaves, checkpoint, tensors, entries = _leaves(model), model.checkpoint, _tensors(model), []
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


def _tensors(model: Model) -> dict[str, Any]:
    """The tensor of the checkpoint of each weight, by path."""
    return {row.path: tensor for row, tensor in model.checkpoint.tensors.pairs} if model.checkpoint else {}


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
    plain = quantized.without_section(raw)  # the weights that are written are not quantized
    # Unknown fields were checked when the model was loaded.
    allow = _field_names(raw) if config is None else ()
    if difference := _difference(model.config, model.family.Config.from_hf(raw, allow)):
        raise ValueError(
            f"config.json does not describe this model ({difference}): pass the correct contents as config="
        )
    if config is None and dtype is None and checkpoint and checkpoint.format == "hf" and plain == raw:
        return {CONFIG: checkpoint.folder / CONFIG}  # unchanged, so the file is copied
    return {CONFIG: plain if dtype is None else _with_dtype(plain, dtype)}


def _difference(ours: Any, theirs: Any) -> str:
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
