"""How fast the rollout engines sample, and how fast they take new weights."""
