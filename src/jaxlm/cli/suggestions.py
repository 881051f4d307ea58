"""Suggestions for unknown commands and flags: former names, names in other tools, then the closest spelling."""

import difflib

from jaxlm.cli.flags import Flag

# Commands, and their names in other tools.
COMMANDS = {
    "generate": "run complete completion completions gen infer inference predict prompt",
    "chat": "talk interactive conversation repl",
    "info": "show inspect summary describe list",
    "verify": "compare test validate",
    "export": "convert save dump",
    "train": "pretrain pre-train training",
    "finetune": "fine-tune ft sft lora tune qlora",
    "fuse": "merge merge-and-unload merge-adapter",
    "eval": "evaluate evaluation perplexity ppl lm-eval",
    "tokenizer": "tokenize train-tokenizer tokenizers",
    "--help": "help commands",
    "--version": "version",
}

# Flags (some with a value), their former names, and their names in transformers, TRL, PEFT, vLLM, llama.cpp, mlx-lm,
# litgpt, torchtune and lm-eval. A name may be in several rows: the first flag that the command has is suggested. The
# tables of YAML keys in training/config.py are also searched, so their entries are not repeated here.
FLAGS = {
    # Models
    "--method lora": "lora use-lora use-peft qlora",
    "--model": "model-path model-id model-name model-dir hf-repo hf-model pretrained pretrained-model-name-or-path "
    "checkpoint checkpoint-dir ckpt ckpt-dir model-url repo-id",
    "--adapter": "adapter-path adapter-name-or-path adapter-name lora lora-path lora-adapter lora-modules peft "
    "peft-model peft-model-id resume-adapter-file",
    "--dtype": "weight-dtype compute-dtype model-dtype data-type",
    "--dtype bfloat16": "bf16 bfloat16",
    "--dtype float16": "fp16 half float16",
    "--dtype float32": "fp32 float32",
    "--format": "load-format checkpoint-format output-format",
    "--tokenizer": "tokenizer-path tokenizer-name-or-path tokenizer-dir tokenizer-model",
    "--revision": "branch commit model-revision hf-revision hub-revision",
    "--token": "hf-token use-auth-token auth-token access-token hub-token",
    "--offline": "local-files-only no-download",
    "--rope-factor": "rope-scaling rope-scale",
    "--mesh model=N": "tensor-parallel-size tensor-parallel tp tp-size tensor-split tensor-model-parallel-size",
    "--mesh data=N": "data-parallel-size data-parallel dp dp-size fsdp",
    "--mesh": "sharding mesh-shape device-mesh parallelism",
    # Processes
    "--coordinator": "master-addr dist-init-addr coordinator-address init-method",
    "--num-processes": "nnodes num-nodes world-size nproc nproc-per-node num-machines",
    "--process-id": "node-rank process-index machine-rank",
    "--debug": "verbose v traceback log-level",
    # Sampling
    "--max-tokens": "max-new-tokens max-length n-predict n predict num-predict max-completion-tokens max-gen-len "
    "max-gen-toks max-output-tokens num-tokens new-tokens max-generated-tokens length",
    "--temperature": "temp t temperatur",
    "--top-k": "topk k",
    "--top-p": "topp nucleus nucleus-p",
    "--min-p": "minp",
    "--repetition-penalty": "repeat-penalty rep-penalty rep-pen",
    "--presence-penalty": "presence-pen pres-penalty",
    "--frequency-penalty": "frequency-pen freq-penalty",
    "--stop": "stop-strings stop-sequences stop-words stop-string reverse-prompt r until",
    "--stop-token-ids": "eos-token-id stop-tokens extra-eos-token stop-ids eos-id",
    "--seed": "random-seed rng-seed manual-seed data-seed",
    "--logprobs": "top-logprobs n-probs num-logprobs output-scores return-logprobs",
    # Prompts
    "--system": "system-prompt system-message sys sys-prompt",
    "--prompts": "prompt-file prompts-file input-file file f prompt-path batch-file",
    "--batch-size": "batch num-parallel parallel max-num-seqs np slots",
    "--raw": "ignore-chat-template no-chat-template no-conversation no-cnv disable-chat-template completion",
    "--no-think": "disable-thinking no-thinking reasoning-budget enable-thinking",
    "--template-arg": "chat-template-kwargs chat-template-config chat-template-args template-args",
    "--json": "json-output output-json as-json",
    # Training
    "--out": "output output-path save-dir save-path o run-dir outdir target work-dir",
    "--shape": "config-json model-config architecture arch",
    "--config": "config-file yaml",
    "--method": "fine-tune-type training-type tuning-type",
    "--method full": "full full-finetune",
    "--steps": "iters num-iters train-iters num-steps iterations total-steps",
    "--epochs": "n-epochs epoch",
    "--batch": "per-device-eval-batch-size total-batch-size batchsize",
    "--length": "max-seq-len seq-length sequence-length ctx-size c n-ctx max-model-len cutoff-len",
    "--accumulate": "grad-accumulation-steps gradient-accumulation accumulate-grad-batches grad-accum-steps "
    "grad-accum accumulation-steps",
    "--remat full": "gradient-checkpointing grad-checkpoint activation-checkpointing enable-activation-checkpointing "
    "checkpoint-activations",
    "--remat": "remat-policy rematerialization recompute",
    "--log-every": "log-steps steps-per-report log-every-n-steps",
    "--save-every": "save-interval save-every-n-steps checkpoint-interval",
    "--eval-every": "steps-per-eval val-interval evaluation-steps",
    "--eval-batches": "val-batches max-eval-batches",
    "--keep": "max-to-keep keep-checkpoints",
    "--samples": "sample-prompts",
    "--report": "logger wandb tensorboard",
    "--resume": "restore auto-resume",
    "--z-loss": "z-loss-coef z-loss-weight z-loss-multiplier",
    "--dry-run": "plan",
    "--data.train": "training-data train-files data dataset-path data-path data-dir text-file",
    "--data.valid": "valid-data eval-dataset validation-data val-data eval-file test-file valid-file",
    "--dataset": "hf-dataset dataset-id",
    "--data.config": "dataset-config",
    "--data.format": "form data-format dataset-format dataset-type",
    "--data.train-on": "learn mask-prompt",
    "--data.text-field": "text-column text-key text-feature",
    "--data.packing": "packing pack",
    "--optimizer.name": "optimizer optimizer-type optimizer-name",
    "--optimizer.lr": "lr max-lr peak-lr learning-rate-max",
    "--optimizer.schedule": "lr-schedule scheduler lr-decay-style schedule-type",
    "--optimizer.warmup": "lr-warmup-steps num-warmup-steps warmup-fraction",
    "--optimizer.final": "min-lr min-lr-ratio lr-end final-lr",
    "--optimizer.b1": "beta-1 adam-b1",
    "--optimizer.b2": "beta-2 adam-b2",
    "--optimizer.eps": "adam-eps epsilon",
    "--optimizer.clip": "max-norm gradient-clip clip-grad clip-grad-norm gradient-clip-val clip-norm",
    "--lora.rank": "lora-dim",
    "--lora.alpha": "lora-scale lora.scale",
    "--lora.targets": "lora-keys lora-target lora-modules lora.target-modules",
    "--lora.rslora": "lora.use-rslora",
    # Evaluation
    "--data-format": "form dataset-format format-of-data",
    "--train-on": "learn score-on",
    "--tasks": "task",
    "--shots": "num-fewshot few-shot fewshot n-shot",
    "--tasks-folder": "include-path",
    "--chat": "apply-chat-template chat-template",
    "--limit": "num-samples max-samples",
    "--stride": "sliding-window",
    # Export, verification and tokenizers
    "--force": "overwrite f exist-ok y yes",
    "--against": "reference ref compare-to",
    "--vocab-size": "vocab vocabulary-size n-vocab",
    "--kind": "model-type type algorithm",
    "--special": "special-tokens added-tokens user-defined-symbols additional-special-tokens",
}

# Names of other tools without a corresponding flag, and what to do instead.
NOTES = {
    "the prompt is an argument without a flag: jaxlm generate PROMPT": "prompt p text input",
    "the KV cache grows as needed, up to the context length of the model": "ctx-size c n-ctx num-ctx max-model-len "
    "max-kv-size kv-cache-size context-length max-context-length max-seq-len max-seq-length context-size",
    "--temperature 0 is greedy decoding, above 0 it samples": "do-sample greedy sample no-sample",
    "beam search is not supported; sampling flags are --temperature, --top-k, --top-p, --min-p": "num-beams beam-size "
    "beam-width num-beam-groups",
    "JAX selects the device; JAX_PLATFORMS=cpu, cuda or tpu overrides it": "device device-map n-gpu-layers ngl "
    "gpu-layers cpu gpu cuda tpu accelerator main-gpu use-cpu",
    "jaxlm never runs code from checkpoints; omit this flag": "trust-remote-code",
    "set the environment variable HF_HOME to change the cache folder": "cache-dir download-dir hf-home cache-folder",
    "jaxlm streams by default; --json prints one object at the end": "stream no-stream streaming",
    "pass the folder to write after the model: jaxlm export MODEL OUT": "out output-dir output output-path save-path o",
}


def unknown_command(word: str, commands: list[str]) -> str:
    """The error message for an unknown command."""
    guess = lookup(COMMANDS, normalized(word), {*commands, "--help", "--version"})
    guess = guess or closest(normalized(word), {name: name for name in commands})
    if guess:
        return f"unknown command {word}: did you mean {guess}?"
    return f"unknown command {word}. Commands: {', '.join(commands)} (jaxlm --help)"


def unknown_flag(name: str, command: str, flags: list[Flag]) -> str:
    """The error message for an unknown flag of a command."""
    names = names_of(flags)
    word = normalized(name)
    if guess := translation(name, flags):
        return f"unknown flag {name}: did you mean {guess}?"
    if note := lookup(NOTES, word):
        return f"unknown flag {name}: {note}"
    if guess := last_part(word, names) or closest(word, {normalized(n): n for n in names}):
        return f"unknown flag {name}: did you mean {guess}?"
    return f"unknown flag {name} (jaxlm {command} --help lists the flags)"


def names_of(flags: list[Flag]) -> list[str]:
    """All names of the flags, without positional arguments."""
    return [name for flag in flags if not flag.positional for name in (flag.name, *flag.aliases)]


def translation(name: str, flags: list[Flag]) -> str | None:
    """The flag for a former name or a name in another tool; None if there is none."""
    word, names = normalized(name), names_of(flags)
    return exact(word, names) or lookup(FLAGS, word, set(names)) or of_training(word, names)


def normalized(word: str) -> str:
    """`max-new-tokens` for --max_new_tokens, in American spelling."""
    return word.lstrip("-").replace("_", "-").lower().replace("optimiser", "optimizer")


def exact(word: str, names: list[str]) -> str | None:
    """The flag of this name, if it was typed with one dash, in capitals or in British spelling."""
    return f"--{word}" if f"--{word}" in names else None


def lookup(table: dict[str, str], word: str, allowed: set[str] | None = None) -> str | None:
    """The first row with this word whose name is allowed."""
    rows = (row for row, words in table.items() if word in words.split())
    return next((row for row in rows if allowed is None or row.partition(" ")[0] in allowed), None)


def of_training(word: str, names: list[str]) -> str | None:
    """The flag for a name in the tables of YAML keys."""
    from jaxlm.training import config

    tables = (getattr(config, name, {}) for name in ("RENAMED_FIELDS", "OTHER_TOOLS"))
    fields = (str(table.get(word.replace("-", "_"))) for table in tables)
    return next((flag for field in fields if (flag := f"--{field}".replace("_", "-")) in names), None)


def last_part(word: str, names: list[str]) -> str | None:
    """The flag whose last part is this word (`--optimizer.weight-decay` for weight-decay), if there is only one."""
    found = [name for name in names if "." in name and name.rpartition(".")[2] == word.rpartition(".")[2]]
    return found[0] if len(found) == 1 else None


def closest(word: str, names: dict[str, str]) -> str | None:
    """The value of the key with the closest spelling."""
    beginning = [name for name in names if len(word) >= 3 and name.startswith(word)]
    close = beginning[:1] or difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return names[close[0]] if close else None
