"""The checks of one shard: whole, as its status JSON says, and made from the index."""

from itertools import zip_longest
from pathlib import Path

import h5py
import numpy as np

from seqmill.base.digests import sha256_and_finite
from seqmill.base.hdf5 import STRING_BLOCK, open_hdf5
from seqmill.base.text_columns import split_bytes, texts_end_to_end
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.packing import rows_of_rank
from seqmill.store.index import Index, residue_offsets
from seqmill.store.shards import Shard, open_shard
from seqmill.store.status import COMPLETE, ShardStatus, read_status


def verify_shard(index: Index, path: Path, status_path: Path, world_size: int) -> tuple[Shard, ShardStatus]:
    """Check one of `world_size` shards against its status JSON and the index; the file is read once.

    Raise a SeqmillError that names the shard and the fault, or an OSError if the shard can't be read.
    """
    status = read_status(status_path)
    if status.status != COMPLETE:
        raise SeqmillError(f"{path}: {status_path} says the shard is {status.status}: {status.reason}")
    if status.world_size != world_size:
        raise SeqmillError(f"{path}: it is one of {status.world_size} shards, but {world_size} were given")
    if not path.is_file():
        raise SeqmillError(f"{path}: no such shard, though {status_path} says it is complete")
    if (size := path.stat().st_size) != status.shard_bytes:
        raise SeqmillError(
            f"{path}: has {size} bytes, but its status JSON says {status.shard_bytes}: truncated or changed"
        )
    shard, not_finite = _open_whole(path, status)
    if (shard.rank, shard.world_size) != (status.rank, status.world_size):
        raise SeqmillError(
            f"{path}: the file is rank {shard.rank} of {shard.world_size}, "
            f"its status JSON rank {status.rank} of {status.world_size}"
        )
    try:
        noted = Fingerprint.from_attributes(status.fingerprint)
    except SeqmillError as error:
        raise SeqmillError(f"{status_path}: {error}") from None
    if difference := shard.fingerprint.difference(noted):
        raise SeqmillError(f"{path}: the file and its status JSON differ: {difference}")
    if shard.fingerprint.index_digest != index.digest:
        raise SeqmillError(f"{path}: made from another index than {index.path}; embed the shard again")
    _verify_rows(index, shard, status)
    _verify_finite(index, shard, not_finite)
    return shard, status


def _open_whole(path: Path, status: ShardStatus) -> tuple[Shard, list[int | None]]:
    """Open a shard whose digest is the one in its status.

    The shard is opened first, so that the same pass over the file also looks for numbers that are not finite. If the
    digest is wrong, that is the error, whatever opening it found. Return also the place of a number that is not finite,
    or None, in the embeddings and in the residues.
    """
    opened: Shard | SeqmillError
    try:
        opened = open_shard(path)
    except SeqmillError as error:
        opened = error
    arrays = [opened.embeddings, opened.residues] if isinstance(opened, Shard) else []
    # Arrays of another dtype are refused later, by name.
    digest, places = sha256_and_finite(path, [array for array in arrays if array.dtype in (np.float32, np.float16)])
    if digest != status.shard_sha256:
        raise SeqmillError(f"{path}: its SHA-256 is not the one in its status JSON: damaged or changed")
    if isinstance(opened, SeqmillError):
        raise opened
    return opened, places


def _verify_rows(index: Index, shard: Shard, status: ShardStatus) -> None:
    path, embeddings = shard.path, shard.embeddings
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise SeqmillError(f"{path}: embeddings are {embeddings.dtype} {embeddings.shape}, not float32 (n, hidden_dim)")
    ranks_own = rows_of_rank(index.pack_offsets, shard.rank, shard.world_size)
    quarantined = np.asarray(shard.quarantined_rows)
    expected = ranks_own[~np.isin(ranks_own, quarantined)]
    if not np.array_equal(shard.index_rows, expected) or len(expected) + len(quarantined) != len(ranks_own):
        raise SeqmillError(f"{path}: its sequences are not those of rank {shard.rank} of {shard.world_size}")
    if len(embeddings) != len(expected) or status.num_sequences != len(ranks_own):
        raise SeqmillError(
            f"{path}: {len(embeddings)} embeddings, {len(quarantined)} quarantined, and {status.num_sequences} "
            f"sequences in its status JSON; the index says {len(ranks_own)}"
        )
    if len(quarantined) != status.quarantined.num_sequences:
        raise SeqmillError(f"{path}: {len(quarantined)} sequences quarantined, another number in its status JSON")
    if status.audit.verdict == "fail":
        raise SeqmillError(
            f"{path}: its audit failed, the embeddings are wrong: {status.audit.worst}; remove the shard, and compute "
            "it in another precision or on another device"
        )
    _verify_ids(index, path, expected)
    _verify_residues(index, shard, expected)


def _verify_residues(index: Index, shard: Shard, rows: np.ndarray) -> None:
    path, residues, dtype = shard.path, shard.residues, shard.fingerprint.per_residue
    if not dtype:
        return
    offsets = residue_offsets(index, rows)
    if not np.array_equal(shard.residue_offsets, offsets):
        raise SeqmillError(f"{path}: its residues are not those of its sequences")
    if residues.dtype != dtype or residues.ndim != 2 or len(residues) != offsets[-1]:
        raise SeqmillError(f"{path}: residues are {residues.dtype} {residues.shape}, not {dtype} ({offsets[-1]}, ...)")


def _verify_finite(index: Index, shard: Shard, places: list[int | None]) -> None:
    """Name the sequence of a number that is not finite; `places` as `_open_whole` returns them."""
    embedding, residue = places
    if embedding is not None:
        row = int(shard.index_rows[embedding // shard.embeddings.shape[1]])
        raise SeqmillError(f"{shard.path}: the embedding of {index.sequence_id(row)!r} is not finite")
    if residue is not None:
        place = np.searchsorted(shard.residue_offsets, residue // shard.residues.shape[1], side="right") - 1
        name = index.sequence_id(int(shard.index_rows[place]))
        raise SeqmillError(f"{shard.path}: the residues of {name!r} are not finite")


def _verify_ids(index: Index, path: Path, rows: np.ndarray) -> None:
    with open_hdf5(path, "shard") as file:
        ids = file["sequence_ids"]
        if h5py.check_string_dtype(ids.dtype) is None:
            raise TypeError("sequence_ids are not strings")
        for start in range(0, len(ids), STRING_BLOCK):
            found = ids[start : start + STRING_BLOCK].tolist()  # as UTF-8: decoding takes half as long as reading
            records = index.sequence_records[rows[start : start + len(found)]]
            wanted, bounds = texts_end_to_end(index.record_ids, index.record_id_offsets, records)
            # Equal bytes and equal lengths are equal ids; this makes no object per expected id.
            lengths = np.fromiter(map(len, found), np.int64, len(found))
            if b"".join(found) != wanted or not np.array_equal(lengths, np.diff(bounds)):
                pairs = zip_longest(found, split_bytes(wanted, bounds))
                shown = [_shown(id_) for id_ in next(pair for pair in pairs if pair[0] != pair[1])]
                raise SeqmillError(f"{path}: has the id {shown[0]} where the index has {shown[1]}")
        if len(ids) < len(rows):
            row = int(rows[len(ids)])
            raise SeqmillError(f"{path}: has the id None where the index has {index.sequence_id(row)!r}")


def _shown(id_: bytes | None) -> str:
    return "no more" if id_ is None else repr(id_.decode("utf-8", "backslashreplace"))
