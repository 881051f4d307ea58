"""The same training run with torch and transformers: `python benchmarks/train_torch.py FOLDER`.

FOLDER holds a Hugging Face model, batches.npz (tokens, targets, pos, loss_mask [steps,B,T]) and run.json (optimizer
settings, the learning rate of each step, and what to evaluate). Prints one JSON line: losses, seconds per step,
validation losses. If a row holds several documents, torch gets the attention mask that keeps them apart.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy


def nats(model, tokens, targets, pos, loss_mask):
    """The sum of nats over the loss mask, and its number of tokens."""
    begins = pos == 0
    if begins.sum() == len(pos):
        logits = model(input_ids=tokens, use_cache=False).logits
    else:
        segment = begins.cumsum(1)
        seen = (segment[:, :, None] == segment[:, None, :]).tril()[:, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        logits = model(input_ids=tokens, position_ids=pos.clamp(min=0), attention_mask=mask, use_cache=False).logits
    each = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    counts = loss_mask.flatten().float()
    return (each * counts).sum(), counts.sum()


def tensors(batches, i):
    return (torch.from_numpy(batches[name][i]) for name in ("tokens", "targets", "pos", "loss_mask"))


def evaluate(model, batches):
    with torch.no_grad():
        sums = [nats(model, *tensors(batches, i)) for i in range(len(batches["tokens"]))]
    return (sum(s for s, _ in sums) / sum(c for _, c in sums)).item()


def main(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    read = {name: np.load(folder / f"{name}.npz") for name in ("batches", *run["evaluate"])}
    batches = {name: {key: _long(part[key]) for key in part.files} for name, part in read.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if run.get("rank"):
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=run["rank"], lora_alpha=run["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if run["compile"]:
        model.forward = torch.compile(model.forward)
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    flat = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": wide, "weight_decay": run["weight_decay"]}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(run["b1"], run["b2"]), eps=run["eps"], fused=True)
    losses, seconds, valid = [], [], []
    for i, rate in enumerate(run["rates"]):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, count = nats(model, *tensors(batches["batches"], i))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
        seconds.append(time.perf_counter() - begin)
        if (i + 1) in run["at"]:
            valid.append([evaluate(model, batches[name]) for name in run["evaluate"]])
    print(json.dumps({"losses": losses, "seconds": seconds, "valid": valid, "torch": torch.__version__}))


def _long(a: np.ndarray) -> np.ndarray:
    return a.astype(np.int64) if a.dtype == np.int32 else a


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(Path(sys.argv[1]))
