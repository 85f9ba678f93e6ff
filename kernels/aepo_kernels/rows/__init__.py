"""What a row of logits gives and takes: the interface of row operations, and torch's own."""
