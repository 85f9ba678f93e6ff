"""A run: its parts put together, the step, the update, checkpoints and evaluation."""
