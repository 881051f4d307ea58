"""llama.cpp's side of benchmarks/decode.py and prefill.py: the same weights as a GGUF file, run by xllamacpp.

    pip install xllamacpp gguf numpy      # in an environment of its own
    python benchmarks/decode.py --llama-python PYTHON

It writes the names of its contestants on one line, then answers each line [name, batch, prompt length] with tokens a
second of all rows together: the new tokens, or with --prefill those of the prompt. Requests are made within the
process. The server of xllamacpp listens on the loopback address only.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The name of a Hugging Face tensor of Qwen3 in GGUF."""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def tensors(file: Path) -> dict[str, np.ndarray]:
    """The bfloat16 tensors of a safetensors file, as bytes [..., 2 x the last axis]."""
    raw = np.memmap(file, np.uint8, "r")
    size = int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        found[name] = raw[begin:end].reshape(*entry["shape"][:-1], -1)
    return found


def write_gguf(folder: Path, out: Path) -> None:
    """Writes a Qwen3 checkpoint without a tokenizer as GGUF."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # llama.cpp needs a vocabulary, whose tokens are not used: prompts are ids.
    V = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{i}>" for i in range(V)])
    writer.add_token_types([gguf.TokenType.NORMAL] * V)
    writer.add_token_merges(["< 0"])
    for name, data in tensors(folder / "model.safetensors").items():
        if "norm" in name:  # llama.cpp keeps vectors in float32
            values = (np.frombuffer(data.tobytes(), np.uint16).astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    import xllamacpp

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="a checkpoint of benchmarks/common.py")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="the largest")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--prefill", action="store_true", help="measure the prompt instead of the new tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    file = args.folder / "bfloat16.gguf"
    if not file.exists():
        unfinished = file.with_suffix(".part")
        write_gguf(args.folder, unfinished)
        unfinished.rename(file)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = args.context * args.batch, args.batch, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.hostnames, params.verbosity = ["127.0.0.1"], -1
    server = xllamacpp.Server(params)

    def speed(prompt: list[int]) -> float:
        answer = server.handle_completions({
            "prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "timings_per_token": True,
        })  # fmt: skip
        if isinstance(answer, str):
            answer = json.loads(answer)
        return answer["timings"]["prompt_per_second" if args.prefill else "predicted_per_second"]

    print(json.dumps(["llama.cpp bfloat16"]), flush=True)
    for line in sys.stdin:
        _, batch, length = json.loads(line)
        prompts = [[(7 * i + row) % 100_000 + 10 for i in range(length)] for row in range(batch)]
        with ThreadPoolExecutor(batch) as pool:
            print(json.dumps(sum(pool.map(speed, prompts))), flush=True)


if __name__ == "__main__":
    main()
