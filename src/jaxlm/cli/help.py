"""Renders `jaxlm --help` and `jaxlm COMMAND --help`: summary, usage, flags in groups, examples.

Descriptions are the docstrings of the commands and of their fields.
"""

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping

from jaxlm.cli.common import ProcessFlags, _ModelFlags
from jaxlm.cli.flags import Flag, defining_classes, flags_of
from jaxlm.cli.terminal import is_styled
from jaxlm.inference.sampling_params import SamplingParams

WIDTH = 80  # maximum number of columns
COLUMN = 28  # column of the descriptions of flags

ABOUT = """Language models in pure JAX: generate, chat, fine-tune, evaluate and export Hugging Face checkpoints on CPU,
GPU and TPU."""

SEVERAL_VALUES = "A flag with ... takes several values, up to the next flag, and may be repeated."
POSITIONAL_FIRST = """ If a positional argument follows it, it takes one value. To pass several, put positional
arguments first, or after --."""

COMMANDS = {
    "Inference": "generate chat serve",
    "Training": "train finetune fuse tokenizer",
    "Checkpoints": "info export verify",
    "Evaluation": "eval",
    "Hardware": "plan bench check",
}

OPTIONS = [
    ("-h, --help", "Show this help."),
    ("-V, --version", "Show the version."),
    ("--tyro-write-completion {bash,zsh,fish} FILE", "Write a script for shell completion."),
]
ENVIRONMENT = {
    "HF_TOKEN": "Access token for gated models of the Hugging Face hub.",
    "HF_HOME": "Folder of the Hugging Face cache. Default: ~/.cache/huggingface.",
    "JAX_PLATFORMS": "Devices to use: cpu, cuda or tpu. Default: the fastest available.",
    "JAX_COMPILATION_CACHE_DIR": "Cache of compiled programs. Default: ~/.cache/jaxlm/xla.",
    "NO_COLOR": "Write no colors and styles, if it is set.",
}


def names(flags: type) -> list[str]:
    return [field.name for field in dataclasses.fields(flags)]


MODEL, SAMPLING = names(_ModelFlags), names(SamplingParams)
GENERATION_MODEL = [*MODEL, "kv_dtype"]
DISTRIBUTED = [name for name in names(ProcessFlags) if name not in ("quiet", "debug")]
RUN = {
    "Run": ["config", "dry_run", "out", "resume"],
    "Model": ["model", "shape", "tokenizer", "chat_template", "method", "adapter", "quantize"],
    "data": [],  # a nested dataclass: --data.*
    "Training": ["steps", "epochs", "batch", "length", "accumulate", "dtype", "weight_dtype", "grad_dtype", "remat",
                 "z_loss", "mesh", "seed"],
    "optimizer": [],
    "lora": [],
    "Evaluation": ["eval_every", "eval_batches", "samples", "sample_tokens"],
    "Logging and checkpoints": ["log_every", "report", "save_every", "keep"],
    "Distributed": DISTRIBUTED,
}  # fmt: skip
WRITTEN = {
    "Output": ["out", "dtype", "type", "quantize", "format", "force"],
    "Model": MODEL,
    "Distributed": DISTRIBUTED,
}

# Fields of each command by group, in the order of the help. A field belongs to the first group that lists it. Fields
# without a group are under "Arguments" if they are positional, else under "Options".
GROUPS: dict[str, dict[str, list[str]]] = {
    "generate": {
        "Prompt": ["prompt", "prompts", "batch_size", "n", "system", "raw", "no_think", "template_arg"],
        "Model": GENERATION_MODEL, "Sampling": SAMPLING, "Structured output": ["json_schema", "regex", "grammar"],
        "Output": ["json"], "Distributed": DISTRIBUTED,
    },
    "chat": {
        "Conversation": ["system", "no_think", "template_arg"],
        "Model": GENERATION_MODEL, "Sampling": SAMPLING, "Distributed": DISTRIBUTED,
    },
    "serve": {
        "Server": ["host", "port", "served_model_name", "api_key_file", "allow_host", "allow_origin",
                   "request_timeout"],
        "Engine": ["slots", "max_length", "max_waiting", "prepare"],
        "Model": GENERATION_MODEL, "Distributed": DISTRIBUTED,
    },
    "plan": {
        "Devices": ["device", "chips", "mesh"],
        "Generation": ["batch", "context", "dtype", "kv_dtype"],
        "Training": ["train", "accumulate", "optimizer", "remat", "weight_dtype", "grad_dtype", "moment_dtype"],
        "Output": ["compile", "json"], "Model": MODEL, "Distributed": DISTRIBUTED,
    },
    "info": {"Model": MODEL, "Output": ["json"], "Distributed": DISTRIBUTED},
    "verify": {
        "Verification": ["against", "record"], "Output": ["report", "json"], "Model": MODEL,
        "Distributed": DISTRIBUTED,
    },
    "export": WRITTEN,
    "fuse": WRITTEN,
    "train": RUN,
    "finetune": RUN,
    "eval": {
        "Texts": ["length", "stride", "batch", "data_format", "train_on", "text_field", "prompt_field",
                  "completion_field", "on_bad", "split"],
        "Tasks": ["tasks", "tasks_folder", "shots", "limit", "chat"],
        "Model": GENERATION_MODEL, "Output": ["json"], "Distributed": DISTRIBUTED,
    },
    "bench": {
        "Cases": ["prompt", "gen", "depth", "batch", "repetitions", "random_weights"],
        "Comparison": ["against"],
        "Training": ["method", "rank"],
        "Serving": ["url", "clients", "rate", "requests", "seconds", "prompts", "slots", "max_length",
                    "first_token_limit"],
        "Output": ["json", "plot"], "Model": GENERATION_MODEL, "Distributed": DISTRIBUTED,
    },
    "tokenizer": {
        "Data": ["text_field", "split", "config", "offline"],
        "Tokenizer": ["kind", "vocab_size", "special"],
        "Output": ["out", "force"],
    },
    "check": {
        "Device": ["device", "name"],
        "Models": ["batch", "context", "dtype", "quantize", "random_weights", "listed_as", "tokenizer"],
        "Output": ["out", "page", "again"],
    },
}  # fmt: skip
TITLES = {"data": "Data", "optimizer": "Optimizer", "lora": "LoRA"}

EXAMPLES: dict[str, list[str]] = {
    "check": [
        "jaxlm check",
        "jaxlm check Qwen/Qwen3-0.6B --random-weights",
        "jaxlm check model.gguf --as Qwen/Qwen3-0.6B",
        "jaxlm check --device v6e-8",
        "jaxlm check --page docs/hardware.md",
    ],
    "": [
        'jaxlm generate "Once upon a time"',
        'jaxlm generate -m Qwen/Qwen3-0.6B "Why is the sky blue?"',
        "jaxlm chat -m Qwen/Qwen3-0.6B",
        "jaxlm finetune --model Qwen/Qwen3-0.6B --data.train chats.jsonl --out run",
        "jaxlm eval -m Qwen/Qwen3-0.6B texts.jsonl",
    ],
    "generate": [
        'jaxlm generate "Once upon a time" --max-tokens 64',
        'jaxlm generate -m Qwen/Qwen3-0.6B "Why is the sky blue?" --temperature 0',
        "jaxlm generate -m Qwen/Qwen3-0.6B --prompts questions.jsonl --batch-size 8",
        "cat notes.txt | jaxlm generate -m Qwen/Qwen3-0.6B --system 'Summarize the text.'",
        'jaxlm generate -m Qwen/Qwen3-0.6B --raw "The capital of France is" --stop . !',
    ],
    "chat": [
        "jaxlm chat -m Qwen/Qwen3-0.6B",
        "jaxlm chat -m Qwen/Qwen3-0.6B --system 'Answer in one sentence.' --temperature 0.7",
        "jaxlm chat -m google/gemma-3-1b-it --dtype bfloat16",
        "jaxlm chat -m Qwen/Qwen3-0.6B --no-think < questions.txt > answers.txt",
    ],
    "serve": [
        "jaxlm serve -m Qwen/Qwen3-0.6B",
        "jaxlm serve -m Qwen/Qwen3-0.6B --port 9000 --slots 16 --max-length 4096 --prepare",
        "jaxlm serve -m google/gemma-3-1b-it --host 0.0.0.0 --api-key-file keys.txt",
    ],
    "info": [
        "jaxlm info Qwen/Qwen3-0.6B",
        "jaxlm info meta-llama/Llama-3.1-70B-Instruct --mesh data=1,model=8",
        "jaxlm info ./checkpoint --dtype bfloat16 --json",
    ],
    "plan": [
        "jaxlm plan qwen3-32b --device v6e-8 --batch 16 --context 8192",
        "jaxlm plan ./checkpoint",
        "jaxlm plan llama-3.1-8b --device H100 --chips 8 --train --context 8192",
        "jaxlm plan qwen3-4b --device v5e-1 --compile",
    ],
    "verify": [
        "jaxlm verify Qwen/Qwen3-0.6B",
        "jaxlm verify meta-llama/Llama-3.2-1B --against transformers,meta",
        "jaxlm verify Qwen/Qwen3-0.6B --record answers.npz",
        "jaxlm verify Qwen/Qwen3-0.6B --against answers.npz --report page",
    ],
    "export": [
        "jaxlm export Qwen/Qwen3-0.6B ./qwen3 --dtype bfloat16",
        "jaxlm export ./run/model ./copy --force",
        "jaxlm export ./run/model ./model.gguf --type q8_0",
        "jaxlm export ./Llama-3.2-1B/original ./llama",
    ],
    "train": [
        "jaxlm train --shape config.json --tokenizer tok --data.train texts.jsonl",
        "jaxlm train --model Qwen/Qwen3-0.6B --data.train a.jsonl b.jsonl --steps 500",
        "jaxlm train -c run.yaml --optimizer.lr 1e-4 --dry-run",
        "jaxlm train --shape config.json --tokenizer tok --dataset roneneldan/TinyStories",
    ],
    "finetune": [
        "jaxlm finetune --model Qwen/Qwen3-0.6B --data.train chats.jsonl --out run",
        "jaxlm finetune --model Qwen/Qwen3-0.6B --data.train chats.jsonl --lora.rank 8",
        "jaxlm finetune --model Qwen/Qwen3-0.6B --data.train chats.jsonl --quantize int4",
        "jaxlm finetune --model Qwen/Qwen3-0.6B --data.train chats.jsonl --method full",
        "jaxlm finetune -c run.yaml --dry-run",
    ],
    "fuse": [
        "jaxlm fuse --adapter run/adapter --out fused",
        "jaxlm fuse -m Qwen/Qwen3-0.6B --adapter run/adapter --out fused --dtype bfloat16",
        "jaxlm fuse --adapter run/adapter --out model.gguf --type q8_0",
        'jaxlm generate -m fused "Hello"',
    ],
    "eval": [
        "jaxlm eval -m Qwen/Qwen3-0.6B texts.jsonl",
        "jaxlm eval -m Qwen/Qwen3-0.6B wikitext --length 2048 --stride 512 --json",
        "jaxlm eval -m Qwen/Qwen3-0.6B --adapter run/adapter chats.jsonl",
        "jaxlm eval -m Qwen/Qwen3-0.6B --tasks hellaswag,gsm8k --shots 5 --limit 100",
    ],
    "bench": [
        "jaxlm bench Qwen/Qwen3-0.6B -p 512 -n 128 -d 0,4096 -b 1,8",
        "jaxlm bench --random-weights qwen3-4b --plot speed.png",
        "jaxlm bench Qwen/Qwen3-0.6B --against transformers,llama.cpp",
        "jaxlm bench train Qwen/Qwen3-0.6B -p 512 -b 8 --method lora",
        "jaxlm bench load Qwen/Qwen3-0.6B",
        "jaxlm bench serve Qwen/Qwen3-0.6B --clients 1,8,32 --against llama.cpp",
    ],
    "tokenizer": [
        "jaxlm tokenizer train 'texts/*.txt' --out tok --vocab-size 8192",
        "jaxlm tokenizer train chats.jsonl --out tok --special '<|user|>' '<|assistant|>'",
        "jaxlm tokenizer train wikitext --out tok --kind unigram",
    ],
}


def overview(commands: Mapping[str, type]) -> str:
    """The text of `jaxlm --help`."""
    lines = ["Usage: jaxlm COMMAND [flags]", "", *wrap(ABOUT)]
    listed = {title: row.split() for title, row in COMMANDS.items()}
    listed["Other"] = [name for name in commands if not any(name in row for row in listed.values())]
    for title, row in listed.items():
        if not row:
            continue
        lines += section(title, [(name, first_sentence(commands[name])) for name in row if name in commands], 14)
    lines += section("Options", OPTIONS, COLUMN)
    lines += section("Environment", list(ENVIRONMENT.items()), COLUMN)
    lines += examples("")
    return "\n".join([*lines, "", *wrap("Run `jaxlm COMMAND --help` for the flags of a command.")])


def of_command(name: str, command: type, negations: bool = False) -> str:
    """The text of `jaxlm COMMAND --help`.

    Args:
        name: The command.
        command: Its dataclass.
        negations: Whether every switch has a --no- form.
    """
    flags = flags_of(command)
    positional = [flag.metavar for flag in flags if flag.positional]
    lines = [*wrap(" ".join(["Usage:", "jaxlm", name, *positional, "[flags]"])), ""]
    for paragraph in inspect.cleandoc(command.__doc__ or "").split("\n\n"):
        lines += [*wrap(paragraph), ""]
    for title, members in grouped(name, flags).items():
        entries = [(invocation(flag, negations), text_of(flag)) for flag in members]
        if title == "Options":
            entries.append(("-h, --help", "Show this help."))
        lines += section(title, entries, COLUMN)[1 if lines[-1] == "" else 0 :]
    if any(flag.repeats for flag in flags):
        lines += ["", *wrap(SEVERAL_VALUES + (POSITIONAL_FIRST if positional else ""))]
    return "\n".join([*lines, *examples(name)])


def grouped(name: str, flags: Iterable[Flag]) -> dict[str, list[Flag]]:
    """The flags of a command by title of their group."""
    table = GROUPS.get(name, {})
    groups: dict[str, list[Flag]] = {TITLES.get(title, title): [] for title in ["Arguments", *table, "Options"]}
    for flag in flags:
        other = "Arguments" if flag.positional else "Options"
        title = flag.group or next((title for title, fields in table.items() if flag.field in fields), other)
        groups.setdefault(TITLES.get(title, title), []).append(flag)
    groups["Options"] = groups.pop("Options")  # last
    return {title: members for title, members in groups.items() if members or title == "Options"}


def invocation(flag: Flag, negations: bool) -> str:
    """A flag with its aliases and metavar, such as `-m, --model NAME`; a list ends with `...`."""
    if flag.positional:
        return flag.metavar.strip("[]")
    name = flag.negated("[no-]") if negations and not flag.types else flag.name
    return " ".join(filter(None, [", ".join([*flag.aliases, name]), flag.metavar])) + " ..." * flag.repeats


def text_of(flag: Flag) -> str:
    """The description of a flag: the docstring of the field, and its default if the docstring does not have it."""
    text = docstring_of(flag)
    if isinstance(flag.default, bool | tuple | dict) or flag.default in (None, "") or "default:" in text.lower():
        return text
    default = f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
    return f"{text} (default:\u00a0{default})"  # on one line


def docstring_of(flag: Flag) -> str:
    """The docstring of the field of a flag."""
    classes = defining_classes(flag.owner, flag.field)
    documented = (field_docstrings(cls.__module__).get((cls.__name__, flag.field)) for cls in classes)
    return next(filter(None, documented), "")


@functools.cache
def field_docstrings(module: str) -> dict[tuple[str, str], str]:
    """The docstrings of the fields of a module's classes, by class and field."""
    docstrings = {}
    for cls in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(cls, ast.ClassDef):
            for field, after in zip(cls.body, cls.body[1:]):
                match field, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        docstrings[cls.name, name] = " ".join(text.split())
    return docstrings


def section(title: str, entries: list[tuple[str, str]], column: int) -> list[str]:
    """Lines of a section: a title, and entries in two columns. If the first column is too narrow for an entry, its text
    begins on the next line."""
    lines = ["", bold(f"{title}:")]
    column = min(column, columns() * 2 // 5)
    for left, text in entries:
        indent = " " * column
        wrapped = textwrap.wrap(text, columns(), initial_indent=indent, subsequent_indent=indent)
        if len(left) + 4 <= column and wrapped:
            lines.append(f"  {left}".ljust(column) + wrapped.pop(0)[column:])
        else:
            lines += textwrap.wrap(left, columns(), initial_indent="  ", subsequent_indent="    ")
        lines += wrapped
    return [line.replace("\u00a0", " ") for line in lines]


def examples(name: str) -> list[str]:
    """Lines with the examples of a command. Long lines are continued with a backslash."""
    lines = ["", bold("Examples:")]
    for example in EXAMPLES.get(name, []):
        words = re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", example)
        line = f"  {words[0]}"
        for number, word in enumerate(words[1:], 2):
            if len(line) + 1 + len(word) > columns() - 2 * (number < len(words)):
                lines.append(f"{line} \\")
                line = "   "
            line += f" {word}"
        lines.append(line)
    return lines if len(lines) > 2 else []


def first_sentence(command: type) -> str:
    """The first sentence of the docstring."""
    paragraph = " ".join(inspect.cleandoc(command.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!])\s+(?=[A-Z-])", paragraph)[0]


def wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), columns())


def columns() -> int:
    """The width of the text: the width of the terminal, at most WIDTH."""
    return max(20, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if is_styled(sys.stdout) else text
