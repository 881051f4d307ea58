"""metrics.jsonl, TensorBoard, Weights & Biases, the loss plot, and analytic FLOPs."""

import json
import struct
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import tiny

from jaxlm.devices import hardware
from jaxlm.nn import flops, params
from jaxlm.training import metrics

LINES = [{"step": n, "loss": 5 / n, "learning_rate": 0.1} for n in range(1, 30)] + [{"step": 29, "valid_loss": 0.3}]


def test_lines_after_the_step_and_truncated_lines_are_removed(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES[:9]) + '{"step": 10, "lo')
    lines = metrics.MetricsFile(path, 5)
    lines.add({"step": 6, "loss": 1.0})
    assert [line["step"] for line in metrics.read(path)] == [1, 2, 3, 4, 5, 6]
    assert metrics.read(path)[-1]["loss"] == 1.0


def test_an_earlier_version_named_two_metrics_otherwise(tmp_path) -> None:
    """Its file reads with today's names, and has them after the run resumes."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "gradient": 0.5, "rate": 0.1}\n')
    line = {"step": 1, "loss": 2.0, "grad_norm": 0.5, "learning_rate": 0.1}
    assert metrics.read(path) == [line]
    assert metrics.MetricsFile(path, 1).kept == [line]
    assert json.loads(path.read_text()) == line
    assert metrics.plot_loss(metrics.read(path), tmp_path / "loss.png", "a run")


@pytest.mark.parametrize("damaged", [b"", b"\0\0", b'{"step": 3, "te\xff": 1}', b'{"step": 3', b"3", b'{"loss": 1.0}'])
def test_a_damaged_line_is_named(damaged, tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n' + damaged + b'\n{"step": 4, "loss": 1.0}\n'
    path.write_bytes(before)
    for open_file in (metrics.read, lambda path: metrics.MetricsFile(path, 4)):
        with pytest.raises(ValueError, match=rf"^{path}:3 is damaged"):
            open_file(path)
    assert path.read_bytes() == before


def test_events_for_tensorboard(tmp_path) -> None:
    """The file has records (length, checksum, event, checksum) with names, steps and numbers."""
    [service] = metrics.services(("tensorboard",), tmp_path, {})
    service.add({"step": 7, "loss": 2.5, "text": "Once"})
    service.close()
    [path] = tmp_path.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(data[12 : 12 + length])
        data = data[16 + length :]
    assert any(b"loss" in event and struct.pack("<f", 2.5) in event for event in events)
    assert any(b"Once" in event for event in events)


def test_weights_and_biases_receives_each_line(tmp_path, monkeypatch) -> None:
    """With a fake module. The folder keeps the id of the run, so that a resumed run continues it."""
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda line, step: calls.append((step, line)), finish=lambda: calls.append("end"))
    fake = SimpleNamespace(init=lambda **how: calls.append(how) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        [service] = metrics.services(("wandb",), tmp_path, {"steps": 3})
        service.add({"step": 2, "loss": 1.5})
        service.close()
    assert calls[0] == calls[3]
    assert (calls[0]["name"], calls[0]["resume"], calls[0]["config"]) == (tmp_path.name, "allow", {"steps": 3})
    assert len(calls[0]["id"]) == 12
    assert calls[1:3] == [(2, {"loss": 1.5}), "end"]


@pytest.mark.parametrize(("name", "module", "extra"), [("wandb", "wandb", "wandb"),
                                                       ("tensorboard", "tensorboardX", "tensorboard")])  # fmt: skip
def test_a_missing_package_of_a_service(name, module, extra, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'jaxlm\[{extra}\]'"):
        metrics.require((name,))


def test_the_loss_plot(tmp_path) -> None:
    """It has the colors of training and validation loss."""
    from matplotlib import colors
    from matplotlib.image import imread

    assert metrics.plot_loss(LINES, tmp_path / "loss.png", "a run")
    pixels = imread(tmp_path / "loss.png")[..., :3].reshape(-1, 3)
    assert len(pixels) == 960 * 540
    for color in ("C0", "C1"):
        near = np.abs(pixels - np.array(colors.to_rgb(color))).max(axis=1) < 0.02
        assert near.sum() > 50


def test_no_plot_without_matplotlib(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not metrics.plot_loss(LINES, tmp_path / "loss.png", "a run")
    assert not (tmp_path / "loss.png").exists()


def test_the_moving_average_does_not_lag() -> None:
    """A line stays a line to its ends, and a peak spreads to both sides."""
    line = np.arange(9.0)
    np.testing.assert_allclose(metrics.moving_average(line, 3), line)
    np.testing.assert_allclose(metrics.moving_average(np.array([0, 0, 0, 5.0, 0, 0, 0]), 2), [0, 0, 1, 1, 1, 0, 0])


def test_flops_per_token() -> None:
    """By hand for an untied Llama of 2 layers, D 48, F 72, N 4, K 2, H 12, V 199 in rows of 10."""
    model = tiny("llama3")
    table, cfg = model.family.PARAMS, model.config
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 72 + 2 * 48
    weights = 2 * layer + 48 + 199 * 48
    assert flops.multiplied(table, cfg) == weights == params.count(table, cfg) - 199 * 48
    attention = 6 * 2 * 12 * 4 * 10
    assert flops.training(table, cfg, 10) == 6 * weights + attention
    assert flops.training(table, cfg, 10, adapter=100) == 4 * weights + 600 + attention


def test_the_longest_matching_device_name_counts() -> None:
    """A card that is slower than its family has its own peak."""
    kinds = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989,
             "NVIDIA H200 NVL": 835, "NVIDIA A100-SXM4-80GB": 312, "TPU v5 lite": 197, "TPU v5": 459}  # fmt: skip
    for kind, figure in kinds.items():
        source = f"{kind}, {figure} TFLOP/s bfloat16 (specified)"
        assert hardware.peak(SimpleNamespace(device_kind=kind, platform="gpu")) == (figure * 1e12, source)


def test_flops_of_sliding_window_attention() -> None:
    """A window has fewer keys per query than half a row."""
    cfg = tiny("gemma3").config
    assert cfg.windows == (5, None)
    seen = np.mean([min(i + 0.5, 5) for i in range(100)])
    table = tiny("gemma3").family.PARAMS
    attention = flops.training(table, cfg, 100) - 6 * flops.multiplied(table, cfg)
    np.testing.assert_allclose(attention, 12 * cfg.N * cfg.H * (seen + 50), rtol=1e-3)


def test_the_peak_of_an_unknown_accelerator_is_that_of_bfloat16(monkeypatch) -> None:
    """A float32 peak would give an MFU above 100 %."""
    seen = []
    monkeypatch.setattr(hardware.specs, "of_device", lambda device: None)
    monkeypatch.setattr(hardware.jax, "jit", lambda f: lambda a, b: seen.append(a.dtype.name) or a)
    monkeypatch.setattr(hardware.jax, "default_device", lambda device: nullcontext())
    for platform, kind in (("gpu", "bfloat16"), ("cpu", "float32")):
        device = SimpleNamespace(device_kind="NVIDIA X1", platform=platform)
        assert kind in hardware.peak(device, sizes=(2,))[1]
        assert set(seen) == {kind}
        seen.clear()
