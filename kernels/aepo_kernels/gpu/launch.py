"""How each Triton kernel is launched on each chip: a table, so that no first call tunes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeVar

import torch

_Launch = TypeVar("_Launch")


class RowLaunch(NamedTuple):
    """block: columns a program holds at once. stages: blocks on their way from memory."""

    block: int
    num_warps: int
    stages: int = 1


class FusedLaunch(NamedTuple):
    """Tile of tokens by vocabulary by hidden; group: tiles of tokens that share
    those of the weight. tma: load by the copy engine where strides and addresses allow. split: sum
    up one half of a tile after the other."""

    block_tokens: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    stages: int
    group: int = 8
    tma: bool = False
    split: bool = False


# By compute capability; a chip that is not listed takes the nearest one below. Those of sm_90 are
# the fastest of a sweep on an H200. The others have not been timed: they are chosen by what they
# compile to, with 16-byte loads and registers for several programs on a multiprocessor.
STATS_LAUNCH = {80: RowLaunch(1024, 4, stages=4), 90: RowLaunch(4096, 8)}
GRAD_LAUNCH = {80: RowLaunch(2048, 4)}
# The largest tiles whose epilogue spills no register, with every option on.
FUSED_LAUNCH = {
    80: FusedLaunch(128, 128, 32, num_warps=8, stages=4),
    90: FusedLaunch(128, 256, 64, num_warps=8, stages=4, group=16, tma=True, split=True),
    100: FusedLaunch(128, 128, 64, num_warps=8, stages=4, tma=True),
    120: FusedLaunch(128, 128, 64, num_warps=8, stages=3),
}
# For what the copy engine cannot read: pointers to the elements of a tile take registers as well.
FUSED_POINTER_LAUNCH = FUSED_LAUNCH | {
    90: FusedLaunch(128, 128, 64, num_warps=8, stages=3),
    100: FusedLaunch(128, 128, 64, num_warps=8, stages=4),
}
# float32 products are plain multiply-adds, whose tiles have to be small.
FUSED_FLOAT32_LAUNCH = {80: FusedLaunch(64, 64, 16, num_warps=4, stages=3)}


def stats_launch(device: torch.device) -> RowLaunch:
    """Launch of the row statistics on a device."""
    return nearest(STATS_LAUNCH, capability(device))


def grad_launch(device: torch.device) -> RowLaunch:
    """Launch of the row gradients on a device."""
    return nearest(GRAD_LAUNCH, capability(device))


def fused_launch(device: torch.device, dtype: torch.dtype, fits_tma: bool) -> FusedLaunch:
    """Launch of the fused forward on a device; fits_tma: the copy engine could read the inputs."""
    table = FUSED_LAUNCH if fits_tma else FUSED_POINTER_LAUNCH
    if dtype == torch.float32:
        table = FUSED_FLOAT32_LAUNCH
    return nearest(table, capability(device))


def nearest(table: dict[int, _Launch], chip: int) -> _Launch:
    """The entry of the highest capability that is not above the chip's, or else the lowest."""
    return table[max((known for known in table if known <= chip), default=min(table))]


@cache
def capability(device: torch.device) -> int:
    """Compute capability times ten; 0 where there is no GPU, as under Triton's interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
