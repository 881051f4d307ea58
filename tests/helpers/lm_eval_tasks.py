"""Three small tasks for lm-eval, which reads them from files: no network."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

YAML = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{answers}}"
        doc_to_target: "{{right}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]""",
    "written": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{answers[right]}}"
        generation_kwargs: {until: [".", "\\n"], max_gen_toks: 12}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]""",
}
ROWS = [
    {"question": "Once upon a time, there was a little", "answers": [" girl", " boy", " table named"], "right": 0},
    {"question": "Lily saw a big", "answers": [" dog", " ball", "ger"], "right": 2},
    {"question": "The cat sat on the", "answers": [" mat.", " sky of"], "right": 0},
    {"question": "Tom and Tim went to the", "answers": [" park", " lake", " red", " is"], "right": 1},
    {"question": "Mom said: do not", "answers": [" go", " be sad"], "right": 1},
]
NAMES = ["jaxlm_choices", "jaxlm_rolling", "jaxlm_written"]


def write_tasks(folder: Path) -> Path:
    """Writes the YAML files of the tasks, and the rows that they read."""
    for split, rows in (("train", ROWS[:2]), ("test", ROWS)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"\n    {split}: {folder}/{split}.jsonl" for split in ("train", "test"))
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(
            f"task: jaxlm_{name}\ndataset_path: json\ntest_split: test\nfewshot_split: train\n"
            f"dataset_kwargs:\n  cache_dir: {folder}/cache\n  data_files:{files}\n"
            + text.replace("\n        ", "\n").lstrip()
            + "\n"
        )
    return folder


def offline(patch: pytest.MonkeyPatch) -> None:
    """Keeps lm-eval from the network, and from what takes seconds."""
    import datasets
    import lm_eval.evaluator
    import lm_eval.tasks
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    patch.setenv("DISABLE_MULTIPROC", "1")
    # To save seconds: not listing the harness's 14,000 tasks, and not asking pip what is installed.
    patch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


def requests(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
