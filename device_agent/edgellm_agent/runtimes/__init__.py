"""Inference runtimes behind one protocol: `base` is the contract, its siblings are the variants."""
