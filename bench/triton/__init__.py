"""The Triton kernels by themselves: what they compile to, and which launch is the fastest."""
