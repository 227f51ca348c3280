"""The pack plan: which unique sequences are computed together, and by which rank.

The plan depends only on the index, not on the device or the number of ranks. A pack is computed the same way wherever
it runs, so the embeddings have the same bits for any world size.
"""

import numpy as np

MIN_PACK_TOKENS = 1024
MAX_PACK_TOKENS = 32768
PACKS_WANTED = 64  # enough to give several ranks equal work


def choose_pack_tokens(num_tokens: int) -> int:
    """Return the target size of a pack, in tokens: a power of two that grows with the input."""
    share = max(num_tokens // PACKS_WANTED, 1)
    return min(max(1 << (share.bit_length() - 1), MIN_PACK_TOKENS), MAX_PACK_TOKENS)


def plan_packs(token_offsets: np.ndarray, pack_tokens: int) -> np.ndarray:
    """Cut consecutive sequences into packs of at most `pack_tokens` tokens, greedily.

    A sequence longer than `pack_tokens` gets a pack of its own.

    Args:
        token_offsets: int64 (num_sequences + 1,), increasing, where each sequence's tokens begin, and the end.
        pack_tokens: the maximum number of tokens in a pack of several sequences.

    Returns:
        int64 (num_packs + 1,): pack p has sequences `result[p]` to `result[p + 1] - 1`.
    """
    num_sequences = len(token_offsets) - 1
    boundaries = [0]
    while boundaries[-1] < num_sequences:
        first = boundaries[-1]
        limit = token_offsets[first] + pack_tokens
        end = int(np.searchsorted(token_offsets, limit, side="right")) - 1
        boundaries.append(max(end, first + 1))
    return np.array(boundaries, dtype=np.int64)


def packs_of_rank(num_packs: int, rank: int, world_size: int) -> range:
    """Return the pack numbers that `rank` computes, in order."""
    return range(rank, num_packs, world_size)


def rows_of_rank(pack_offsets: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the index rows (int64) of the sequences in a rank's packs, in the order of its shard."""
    begins = pack_offsets[:-1][rank::world_size]
    counts = np.diff(pack_offsets)[rank::world_size]
    # In place, because one rank of a thousand should not need memory for all rows.
    rows = np.repeat(begins - (np.cumsum(counts) - counts), counts)
    rows += np.arange(len(rows))
    return rows
