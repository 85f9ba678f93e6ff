"""What a user types: train, eval, plot, configs, doctor and bench."""
