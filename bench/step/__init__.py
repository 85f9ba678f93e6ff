"""A whole training step beside those of plain trainers, each after a check of its update."""
