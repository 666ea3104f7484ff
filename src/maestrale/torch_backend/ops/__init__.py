"""The kernel seam: plain tensors in, plain tensors out. `reference` defines the answer, the others are tested on it."""
