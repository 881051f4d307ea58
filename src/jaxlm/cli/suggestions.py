"""Suggestions for unknown commands, flags and YAML keys: former names, names in other tools, then close spellings."""

import dataclasses
import difflib
import re
from collections.abc import Collection
from typing import Literal, get_args, get_origin

from jaxlm.cli.flags import Flag
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.training.config import current_name

# Commands, and their names in other tools.
COMMANDS = {
    "generate": "run complete completion completions gen infer inference predict prompt",
    "chat": "talk interactive conversation repl",
    "serve": "server api openai api-server",
    "info": "show inspect summary describe list",
    "verify": "compare test validate",
    "export": "convert save dump",
    "train": "pretrain pre-train training",
    "finetune": "fine-tune ft sft lora tune qlora",
    "fuse": "merge merge-and-unload merge-adapter",
    "eval": "evaluate evaluation perplexity ppl lm-eval",
    "tokenizer": "tokenize train-tokenizer tokenizers",
    "check": "compat compatibility matrix hardware devices",
    "--help": "help commands",
    "--version": "version",
}

# Flags (some with a value), their former names, and their names in transformers, TRL, PEFT, vLLM, llama.cpp, mlx-lm,
# litgpt, torchtune, axolotl, nanoGPT and lm-eval. A name may be in several rows: the first flag that the command has is
# suggested. Keys of a YAML file are flags without dashes.
FLAGS = {
    # Models
    "--method lora": "lora use-lora use-peft qlora",
    "--model": "model-path model-id model-name model-dir hf-repo hf-model pretrained pretrained-model-name-or-path "
    "checkpoint checkpoint-dir ckpt ckpt-dir model-url repo-id model-name-or-path base-model",
    "--adapter": "adapter-path adapter-name-or-path adapter-name lora lora-path lora-adapter lora-modules peft "
    "peft-model peft-model-id resume-adapter-file",
    "--dtype bfloat16": "bf16 bfloat16",
    "--dtype float16": "fp16 half float16",
    "--dtype float32": "fp32 float32",
    "--dtype": "fp16 weight-dtype compute-dtype model-dtype data-type tf32 precision torch-dtype",
    "--type": "outtype out-type ftype quant quantize quantization qtype",
    "--quantize int4": "load-in-4bit load-4bit use-4bit",
    "--quantize int8": "load-in-8bit load-8bit",
    "--quantize": "quant quantization quantization-config bits q-bits",
    "--chat-template": "template chat-template-path chat-template-jinja chat-format conversation-template",
    "--format": "load-format checkpoint-format output-format",
    "--tokenizer": "tokenizer-path tokenizer-name-or-path tokenizer-dir tokenizer-model tokenizer-name",
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
    "--slots": "max-num-seqs parallel np batch-size max-batch-size",
    "--max-length": "max-model-len ctx-size n-ctx context-length max-seq-len",
    "--api-key-file": "api-key",
    "--n": "num-return-sequences best-of num-samples",
    "--json-schema": "schema json-schema-file guided-json response-format",
    "--regex": "guided-regex pattern",
    "--grammar": "guided-grammar grammar-file lark",
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
    "--out": "output output-path save-dir save-path o run-dir outdir target work-dir output-dir out-dir",
    "--shape": "config-json model-config architecture arch config-name",
    "--config": "config-file yaml",
    "--method": "fine-tune-type training-type tuning-type",
    "--method full": "full full-finetune",
    "--steps": "iters num-iters train-iters num-steps iterations total-steps max-steps max-iters",
    "--epochs": "n-epochs epoch num-epochs num-train-epochs",
    "--batch": "per-device-eval-batch-size total-batch-size batchsize batch-size train-batch-size micro-batch-size "
    "global-batch-size per-device-train-batch-size",
    "--length": "max-seq-len seq-length sequence-length ctx-size c n-ctx max-model-len cutoff-len max-seq-length "
    "max-length block-size sequence-len seq-len context-length",
    "--accumulate": "grad-accumulation-steps gradient-accumulation accumulate-grad-batches grad-accum-steps "
    "grad-accum accumulation-steps gradient-accumulation-steps",
    "--weight-dtype": "param-dtype master-dtype master-weights-dtype training.dtype weights-dtype",
    "--grad-dtype": "gradient-dtype reduce-dtype mixed-precision-reduce grad-reduce-dtype accumulate-dtype",
    "--optimizer.moment-dtype": "mu-dtype nu-dtype optimizer.mu-dtype optimizer-dtype moment-dtype "
    "optimizer-state-dtype optim-state-dtype optimizer.dtype",
    "--remat full": "gradient-checkpointing grad-checkpoint activation-checkpointing enable-activation-checkpointing "
    "checkpoint-activations",
    "--remat": "remat-policy rematerialization recompute",
    "--log-every": "log-steps steps-per-report log-every-n-steps logging-steps log-interval",
    "--save-every": "save-interval save-every-n-steps checkpoint-interval save-steps",
    "--eval-every": "steps-per-eval val-interval evaluation-steps eval-steps eval-interval",
    "--eval-batches": "val-batches max-eval-batches eval-iters",
    "--keep": "max-to-keep keep-checkpoints save-total-limit",
    "--samples": "sample-prompts",
    "--data.streaming": "streaming streaming-dataset stream-dataset",
    "--data.shuffle-buffer": "shuffle-buffer shuffle-buffer-size buffer-size",
    "--report": "logger wandb tensorboard report-to",
    "--resume": "restore auto-resume overwrite-output-dir resume-from-checkpoint",
    "--z-loss": "z-loss-coef z-loss-weight z-loss-multiplier",
    "--dry-run": "plan",
    "--data.train": "training-data train-files data dataset-path data-path data-dir text-file train-file train-data",
    "--data.valid": "valid-data eval-dataset validation-data val-data eval-file test-file valid-file validation-file",
    "--data.valid-split": "val-set-size validation-split valid-size val-split val-size test-size test-split-fraction "
    "validation-split-percentage validation-size",
    "--dataset": "hf-dataset dataset-id dataset-name",
    "--data.config": "dataset-config dataset-config-name",
    "--data.format": "form data-format dataset-format dataset-type",
    "--data.train-on": "learn mask-prompt assistant-only-loss completion-only-loss train-on-inputs",
    "--data.text-field": "text-column text-key text-feature dataset-text-field",
    "--data.packing": "packing pack sample-packing",
    "--optimizer.name": "optimizer optimizer-type optimizer-name optim",
    "--optimizer.lr": "lr max-lr peak-lr learning-rate-max learning-rate",
    "--optimizer.schedule": "lr-schedule scheduler lr-decay-style schedule-type lr-scheduler-type lr-scheduler",
    "--optimizer.warmup": "lr-warmup-steps num-warmup-steps warmup-fraction warmup-steps warmup-ratio warmup-iters",
    "--optimizer.final": "min-lr min-lr-ratio lr-end final-lr",
    "--optimizer.b1": "beta-1 adam-b1 adam-beta1 beta1",
    "--optimizer.b2": "beta-2 adam-b2 adam-beta2 beta2",
    "--optimizer.eps": "adam-eps epsilon adam-epsilon",
    "--optimizer.clip": "max-norm gradient-clip clip-grad clip-grad-norm gradient-clip-val clip-norm max-grad-norm "
    "grad-clip gradient-clipping",
    "--lora.rank": "lora-dim lora-r r lora-rank",
    "--lora.alpha": "lora-scale lora.scale lora-alpha",
    "--lora.targets": "lora-keys lora-target lora-modules lora.target-modules target-modules lora-target-modules",
    "--lora.rslora": "lora.use-rslora use-rslora",
    "--lora.dropout": "lora-dropout",
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

# Names of other tools without a corresponding flag: what to do instead, the commands that it is for, and the names.
SAMPLING_NOTES = [
    ("--temperature 0 is greedy decoding, above 0 it samples", "generate chat", "do-sample greedy sample no-sample"),
    ("beam search is not supported; sampling flags are --temperature, --top-k, --top-p, --min-p", "generate chat",
     "num-beams beam-size beam-width num-beam-groups use-beam-search length-penalty diversity-penalty early-stopping"),
    ("not supported; sampling flags are --temperature, --top-k, --top-p, --min-p", "generate chat", "typical-p "
     "no-repeat-ngram-size penalty-alpha epsilon-cutoff eta-cutoff mirostat min-tokens min-length min-new-tokens"),
    ("--n is the number of answers to each prompt", "generate", "n num-return-sequences best-of"),
    ("sampling parameters are flags of their own, such as --max-tokens and --temperature", "generate chat",
     "sampling-params generation-config generation-kwargs gen-kwargs"),
]  # fmt: skip
NOTES = [
    *SAMPLING_NOTES,
    ("the prompt is an argument without a flag: jaxlm generate PROMPT", "generate", "prompt p text input"),
    ("the KV cache grows as needed, up to the context length of the model", "generate chat eval",
     "ctx-size c n-ctx num-ctx max-model-len max-kv-size kv-cache-size context-length max-context-length max-seq-len "
     "max-seq-length context-size"),
    ("JAX selects the device; JAX_PLATFORMS=cpu, cuda or tpu overrides it", "", "device device-map n-gpu-layers ngl "
     "gpu-layers cpu gpu cuda tpu accelerator main-gpu use-cpu"),
    ("jaxlm never runs code from checkpoints; omit this flag", "", "trust-remote-code"),
    ("set the environment variable HF_HOME to change the cache folder", "", "cache-dir download-dir hf-home "
     "cache-folder"),
    ("jaxlm streams by default; --json prints one object at the end", "generate chat", "stream no-stream streaming"),
    ("weights follow the names: --data.train a.jsonl=0.7 b.jsonl=0.3", "train finetune", "interleave-probs "
     "interleave-probabilities data-weights dataset-weights mixing-weights train-weights data-mix dataset-mixer"),
    ("pass the folder to write after the model: jaxlm export MODEL OUT", "export", "out output-dir output output-path "
     "save-path o"),
]  # fmt: skip

# Names above that data have too. Fields of a prompt with these names are not sampling parameters.
DATA_FIELDS = {"length", "num-tokens", "predict", "sample", "greedy", "until", "k", "r", "t"}


def unknown_command(word: str, commands: list[str]) -> str:
    """The error message for an unknown command."""
    guess = lookup(COMMANDS, normalized(word), {*commands, "--help", "--version"})
    guess = guess or closest(normalized(word), {name: name for name in commands})
    if guess:
        return f"unknown command {word}: did you mean {guess}?"
    return f"unknown command {word}. Commands: {', '.join(commands)} (jaxlm --help)"


def unknown_flag(name: str, command: str, flags: list[Flag]) -> str:
    """The error message for an unknown flag of a command."""
    flag, note = suggestion(name, command, flags)
    if flag:
        return f"unknown flag {name}: did you mean {flag}?"
    return f"unknown flag {name}: {note}" if note else f"unknown flag {name} (jaxlm {command} --help lists the flags)"


def unknown_key(name: str, command: str, flags: list[Flag]) -> str:
    """The error message for an unknown key of a YAML file (`lora.r`)."""
    if (new := current_name(name)) != name:
        return f"{name} is now {new}"
    flag, note = suggestion(name, command, flags)
    if flag:
        key, _, value = flag.removeprefix("--").replace("-", "_").partition(" ")
        return f"unknown key {name}: did you mean {key}{value and f': {value}'}?"
    return f"unknown key {name}: {note or f'jaxlm {command} --help lists the fields'}"


def unknown_option(name: str, flags: list[Flag]) -> str:
    """The error message for an unknown name behind /set of a chat, whose `flags` are given."""
    names = {f"--{field.name.replace('_', '-')}": field.name for field in dataclasses.fields(SamplingParams)}
    flag, note = suggestion(name, "chat", flags)
    if flag and flag in names:
        return f"/set {name}: did you mean {names[flag]}?"
    if flag == "--system":
        return f"/set {name}: the system message is set by /system TEXT"
    if flag:
        return f"/set {name}: {flag} is a flag of jaxlm chat, which a running chat does not change"
    if note:
        note = re.sub(r"--[a-z][a-z-]*", lambda match: names.get(match[0], match[0]), note).replace(
            "sampling flags", "parameters"
        )
        return f"/set {name}: {note}"
    return f"/set {name}: there is no such sampling parameter. Names: {', '.join(names.values())}"


def suggestion(name: str, command: str, flags: list[Flag]) -> tuple[str | None, str | None]:
    """The flag that a name means (maybe with a value), or else a note."""
    word, names = normalized(name), names_of(flags)
    last = word.rpartition(".")[2]  # `learning-rate` of the YAML key training.learning_rate
    if flag := translation(name, flags):
        return flag, None
    if note := next((note for note, to, words in NOTES if word in words.split() and command in (to or command)), None):
        return None, note
    close = closest(word, {normalized(n): n for n in names})
    close = close or closest(last, {normalized(n).rpartition(".")[2]: n for n in reversed(names)})
    return last_part(word, names) or of_other_tools(last, flags) or close, None


def sampling_advice(field: str) -> str | None:
    """What to do instead of a field of a prompt that is a sampling parameter here or in another tool; None for other
    fields. Only the exact names of the tables count, because a field may have any name."""
    word = field.replace("_", "-")
    if word in DATA_FIELDS:
        return None
    flags = [f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(SamplingParams)]
    note = next((note for note, _, words in SAMPLING_NOTES if word in words.split()), None)
    flag = exact(word, flags) or lookup(FLAGS, word, flags)
    return note or (f"pass {flag}" if flag else None)


def names_of(flags: list[Flag]) -> list[str]:
    """All names of the flags, without positional arguments."""
    return [name for flag in flags if not flag.positional for name in (flag.name, *flag.aliases)]


def translation(name: str, flags: list[Flag]) -> str | None:
    """The flag for a former name or a name in another tool; None if there is none."""
    word, names = normalized(name), names_of(flags)
    renamed = normalized(current_name(word.replace("-", "_")))
    return exact(word, names) or exact(renamed, names) or of_other_tools(renamed, flags)


def of_other_tools(word: str, flags: list[Flag]) -> str | None:
    """The row of FLAGS with this word, if the command has the flag."""
    return lookup(FLAGS, word, [row for row in FLAGS if accepts(row, flags)])


def accepts(row: str, flags: list[Flag]) -> bool:
    """Whether a row of FLAGS is a flag of the command, with a value that it takes."""
    name, _, value = row.partition(" ")
    flag = next((flag for flag in flags if name in (flag.name, *flag.aliases) and not flag.positional), None)
    choices = get_args(flag.types[0]) if flag and flag.types and get_origin(flag.types[0]) is Literal else ()
    return flag is not None and (not value or not choices or value in choices)


def normalized(word: str) -> str:
    """`max-new-tokens` for --max_new_tokens."""
    return word.lstrip("-").replace("_", "-").lower()


def exact(word: str, names: list[str]) -> str | None:
    """The flag of this name, if it was typed with one dash or in capitals. A single letter is a short flag of another
    tool."""
    return f"--{word}" if f"--{word}" in names and len(word) > 1 else None


def lookup(table: dict[str, str], word: str, allowed: Collection[str]) -> str | None:
    """The first allowed row with this word."""
    return next((row for row, words in table.items() if word in words.split() and row in allowed), None)


def last_part(word: str, names: list[str]) -> str | None:
    """The flag whose last part is this word (`--optimizer.weight-decay` for weight-decay), if there is only one."""
    found = [name for name in names if "." in name and name.rpartition(".")[2] == word.rpartition(".")[2]]
    return found[0] if len(found) == 1 else None


def closest(word: str, names: dict[str, str]) -> str | None:
    """The value of the key with the closest spelling."""
    beginning = [name for name in names if len(word) >= 3 and name.startswith(word)]
    close = beginning[:1] or difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return names[close[0]] if close else None
