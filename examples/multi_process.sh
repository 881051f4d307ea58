#!/usr/bin/env bash
# Two processes on this machine generate one text together, as on two machines of a cluster:
#
#   bash examples/multi_process.sh
#   bash examples/multi_process.sh Qwen/Qwen3-0.6B "The capital of France is"
#
# jax.distributed connects them on the loopback address. Each process has two virtual devices of the CPU, and holds the
# weights of its devices only. Process 0 prints the text. docs/scaling.md has the commands for clusters.
set -euo pipefail
model=${1:-$(dirname "$0")/../src/jaxlm/stories}
prompt=${2:-Once upon a time}

export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
generate=(python -m jaxlm generate -m "$model" --raw --mesh data=1,model=4 --temperature 0 --max-tokens 32
  --coordinator "127.0.0.1:$port" --num-processes 2 "$prompt")

echo "two processes with two devices each, connected at 127.0.0.1:$port" >&2
"${generate[@]}" --process-id 1 &
trap 'kill %1 2>/dev/null || true' EXIT
"${generate[@]}" --process-id 0
wait %1
