"""From a source to rendered prompts, and the order in which a run draws them."""
