"""What a run leaves to read: metrics, sample completions and the plot."""
