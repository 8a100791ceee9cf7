"""Speed and memory beside the peers, on this machine: `python -m benchmarks --model GGUF`."""
