"""What stands beside the weights of an exported model: config.json or params.json, the tokenizer's files."""

import logging
from collections.abc import Collection
from typing import Any

from jaxlm.checkpoint import meta
from jaxlm.checkpoint.hub import CONFIG, OPTIONAL
from jaxlm.checkpoint.meta_params import params_of, untold_factor
from jaxlm.model import Model
from jaxlm.models import llama3

GENERATION = "generation_config.json"
FOLDERS_OWN = (GENERATION, "preprocessor_config.json", "processor_config.json")  # the others are the tokenizer's
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}  # one of which makes a tokenizer
Texts = dict[str, Any]  # a file's name -> its contents as JSON, or the path of the file to copy
_log = logging.getLogger(__name__)


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


def other_texts(model: Model, format: str) -> Texts:
    """The source's files that are written again as they stand: tokenizer, chat template, generation_config.json."""
    found, told = model.checkpoint, {k: v for k, v in model.generation_config.items() if v not in (None, [])}
    texts: Texts = {}
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


def lacks_tokenizer(model: Model, texts: Texts) -> bool:
    """Whether there is a tokenizer and no file has it in a form that transformers is sure to read."""
    found = model.checkpoint
    made = found is None or ((found.format == "meta" or found.tokenizer) and "tokenizer.json" not in texts)
    return model.tokenizer is not None and bool(made)
