"""`export`: writes a model as a Hugging Face checkpoint or as a GGUF file."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import adapters
from jaxlm.checkpoint import gguf_writer, quantized_writer
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.atomic import staged, staged_file
from jaxlm.checkpoint.gguf_files import SUFFIX, is_gguf
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.safetensors import DTYPES, listed
from jaxlm.checkpoint.source import ModelSource
from jaxlm.checkpoint.writer import Entry
from jaxlm.devices import distributed
from jaxlm.loading import loading_bar, wanted_dtype
from jaxlm.loading.resolving import resolve
from jaxlm.model import Model, require_model
from jaxlm.nn import lora, params
from jaxlm.nn.quantize import TYPES
from jaxlm.nn.quantized import is_quantized
from jaxlm.processing.gguf_tokenizer_writer import tokenizer_metadata, without_row
from jaxlm.processing.tokenizer_files import eos_ids
from jaxlm.sidecars import config_json, sidecar_files, write_sidecars

SMALL = 32 << 20  # bytes of disk space for headers and for a tokenizer that cannot be copied


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
    quantize: str | None = None,
    force: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> Exported:
    """Writes a model as a Hugging Face checkpoint, or as one GGUF file for llama.cpp if `out` ends in .gguf. The folder
    or file appears at `out` only when it is complete.

    Tensors keep the dtypes of the model's checkpoint, even if it was loaded in another dtype, and in Hugging Face's
    format their names. Quantized weights stay quantized in a folder, which is then in the format of compressed-tensors
    (checkpoint/quantized_writer.py); in a GGUF file they are dequantized. Tensors that are not loaded (vision) and
    tokenizer files are copied. If the weights are sharded over several processes, all of them must call this function;
    the coordinator writes.

    A GGUF file has the weights of the language model, the config, the tokenizer and the chat template. Norms are
    float32. Sampling parameters of generation_config.json are not in it.

    Args:
        model: The model.
        out: Folder or .gguf file to write.
        format: "hf" (Hugging Face). A name that ends in .gguf selects GGUF.
        dtype: "float32", "bfloat16" or "float16" for all loaded tensors. None or "auto": the dtype in the file.
            Without `quantize`, quantized weights are dequantized to it. For a folder only.
        type: "f32", "f16", "bf16", "q8_0" or "q4_0" for the matrices of a GGUF file. None: as in the checkpoint. The
            output head, and an embedding that is tied to it, are q8_0 in a q4_0 file.
        quantize: Quantize the matrices of the layers: "int8", "int8-weights", "int4" or "fp8" (nn/quantize.py). For a
            folder only.
        force: Replace an existing checkpoint folder or GGUF file at `out`.
        config: Contents of config.json, for a model without a checkpoint (`Model.init`). For a folder only.
        progress: Show a progress bar on stderr. Default: only on a terminal.

    Returns:
        The folder or file, the number of tensors, their size in bytes, and notes on what it does not have.

    Raises:
        ValueError: The model has an adapter, an argument is invalid, the config does not describe the model, or GGUF
            cannot express the config or the tokenizer.
        FileExistsError: `out` exists and is not a checkpoint, or `force` is False.
        OSError: The disk is full, or a file cannot be written. Nothing is left at `out`.
    """
    require_model(model, "export")
    check_format(out, format, dtype, type, quantize)
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
    form = quantized_writer.form_to_write(quantize) if quantize else _own_form(model) if wanted is None else None
    entries, packed, dense = _entries(model, wanted, form, quantize is not None)
    if packed and model.is_multiprocess:
        raise ValueError("quantized weights are written by one process: load the model in one, or choose dtype=")
    prefixes = model.family.IGNORED_PREFIXES if model.ignored else ()
    added = quantized_writer.quantization_config(form, dense, prefixes) if packed and form else None
    sidecars = sidecar_files(model) | config_json(model, config, _config_dtype(model, wanted), added)
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
    notes = () if form is None or all(each.is_exact for each in packed) else (_rounded_again(form.type),)
    return Exported(out, len(entries), nbytes, notes)


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


def _rounded_again(type: str) -> str:
    return (f"the {type} weights were rounded again, to the form that other tools read: export the original model with "
            f"--quantize {type} (quantize=) for smaller errors")  # fmt: skip


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


def check_format(out: str | Path, format: str, dtype: Any, type: str | None, quantize: str | None = None) -> None:
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
    if quantize is not None and to_gguf:
        raise ValueError(f"--quantize {quantize} (quantize=) applies to a folder, and {out} is a GGUF file: choose "
                         "--type q8_0 or q4_0 (type=)")  # fmt: skip
    if quantize is not None and quantize not in TYPES:
        raise ValueError(f"unknown type {quantize!r} of quantized weights: choose one of {', '.join(TYPES)}")
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


def _own_form(model: Model) -> quantized_writer.Form | None:
    """The form of most of the layers' quantized weights, if other tools know it."""
    forms = [quantized_writer.form_of(leaf) for path, leaf in _weights(model).items() if path.startswith("layers.")]
    return next((form for form, _ in Counter(filter(None, forms)).most_common(1)), None)


def _entries(
    model: Model, wanted: np.dtype | None, form: quantized_writer.Form | None, every: bool
) -> tuple[list[Entry], list[quantized_writer.Packed], list[str]]:
    """The tensors to write, with the names and dtypes of the checkpoint unless `wanted` is given; the weights that are
    written in `form`, which are all matrices of the layers or those that are in this form already; and the names of the
    layers' other matrices."""
    leaves, checkpoint, tensors, entries = _leaves(model), model.checkpoint, _tensors(model), []
    weights, packed, dense = _weights(model), [], []
    for row in params.tensors(model.family.PARAMS, model.config):
        tensor, leaf = tensors.get(row.path), leaves[row.path]
        name = tensor.name if tensor and tensor.name in row.names else row.names[0]
        if form is not None and quantized_writer.fits(row, form):
            of_form = quantized_writer.form_of(weights[row.path]) == form
            if of_form or every:
                own = weights[row.path] if of_form else None
                packed.append(quantized_writer.Packed(leaf, row.stored_shape[-1], form, own))
                entries += quantized_writer.packed_entries(name, packed[-1], row.stored_shape)
                continue
        if row.letters not in params.NORMS and row.path.startswith("layers."):
            dense.append(name)
        entries.append(files.array_entry(name, leaf, row.stored_shape, wanted or _file_dtype(tensor, leaf)))
    if checkpoint and checkpoint.format == "hf":
        for head in checkpoint.tensors.heads:  # a stored copy of the embedding is written too
            dtype = wanted or _file_dtype(head, leaves["embed"])
            entries.append(files.array_entry(head.name, leaves["embed"], leaves["embed"].shape, dtype))
        entries += map(files.copied_entry, checkpoint.tensors.ignored)
    return entries, packed, dense


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
    """The weights by path, quantized ones as DequantizedTensor. Raises ValueError if they do not match the config."""
    leaves = _weights(model)
    shapes = {row.path: row.shape for row in params.tensors(model.family.PARAMS, model.config)}
    faults = [f"{path} missing" for path in shapes.keys() - leaves.keys()]
    faults += [f"{path} unknown" for path in leaves.keys() - shapes.keys()]
    for path in shapes.keys() & leaves.keys():
        shape = getattr(leaves[path], "shape", None)
        if shape != shapes[path]:
            faults.append(f"{path} has shape {shape} instead of {shapes[path]}")
    if faults:
        raise ValueError(f"the weights do not match the config: {listed(sorted(faults))}")
    return {
        path: quantized_writer.DequantizedTensor(leaf) if is_quantized(leaf) else leaf for path, leaf in leaves.items()
    }


def _weights(model: Model) -> dict[str, Any]:
    """The weights by path."""
    weights = model.weights
    if isinstance(weights["layers"], dict):  # stacked for scan_layers
        weights = params.unstack(weights)
    leaves = {path: leaf for path, leaf in weights.items() if path != "layers"}
    for i, layer in enumerate(weights["layers"]):
        leaves |= {f"layers.{i}.{name}": leaf for name, leaf in layer.items()}
    return leaves
