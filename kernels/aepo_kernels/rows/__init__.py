"""Row operations: statistics and gradients of rows of logits. Their interface, and torch's own."""
