"""Finds the files of a model, and checks them without reading its weights. `load` reads them."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import adapters, models
from jaxlm.checkpoint import gguf_files, gguf_models, headers, hf, hub, meta, peft, quantized
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from jaxlm.checkpoint.peft_config import Settings, read_settings
from jaxlm.checkpoint.source import ModelSource
from jaxlm.inference.sampling_params import log_unsupported
from jaxlm.nn import params
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import eos_ids


class Resolved(NamedTuple):
    """A checked checkpoint whose weights are not read yet."""

    family: Any
    config: Any
    checkpoint: hf.Checkpoint
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]


def resolve(source: ModelSource, family: Any = None) -> Resolved:
    """Does everything that `load` does before it reads weights: finds or downloads files, checks and matches them."""
    return with_tokenizer(match_tensors(source, family), source.tokenizer)


def match_tensors(source: ModelSource, family: Any = None, *, headers_only: bool = False) -> Resolved:
    """Reads the config of a checkpoint, matches its tensors with the family's PARAMS, and finds its adapter.

    Args:
        source: The checkpoint.
        family: As in `load`.
        headers_only: Read small files and headers only, for `jaxlm info`. No weights are downloaded. The checkpoint may
            have no weights; tensors.no_weights is the reason then.

    Returns:
        The checkpoint, without a tokenizer yet.
    """
    try:
        resolved = _match_folder(source, family, headers_only)
    except FileNotFoundError:
        if (adapter := _as_adapter(source)) is None:
            raise
        return _match_base(source, adapter, family, headers_only)
    if source.adapter is None:
        return resolved
    return with_adapter(resolved, source.of_adapter(), str(source.name))


def with_adapter(resolved: Resolved, source: ModelSource, base: str) -> Resolved:
    """Adds the adapter `source`. base: the name of the base model."""
    checkpoint = resolved.checkpoint
    adapter = peft.find(
        hub.resolve_adapter(source),
        resolved.family.PARAMS,
        resolved.config,
        resolved.family.IGNORED_PREFIXES,
        source.allow_fields,
        {row.path: tensor for row, tensor in checkpoint.tensors.pairs if tensor.file.is_file()},
    )
    notes = checkpoint.notes
    if (named := adapter.settings.base) and not _same_model(named, base):
        notes += (f"the adapter {source.name} names the base model {named}; it is used with {base}",)
    return resolved._replace(checkpoint=replace(checkpoint, adapter=adapter, notes=notes))


def _same_model(one: str, other: str) -> bool:
    """Whether two names are the same hub id or folder."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _as_adapter(source: ModelSource) -> Path | None:
    """The folder of the adapter `source.name`; None if it is not an adapter."""
    if source.format == "meta" or str(source.name).endswith(gguf_files.SUFFIX):
        return None
    with suppress(OSError, ValueError):
        return hub.resolve_adapter(source)
    return None


def base_of(source: ModelSource) -> ModelSource:
    """The base model of the adapter `source`.

    Raises:
        ValueError: The adapter does not name it.
        FileNotFoundError: There is no such adapter.
    """
    settings, name = _settings_with_base(source, hub.resolve_adapter(source))
    return replace(source, name=name, revision=None if Path(name).exists() else settings.revision)


def _settings_with_base(source: ModelSource, adapter: Path) -> tuple[Settings, str]:
    """The settings of the adapter in a folder, and the name of its base model, which they must have."""
    settings = read_settings(adapter, source.allow_fields)
    if settings.base is None:
        raise ValueError(
            f"{source.name} is an adapter without the name of its base model: pass the base "
            f"(-m BASE --adapter {source.name})"
        )
    return settings, settings.base


def _match_base(source: ModelSource, adapter: Path, family: Any, headers_only: bool) -> Resolved:
    """Matches the base model of an adapter, with the adapter."""
    if source.adapter is not None:
        raise ValueError(
            f"{source.name} is an adapter: pass its base model with {source.adapter}, or pass {source.name} only"
        )
    settings, name = _settings_with_base(source, adapter)
    revision = None if Path(name).exists() else settings.revision
    base = replace(source, name=name, adapter=adapter, revision=revision)
    try:
        return match_tensors(base, family, headers_only=headers_only)
    except FileNotFoundError as error:
        hint = f"if the base model is elsewhere, pass it (-m BASE --adapter {source.name})"
        raise FileNotFoundError(f"{source.name} is an adapter of {name}, and {error}; {hint}") from None


def _match_folder(source: ModelSource, family: Any, headers_only: bool) -> Resolved:
    """Reads and checks the config and tensors of a checkpoint."""
    if (gguf := gguf_files.find(source, headers_only)) is not None:
        known, config, checkpoint = gguf_models.open_gguf(gguf, source.allow_fields)
        if family is not None and known is not family:
            raise ValueError(f"{gguf} is a model of {known.__name__}, not of {family.__name__}: use jaxlm.load")
        return Resolved(known, config, checkpoint, None, {})
    if headers_only:
        folder, read_index = headers.find(source)
    else:
        folder = hub.resolve(source)
        read_index = partial(hf.read_index, folder)
    config_json = folder if folder.is_file() else folder / hub.CONFIG
    is_meta = source.format == "meta" or not config_json.is_file()
    raw = {"model_type": "llama"} if is_meta else hf.read_json(config_json)
    with explain_errors(str(source.name)):
        known = models.family_of(raw.get("model_type"))
        if family is not None and known is not family:
            raise ValueError(
                f"model_type {raw['model_type']!r} belongs to {known.__name__}, not {family.__name__}: use jaxlm.load"
            )
        if is_meta:
            config, checkpoint = _match_meta(source, folder, known)
        elif source.rope_factor is not None:
            raise ValueError("--rope-factor (rope_factor=) applies to Meta's files only: config.json has the factor; "
                             "omit it")  # fmt: skip
        else:
            scheme = quantized.scheme_of(raw)
            config = known.Config.from_hf(raw, source.allow_fields)
            tensors = _match_hf(folder, known, config, scheme, read_index, headers_only)
            checkpoint = hf.Checkpoint(folder, raw, {}, tensors)
    if (path := folder / "generation_config.json").exists():
        checkpoint = replace(checkpoint, generation_config=hf.read_json(path))
        if not headers_only:  # `jaxlm info` shows the names itself
            log_unsupported(checkpoint.generation_config)
    return Resolved(known, config, checkpoint, None, {})


def _match_hf(
    folder: Path,
    family: Any,
    config: Any,
    scheme: quantized.Scheme | None,
    read_index: headers.ReadIndex,
    headers_only: bool,
) -> hf.MatchResult:
    """Matches the tensors of a checkpoint in Hugging Face's format."""
    try:
        index = read_index()
    except FileNotFoundError as error:
        # Some tools copy the config.json of the base into an adapter's folder, which is not a checkpoint.
        if not headers_only or (folder / ADAPTER_CONFIG).is_file():
            raise
        return hf.MatchResult([], [], [], no_weights=str(error))
    ignored, faults = family.IGNORED_PREFIXES, {}
    if scheme is not None:
        index, faults = quantized.join(scheme, index, ignored)
    return hf.match(family.PARAMS, config, index, ignored, faults, headers_only=headers_only)


def _match_meta(source: ModelSource, folder: Path, family: Any) -> tuple[Any, hf.Checkpoint]:
    """Reads the config and tensors of Meta's files. They always have a head. It is treated as tied if its bytes equal
    those of the embedding."""
    params_json = hf.read_json(folder / meta.PARAMS)
    shards = meta.read_shards(folder, params_json)
    raw = meta.hf_config(params_json, meta.vocabulary(shards, params_json), source.rope_factor, source.allow_fields)
    config = family.Config.from_hf(raw)
    table = {path: (family.PARAMS[path][0], name) for path, name in meta.NAMES.items()}
    joined, faults = meta.join(shards, config.D, config.H)
    tensors = {row.path: tensor for row, tensor in hf.match(table, config, joined, (), faults, meta.PARAMS).pairs}
    if hf.same(tensors["head"], tensors["embed"]):
        raw["tie_word_embeddings"] = True
        config = family.Config.from_hf(raw)
    pairs = [(row, tensors[row.path]) for row in params.tensors(family.PARAMS, config)]
    return config, hf.Checkpoint(folder, raw, {}, hf.MatchResult(pairs, [], []), "meta", params_json)


def with_tokenizer(resolved: Resolved, path: str | Path | None) -> Resolved:
    """Adds the tokenizer, from `path` or the checkpoint's folder, and the EOS ids."""
    checkpoint, folder = resolved.checkpoint, resolved.checkpoint.folder
    ends = loaded_generation_config(checkpoint)["eos_token_id"]
    is_meta = checkpoint.format == "meta"
    folders = [folder, folder.parent] if is_meta and folder.name == hub.ORIGINAL else [folder]
    folders = [path for path in folders if path.suffix != ".json"]  # headers_only: it may be a config file
    # Meta's files have no EOS ids, so those in the folder of the tokenizer are used.
    eos_of = (None, None) if is_meta and not ends else ({"eos_token_id": ends}, {})
    tokenizer = None
    for place in [_tokenizer_path(path)] if path else folders:
        if (tokenizer := Tokenizer.load(place, *eos_of)) is not None:
            checkpoint = replace(checkpoint, tokenizer=None if place == folder else place)
            break
    if checkpoint.adapter is not None and not path:
        tokenizer, checkpoint = adapters.choose_tokenizer(tokenizer, checkpoint, resolved.config, ends)
    if tokenizer is None and path:
        raise FileNotFoundError(
            f"{path} has no tokenizer: pass a folder with tokenizer.json, tokenizer.model or vocab.json"
        )
    if tokenizer is not None and is_meta:
        tokenizer, checkpoint = _with_eos_ids(tokenizer, checkpoint)
    return resolved._replace(
        checkpoint=checkpoint, tokenizer=tokenizer, generation_config=loaded_generation_config(checkpoint)
    )


def loaded_generation_config(checkpoint: hf.Checkpoint) -> dict[str, Any]:
    """Returns the contents of generation_config.json with the EOS ids of both files, either of which may be
    incomplete."""
    return {**checkpoint.generation_config, "eos_token_id": eos_ids(checkpoint.generation_config, checkpoint.config)}


def _tokenizer_path(path: str | Path) -> Path:
    """The folder of a tokenizer.json, because other files in the folder belong to it; other paths are unchanged."""
    path = Path(path).expanduser()
    return path.parent if path.name == "tokenizer.json" and path.is_file() else path


def _with_eos_ids(tokenizer: Tokenizer, checkpoint: hf.Checkpoint) -> tuple[Tokenizer, hf.Checkpoint]:
    """Adds BOS and EOS ids from the tokenizer to the configs of a checkpoint in Meta's format, which has none."""
    vocabulary = tokenizer.get_vocab()
    ends = sorted(tokenizer.eos_ids) or [vocabulary[token] for token in meta.ENDS if token in vocabulary]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    config, generation_config = {**checkpoint.config, **ids}, {**ids, **checkpoint.generation_config}
    return Tokenizer(tokenizer.hf, ends), replace(checkpoint, config=config, generation_config=generation_config)
