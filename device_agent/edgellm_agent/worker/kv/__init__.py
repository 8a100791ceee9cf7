"""The KV cache: memory of two kinds, and the pool that accounts for it."""
