"""The tokenizer of a checkpoint: encoding, decoding, the chat template, and stop token ids.

`Tokenizer` wraps a transformers tokenizer (attribute `hf`; PyTorch is not needed). It adds a BOS token exactly once,
collects every EOS id of the checkpoint's files, and converts errors of tokenizers and templates to ValueError.

Threads may share a Tokenizer. transformers sets truncation, padding and the splitting of special tokens on the Rust
tokenizer before it encodes, and they stay set. A call with such options would change what other threads encode at the
same time, so it runs alone.
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from jaxlm.processing.chat_template import THINKING, template_errors
from jaxlm.processing.detokenizer import bytes_of_byte_level, bytes_of_fallback, is_byte_level
from jaxlm.processing.gguf_tokenizer import from_gguf
from jaxlm.processing.messages import ASSISTANT, json_arguments, near_role, normalize
from jaxlm.processing.shared_lock import SharedLock
from jaxlm.processing.tokenizer_files import (
    eos_ids,
    from_tokenizer_model,
    leading_id,
    load_tokenizer,
    naming_errors,
    read_json_if_present,
)
from jaxlm.processing.written import dropped

Messages = Sequence[Mapping[str, Any]]
# By transformers tokenizer, because several Tokenizers may have the same one, and locks cannot be pickled.
_locks: WeakKeyDictionary[Any, SharedLock] = WeakKeyDictionary()
_locks_change = threading.Lock()


def _after_fork() -> None:
    """Forgets locks that threads of the parent process may hold."""
    global _locks_change
    _locks_change = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class NoChatTemplate(ValueError):
    """The tokenizer has no chat template."""


class Tokenizer:
    """A transformers tokenizer with the stop token ids of its checkpoint. Other attributes, and calls, go to `hf`.

    Attributes:
        hf: The transformers tokenizer. Set attributes such as `chat_template` on it.
        eos_ids: The EOS ids in the checkpoint's configuration files.
        loaded_template: The chat template of its files.
        has_new_tokens: Whether tokens were added that its files do not have (`add_special_tokens`).
    """

    def __init__(self, hf: Any, eos_ids: Iterable[int] = ()):
        self.hf = hf
        self.eos_ids: frozenset[int] = frozenset(eos_ids)
        self.loaded_template: Any = hf.chat_template
        self.has_new_tokens: bool = False
        self._added_ids: frozenset[int] | None = None  # ids of added tokens, when they are known

    @classmethod
    def load(
        cls,
        folder: str | Path,
        generation_config: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> "Tokenizer | None":
        """Loads the tokenizer of a checkpoint folder, of a single tokenizer.model or of a GGUF file.

        The first of these files that exists is used: tokenizer.json, unchanged; tokenizer.model in the format of Meta's
        Llama 3; tokenizer.model (SentencePiece) or vocab.json, by transformers' AutoTokenizer. Code in the folder is
        never executed.

        Args:
            folder: A local folder. Its chat template is read from chat_template.jinja, tokenizer_config.json or
                chat_template.json. The path of a tokenizer.json selects its folder. The path of a tokenizer.model
                or of a GGUF file selects that file only.
            generation_config: Contents of generation_config.json, for its `eos_token_id`. None reads the file.
            config: Contents of config.json, for its `eos_token_id`. None reads the file.

        Returns:
            The tokenizer; None if the folder has none.

        Raises:
            FileNotFoundError: The folder or file does not exist.
            ValueError: A file cannot be read; the message has its name.
        """
        folder = Path(folder)
        if folder.is_file():
            if folder.suffix == ".gguf":
                found = from_gguf(folder)
                return found and cls(found[0], {*found[1], *eos_ids(generation_config or {}, config or {})})
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
        # Without tokenizer_config.json these two are not set, and the chat template would omit them.
        if hf.bos_token is None and (bos := leading_id(hf)) is not None:
            hf.bos_token = hf.convert_ids_to_tokens(bos)
        if hf.eos_token is None and len(ends) == 1:
            hf.eos_token = hf.convert_ids_to_tokens(*ends)
        return cls(hf, ends)

    def __getattr__(self, name: str) -> Any:
        if name == "hf":  # not set yet while the object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.hf, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock.exclusive():
            return self.hf(*args, **kwargs)

    @property
    def _lock(self) -> SharedLock:
        with _locks_change:
            return _locks.setdefault(self.hf, SharedLock())

    def __len__(self) -> int:
        return len(self.hf)

    def __repr__(self) -> str:
        return f"Tokenizer({self.hf.name_or_path!r}, {len(self)} tokens, has_template={self.has_template})"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. It counts added tokens, which transformers' `vocab_size` does not."""
        return max(self.hf.get_vocab().values()) + 1

    @property
    def bos_id(self) -> int | None:
        """The BOS id; None if the vocabulary has no BOS token (Qwen)."""
        return self.hf.bos_token_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which `decode` omits by default."""
        return frozenset(token_id for token_id, token in self.hf.added_tokens_decoder.items() if token.special)

    def add_special_tokens(self, tokens: Iterable[str]) -> None:
        """Adds special tokens that the tokenizer does not have, after its last id. A token of the vocabulary that is
        not special becomes so, and keeps its id.

        Raises:
            ValueError: The vocabulary has ids without a token, which the tokenizers library would give away twice.
        """
        from tokenizers import AddedToken

        added, size = self.hf.get_added_vocab(), self.vocab_size
        new = [token for token in tokens if token not in added]
        known = self.hf.get_vocab().keys()
        if not new:
            return
        with self._lock.exclusive():
            special = [AddedToken(token, special=True, normalized=False) for token in new]
            self.hf.add_tokens(special, special_tokens=True)
        self.has_new_tokens, self._added_ids = True, None
        ids = [self.hf.convert_tokens_to_ids(token) for token in new if token not in known]
        if ids != list(range(size, size + len(ids))):
            raise ValueError(f"tokens cannot be added to {self.hf.name_or_path}: some ids below {size:,} have no token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Stop token ids: every id that ends an answer, sorted.

        This is the union of `eos_token_id` in generation_config.json and config.json, the EOS token of the tokenizer,
        and the token after an assistant turn in the chat template. The files of a checkpoint often disagree.
        """
        return self.stop_ids_beside(self.eos_ids)

    def stop_ids_beside(self, ids: Iterable[int]) -> tuple[int, ...]:
        """`stop_ids` with `ids` instead of the EOS ids in the configuration files."""
        templates = self.hf.chat_template.values() if isinstance(self.hf.chat_template, dict) else [None]
        ends = {*ids, self.hf.eos_token_id, *map(self._end_of_turn, templates)}
        return tuple(sorted(token_id for token_id in ends if token_id is not None))

    def _end_of_turn(self, template: str | None) -> int | None:
        """The token that a chat template renders after an assistant turn; None if there is none."""
        marker = "ananswer"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        try:
            after = self.render(turns, add_generation_prompt=False, chat_template=template)
            after = after.partition(marker)[2].lstrip()
        except ValueError:  # no template, or one that cannot render these messages
            return None
        added = sorted(self.hf.get_added_vocab().items(), key=lambda item: -len(item[0]))
        return next((token_id for token, token_id in added if after.startswith(token)), None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encodes text. Special tokens in the text are recognized. BOS is not added if the text begins with it.

        Args:
            text: The text.
            add_special_tokens: Add the special tokens that the tokenizer adds to a text, such as BOS.
        """
        with naming_errors(f"the tokenizer {self.hf.name_or_path} cannot encode this text"), self._lock.shared():
            ids = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
            doubled = add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self.bos_id == leading_id(self.hf)
        return ids[1:] if doubled else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decodes token ids without cleaning up spaces. Ids outside the vocabulary are skipped.

        Args:
            ids: Token ids.
            skip_special: Omit special tokens.
        """
        ids = [int(token_id) for token_id in ids]
        with naming_errors(f"the tokenizer {self.hf.name_or_path} cannot decode these ids"):
            return self.hf.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def token_text(self, token_id: int) -> str:
        """The text of one token on its own: `token_bytes` as UTF-8. Bytes that are part of a character become U+FFFD.

        Args:
            token_id: Token id.
        """
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text. Those of the ids of a text, joined, are the text as UTF-8.

        The space that some tokenizers add before a text is among the bytes of its first token. A tokenizer may
        normalize a text before it encodes it. A special token is written out: b"<|im_end|>".

        Args:
            token_id: Token id. An id that has no token, such as padding of the vocabulary, has no bytes.
        """
        token_id = int(token_id)
        try:
            token = self.hf.convert_ids_to_tokens(token_id)
        except (IndexError, OverflowError):
            token = None
        if token is None:
            return b""
        if is_byte_level(self.hf):
            if self._added_ids is None:
                self._added_ids = frozenset(self.hf.added_tokens_decoder)
            return token.encode() if token_id in self._added_ids else bytes_of_byte_level(token)
        raw = bytes_of_fallback(token)
        if raw is not None:
            return raw
        # Behind itself, because decoders change the first token of a text: they strip its space.
        alone, twice = (self.decode([token_id] * n, skip_special=False) for n in (1, 2))
        return twice[len(alone) :].encode()

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.hf.chat_template)

    def render(
        self,
        messages: Messages,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """Renders a conversation with the checkpoint's chat template.

        Args:
            messages: Dicts with "role" and "content" (text, or a list of text parts), oldest first. Other forms are
                converted (jaxlm.processing.messages).
            tools: JSON schemas, or functions with type hints and a docstring.
            add_generation_prompt: Append the beginning of an assistant turn.
            template_args: Variables of the template (`enable_thinking=False`); see `template_accepts`. Also
                `documents`, `chat_template` and `continue_final_message`, as in transformers' apply_chat_template.

        Raises:
            ValueError: There is no template, a message has content that is not text (images are not supported yet), or
                the template raises an error, whose message is included.
        """
        if not self.has_template:
            raise NoChatTemplate(
                "this tokenizer has no chat template (it may belong to a base model): pass a plain prompt, or use a "
                "model with a template: Qwen/Qwen3-0.6B, google/gemma-3-1b-it, meta-llama/Llama-3.2-1B-Instruct"
            )
        from jaxlm.processing.template_rendering import render

        texts = self._normalized(messages, tools, template_args)
        template_args["add_generation_prompt"] = add_generation_prompt
        try:
            with template_errors():
                return render(self.hf, texts, tools, **template_args)
        except ValueError as error:
            # Some templates (DeepSeek's) join the arguments of tool calls to a text, and so need them as JSON.
            if not any(message.get("tool_calls") for message in texts):
                raise
            try:
                with template_errors():
                    return render(self.hf, json_arguments(texts), tools, **template_args)
            except ValueError:
                raise error from None

    def _normalized(self, messages: Messages, tools: list[Any] | None, template_args: Mapping[str, Any]) -> list[dict]:
        with template_errors():
            template = self.hf.get_chat_template(chat_template=template_args.get("chat_template"), tools=tools)
        return normalize(messages, template)

    def prompt(
        self,
        messages: Messages,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """Renders a conversation as a prompt. The arguments are those of `render`.

        Raises:
            ValueError: As in `render`, or the template does not write a message of the user, the system or a tool.
        """
        render = partial(self.render, tools=tools, add_generation_prompt=add_generation_prompt, **template_args)
        text = render(messages)
        texts = self._normalized(messages, tools, template_args)
        i = dropped(render, texts, text, besides=ASSISTANT)
        if i is not None:
            role = texts[i]["role"]
            why = f"it has no place for the role {role!r}{near_role(role)}"
            raise ValueError(f"the chat template does not write message {i + 1}: {why}")
        return text

    def chat(self, messages: Messages, *args: Any, **kwargs: Any) -> list[int]:
        """Renders a prompt as token ids. The arguments are those of `render`. Only the template adds BOS."""
        return self.encode(self.prompt(messages, *args, **kwargs), add_special_tokens=False)

    def template_accepts(self, name: str) -> bool:
        """Whether the chat template, or one of several, reads a variable of this name. Templates ignore unknown
        arguments."""
        if not self.has_template:
            return False
        from jaxlm.processing.template_sandbox import variables

        found = self.hf.chat_template
        templates = found.values() if isinstance(found, dict) else [found]
        with template_errors():
            return any(name in variables(template) for template in templates)

    @property
    def thinking(self) -> tuple[str, str] | None:
        """The tags around reasoning, ("<think>", "</think>"); None if the vocabulary does not have them."""
        return THINKING if set(THINKING) <= self.hf.get_added_vocab().keys() else None
