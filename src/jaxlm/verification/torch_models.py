"""The references that run on PyTorch: transformers, and Meta's code. They run in float32 on the CPU, and again in
jaxlm's type if that is another, to measure the reference's own error in it.

Only this file and meta_code.py import torch. Each reference reads the checkpoint with its own loader. Files in the
other one's format are renamed and permuted here, with torch only.
"""

# pyright: reportMissingImports=false
# PyTorch is optional: types are checked with and without it.

import importlib.util
from typing import Any

import numpy as np

from jaxlm.loading.resolving import Resolved
from jaxlm.processing.tokenizer_files import import_transformers
from jaxlm.verification.meta_code import Meta, to_transformers
from jaxlm.verification.probes import CHATS, TEXTS, Probes, Trace

FULL, SLIDING = "full_attention", "sliding_attention"


class Transformers:
    """Hugging Face's model classes."""

    @staticmethod
    def require(subject: Resolved) -> None:
        if importlib.util.find_spec("torch") is None:
            raise ValueError(
                "transformers' models need PyTorch: pip install torch, or compare with a recording made where it is "
                "installed (jaxlm verify MODEL --record FILE there, --against FILE here)"
            )
        if subject.checkpoint.format == "gguf" and importlib.util.find_spec("gguf") is None:
            raise ValueError("transformers needs the package gguf to read GGUF files: pip install gguf")

    def __call__(self, subject: Resolved, probes: Probes, dtype: str) -> list[Trace]:
        import torch

        transformers = import_transformers()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        traces = []
        for name in dict.fromkeys(("float32", dtype)):
            model = self.load(subject, getattr(torch, name)).eval()
            traces.append(self.trace(model, subject, probes, name))
            del model
        traces[0].ids, traces[0].chats = _tokenized(subject)
        return traces

    def load(self, subject: Resolved, dtype: Any) -> Any:
        transformers = import_transformers()
        options = {"dtype": dtype, "attn_implementation": "eager", "trust_remote_code": False}
        format, folder = getattr(subject.checkpoint, "format", "hf"), subject.checkpoint.folder
        if format == "hf":
            return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        if format == "gguf":
            return transformers.AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file=folder.name, **options)
        config = transformers.LlamaConfig(**subject.checkpoint.config)
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
        model.load_state_dict({name: w.to(dtype) for name, w in to_transformers(subject)}, strict=True)
        return model

    def trace(self, model: Any, subject: Resolved, probes: Probes, dtype: str) -> Trace:
        import torch

        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(probes.tokens).long(),
                position_ids=torch.from_numpy(probes.pos).long(),
                attention_mask=_masks(model, probes.pos),
                use_cache=False,
                output_hidden_states=True,
                logits_to_keep=torch.from_numpy(probes.indices).long(),
            )
            # Otherwise generate would apply the checkpoint's generation_config: penalties change greedy text.
            model.generation_config = import_transformers().GenerationConfig()
            text = model.generate(
                torch.tensor([probes.prompt]),
                attention_mask=torch.ones(1, len(probes.prompt), dtype=torch.long),
                generation_config=import_transformers().GenerationConfig(max_new_tokens=probes.steps, do_sample=False),
                eos_token_id=None,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        radians, amplitude = _frequencies(model, subject)
        best = [score[0].float().topk(2).values for score in text.scores]
        return Trace(
            f"transformers {import_transformers().__version__}",
            dtype,
            radians,
            amplitude,
            [state[:, probes.indices].float().numpy() for state in out.hidden_states],
            out.logits.float().numpy(),
            text.sequences[0, len(probes.prompt) :].tolist(),
            [float(two[0] - two[1]) for two in best],
        )


def _masks(model: Any, pos: np.ndarray) -> Any:
    """Additive masks [B,1,T,T] by position. transformers' own go by index and treat a jump as a new document."""
    import torch

    distance = torch.from_numpy(pos[:, None, :, None] - pos[:, None, None, :])
    least = torch.finfo(model.dtype).min

    def mask(window: int | None) -> Any:
        visible = (distance >= 0) & (True if window is None else distance < window)
        return torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, least)

    text = model.config.get_text_config()
    if SLIDING not in (getattr(text, "layer_types", None) or ()):
        return mask(None)
    return {FULL: mask(None), SLIDING: mask(text.sliding_window)}


def _frequencies(model: Any, subject: Resolved) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The model's own rotary frequencies and scales, by field of jaxlm's config."""
    inner = getattr(model, "model", model)
    rotary = getattr(inner, "language_model", inner).rotary_emb
    kinds = {"rope": ""} if not hasattr(subject.config, "local_rope") else {"rope": FULL, "local_rope": SLIDING}
    radians, amplitude = {}, {}
    for ours, kind in kinds.items():
        before = f"{kind}_" if kind else ""
        if (buffer := getattr(rotary, f"{before}inv_freq", None)) is not None:
            radians[ours] = buffer.float().numpy()
            amplitude[ours] = float(getattr(rotary, f"{before}attention_scaling"))
    return radians, amplitude


def _tokenized(subject: Resolved) -> tuple[list[list[int]] | None, list[list[int]] | None]:
    """Token ids of TEXTS and CHATS by transformers' AutoTokenizer, if the folder has a tokenizer for it."""
    folder = subject.checkpoint.folder
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return None, None
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    if not tokenizer.chat_template:
        return ids, None
    prompts = [tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False) for chat in CHATS]
    return ids, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]


RUNS: dict[str, Any] = {"transformers": Transformers(), "meta": Meta()}
