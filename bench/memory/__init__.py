"""The memory that a plan predicts beside what a run takes, each run in a process of its own."""
