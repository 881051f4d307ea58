"""ModelSource: the checkpoint that a model is loaded from. `load` and the commands take its fields or one."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelSource:
    """Which checkpoint to read, and how.

    Attributes:
        name: Hugging Face hub id (`org/name`), local folder or GGUF file (`org/name:file.gguf` on the hub). A LoRA
            adapter is loaded together with the base model in its adapter_config.json.
        adapter: hub id or folder of a LoRA adapter in PEFT's format, applied to `name`.
        format: "hf", or "meta" for Meta's original Llama 3 files (params.json, consolidated.*.pth; `original/` in a hub
            repository). None: the format of the folder; Hugging Face's if it has both.
        tokenizer: folder or tokenizer.model, if the tokenizer is not in the checkpoint's folder.
        rope_factor: RoPE scaling factor of Meta's files, which params.json does not state: 8 for Llama 3.1 and 3.3, 32
            for 3.2. Not needed for published shapes.
        revision: branch, tag or commit of a hub id. None: `main`.
        token: hub access token. None: HF_TOKEN, or the token saved by `hf auth login`.
        offline: use the local cache only.
        allow_fields: names of config fields that are refused, to ignore because they do not change the result.
    """

    name: str | Path
    adapter: str | Path | None = None
    format: str | None = None
    tokenizer: str | Path | None = None
    rope_factor: float | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    allow_fields: Collection[str] = ()

    @classmethod
    def of(cls, name: "str | Path | ModelSource", **fields: Any) -> "ModelSource":
        """A source from a name and fields. Fields that are set override those of a `name` that is a ModelSource."""
        if not isinstance(name, ModelSource):
            return cls(name, **fields)
        return replace(name, **{key: value for key, value in fields.items() if value})

    def of_adapter(self) -> "ModelSource":
        """The source of `adapter` itself. `revision` is the model's, so it does not apply."""
        assert self.adapter is not None
        return replace(self, name=self.adapter, adapter=None, revision=None)

    def __str__(self) -> str:
        return str(self.name) + (f" with {self.adapter}" if self.adapter else "")
