"""The files of small tokenizers of the kinds that published models have."""

import base64
import functools
import json
from pathlib import Path

from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import META_WORDS

TEXT = "the cat sat on the mat, the cat said hello to the world 日本 日本語"
PROSE = (
    "A tokenizer splits a text into words, numbers and spaces, and then joins the bytes of each.\n\n"
    "    It doesn't matter whether the parts were 1, 12 or 123 letters long: we'll read them, they're joined again.\n"
    "Während naïve Leute schlafen, 日本 日本語, привет; (the others) write code: if x == 10: return {y: z + 1}\n"
)


def byte_level(folder: Path, bos: bool = False, **config) -> Path:
    """A byte-level vocabulary of about 300 tokens, like Llama 3's (with bos) or Qwen's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [TEXT] * 9,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tok.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False), "<two words>"])
    if bos:
        tok.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return save(tok, folder, config)


def byte_fallback(folder: Path, prefix: bool = False, **config) -> Path:
    """A vocabulary of pieces and single bytes, like Gemma's or (with prefix) Llama 2's, with Gemma 3's ids of turns."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *"etaonisrhldcumfpgwybvkxjqz",
        "▁",
        "th",
        "the",
        "▁the",
        ",",
        ".",
        "!",
    ]
    pieces += ["\n", "▁▁", *(f"<unused{n}>" for n in range(200))]
    pieces[105:107] = "<start_of_turn>", "<end_of_turn>"
    pieces = [*pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tok.add_special_tokens([*pieces[:4], "<start_of_turn>", "<end_of_turn>"])
    tok.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return save(tok, folder, {"bos_token": "<bos>", "eos_token": "<eos>", **config})


def save(tok, folder: Path, config: dict) -> Path:
    tok.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_tiktoken(folder: Path, size: int = 400) -> Path:
    """A tokenizer.model in Meta's format, of this many tokens: the 256 bytes, then what merges make."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [c for c in letters if ord(c) < 256]
    rest = sorted(set(range(256)) - set(map(ord, printable)))
    byte_of = dict(zip(printable, map(ord, printable))) | dict(zip([c for c in letters if ord(c) > 255], rest))
    tok = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(META_WORDS), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    tok.train_from_iterator([PROSE], trainer)
    vocabulary = sorted(tok.get_vocab().items(), key=lambda item: item[1])
    assert len(vocabulary) == size
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {i}\n" for token, i in vocabulary]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder / "tokenizer.model"


@functools.cache
def load_once(folder: Path) -> Tokenizer:
    return load(folder)


def load(folder: Path, *configs: dict) -> Tokenizer:
    tok = Tokenizer.load(folder, *configs)
    assert tok is not None
    return tok


def write(kind: str, folder: Path) -> Path:
    """The files of a small tokenizer of one of SMALL."""
    if kind == "byte_level":
        return byte_level(folder, bos=True, eos_token="<|end|>")
    return byte_fallback(folder, prefix=kind.endswith("prefix"))


SMALL = ["byte_level", "byte_fallback", "byte_fallback_prefix"]
