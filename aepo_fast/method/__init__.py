"""The algorithm without a model, input or output: losses, advantages, AEPO's term and the entropy
controllers.
"""
