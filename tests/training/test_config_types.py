"""Values of a run that are misspelt or have another type, given in Python: all are refused with a way out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.formats import TextOptions
from jaxlm.training.config import Data, LoraOptions, Optimizer, Run

WRONG: list[tuple[type, dict[str, Any], str]] = [
    # choices
    (Optimizer, {"name": "adamw2"}, "did you mean 'adamw'"),
    (Optimizer, {"name": "AdamW"}, "did you mean 'adamw'"),
    (Optimizer, {"name": "sgd"}, "one of 'adamw', 'muon', 'adafactor', 'lion'"),
    (Optimizer, {"name": None}, "one of 'adamw'"),
    (Optimizer, {"schedule": "cosin"}, "did you mean 'cosine'"),
    (Optimizer, {"schedule": "constant_with_warmup"}, "one of 'cosine', 'linear', 'wsd', 'constant'"),
    (Run, {"method": "dora"}, "did you mean 'lora'"),
    (Run, {"method": "LoRA"}, "did you mean 'lora'"),
    (Run, {"dtype": "bf16"}, "did you mean 'bfloat16'"),
    (Run, {"dtype": "fp32"}, "one of 'auto', 'float32', 'bfloat16'"),
    (Run, {"dtype": np.float32}, "one of 'auto'"),
    (Run, {"remat": True}, "one of 'auto', 'none', 'full', 'dots'"),
    (Run, {"remat": "ful"}, "did you mean 'full'"),
    (Run, {"resume": True}, "one of 'auto', 'never'"),
    (Run, {"report": "tensorbord"}, "did you mean 'tensorboard'"),
    (Run, {"report": ("wandb", "mlflow")}, "one of 'tensorboard', 'wandb'"),
    (Data, {"format": "mesages"}, "did you mean 'messages'"),
    (Data, {"train_on": "asistant"}, "did you mean 'assistant'"),
    (Data, {"packing": True}, "one of 'split', 'whole', 'none'"),
    (Data, {"packing": "wholes"}, "did you mean 'whole'"),
    (Data, {"long": "truncat"}, "did you mean 'truncate'"),
    (Data, {"on_bad": "ignore"}, "one of 'stop', 'skip'"),
    (TextOptions, {"train_on": "completions"}, "did you mean 'completion'"),
    # numbers
    (Run, {"steps": "7"}, "write 7$"),
    (Run, {"steps": 1e3}, "write 1000$"),
    (Run, {"batch": 8.5}, "write 8$"),
    (Run, {"batch": None}, "not an integer"),
    (Run, {"steps": float("inf")}, "not an integer$"),
    (Run, {"steps": "nan"}, "not an integer$"),
    (Run, {"length": "1k"}, "not an integer"),
    (Run, {"seed": True}, "not an integer"),
    (Run, {"epochs": "3"}, "write 3.0$"),
    (Run, {"z_loss": False}, "not a number"),
    (Optimizer, {"lr": "3e-4"}, "write 0.0003$"),
    (Optimizer, {"warmup": [10]}, "not a number"),
    (LoraOptions, {"rank": "16"}, "write 16$"),
    (LoraOptions, {"alpha": "32"}, "write 32.0$"),
    (LoraOptions, {"rslora": "yes"}, "write True$"),
    (LoraOptions, {"rslora": "false"}, "write False$"),
    (LoraOptions, {"dropout": None}, "not a number"),
    # texts, paths, groups
    (Run, {"model": 3}, "write '3'$"),
    (Run, {"mesh": 4}, "write '4'$"),
    (Run, {"mesh": {"data": 4}}, "not a string"),
    (Run, {"shape": 3}, "not a path"),
    (Run, {"samples": [1]}, "write '1'$"),
    (Data, {"train": 3}, "write '3'$"),
    (Data, {"text_field": None}, "not a string"),
    (Run, {"data": "a.jsonl"}, r"write Data\(...\)$"),
    (Run, {"optimizer": {"lr": 0.1}}, r"write Optimizer\(lr=0.1\)$"),
    (Run, {"lora": 16}, r"write LoraOptions\(...\)$"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG, ids=lambda x: str(x))
def test_wrong_values_are_refused_with_a_way_out(kind: type, values: dict[str, Any], message: str) -> None:
    [name] = values
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} is .*{message}"):
        kind(**values)
    with pytest.raises(ValueError, match=message):
        replace(kind(), **values)


def test_what_the_command_line_accepts() -> None:
    assert Data(train="a.jsonl").train == ("a.jsonl",)
    assert Data(train=["a.jsonl", "b.jsonl"]).train == ("a.jsonl", "b.jsonl")
    assert Data(train=Path("a.jsonl")).train == ("a.jsonl",)
    run = Run(out="run", shape="config.json", samples="Once", report=["wandb"], steps=np.int64(7), z_loss=1)
    assert (run.out, run.shape) == (Path("run"), Path("config.json"))
    assert (run.samples, run.report) == (("Once",), ("wandb",))
    assert (type(run.steps), type(run.z_loss)) == (int, float)
    assert Run() == Run(data=Data(), optimizer=Optimizer(), lora=LoraOptions())


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"\(lora\) need method lora"):
        Run(model="x", data=Data("a.txt"), lora=LoraOptions(rank=4)).check()
    Run(model="x", data=Data("a.txt"), method="lora", lora=LoraOptions(rank=4)).check()
    Run(model="x", data=Data("a.txt"), lora=LoraOptions()).check()


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Run, "stps", "did you mean steps"),
        (Run, "lr", r"did you mean optimizer \(lr=…\)"),
        (Run, "ranks", r"did you mean lora \(rank=…\)"),
        (Data, "streamin", "did you mean streaming"),
        (LoraOptions, "scale", "its fields are rank, alpha, dropout"),
    ],
)
def test_unknown_fields(kind, name, message):
    with pytest.raises(TypeError, match=f"{kind.__name__} has no field {name!r}: {message}"):
        kind(**{name: 1})
