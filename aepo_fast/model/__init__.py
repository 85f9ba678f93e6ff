"""The policy: its weights and layers, micro-batches for it, and the head over them."""
