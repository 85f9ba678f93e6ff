"""The kernels inside other trainers: one module per peer, which imports its peer when it is used.

Importing this package needs torch only. `head_arguments` is what all of these modules share.
"""

from aepo_kernels.integrations.heads import backbone_of, head_arguments

__all__ = ["backbone_of", "head_arguments"]
