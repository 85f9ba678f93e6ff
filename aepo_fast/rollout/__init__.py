"""Sampling completions with Transformers or vLLM, and keeping the engine's weights the policy's."""
