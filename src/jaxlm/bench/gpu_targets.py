"""Descriptions of NVIDIA GPUs for XLA's compiler, which compiles with them on a machine without a GPU.

Figures: NVIDIA's architecture white papers of A100 and H100, its data sheet of H200, and the CUDA programming guide's
table of compute capabilities. Nothing is autotuned without a GPU: a card may choose other kernels.
"""

import importlib.util
from typing import Any, NamedTuple

from jaxlm.devices.specs import Spec


class Target(NamedTuple):
    """What the compiler asks of a GPU beyond devices/specs.py.

    Attributes:
        capability: Compute capability.
        cores: Streaming multiprocessors.
        clock: GHz.
        fpus: Float32 units of a multiprocessor.
        l2: L2 cache, bytes.
        shared: Shared memory of a multiprocessor, bytes. A block may use 1 KiB less.
    """

    capability: str
    cores: int
    clock: float
    fpus: int
    l2: int
    shared: int


TARGETS = {
    "A100": Target("8.0", 108, 1.41, 64, 40 << 20, 164 << 10),
    "H100": Target("9.0", 132, 1.98, 128, 50 << 20, 228 << 10),
    "H200": Target("9.0", 132, 1.98, 128, 50 << 20, 228 << 10),
}


def text(spec: Spec) -> str:
    """The description of a GPU as XLA's GpuTargetConfigProto in protobuf's text format.

    Raises:
        ValueError: There is no description of this GPU.
    """
    if spec.name not in TARGETS:
        raise ValueError(f"no description of {spec.name} for the CUDA compiler; there are {', '.join(TARGETS)}")
    target = TARGETS[spec.name]
    major, minor = target.capability.split(".")
    feature = "feature_extension: ACCELERATED_FEATURES" if major == "9" else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: {48 << 10}
  shared_memory_per_core: {target.shared}
  shared_memory_per_block_optin: {target.shared - 1024}
  core_count: {target.cores}  fpus_per_core: {target.fpus}  clock_rate_ghz: {target.clock}
  block_dim_limit_x: {2**31 - 1}  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {spec.bandwidth:.0f}  device_memory_size: {spec.memory:.0f}  l2_cache_size: {target.l2}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  device_vendor: "NVIDIA Corporation"  name: "{spec.kind}"  device_address_bits: 64  ecc_enabled: true
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{spec.kind}"
"""


def devices(spec: Spec, count: int) -> list[Any]:
    """The GPUs of a host, for compilation only.

    Raises:
        ValueError: The CUDA compiler is not installed, or there is no description of this GPU.
    """
    from jax.experimental import topologies

    described = text(spec)
    if importlib.util.find_spec("jax_cuda13_plugin") is None and importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ValueError(f"the CUDA compiler is not installed: pip install 'jax[cuda13]' to compile for {spec.name}")
    options: dict[str, Any] = {"topology": f"1x1x{count}", "target_config": described}
    return list(topologies.get_topology_desc(platform="cuda", topology_name=spec.kind, **options).devices)
