"""Predicts what a run needs in memory, before any weights load."""
