"""From completions to rewards: task verifiers, math answers, the user's own functions."""
