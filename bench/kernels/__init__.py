"""The kernels beside plain PyTorch, other projects and the bare GEMMs, each after a check."""
