"""The tuned numbers: how much a call of the head may have in memory at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Bytes, tokens and columns that a call may have in memory at once.

    "Not measured" says that no raw file under bench/results/ compares the number with others.
    """

    # Logits of a chunk on a CPU, and its most tokens. Larger chunks update the weight's float32
    # gradient less often. Not measured: chosen for at most 64 MiB beside inputs and gradients.
    chunk_bytes: int = 5 * 2**23
    chunk_tokens: int = 1024
    # Tokens and columns whose logits stay cached where no gradient follows. The tokens came with
    # bench/results/cpu/kernels-20261123-190016.json. The columns: not measured.
    stats_tokens: int = 256
    stats_columns: int = 16384
    # In float32, so many times the tokens by as many times fewer columns: float32 GEMMs repack the
    # weight on every call. Not measured.
    float32_stats_factor: int = 4
    # Logits of a slice of the vocabulary, for all tokens. Not measured.
    slice_bytes: int = 2**24
    # Columns of a slice where they are rows of a GEMM's first operand. Not measured.
    slice_columns: int = 16384
    # The sum of hidden's gradient beside what slices need; with more, blocks take over. Not
    # measured: chosen for at most 64 MiB.
    sum_bytes: int = 28 * 2**20
    # Stashed float16 logits beside the weight's gradient. Not measured: chosen for at most 64 MiB.
    stash_bytes: int = 2**25
    # Logits of a chunk on a GPU, and its most tokens. "train H N chunk" in
    # bench/results/h200/launches-20261126-2.json has milliseconds and MiB of chunks of 2,048 to
    # 8,192 tokens beside this default ("None").
    gpu_chunk_bytes: int = 3 * 2**29
    gpu_chunk_tokens: int = 8192
    # "fused" is for small memory. Its forward pass needs some 20 KB a token, and logits of few
    # tokens exist in its backward pass. Not measured against others:
    # bench/results/h200/kernels-20261126-104727.json timed these alone.
    fused_forward_tokens: int = 4096
    fused_chunk_bytes: int = 2**28
    # Blocks of some tokens by some rows of the vocabulary: a block's logits, its hidden states, a
    # slice of the weight's gradient, its most tokens, and the part of hidden's sum that lies in
    # memory of its own. Not measured: chosen for at most 64 MiB.
    block_logits_bytes: int = 2**24
    block_hidden_bytes: int = 2**23
    block_weight_bytes: int = 2**23
    block_tokens: int = 1024
    block_sum_bytes: int = 20 * 2**20
    # Rows of the weight that `kept_ids` gathers at once, and their gradient. Not measured.
    kept_bytes: int = 2**25
    gpu_kept_bytes: int = 2**28
    # Memory that a chunk leaves to GEMMs on a CPU. Upcast GEMMs hold three blocks and a whole small
    # operand. GEMMs in C++ hold the packed blocks of two threads. Not measured.
    gemm_bytes: int = 2**23
    # A block that stays cached: some rows of a bfloat16 product on its way to a float32 sum, or
    # some rows of an operand as float32. Not measured.
    gemm_block_bytes: int = 2**21
    # Elements of a scratch buffer of torch's row operations. On a CPU the buffer should stay near
    # the cache, yet every operation pays for waking up threads. Not measured.
    torch_rows_elements: int = 2**22
    gpu_torch_rows_elements: int = 2**26


DEFAULT_BUDGET = Budget()
