"""What all benchmarks share: the machine and its result files, and timing."""
