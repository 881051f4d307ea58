"""The notebooks run from a clean kernel, with a tiny model and few steps, and their results are right."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from examples.conftest import EXAMPLES

pytestmark = pytest.mark.oracle
TEXT = "the river runs to the sea . the town lies on the river , and the people of the town sail to the sea . "


def run(
    name: str, values: str, monkeypatch: pytest.MonkeyPatch, code: str = "", **environment: str
) -> tuple[list[Any], Any]:
    """Executes a notebook, and `code` in its kernel at the end. Returns its outputs, and the value of an expression."""
    import nbformat
    from nbclient import NotebookClient

    for key, value in environment.items():
        monkeypatch.setenv(f"JAXLM_EXAMPLE_{key}", value)
    monkeypatch.delenv("JAX_DEFAULT_DEVICE", raising=False)
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    notebook = nbformat.read(EXAMPLES / name, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n{code}\nprint(json.dumps({values}))"))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output["text"] for output in outputs if output["output_type"] == "stream"]
    assert "Warning" not in "".join(texts)
    return outputs[:-1], json.loads(texts[-1])


def images(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_train_and_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [f" = Town {i} = \n\n {TEXT * 12}\n\n = = Sea = = \n\n the sea .\n" for i in range(60)]
    (tmp_path / "text.txt").write_text("".join(articles))
    values = '[[line["loss"] for line in metrics if "loss" in line], trained.last["valid_loss"], texts, articles[:2]]'
    settings = {"TEXT": str(tmp_path / "text.txt"), "STEPS": "12", "OUT": str(tmp_path / "out")}
    outputs, (losses, valid_loss, texts, found) = run("train_and_generate.ipynb", values, monkeypatch, **settings)
    assert [article.split("\n")[0].strip() for article in found] == ["= Town 0 =", "= Town 1 ="]
    assert losses[-1] < losses[0] - 1
    assert valid_loss < losses[0] - 1
    assert images(outputs) == 1
    assert len(texts) == 2
    assert all(texts)


def test_chat_with_a_real_model(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = "[losses, before, after, conversation.messages, best[-1].tolist(), predicted]"
    code = "predicted = model.forward(tokens, model.weights)[0][0].argmax(-1).tolist()"
    outputs, results = run("chat_with_a_real_model.ipynb", values, monkeypatch, code, MODEL=folder, STEPS="6")
    losses, before, after, messages, lens, predicted = results
    assert losses[-1] < losses[0]
    assert len(before) == len(after) == 3
    assert before != after
    assert len(messages) == 4
    assert lens == predicted  # the lens of the last layer is the output of the model
    assert images(outputs) == 1


def test_benchmark(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SIZES": "-p 16 -n 8 -b 1 -r 1", "TRAIN_SIZES": "-p 16 -b 2 -r 1"}
    outputs, device = run("benchmark.ipynb", "DEVICE", monkeypatch, MODEL=folder, **sizes)
    assert device == "cpu"
    tables = [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    rows = {cells[1]: cells for table in tables[:2] for line in table.splitlines() if len(cells := line.split("|")) > 4}
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert {"pp16", "tg8"} <= rows.keys()
    columns = rows["test"]
    assert float(rows["tg8"][columns.index("tokens/s")].split()[0].replace(",", "")) > 0
    assert "### Sampling" in tables[2]
