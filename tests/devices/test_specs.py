"""The table of accelerators, and the names of slices."""

import pytest

from jaxlm.devices import specs


@pytest.mark.parametrize(
    ("text", "count", "name", "devices"),
    [
        ("v5e-8", None, "v5e", 8),
        ("v6e", None, "v6e", 1),
        ("v5e", 8, "v5e", 8),
        ("v5p-8", None, "v5p", 4),  # named by cores, two a device
        ("V5P-8", 4, "v5p", 4),
        ("v2-8", None, "v2", 8),  # a core is a device
        ("v4-16", None, "v4", 8),
        ("h100", None, "H100", 1),
        ("H100-8", None, "H100", 8),
        ("A100-40GB", None, "A100-40GB", 1),  # not 40 of something
        ("A100-40GB-2", None, "A100-40GB", 2),
    ],
)
def test_names(text: str, count: int | None, name: str, devices: int) -> None:
    spec, found = specs.parse(text, count)
    assert (spec.name, found) == (name, devices)
    assert specs.parse(specs.slice_name(spec, found)) == (spec, found)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("v9", None, "unknown device 'v9'.*v5e, v5p.*H200"),
        ("H10", None, "did you mean H100"),
        ("v5p-3", None, "named by cores.*v5p-2"),
        ("v5e-8", 4, "has 8 devices, but 4"),
        ("v5e-0", None, "at least one"),
        ("v5e", 0, "at least one"),
        ("", None, "unknown device"),
    ],
)
def test_wrong_names(text: str, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs.parse(text, count)


def test_kinds_of_jax() -> None:
    """A variant has its own figures, and a longer name is not taken for its beginning."""
    for kind, name in {
        "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4", "TPU7x": "tpu7x",
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB", "NVIDIA A100 80GB PCIe": "A100-PCIe", "TPU v5p": "v5p",
        "NVIDIA H100 NVL": "H100-NVL", "NVIDIA H200": "H200", "NVIDIA L4": "L4", "NVIDIA L40S": "L40S",
    }.items():  # fmt: skip
        found = specs.find(kind)
        assert found is not None
        assert found.name == name
    assert specs.find("NVIDIA GeForce RTX 4090") is None
    assert specs.find("NVIDIA L40") is None
    assert specs.find("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a part of the card
    assert specs.find("TPU v4 lite") is None


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth", "teraflops", "link"),
    [
        ("v5e", 16, 819, 197, 200), ("v6e", 32, 1640, 918, 400), ("v5p", 95, 2765, 459, 600),
        ("v2", 16 / 2, 700 / 2, 45 / 2, 248 / 2), ("tpu7x", 192 / 2, 7380 / 2, 2307 / 2, 600 / 2),
        ("A100", 80, 2039, 312, 600 / 2), ("H100", 80, 3350, 989, 900 / 2), ("H200", 141, 4800, 989, 900 / 2),
    ],
)  # fmt: skip
def test_figures(name: str, memory: float, bandwidth: float, teraflops: float, link: float) -> None:
    """GB, GB/s, TFLOP/s and GB/s of links in one direction, as the pages state them for a chip or a card."""
    spec = specs.BY_NAME[name]
    found = spec.memory / 1e9, spec.bandwidth / 1e9, spec.flops / 1e12, spec.link / 1e9
    assert found == pytest.approx((memory, bandwidth, teraflops, link))


def test_figures_are_of_the_published_order() -> None:
    """Bytes, bytes/s and FLOP/s, not gigabytes: every device needs 50 to 800 FLOPs a byte to be bound by arithmetic."""
    for spec in specs.DEVICES:
        assert 8e9 <= spec.memory <= 200e9, spec.name
        assert 50 < spec.flops / spec.bandwidth < 800, spec.name
        assert 10 < spec.memory / spec.bandwidth * 1e3 < 100, spec.name  # ms to read all of it
        assert spec.link < spec.bandwidth
        assert spec.source.startswith("https://")
