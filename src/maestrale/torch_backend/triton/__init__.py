"""The torch backend's kernels for a GPU, in Triton; run on the CPU by Triton's interpreter, for tests."""
