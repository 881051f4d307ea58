"""`export`: a model as a checkpoint folder."""

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import adapters
from jaxlm.checkpoint import meta
from jaxlm.checkpoint import writer as files
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.hub import CONFIG, OPTIONAL
from jaxlm.checkpoint.meta_params import params_of, untold_factor
from jaxlm.checkpoint.pth import write_pth
from jaxlm.checkpoint.safetensors import DTYPES, listed
from jaxlm.checkpoint.source import ModelSource
from jaxlm.checkpoint.writer import Entry
from jaxlm.devices import distributed
from jaxlm.loading import loading_bar, resolve, wanted_dtype
from jaxlm.model import Model
from jaxlm.models import llama3
from jaxlm.nn import lora, params

FORMATS = ("hf", "meta")
SMALL = 32 << 20  # bytes: room for headers, and for a tokenizer that is written anew
GENERATION = "generation_config.json"
FOLDERS_OWN = (GENERATION, "preprocessor_config.json", "processor_config.json")  # the others are the tokenizer's
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}  # one of which makes a tokenizer
SidecarFiles = dict[str, Any]  # a file's name -> its contents as JSON, or the path of the file to copy
_log = logging.getLogger(__name__)


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


def _texts(model: Model, format: str, wanted: np.dtype | None, config: dict[str, Any] | None) -> SidecarFiles:
    """What stands beside the weights."""
    told = partial(config_json, dtype=_named_dtype(model, wanted)) if format == "hf" else params_json
    return sidecar_files(model, format) | told(model, config)


def _write_texts(folder: Path, texts: SidecarFiles, model: Model, format: str) -> None:
    """Copies and writes small files, and a tokenizer anew where none can be copied."""
    if format == "hf" and model.tokenizer and lacks_tokenizer(model, texts):
        model.tokenizer.hf.save_pretrained(folder)
        texts.pop("tokenizer.model", None)  # Meta's form, which transformers would take for another one
    for name, text in texts.items():
        if isinstance(text, Path):
            shutil.copyfile(text, folder / name)
        else:
            files.write_json(folder / name, text)


def open_model(source: ModelSource, *, fuse: bool = False) -> Model:
    """A model to export: its weights are LazyTensors, which are read from disk slice by slice while they are written.

    Args:
        source: the model.
        fuse: merge the adapter into the weights as they are read. ValueError if there is none; without `fuse`,
            ValueError if there is one.
    """
    resolved = resolve(source)
    checkpoint, name = resolved.checkpoint, source.name
    if fuse and checkpoint.adapter is None:
        raise ValueError(f"{name} is no adapter: pass one (jaxlm fuse -m {name} --adapter ADAPTER --out FOLDER)")
    if checkpoint.adapter is not None and not fuse:
        raise ValueError(
            f"{source} is a model with an adapter: merge them with jaxlm fuse, which writes one checkpoint"
        )
    weights: dict[str, Any] = {}
    for row, tensor in checkpoint.tensors.pairs:
        params.put(weights, row.path, files.LazyTensor(tensor, row.shape))
    return Model(
        family=resolved.family,
        config=resolved.config,
        weights=adapters.fused_on_disk(weights, checkpoint),
        tokenizer=resolved.tokenizer,
        generation_config=resolved.generation_config,
        source=str(name),
        checkpoint=adapters.without_adapter(checkpoint),
    )


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


# Sidecar files: config.json, the tokenizer's files, generation_config.json


def config_json(model: Model, given: dict[str, Any] | None, dtype: str | None) -> dict[str, Any]:
    """config.json with its contents, checked to be the model's; `dtype` is named in it, None leaves what it says."""
    found = model.checkpoint
    if given is None and found is None:
        raise ValueError(
            f"{model} was made without a checkpoint, so there is no config.json to write: pass its contents, "
            "export(model, out, config={...}), as `Config.from_hf` takes them"
        )
    config = given if given is not None else found.config if found else {}
    # What was let pass when the model was loaded passes again.
    allow = _keys(config) if given is None else ()
    if unlike := _unlike(model.config, model.family.Config.from_hf(config, allow)):
        raise ValueError(f"config.json would not describe this model ({unlike}): pass the right contents as config=")
    if given is None and dtype is None and found and found.format == "hf":
        return {CONFIG: found.folder / CONFIG}  # letter for letter
    return {CONFIG: config if dtype is None else _with_dtype(config, dtype)}


def _unlike(ours: Any, theirs: Any, but: Collection[str] = ()) -> str:
    names = [name for name in vars(ours) if name not in but and getattr(ours, name) != getattr(theirs, name)]
    return ", ".join(f"{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here" for name in names)


def _keys(value: Any) -> Collection[str]:
    """The names of all fields, nested ones too."""
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(_keys, value.values()))


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The field that names the type, in its older or its newer spelling, for the model and its language half."""
    spelled = [field for field in ("dtype", "torch_dtype") if field in config] or ["dtype"]
    config = {**config, **dict.fromkeys(spelled, name)}
    if text := config.get("text_config"):
        config["text_config"] = {**text, **{field: name for field in ("dtype", "torch_dtype") if field in text}}
    return config


def params_json(model: Model, config: dict[str, Any] | None) -> dict[str, Any]:
    """params.json with its contents; refuses what that file cannot say."""
    if model.family is not llama3:
        family = model.family.__name__.rpartition(".")[2]
        raise ValueError(f"{model.source} is a model of {family}, and only Llama has the form of Meta's: --format hf")
    cfg, found = model.config, model.checkpoint
    told = params_of(cfg)
    # The context follows from use_scaled_rope there, and whether the head is tied from the head.
    theirs = llama3.Config.from_hf(
        meta.hf_config(told, rope_factor=cfg.rope.factor if told["use_scaled_rope"] else None)
    )
    if unlike := _unlike(cfg, theirs, ("context", "tied")):
        raise ValueError(f"{meta.PARAMS} cannot say what {model.source} is ({unlike}): --format hf can")
    if factor := untold_factor(cfg):
        flag = f"--rope-factor {factor:g} (rope_factor={factor:g})"
        _log.warning(
            "%s cannot say how far the rotary frequencies are stretched: load this folder with %s", meta.PARAMS, flag
        )
    if cfg.context != theirs.context:
        _log.warning("%s cannot say the context: %s here, taken for %s there", meta.PARAMS, cfg.context, theirs.context)
    return {meta.PARAMS: found.folder / meta.PARAMS if found and found.format == "meta" and config is None else told}


def sidecar_files(model: Model, format: str) -> SidecarFiles:
    """The source's files that are written again as they stand: tokenizer, chat template, generation_config.json."""
    found, told = model.checkpoint, {k: v for k, v in model.generation_config.items() if v not in (None, [])}
    texts: SidecarFiles = {}
    if found is not None:
        place = found.tokenizer or found.folder  # a tokenizer may lie elsewhere
        paths = {name: (found.folder if name in FOLDERS_OWN else place) / name for name in OPTIONAL}
        if place.is_file():
            paths["tokenizer.model"] = place
        texts = {name: path for name, path in paths.items() if path.is_file()}
    if told and (found is None or "meta" in (format, found.format)):  # params.json has no tokens that end a text
        texts.setdefault(GENERATION, told)
    if format == "meta" and model.tokenizer is not None and not texts.keys() & TOKENIZERS:
        _log.warning(
            "the tokenizer is not written: it came from no file that could be copied. "
            "model.tokenizer.hf.save_pretrained(folder) puts it beside the weights"
        )
    return texts


def lacks_tokenizer(model: Model, texts: SidecarFiles) -> bool:
    """Whether there is a tokenizer and no file has it in a form that transformers is sure to read."""
    found = model.checkpoint
    made = found is None or ((found.format == "meta" or found.tokenizer) and "tokenizer.json" not in texts)
    return model.tokenizer is not None and bool(made)
