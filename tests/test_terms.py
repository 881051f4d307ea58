"""The code speaks the field's words: no private name comes back, and what people search for is found."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "jaxlm"
# (file, private names that are gone from it, the field's names that are there now)
RENAMED = [
    ("nn/scan_layers.py", ["fold", "unstacked"], ["scan_layers"]),
    ("nn/attention_reference.py", ["Places"], ["TokenPositions", "segment_ids"]),
    ("nn/attention_reference.py", ["visible", "seen"], ["attention_mask"]),
    ("nn/attention_reference.py", ["NOTHING", "SCORES"], ["MASK_VALUE", "MAX_SCORE_ELEMENTS"]),
    ("nn/attention_cpu.py", ["_in_parts", "_one_query", "_best"], ["causal_blocked", "cache_blocked"]),
    ("devices/mesh.py", ["held"], ["local_size"]),
    ("inference/decoding.py", ["held"], ["constrain_state"]),
    ("nn/kv_cache.py", ["held", "at", "Slots", "grow"], ["map_arrays", "positions", "LayerCache", "slot_index"]),
    ("nn/linear.py", ["Form"], ["WeightForm"]),
    ("inference/decoding.py", ["pick", "Made"], ["sample_token", "StepOutput"]),
    ("inference/compilation.py", ["Programs"], ["CompiledSteps"]),
    (
        "inference/scheduler.py",
        ["grow", "_join", "read", "flight"],
        ["resize_cache", "_admit", "_fetch_tokens", "_in_flight"],
    ),
    ("inference/prompts.py", ["room"], ["resolve_max_tokens"]),
    ("inference/generation.py", ["Piece"], ["CompletionChunk"]),
    ("evaluation/scoring.py", ["Piece"], ["ScoreRequest"]),
    ("inference/sampling_params.py", ["Options", "NEUTRAL"], ["SamplingParams", "DEFAULTS"]),
    (
        "inference/sampling.py",
        ["_floor", "_floor_of_share", "_cut"],
        ["_top_k_threshold", "_top_p_threshold", "_mask_below"],
    ),
    ("inference/conversation.py", ["Seen", "holds"], ["CachedPrefix"]),
    ("devices/mesh.py", ["ON", "ON_TRAINED", "WIDE"], ["RULES", "FSDP_RULES", "TENSOR_AXES"]),
    ("devices/mesh.py", ["on", "of", "divided"], ["use_mesh", "mesh_of", "traced_spec"]),
    ("devices/mesh.py", ["parts", "rounded"], ["num_shards", "round_up_batch"]),
    ("devices/topology.py", ["split", "grouped", "arranged"], ["factor_kv_heads", "with_kv_groups", "arrange_devices"]),
    ("model.py", ["shared"], ["is_multiprocess"]),
    ("devices/distributed.py", ["several", "first"], ["is_multiprocess", "is_coordinator"]),
    (
        "devices/distributed.py",
        ["agree", "on_first", "from_first"],
        ["assert_equal", "run_on_coordinator", "broadcast"],
    ),
    ("cli/common.py", ["one_voice"], ["silence_workers"]),
    ("models/llama3.py", ["UNREAD", "NORM"], ["IGNORED_PREFIXES", "NORM_IDENTITY"]),
    ("models/qwen3.py", ["UNREAD", "NORM"], ["IGNORED_PREFIXES", "NORM_IDENTITY"]),
    ("models/olmo2.py", ["UNREAD", "NORM"], ["IGNORED_PREFIXES", "NORM_IDENTITY"]),
    ("models/gemma3.py", ["UNREAD", "NORM", "SEEING"], ["IGNORED_PREFIXES", "NORM_IDENTITY", "VISION_FIELDS"]),
    ("data/packing.py", ["learned", "Batches"], ["loss_mask", "DataLoader"]),
    ("data/formats.py", ["learn", "form", "Fault"], ["train_on", "format", "InvalidRowError"]),
    ("data/readers.py", ["Bad"], ["InvalidRow"]),
    ("training/step.py", ["rule", "sound"], ["tx", "all_finite"]),
    ("training/resume.py", ["spoiled", "settle", "FREE"], ["delete_diverged", "check_resume", "MUTABLE_FIELDS"]),
    ("training/loop.py", ["tell", "look"], ["log", "evaluate_and_sample"]),
    ("cli/train.py", ["rehearse", "hush"], ["dry_run", "silence_orbax"]),
    ("checkpoint/hf.py", ["Matched"], ["MatchResult"]),
    ("checkpoint/meta.py", ["Joined"], ["ConcatTensor"]),
    ("checkpoint/writer.py", ["Stored", "rows"], ["LazyTensor", "gather_rows"]),
    ("loading/resolving.py", ["Found", "way_out"], ["Resolved"]),
    ("sidecars.py", ["other_texts"], ["sidecar_files"]),
    ("nn/params.py", ["rows"], ["tensors"]),
]
COMMON = {"first", "rows"}  # plain as a variable, not as the name of a function
FILES_GONE = [
    "ops",
    "options.py",
    "chat.py",
    "checkpoint/refusals.py",
    "export_texts.py",
    "training/turns.py",
    "training/forms.py",
]
SEARCHED = [
    "KV cache", "continuous batching", "gradient accumulation", "gradient clipping", "loss mask", "data loader",
    "tensor parallel", "activation checkpointing", "learning rate",
]  # fmt: skip
BRITISH = r"\b(optimis|initialis|normalis|quantis|tokenis|serialis|neighbour|behaviour|colour|favour)"


def definitions(path: Path) -> set[str]:
    """Names of functions, classes, parameters and variables. Variables may have COMMON words as names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in COMMON:
            found.add(node.id)
    return found


@pytest.mark.parametrize(("file", "old", "new"), RENAMED, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_private_names_do_not_come_back(file, old, new) -> None:
    text = (SRC / file).read_text()
    assert not definitions(SRC / file) & set(old)
    assert not [name for name in new if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("file", FILES_GONE)
def test_files_that_moved_are_gone(file) -> None:
    assert not (SRC / file).exists()


@pytest.mark.parametrize("term", SEARCHED)
@pytest.mark.parametrize("place", ["src/**/*.py", "docs/*.md", "tests/**/*.py"])
def test_what_people_search_for_is_found(term, place) -> None:
    pattern = re.compile(term.replace(" ", r"\s+"), re.IGNORECASE)
    here = Path(__file__)
    assert any(pattern.search(path.read_text()) for path in ROOT.glob(place) if path != here)


@pytest.mark.parametrize("place", ["src/**/*.py", "docs/*.md", "README.md"])
def test_spelling_is_american(place) -> None:
    for path in ROOT.glob(place):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if '"optimiser' in line or line == "    optimiser: Any":  # a former name that is still read
                continue
            assert not re.search(BRITISH, line, re.IGNORECASE), f"{path.name}:{number}: {line.strip()}"
