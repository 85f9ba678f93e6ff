"""The head a few tokens at a time: log-probs, losses and gradients without [N, V] logits."""
