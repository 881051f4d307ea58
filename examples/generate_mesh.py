"""Generates text on a mesh of 1 x 4 devices: tensor parallelism, with a quarter of each weight on each device.

    python examples/generate_mesh.py
    python examples/generate_mesh.py --model meta-llama/Llama-3.2-1B --prompt "The capital of France is"

With fewer than four GPUs or TPU chips, it makes four virtual devices of the CPU. They compute the same, but not faster.
docs/scaling.md describes meshes. The tokens are those of generate_single_device.py.
"""

import os
from pathlib import Path

import tyro

STORIES = Path(__file__).parents[1] / "src" / "jaxlm" / "stories"


def main(model: str = str(STORIES), prompt: str = "Once upon a time", max_tokens: int = 32) -> list[int]:
    """Returns the tokens of the continuation.

    Args:
        model: Hub id, folder or .gguf file.
        prompt: Text to continue.
        max_tokens: Maximum number of tokens to generate.
    """
    # jax reads the flag when it makes its first device. A number of devices in XLA_FLAGS comes later, and wins.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
    import jax

    import jaxlm

    devices = jax.devices() if len(jax.devices()) >= 4 else jax.devices("cpu")
    mesh = jax.make_mesh((1, 4), ("data", "model"), devices=devices[:4])
    print(f"mesh {dict(mesh.shape)} of {devices[0].platform} devices")
    loaded = jaxlm.load(model, dtype="float32", mesh=mesh)
    gate = loaded.weights["layers"][0]["gate"]
    print(f"{loaded!r}\nlayers.0.gate {gate.shape}: {gate.sharding.shard_shape(gate.shape)} on each device")
    completion = jaxlm.generate(loaded, prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    print(prompt + completion)
    print(f"tokens: {completion.tokens}")
    return completion.tokens


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
