"""Text to token ids and back: a checkpoint's own tokenizer, its chat template, and the ids that end an answer.

The tokenizer is transformers' own (attribute `hf`; it needs no PyTorch). What is added is what its users trip over: the
beginning-of-sequence token exactly once, every id that ends an answer, and template errors that say what is wrong.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.processing.chat_template import THINKING, plain, template_errors
from jaxlm.processing.tokenizer_files import (
    eos_ids,
    from_tokenizer_model,
    leading_id,
    load_tokenizer,
    naming_errors,
    read_json_if_present,
)

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """transformers' tokenizer of one checkpoint. Attributes not listed here are those of `hf`; calling it calls `hf`.

    Attributes:
        hf: the transformers tokenizer. What is to be changed (its `chat_template`, say) is set there.
        eos_ids: the ids that end a text by the word of the checkpoint's configuration files.
    """

    def __init__(self, hf: Any, eos_ids: Iterable[int] = ()):
        self.hf = hf
        self.eos_ids: frozenset[int] = frozenset(eos_ids)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        generation_config: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> "Tokenizer | None":
        """The tokenizer of a checkpoint folder, or of one tokenizer.model; None where the folder holds none.

        tokenizer.json is read as it stands; else tokenizer.model in the form of Meta's Llama 3; else whatever
        transformers' AutoTokenizer makes of tokenizer.model or vocab.json. Code in the folder never runs.

        Args:
            folder: a local folder; a chat template may lie in chat_template.jinja, tokenizer_config.json or
                chat_template.json. Of a tokenizer.json its folder, of a tokenizer.model the file is read alone.
            generation_config, config: contents of generation_config.json and config.json, for their `eos_token_id`.
                None reads the folder's.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: a file cannot be read; the message names it.
        """
        folder = Path(folder)
        if folder.is_file():
            if folder.name != "tokenizer.json":
                return cls(from_tokenizer_model(folder), eos_ids(generation_config or {}, config or {}))
            folder = folder.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return None
        files = ("generation_config.json", generation_config), ("config.json", config)
        ends = eos_ids(*(read_json_if_present(folder / name) if given is None else given for name, given in files))
        hf = load_tokenizer(folder)
        if not hf.chat_template:
            hf.chat_template = read_json_if_present(folder / "chat_template.json").get("chat_template")
        # A folder without tokenizer_config.json does not name these two, and its template would leave them out.
        if hf.bos_token is None and (bos := leading_id(hf)) is not None:
            hf.bos_token = hf.convert_ids_to_tokens(bos)
        if hf.eos_token is None and len(ends) == 1:
            hf.eos_token = hf.convert_ids_to_tokens(*ends)
        return cls(hf, ends)

    def __getattr__(self, name: str) -> Any:
        if name == "hf":  # not set yet: a copy or an unpickled object under construction
            raise AttributeError(name)
        return getattr(self.hf, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hf(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.hf)

    def __repr__(self) -> str:
        return f"Tokenizer({self.hf.name_or_path!r}, {len(self)} tokens, has_template={self.has_template})"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included (transformers' own `vocab_size` leaves those out)."""
        return max(self.hf.get_vocab().values()) + 1

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, None for a vocabulary that has no such token (Qwen)."""
        return self.hf.bos_token_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out by default."""
        return frozenset(token_id for token_id, token in self.hf.added_tokens_decoder.items() if token.special)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, sorted.

        The union of `eos_token_id` in generation_config.json and in config.json, the tokenizer's own, and the token
        with which the chat template closes an assistant's turn: files of one checkpoint often name different ones.
        """
        return self.stop_ids_beside(self.eos_ids)

    def stop_ids_beside(self, ids: Iterable[int]) -> tuple[int, ...]:
        """`stop_ids` with these in the place of what the configuration files say."""
        ends = {*ids, self.hf.eos_token_id, self._end_of_turn()}
        return tuple(sorted(token_id for token_id in ends if token_id is not None))

    def _end_of_turn(self) -> int | None:
        marker = "ananswer"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        try:
            after = self.render(turns, add_generation_prompt=False).partition(marker)[2].lstrip()
        except ValueError:  # no template, or one for messages of another shape: nothing to learn here
            return None
        added = sorted(self.hf.get_added_vocab().items(), key=lambda item: -len(item[0]))
        return next((token_id for token, token_id in added if after.startswith(token)), None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, special tokens that it spells out included.

        A tokenizer that adds BOS adds it only where the text does not begin with it already.
        """
        with naming_errors(f"the tokenizer {self.hf.name_or_path} cannot encode this text"):
            ids = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        doubled = add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self.bos_id == leading_id(self.hf)
        return ids[1:] if doubled else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids, with its spaces as they are. Ids outside the vocabulary have no text."""
        ids = [int(token_id) for token_id in ids]
        with naming_errors(f"the tokenizer {self.hf.name_or_path} cannot decode these ids"):
            return self.hf.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    @property
    def has_template(self) -> bool:
        return bool(self.hf.chat_template)

    def render(
        self,
        messages: Messages,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """The text of a conversation as the checkpoint's chat template writes it.

        Args:
            messages: dicts with "role" and "content" (a text, or a list of text parts), oldest first.
            tools: JSON schemas, or functions with type hints and a docstring.
            add_generation_prompt: open the assistant's turn at the end.
            template_args: variables of the template (`enable_thinking=False`); see `template_accepts`. Also
                `documents`, `chat_template` and `continue_final_message`, as of transformers' apply_chat_template.

        Raises:
            ValueError: there is no template, or a message holds what is no text (images are not supported yet), or the
                template refuses these messages or tools; the message is the template's own then.
        """
        if not self.has_template:
            raise ValueError(
                "this tokenizer has no chat template (a base model?): give a plain prompt, or use a model with one: "
                "Qwen/Qwen3-0.6B, google/gemma-3-1b-it, meta-llama/Llama-3.2-1B-Instruct"
            )
        from jaxlm.processing.template_rendering import render

        texts = plain(messages)
        with template_errors():
            return render(self.hf, texts, tools, add_generation_prompt=add_generation_prompt, **template_args)

    def chat(self, messages: Messages, *args: Any, **kwargs: Any) -> list[int]:
        """Token ids of `render(...)`, same arguments. BOS is there if the template writes it, never a second time."""
        return self.encode(self.render(messages, *args, **kwargs), add_special_tokens=False)

    def template_accepts(self, name: str) -> bool:
        """Whether the chat template reads a variable of this name: a template ignores arguments it does not know."""
        if not self.has_template:
            return False
        from jaxlm.processing.template_sandbox import variables

        with template_errors():
            return name in variables(self.hf.get_chat_template())

    @property
    def thinking(self) -> tuple[str, str] | None:
        """The tokens around a model's reasoning, ("<think>", "</think>"), if the vocabulary has them (Qwen3)."""
        return THINKING if set(THINKING) <= self.hf.get_added_vocab().keys() else None
