"""`jaxlm plan`: text, JSON and wrong input."""

import json
from typing import Any

import pytest

from jaxlm import cli


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *args])
    out = capsys.readouterr()
    return status, out.out, out.err


def facts(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    return json.loads(run(capsys, *args, "--json")[1])


def test_generation(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "qwen3-32b", "--device", "v6e", "--chips", "8", "--batch", "16", "--context", "8192")
    assert status == 0
    assert "Qwen/Qwen3-32B on 8 x v6e, bfloat16, mesh data=1,model=8" in out
    found = facts(capsys, "Qwen/Qwen3-32B", "--device", "v6e-8", "--batch", "16", "--context", "8192")
    memory = found["memory"]
    assert memory["weights"] == 8_192_134_400 // 1 or memory["weights"] > 0
    assert sum(memory[part] for part in ("weights", "cache", "new_cache", "temporaries", "programs")) == memory["total"]
    assert found["decode"]["seconds"] * found["tokens_per_second"] == pytest.approx(16)
    assert f"{memory['total'] / 1e9:.2f} GB" in out
    assert f"batch {found['max_batch']:,}" in out


def test_the_largest_batch_and_context_fit_and_more_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "llama-3.1-8b", "--device", "H100")
    for rows, fits in ((found["max_batch"], True), (found["max_batch"] + 1, False)):
        assert facts(capsys, "llama-3.1-8b", "--device", "H100", "--batch", str(rows))["fits"] is fits
    for length, fits in ((found["max_context"], True), (found["max_context"] + 1, False)):
        assert facts(capsys, "llama-3.1-8b", "--device", "H100", "--context", str(length))["fits"] is fits


def test_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "llama-3.1-70b", "--device", "H100")
    assert status == 1
    assert "Does not fit. Any one of these fits: --quantize int4" in out
    assert "or H100-4" in out
    assert facts(capsys, "llama-3.1-70b", "--device", "H100-4")["fits"]
    assert not facts(capsys, "llama-3.1-70b", "--device", "H100-2")["fits"]
    _, out, _ = run(capsys, "qwen3-8b", "--device", "v5p-2", "--batch", "500")
    assert "Any one of these fits: batch " in out


def test_quantized_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Of Llama 3.1 8B: a byte for each weight but norms, and 4 bytes of scale for each output channel; int4 has 5 bits
    for each weight of the layers, and embedding, head, keys and values as int8."""
    table, norms = 2 * 128256 * 4096, 65 * 4096
    layers = 8_030_261_248 - table - norms
    channels = 2 * 128256 + 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    as_int8, rest = table + 64 * 1024 * 4096, layers - 64 * 1024 * 4096
    sizes = {"int8": table + layers + 4 * channels, "int4": as_int8 + 4 * (2 * 128256 + 64 * 1024) + rest * 5 // 8}
    for name, nbytes in sizes.items():
        found = facts(capsys, "llama-3.1-8b", "--device", "v6e", "--quantize", name)
        assert (found["quantize"], found["memory"]["weights"]) == (name, nbytes + 2 * norms)
    status, out, _ = run(capsys, "llama-3.1-70b", "--device", "H100")
    assert (status, "--quantize int4 (weights" in out, "--quantize int8" in out) == (1, True, False)
    assert facts(capsys, "llama-3.1-70b", "--device", "H100", "--quantize", "int4")["fits"]


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3.1 8B in float32 with AdamW: 12 bytes a parameter over eight devices, and its step by hand."""
    found = facts(capsys, "llama-3.1-8b", "--device", "v6e-8", "--train", "--context", "8192")
    memory, N = found["memory"], 8_030_261_248
    assert memory["weights"] + memory["optimizer"] == pytest.approx(12 * N / 8, rel=1e-3)
    multiplied = N - 128256 * 4096
    model = 8 * 8192 * (6 * multiplied + 6 * 32 * 4096 * 8192)
    assert found["step"]["compute"] == pytest.approx(4 / 3 * model / 8 / 918e12)  # the forward pass runs twice
    assert found["mfu"] == pytest.approx(model / 8 / 918e12 / found["step"]["seconds"])
    status, out, _ = run(capsys, "qwen3-4b", "--device", "v6e-1", "--train", "--context", "512", "--batch", "8")
    assert status == 1
    assert "Does not fit" in out
    smaller = ("--optimizer", "adafactor", "--weight-dtype", "bfloat16", "--grad-dtype", "bfloat16")
    assert facts(capsys, "qwen3-4b", "--device", "v6e-1", "--train", "--context", "512", "--batch", "8", *smaller)[
        "fits"
    ]


def test_a_folder_needs_no_published_name(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 128, "tie_word_embeddings": True, "torch_dtype": "float32"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = facts(capsys, str(tmp_path), "--device", "v5e-4", "--context", "64", "--batch", "4")
    assert found["dtype"] == "float32"
    assert found["memory"]["weights"] > 0


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU has no published figures: its memory is its own, its rates are measured."""
    found = facts(capsys, "qwen3-0.6b", "--context", "512")
    assert found["device"]["platform"] == "cpu"
    assert found["device"]["source"] == "measured now"
    assert found["device"]["memory"] > 1e9
    assert found["device"]["bandwidth"] > 1e9


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("qwen3-0.6b", "--device", "v9"), 1, "unknown device 'v9'"),
        (("qwen3-0.6b", "--device", "v5p-3"), 1, "named by cores"),
        (("qwen3-0.6b", "--device", "v5e-8", "--mesh", "model=3"), 1, "try data="),
        (("qwen3-0.6b", "--device", "v5e-8", "--mesh", "rows=8"), 1, "unknown axis"),
        (("qwen3-0.6b", "--device", "v5e-8", "--chips", "4"), 1, "has 8 devices"),
        (("qwen3-0.6b", "--device", "v5e", "--batch", "0"), 1, "at least 1"),
        (("qwen3-0.6b", "--device", "v5e-8", "--train", "--batch", "12"), 1, "try 16"),
        (("qwen3-0.6b", "--chips", "99"), 1, "--chips 99"),
        (("qwen-0.6b", "--device", "v5e", "--offline"), 1, "Qwen/Qwen3-0.6B"),
        ((), 2, "pass one model"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], status: int, message: str) -> None:
    found, out, err = run(capsys, *args) if args else (2, "", "pass one model")
    assert found == status
    assert message in err
    assert err.count("\n") <= 1
    assert out == ""
