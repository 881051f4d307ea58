"""`export`: a model as a checkpoint folder."""

import itertools
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import adapters
from jaxlm import export_texts as beside
from jaxlm.checkpoint import meta
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.pth import write_pth
from jaxlm.checkpoint.safetensors import DTYPES, listed
from jaxlm.checkpoint.writer import Entry
from jaxlm.devices import distributed
from jaxlm.loading import loading_bar, resolve, wanted_dtype
from jaxlm.model import Model
from jaxlm.nn import lora, params

FORMATS = ("hf", "meta")
SMALL = 32 << 20  # bytes: room for headers, and for a tokenizer that is written anew


class Exported(NamedTuple):
    """What was written: the folder, how many tensors, and their bytes."""

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
    """Writes a model as a checkpoint folder, which takes its name when it is whole and on the disk.

    format: "hf", Hugging Face's, or for a Llama "meta", the form of Meta's originals. Tensors keep the names and types
    of the checkpoint that the model came from, also where it was loaded in another type; those that were not read
    (vision) and the tokenizer's files are copied. dtype: "float32", "bfloat16" or "float16" for all tensors that were
    read. force: replace a checkpoint that stands at `out`, the whole folder. config: the contents of config.json, for a
    model that was made without one (`Model.init`). progress: show a bar on stderr (default: when it is a terminal).
    Where the weights lie with several processes all must call it, and the first writes: if that fails, the others must
    end too. Raises ValueError, FileExistsError or OSError (no room), each with what to do; then nothing is left.
    """
    _check(model, format)
    out = Path(os.path.realpath(os.path.expanduser(out)))
    check = partial(files.check_target, out, sources(model.checkpoint), force)
    _agreed(check, model.is_multiprocess)
    wanted = None if dtype is None or str(dtype) == "auto" else wanted_dtype(dtype, np.dtype(np.float32), "cpu")
    texts = _texts(model, format, wanted, config)
    entries = _entries(model, wanted, format)
    nbytes = sum(entry.nbytes for entry in entries)
    room = nbytes + SMALL + sum(path.stat().st_size for path in texts.values() if isinstance(path, Path))
    if not model.is_multiprocess or distributed.is_coordinator():
        with files.staged(out, room, force, check) as folder, loading_bar(nbytes, progress, "writing") as advance:
            _write_texts(folder, texts, model, format)
            _write_tensors(folder, entries, format, advance)
    else:
        _follow(entries, format)
    if model.is_multiprocess:
        distributed.gather("written")
    return Exported(out, len(entries), nbytes)


def _check(model: Model, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if lora.count(model.weights):
        raise ValueError(f"{model.source} has an adapter beside its weights: jaxlm.fuse(model) first, or `jaxlm fuse`")


def _agreed(check: Callable[[], None], shared: bool) -> None:
    """Raises what is in the way: where several processes write together, in all of them if in one."""
    problem = None
    try:
        check()
    except OSError as error:
        problem = error
    told = distributed.gather(str(problem or "")) if shared else []
    if problem:
        raise problem
    for number, text in enumerate(told):
        if text:
            raise OSError(f"process {number} found: {text}")


def _write_tensors(folder: Path, entries: list[Entry], format: str, advance: Callable[[int], None]) -> None:
    if format == "meta":
        tensors = ((e.name, e.dtype, e.shape, files.counted(e.chunks(), advance)) for e in entries)
        write_pth(folder / "consolidated.00.pth", tensors)
    else:
        files.write_weights(folder, entries, advance)


def _follow(entries: list[Entry], format: str) -> None:
    """What the other processes do while the first one writes: their devices hold parts of what it asks for."""
    for entry in entries if format == "meta" else itertools.chain(*files.in_files(entries)):
        if entry.spread:
            for _ in entry.chunks():
                pass


def _texts(model: Model, format: str, wanted: np.dtype | None, config: dict[str, Any] | None) -> beside.Texts:
    """What stands beside the weights."""
    told = partial(beside.config_json, dtype=_named_dtype(model, wanted)) if format == "hf" else beside.params_json
    return beside.other_texts(model, format) | told(model, config)


def _write_texts(folder: Path, texts: beside.Texts, model: Model, format: str) -> None:
    """Copies and writes small files, and a tokenizer anew where none can be copied."""
    if format == "hf" and model.tokenizer and beside.lacks_tokenizer(model, texts):
        model.tokenizer.hf.save_pretrained(folder)
        texts.pop("tokenizer.model", None)  # Meta's form, which transformers would take for another one
    for name, text in texts.items():
        if isinstance(text, Path):
            shutil.copyfile(text, folder / name)
        else:
            files.write_json(folder / name, text)


def open_model(name: str | Path, *, fuse: bool = False, **options: Any) -> Model:
    """A model that can be exported and nothing else: its weights stay on the disk, so that memory does not matter.

    fuse: with an adapter, which is added in as they are read. Other arguments as `loading.find` takes them.
    """
    found = resolve(name, **options)
    adapter = found.checkpoint.adapter
    if fuse and adapter is None:
        raise ValueError(f"{name} is no adapter and none is named: jaxlm fuse -m {name} --adapter ADAPTER --out FOLDER")
    if adapter is not None and not fuse:
        raise ValueError(
            f"an adapter stands beside the weights of {found.checkpoint.folder}: jaxlm fuse writes both as one"
        )
    weights: dict[str, Any] = {}
    for row, tensor in found.checkpoint.tensors.pairs:
        params.put(weights, row.path, files.LazyTensor(tensor, row.shape))
    weights = adapters.fused_on_disk(weights, found.checkpoint)
    whole = adapters.without_adapter(found.checkpoint)
    return Model(found.family, found.config, weights, found.tokenizer, found.generation_config, str(name), whole)


def sources(found: Checkpoint | None) -> set[Path]:
    """The folders and the files of a checkpoint, without links."""
    if found is None:
        return set()
    read = [*(tensor for _, tensor in found.tensors.pairs), *found.tensors.heads, *found.tensors.ignored]
    places = {part.file for tensor in read for part in getattr(tensor, "parts", (tensor,))} | {found.folder}
    return {path.resolve() for path in places | ({found.tokenizer} if found.tokenizer else set())}


# Tensors


def _entries(model: Model, wanted: np.dtype | None, format: str) -> list[Entry]:
    """Every tensor to write, in the type of the source unless another one is wanted."""
    leaves, found = _leaves(model), model.checkpoint
    source = {row.path: tensor for row, tensor in found.tensors.pairs} if found else {}
    entries = []

    def add(name: str, path: str, shape: tuple[int, ...], tensor: Any, change: Any = None) -> None:
        leaf = leaves[path]
        entries.append(files.array_entry(name, leaf, shape, wanted or _stored_dtype(tensor, leaf), change))

    for row in params.tensors(model.family.PARAMS, model.config):
        tensor = source.get(row.path)
        if format == "meta":
            layer, general = _general(row.path)
            change = partial(meta.to_pairs, H=model.config.H) if general in meta.ROTARY else None
            add(meta.NAMES[general].format(layer), row.path, row.stored_shape, tensor, change)
        else:  # in the source's own spelling
            add(
                tensor.name if tensor and tensor.name in row.names else row.names[0], row.path, row.stored_shape, tensor
            )
    if format == "meta" and model.config.tied:  # a tied head is stored there
        add(meta.NAMES["head"], "embed", (model.config.V, model.config.D), source.get("embed"))
    if format == "hf" and found and found.format == "hf":
        for head in found.tensors.heads:  # a copy of the embedding follows it
            add(head.name, "embed", head.shape, head)
        entries += map(files.stored_entry, found.tensors.ignored)
    return entries


def _general(path: str) -> tuple[str, str]:
    """`layers.3.q` -> its number and its key in a table, `layers.q`."""
    first, _, rest = path.partition(".")
    layer, _, name = rest.partition(".")
    return (layer, f"{first}.{name}") if rest else ("", path)


def _stored_dtype(tensor: Any, leaf: Any) -> np.dtype:
    """The type to write where none is wanted: the source's, else the array's own."""
    dtype = DTYPES[tensor.dtype] if tensor else np.dtype(leaf.dtype)
    if dtype not in files.KINDS:
        known = ", ".join(dtype.name for dtype in files.KINDS)
        raise ValueError(f"a weight has type {dtype}: name the type to write (dtype=, --dtype): {known}")
    return dtype


def _named_dtype(model: Model, wanted: np.dtype | None) -> str | None:
    """The type that config.json is to name, None where the source's own says it."""
    found = model.checkpoint
    if wanted is None and (found is None or found.format == "meta"):
        wanted = _stored_dtype(found.tensors.pairs[0][1] if found else None, model.weights["embed"])
    return None if wanted is None else wanted.name


def _leaves(model: Model) -> dict[str, Any]:
    """path -> array of every weight; ValueError unless they are those that the config asks for."""
    weights = model.weights
    if isinstance(weights["layers"], dict):  # stacked for scans
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
        raise ValueError(f"the weights are not those of the config: {listed(sorted(faults))}")
    return leaves
