"""The datasets of `index.h5`, and its digest.

    record_ids, record_id_offsets                    UTF-8 bytes (uint8) and int64 (num_records + 1,)
    record_descriptions, record_description_offsets  likewise
    record_lengths     int32 (num_records,)       residues or bases in the cleaned sequence, before any truncation;
                                                  0 if the record is invalid, and only then
    record_fates       uint8 (num_records,)       see Fate
    record_rows        int64 (num_records,)       row of the record's unique sequence; -1 if rejected
    tokens             uint8 or uint16        all unique sequences end to end, special tokens included
    token_offsets      int64 (num_sequences + 1,)
    sequence_digests   uint8 (num_sequences, 16)  BLAKE2b of the cleaned sequence (of a protein: of its tokens)
    sequence_records   int64 (num_sequences,)     the first record that has the sequence
    pack_offsets       int64 (num_packs + 1,)     in sequences
    pack_checksums     uint32 (num_packs,)        CRC-32 of the pack's tokens
    sequence_segments  int64 (num_sequences + 1,) where each sequence's segments begin
    segment_offsets    int64 (num_segments + 1,)  where each segment's tokens begin
    segment_lengths    int32 (num_segments,)      its weight: residues, or known bases (ACGT)
    reused_files       int32 (num_reused,)        the file in the attribute `reuse` that has the sequence's vector
    reused_rows        int64 (num_reused,)        its row in that file

Unique sequences are sorted by descending number of tokens, ties by first appearance. Reused ones, whose vectors come
from an earlier result, follow the others in the same order; they are in no pack, and their tokens are never read. The
attributes num_tokens, num_residues and num_packs count what is computed. The attribute num_invalid counts the rejected
records that are invalid: they have a letter that is not allowed, or no sequence; it is absent in older files, which
have none. A segment goes through the model by itself: it is a window of a long contig, on one strand. If every sequence
is one segment, the three datasets of segments are empty.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import h5py
import numpy as np

INDEX_FORMAT = 4
DIGEST_ROWS = 16 << 20
# Attributes that the embeddings or their order depend on.
POLICIES = (
    *("tokenizer", "letter_policy", "long_sequences", "max_length"),
    *("window", "stride", "strand", "pack_tokens"),
)
TOKENS = (np.uint8, np.uint16)  # letters; a vocabulary of thousands
# Each dataset's dtype, and the shape of one of its rows. `tokens` may have either dtype of TOKENS.
DATASETS: dict[str, tuple[type, tuple[int, ...]]] = {
    "record_ids": (np.uint8, ()),
    "record_id_offsets": (np.int64, ()),
    "record_descriptions": (np.uint8, ()),
    "record_description_offsets": (np.int64, ()),
    "record_lengths": (np.int32, ()),
    "record_fates": (np.uint8, ()),
    "record_rows": (np.int64, ()),
    "tokens": (np.uint8, ()),
    "token_offsets": (np.int64, ()),
    "sequence_digests": (np.uint8, (16,)),
    "sequence_records": (np.int64, ()),
    "pack_offsets": (np.int64, ()),
    "pack_checksums": (np.uint32, ()),
    "sequence_segments": (np.int64, ()),
    "segment_offsets": (np.int64, ()),
    "segment_lengths": (np.int32, ()),
    "reused_files": (np.int32, ()),
    "reused_rows": (np.int64, ()),
}


WHY_INVALID = "with a letter that is not allowed or without a sequence"  # for messages


class Fate(IntEnum):
    """What happens to an input record; every record has exactly one fate."""

    EMBEDDED = 0
    TRUNCATED = 1  # embedded by its first max_length residues
    DUPLICATE = 2  # has the embedding of an earlier record with the same sequence
    REJECTED = 3  # left out, with a reason
    QUARANTINED = 4  # left out by the merge because its embedding is not finite; never in the index
    WINDOWED = 5  # longer than max_length: embedded in windows
    REUSED = 6  # has the vector of the same sequence in an earlier result


def content_digest(
    datasets: Mapping[str, np.ndarray | h5py.Dataset],
    attributes: Mapping[str, Any],
    check: Callable[[], object] = lambda: None,
) -> str:
    """Digest what embeddings and their order depend on, not the path or compression of the FASTA.

    Return the SHA-256 (hexadecimal) of the policies, the fingerprints of reused files and all datasets but `tokens`,
    which `sequence_digests` and `pack_checksums` represent. `check` (`NewFile.check`) is called between blocks.
    """
    decisive: dict[str, Any] = {name: attributes[name] for name in POLICIES}
    decisive["reuse"] = [source["fingerprint"] for source in json.loads(attributes["reuse"])]
    digest = hashlib.sha256(json.dumps({"index_format": INDEX_FORMAT, **decisive}, sort_keys=True).encode())
    for name in sorted(DATASETS.keys() - {"tokens"}):
        digest.update(name.encode())
        for start in range(0, len(datasets[name]), DIGEST_ROWS):
            digest.update(np.ascontiguousarray(datasets[name][start : start + DIGEST_ROWS]))
            check()
    return digest.hexdigest()
