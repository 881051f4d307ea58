"""Short names of published models for the benchmarks: name -> what config.json says of the text model."""

from jaxlm.bench.published import MODELS as PUBLISHED

IDS = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "gemma-3-27b": "google/gemma-3-27b-pt",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
}
MODELS = {name: PUBLISHED[id].config.get("text_config", PUBLISHED[id].config) for name, id in IDS.items()}
