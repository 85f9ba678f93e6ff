"""The Triton kernels, and how each is launched; only these modules import triton."""
