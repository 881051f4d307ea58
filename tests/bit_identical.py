"""Records what jaxlm computes at one commit, and holds a later commit against it, bit for bit.

    python tests/bit_identical.py record DIR     # at the old commit: models, recordings, half-finished runs
    python tests/bit_identical.py compare DIR    # at a later commit: all of it again; exits with 1 on any difference

For refactorings that must not change a single bit. PYTHONPATH says whose code runs. Only the public surface is used, so
that one file runs at both commits; names that changed between them go into SPELLING. `record` needs the folder of real
data (../shared/data, or what JAXLM_SHARED names). `compare` needs DIR alone: at the same path, with the same packages,
on the same kind of CPU. Programs that have not changed are not compiled again (DIR/programs), unless
JAX_ENABLE_COMPILATION_CACHE=false says so.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

RECORDING, DIR = "record" in sys.argv, Path(sys.argv[-1]).absolute()
MODELS, DATA, HALF, WORK = (DIR / name for name in ("models", "data", "half", "work"))
SHARED = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).absolute().parents[2] / "shared" / "data")
GONE = {"jaxlm export --format meta"}  # refused since
# Before jax is imported; the commands inherit it. Corpora are tokenized anew, for their cache is in WORK.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(DIR / "programs"), "HF_HUB_OFFLINE": "1",
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(WORK), "HF_HOME": str(WORK),
               "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false"}  # fmt: skip

import jax  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import jaxlm  # noqa: E402

# Parts of flags and YAML keys: at the recorded commit -> at the commit that runs. What is not here is spelled alike in
# both; more may be added. JSON files are compared in the recorded spelling.
SPELLING = {
    "optimiser": "optimizer", '"rate"': '"learning_rate"', '"gradient"': '"grad_norm"', '"form"': '"format"',
    '"learn"': '"train_on"',
}  # fmt: skip
# Fields of JSON that differ from call to call, or hold versions or the package's path.
VOLATILE = {"tokens_per_second", "first_token_seconds", "compile_seconds", "seconds", "mfu", "model",
            "peft_version"}  # fmt: skip

SIZES = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
         "torch_dtype": "float32", "eos_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
LLAMA, QWEN, OLMO = ({**SIZES, "model_type": kind} for kind in ("llama", "qwen3", "olmo2"))
GEMMA = {**SIZES, "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5}
BFLOAT, TIED = {"torch_dtype": "bfloat16"}, {"tie_word_embeddings": True}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR, KINDS = {"rope_type": "linear", "factor": 8.0}, ["full_attention", "sliding_attention", "sliding_attention"]
# Name -> tokenizer ("": the package's own), chat template, config.json. The last is a model that also sees.
MADE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3-tied": ("llama3", "meta-llama-Meta-Llama-3-8B-Instruct", {
        **LLAMA, **TIED, "vocab_size": 128256, "eos_token_id": 128009, "rope_theta": 5e5, "rope_scaling": SCALED}),
    "llama3-untied": ("", "", {**LLAMA, **BFLOAT}),
    "qwen3-tied": ("qwen3", "", {
        **QWEN, **BFLOAT, **TIED, "vocab_size": 151936, "eos_token_id": 151645, "head_dim": 8}),
    "qwen3-untied": ("", "Qwen-Qwen3-0.6B", {**QWEN, "head_dim": 12, "rope_scaling": YARN}),
    "olmo2-untied": ("olmo2", "allenai-OLMo-2-Instruct.reconstructed", {
        **OLMO, "vocab_size": 100352, "eos_token_id": 100257}),
    "olmo2-tied": ("", "", {**OLMO, **BFLOAT, **TIED, "rope_scaling": LINEAR}),
    "gemma3-tied": ("", "google-gemma-3-1b-it", {
        **GEMMA, **TIED, "num_hidden_layers": 3, "sliding_window_pattern": 2, "rope_scaling": LINEAR}),
    "gemma3-untied": ("", "", {
        "model_type": "gemma3", **BFLOAT, "tie_word_embeddings": False, "vision_config": {"depth": 1},
        "text_config": {**GEMMA, **BFLOAT, "num_hidden_layers": 3, "layer_types": KINDS}}),
}  # fmt: skip
PROMPTS = ["Once upon a time", 'Lily said: "Look, a dog – 5 bones!"', "One day", "Once upon a time"]
SAMPLED: dict[str, Any] = {
    "seed": 7, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.3,
    "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {9: 3.0, 17: -100.0}}  # fmt: skip

# Training runs: the command, and its YAML file or its flags. Those in STOPPED (by which signal) are half done when
# `compare` begins, and are recorded as they are when nothing stops them.
NEW = {"shape": f"{DATA}/shape.json", "tokenizer": f"{MODELS}/story", "log_every": 1}
QWEN_FLAGS = [f"--model={MODELS}/qwen3-untied", "--log-every=1", "--batch=4", "--length=256"]
RUNS: dict[str, tuple[str, Any]] = {
    "train": ("train", {**NEW, "data": {"train": f"{DATA}/train.txt", "valid": f"{DATA}/valid.txt", "packing": "split"},
        "steps": 4, "batch": 4, "length": 64, "accumulate": 2, "remat": "dots", "samples": ["One day"],
        "sample_tokens": 6, "optimiser": {"name": "muon", "lr": 0.01, "schedule": "wsd", "warmup": 1}}),
    "train gemma": ("train", {"model": f"{MODELS}/gemma3-tied", "log_every": 1, "steps": 4, "batch": 4, "length": 256,
        "accumulate": 2, "data": {"train": f"{DATA}/chats.jsonl", "packing": "whole"}, "optimiser": {"name": "lion"}}),
    "finetune": ("finetune", [*QWEN_FLAGS, f"--data.train={DATA}/chats.jsonl", "--steps=3", "--lora.rank=4",
        "--lora.dropout=0.1", "--lora.rslora", "--lora.targets=q_proj", "--lora.targets=up", "--optimiser.lr=0.01"]),
    "stopped train": ("train", {**NEW, "data": {"train": f"{DATA}/train.txt", "valid": f"{DATA}/valid.txt"},
        "steps": 16, "batch": 8, "length": 128, "save_every": 3, "eval_every": 5, "optimiser": {"lr": 0.01}}),
    "stopped finetune": ("finetune", [*QWEN_FLAGS, f"--data.train={DATA}/questions.jsonl", "--steps=16",
        "--save-every=3", "--optimiser.name=adafactor", "--optimiser.lr=0.01"]),
}  # fmt: skip
STOPPED = {"stopped train": signal.SIGTERM, "stopped finetune": signal.SIGKILL}


def write_model(name: str, seed: int) -> None:
    """A checkpoint whose attention is not flat and whose norms are not neutral, with its tokenizer."""
    folder, (tokenizer, template, config) = MODELS / name, MADE[name]
    family = import_module(f"jaxlm.models.{name.partition('-')[0]}")
    model = jaxlm.Model.init(family, family.Config.from_hf(config), jax.random.key(seed), config["torch_dtype"])
    jaxlm.export(model, folder, config=config)
    weights, seeing = folder / "model.safetensors", "text_config" in config
    arrays, random = {"vision_tower.a": np.ones(3, np.float32)} if seeing else {}, np.random.default_rng(seed)
    for tensor, value in load_file(weights).items():
        spread = value + 0.2 + 0.3 * random.standard_normal(value.shape) if "norm" in tensor else value * 1.2
        arrays["language_model." * seeing + tensor] = spread.astype(value.dtype)
    save_file(arrays, weights)
    for path in (SHARED / "tokenizers" / tokenizer if tokenizer else MODELS / "story").glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)
    if template:
        shutil.copyfile(SHARED / f"chat_templates/{template}.jinja", folder / "chat_template.jinja")
    if "gemma3" in name:
        sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [0, 5]}
        (folder / "generation_config.json").write_text(json.dumps(sampling))


def write_inputs() -> None:
    """Models and data."""
    for folder in (MODELS, DATA, HALF):
        folder.mkdir(parents=True)
    shutil.copytree(Path(str(jaxlm.__file__)).parent / "stories", MODELS / "story")
    for name in ("stories260K", "babyllama_tok105"):
        shutil.copytree(SHARED / "checkpoints" / name, MODELS / name)
    jaxlm.export(jaxlm.load(MODELS / "stories260K"), MODELS / "meta", format="meta")
    for seed, name in enumerate(MADE):
        write_model(name, seed)
    stories = next((SHARED / "corpora/tinystories").glob("*.txt")).read_text().split("<|endoftext|>")
    for name, part in {"train": stories[:120], "valid": stories[120:126]}.items():
        (DATA / f"{name}.txt").write_text("<|endoftext|>".join(part))
    rows = [json.loads(line) for line in (SHARED / "corpora/gsm8k/train.jsonl").read_text().splitlines()[:40]]
    turns = [[{"role": "user", "content": x["question"]}, {"role": "assistant", "content": x["answer"]}] for x in rows]
    files = {"questions": rows, "chats": [{"messages": chat} for chat in turns], "prompts": [*PROMPTS, turns[0][:1]]}
    for name, lines in files.items():
        (DATA / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (DATA / "shape.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))


KNOWN: dict[str, Any] = {}  # the recorded values by name
VALUES: dict[str, Any] = {}  # those of this call
WRONG: list[str] = []


def add(name: str, value: Any) -> None:
    """Takes a value, and compares it with the recorded one."""
    VALUES[name] = json.loads(json.dumps(value, default=described))
    found = [] if RECORDING else [*differences(KNOWN.get(name), VALUES[name])]
    tell(name, "; ".join(found[:3]) + f"; {len(found) - 3} more" * (len(found) > 3))


def tell(name: str, fault: str) -> None:
    """Prints a line, and keeps the name where something is wrong."""
    print(f"{'WRONG' if fault else 'recorded' if RECORDING else 'same':8}  {name}  {fault}".rstrip(), flush=True)
    WRONG.extend([name] if fault else [])


def described(array: Any) -> dict[str, Any]:
    """An array for JSON: its type, its digest, and some numbers that show how far another one is."""
    array = np.asarray(array)
    some = array.reshape(-1)[:: max(1, array.size // 100)].astype(np.float64).tolist()
    return {"type": f"{array.dtype}{list(array.shape)}", "sha256": digest(array.tobytes()), "some": some}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """What differs, in words; NaN equals NaN."""
    if json.dumps(old) == json.dumps(new):
        return
    if where.endswith("/seed") and isinstance(old, int) and old >= 1000:
        return  # drawn: the seeds that this script gives are small
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield f"{where} {str(old)[:60]!r} became {str(new)[:60]!r}"
    elif "some" in old and old["type"] == new.get("type"):
        yield f"{where} {old['type']} differs, by {np.abs(np.subtract(old['some'], new['some'])).max():.3g} or more"
    else:
        for key in old | new:
            yield from differences(old.get(key), new.get(key), f"{where}/{key}")


def spelled(text: Any) -> str:
    """A flag or a file as the commit that runs spells it."""
    return reduce(lambda text, pair: text.replace(*pair), SPELLING.items(), str(text))


def steady(text: str) -> Any:
    """JSON in the recorded spelling, without what is volatile."""
    text = reduce(lambda text, pair: text.replace(pair[1], pair[0]), SPELLING.items(), text)
    return json.loads(text, object_hook=lambda value: {k: v for k, v in value.items() if k not in VOLATILE})


def facts(pieces: Iterable[Any]) -> list[Any]:
    """Of answers or pieces: the text and what it carries but times."""
    return [{"text": str(one), **{k: v for k, v in vars(one).items() if k not in VOLATILE}} for one in pieces]


def files(folder: Path) -> dict[str, str]:
    """The digests of a folder's files."""
    return {str(x.relative_to(folder)): digest(x.read_bytes()) for x in sorted(folder.rglob("*")) if x.is_file()}


def one_model(name: str) -> None:
    """All that one checkpoint gives, or the recorded adapter beside the base that it names."""
    model = jaxlm.load(DIR / name if name == "adapter" else MODELS / name, offline=True)
    if name in (*MADE, "adapter"):
        numbers(name, model)
    answers(name, model)
    if name == "adapter":
        model = jaxlm.fuse(model)
        add("adapter: fused weights", jax.tree.leaves(model.weights))
    jaxlm.export(model, WORK / "export" / name)
    add(f"{name}: export", files(WORK / "export" / name))


def numbers(name: str, model: Any) -> None:
    """Logits asked for in every way, hidden states, gradients."""
    weights, forward, init_kv, _, config = model
    tokens, at = np.random.default_rng(1).integers(0, config.V, (3, 24)).astype(np.int32), np.arange(24)
    packed = np.stack([at, np.r_[at[:14], at[:10]], np.maximum(at - 9, -1)])
    ragged = np.stack([at, np.maximum(at - 9, -1), np.where(at < 15, at, -1)])[:, :20]

    def continued(kv: Any, cuts: list[int], pos: Any = None) -> list[jax.Array]:
        found = []
        for begin, end in pairwise(cuts):
            logits, kv = forward(tokens[:, begin:end], weights, kv, None if begin else pos)
            found.append(logits)
        return found

    def loss(weights: Any) -> jax.Array:
        scores = jax.nn.log_softmax(forward(tokens[:, :-1], weights, None, packed[:, :-1])[0])
        return -jax.numpy.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    add(f"{name}: logits", forward(tokens, weights)[0])
    add(f"{name}: logits of ragged rows with a cache", continued(init_kv(3, 24), [0, 20, 21, 22, 23, 24], ragged))
    add(f"{name}: logits in chunks", continued(init_kv(3, 24, chunk=8), [0, 8, 16, 24]))
    add(f"{name}: hidden states of packed documents", model.hidden_states(tokens, pos=packed))
    value, gradients = jax.value_and_grad(loss)(weights)
    add(f"{name}: loss and gradients", [value, jax.tree.leaves(gradients)])


def answers(name: str, model: Any) -> None:
    """Answers of every kind, conversations, and how well texts are predicted."""
    tokenizer, how = model.tokenizer, dict[str, Any](max_tokens=10, batch_size=2, logprobs=2)
    prompts: Any = PROMPTS if tokenizer else [[1, 5, 9], [1, 40, 41, 42, 43, 44, 45], [1], [1, 5, 9]]
    greedy = jaxlm.generate(model, prompts, temperature=0, **how)
    add(f"{name}: greedy", facts(greedy))
    add(f"{name}: streamed", facts(jaxlm.stream(model, prompts, seed=3, **how)))  # as the model's own file says
    stop = {"stop": greedy[0][3:6]} if tokenizer else {"stop_token_ids": greedy[0].tokens[5]}
    add(f"{name}: stopped", facts(jaxlm.generate(model, prompts, temperature=0, **stop, **how)))
    chat = tokenizer is not None and bool(tokenizer.hf.chat_template)
    if name == "adapter" or not (chat or name == "story"):
        return  # compiling takes most of the time
    add(f"{name}: sampled", facts(jaxlm.generate(model, prompts, **how, **SAMPLED)))
    add(f"{name}: evaluate", list(jaxlm.evaluate(model, DATA / "valid.txt", length=128, batch=2)))
    talk = jaxlm.Conversation(model, system="Be brief." if chat else None, seed=5, temperature=0.7, max_tokens=8)
    turns = [[facts(talk.send(text)), talk.prefilled] for text in ("Hello!", " Tell me about dogs.", " And cats?")]
    add(f"{name}: conversation", [turns, facts(talk.retry()), talk.messages])
    if chat:
        chats = [talk.messages[:3], talk.messages[:1]]
        add(f"{name}: chats", facts(jaxlm.generate(model, chats, temperature=0.7, seed=2, **how)))


def started(*args: Any, **how: Any) -> subprocess.Popen[str]:
    """A command at work."""
    argv = [sys.executable, "-m", "jaxlm", *map(spelled, args)]
    return subprocess.Popen(argv, cwd=WORK, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **how)


def command(*args: Any, stdin: str = "") -> str:
    """What a command prints on stdout."""
    process = started(*args, stderr=subprocess.PIPE)
    printed, told = process.communicate(stdin)
    if process.returncode:
        raise RuntimeError(f"{args} ended with {process.returncode}: {told[-1000:]}")
    return printed


def commands(name: str) -> None:
    """The commands but training."""
    gemma, qwen = MODELS / "gemma3-tied", MODELS / "qwen3-untied"
    sampled = ["--max-tokens=12", "--seed=4", "--temperature=0.9", "--top-k=40"]
    printed = {
        "generate with the package's model": ["generate", "--json", PROMPTS[0], "--seed=4"],
        "generate --prompts": ["generate", "-m", qwen, "--prompts", DATA / "prompts.jsonl", "--logprobs=2", *sampled],
        "generate with an adapter": ["generate", "-m", DIR / "adapter", "--json", "--raw", PROMPTS[1], *sampled],
        "generate with Meta's files": ["generate", "-m", MODELS / "meta", "--json", PROMPTS[2], *sampled],
        "eval of texts": ["eval", "--json", DATA / "valid.txt"],
        "eval of chats": ["eval", "-m", gemma, "--json", DATA / "chats.jsonl"],
    }
    for what, args in printed.items():
        add(f"jaxlm {what}", [steady(line) for line in command(*args).splitlines()])
    add("jaxlm generate from stdin", command("generate", "-m", gemma, *sampled, stdin="Hello"))
    written = {
        "export": ["export", MODELS / "gemma3-untied", "--dtype=float32"],
        "fuse": ["fuse", "-m", qwen, "--adapter", DIR / "adapter", "--out"],
    }
    for kind in ("bpe", "unigram", "char"):
        asked = ["tokenizer", "train", DATA / "train.txt", f"--kind={kind}", "--vocab-size=600", "--out"]
        written[f"tokenizer train --kind={kind}"] = asked
    (WORK / "commands").mkdir()
    for what, args in written.items():
        command(*args, WORK / "commands" / what)
        add(f"jaxlm {what}", files(WORK / "commands" / what))


def training(name: str) -> None:
    """A run, or what is left of one: its lines, its records, what it made."""
    (kind, asked), out, file = RUNS[name], WORK / "runs" / name, WORK / f"{name}.yaml"
    if isinstance(asked, dict):
        file.write_text(spelled(json.dumps(asked)))  # JSON is YAML
        asked = ["-c", file]
    if name in STOPPED and not RECORDING:
        shutil.copytree(HALF / name, out)
    command(kind, f"--out={out}", *asked)
    add(f"{name}: losses", [steady(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for told in ("run.json", "contents.json"):
        add(f"{name}: {told}", steady((out / told).read_text()))
    [made] = (path for path in (out / "model", out / "adapter") if path.exists())
    add(f"{name}: {made.name}", files(made))
    if RECORDING and name == "finetune":
        shutil.copytree(made, DIR / "adapter")
    if RECORDING and name in STOPPED:
        shutil.rmtree(out)
        process = started(kind, f"--out={out}", *asked, stderr=subprocess.DEVNULL)
        next(line for line in process.stdout or () if line.startswith("step 5/"))
        while process.poll() is None and not any(path.name.isdecimal() for path in (out / "checkpoints").iterdir()):
            time.sleep(0.005)
        process.send_signal(STOPPED[name])
        if process.wait() == 0:
            raise RuntimeError(f"{name} ended before it could be stopped: make it longer")
        shutil.move(out, HALF / name)


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        print(__doc__)
        return 2
    begin, file = time.time(), DIR / "recordings.json"
    print(f"{sys.argv[1]} {jaxlm.__file__}, jax {jax.__version__}, Python {sys.version.split()[0]}", flush=True)
    if RECORDING:
        write_inputs()
    else:
        KNOWN.update(json.loads(file.read_text()))
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    work: dict[str, Callable[[str], None]] = {**dict.fromkeys(RUNS, training), "commands": commands}
    names = ("adapter", "story", "stories260K", "babyllama_tok105", "meta", *MADE)
    with ThreadPoolExecutor(1 if RECORDING else 2) as pool:
        parts = {name: pool.submit(do, name) for name, do in (work | dict.fromkeys(names, one_model)).items()}
    for name, part in parts.items():
        if error := part.exception():  # the other parts went on
            tell(name, f"{type(error).__name__}: {error}")
    for name in KNOWN.keys() - VALUES.keys() - GONE:
        tell(name, "was not computed")
    if RECORDING and not WRONG:
        file.write_text(json.dumps(VALUES, indent=1))
    print(f"{len(VALUES)} comparisons, {len(WRONG)} differ, {time.time() - begin:.0f} s")
    return 1 if WRONG else 0


if __name__ == "__main__":
    sys.exit(main())
