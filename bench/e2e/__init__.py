"""Whole runs of the same task: TRL as it comes, TRL with our head, and this trainer."""

TRL, TRL_OUR_HEAD, OURS = CANDIDATES = ("TRL", "TRL, our head", "ours")
