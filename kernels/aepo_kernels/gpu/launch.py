"""How each Triton kernel is launched on each chip: a table, so that no first call has to tune."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeVar

import torch

_Launch = TypeVar("_Launch")


class RowLaunch(NamedTuple):
    """Launch of a row kernel. block: columns that a program holds at once.

    stages: blocks that are loaded while others are computed.
    """

    block: int
    num_warps: int
    stages: int = 1


class FusedLaunch(NamedTuple):
    """Launch of the fused forward: a tile is block_tokens by block_vocab, summed over block_hidden.

    group: tiles of tokens that share tiles of the weight. tma: the copy engine loads the tiles.
    split: the two halves of a tile are summed up one after the other.
    """

    block_tokens: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    stages: int
    group: int = 8
    tma: bool = False
    split: bool = False


# Keys are compute capabilities times ten. A chip that is not listed takes the nearest key below.
# Entries for sm_90 come from sweeps on an H200: STATS_LAUNCH is the fastest without a second
# temperature of bench/results/h200/launches-20261126-2.json, GRAD_LAUNCH (its entry of 80) the
# fastest of launches-20261126-1.json beside it. Other entries are not timed. What the kernels
# compile to chose them (bench/results/compiled): 16-byte loads, and registers for several programs
# on a multiprocessor.
STATS_LAUNCH = {80: RowLaunch(1024, 4, stages=4), 90: RowLaunch(4096, 8)}
GRAD_LAUNCH = {80: RowLaunch(2048, 4)}
# The largest tiles whose epilogue spills no register with every option on, compiled by triton 3.9:
# bench/results/compiled/triton-3.9.0.json. launches-20261126-2.json has times for sm_90.
FUSED_LAUNCH = {
    80: FusedLaunch(128, 128, 32, num_warps=8, stages=4),
    90: FusedLaunch(128, 256, 64, num_warps=8, stages=4, group=16, tma=True, split=True),
    100: FusedLaunch(128, 128, 64, num_warps=8, stages=4, tma=True),
    120: FusedLaunch(128, 128, 64, num_warps=8, stages=3),
}
# With sums of logits and the largest one before the target, the tile of 90 would spill. Not timed.
FUSED_LOGIT_STATS_LAUNCH = FUSED_LAUNCH | {90: FUSED_LAUNCH[100]}
# For matrices that the copy engine cannot read. Pointers to a tile's elements need registers, so
# the tiles are smaller. Not timed.
FUSED_POINTER_LAUNCH = FUSED_LAUNCH | {
    90: FusedLaunch(128, 128, 64, num_warps=8, stages=3),
    100: FusedLaunch(128, 128, 64, num_warps=8, stages=4),
}
# float32 products are plain multiply-adds, which need small tiles. Not timed.
FUSED_FLOAT32_LAUNCH = {80: FusedLaunch(64, 64, 16, num_warps=4, stages=3)}


def stats_launch(device: torch.device) -> RowLaunch:
    """The launch of the row statistics on a device."""
    return nearest(STATS_LAUNCH, capability(device))


def grad_launch(device: torch.device) -> RowLaunch:
    """The launch of the row gradients on a device."""
    return nearest(GRAD_LAUNCH, capability(device))


def fused_launch(
    device: torch.device, dtype: torch.dtype, fits_tma: bool, logit_stats: bool
) -> FusedLaunch:
    """The launch of the fused forward for inputs of a dtype on a device.

    fits_tma: the copy engine can read the inputs. logit_stats: see `fused.linear_row_stats`.
    """
    table = FUSED_LOGIT_STATS_LAUNCH if logit_stats else FUSED_LAUNCH
    if not fits_tma:
        table = FUSED_POINTER_LAUNCH
    if dtype == torch.float32:
        table = FUSED_FLOAT32_LAUNCH
    return nearest(table, capability(device))


def nearest(table: dict[int, _Launch], chip: int) -> _Launch:
    """The entry of the highest capability that is not above `chip`, else of the lowest one."""
    return table[max((known for known in table if known <= chip), default=min(table))]


@cache
def capability(device: torch.device) -> int:
    """A device's compute capability times ten; 0 for a CPU, on which Triton's interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
