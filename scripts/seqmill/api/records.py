"""The forms in which sequences may be given in Python, as records of a FASTA file."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seqmill.errors import SeqmillError
from seqmill.index.fasta import BLOCK_BYTES, SHOWN_ID, FastaFile, FastaRecord

Sequences = Any  # see `read_blocks`; Biopython's types are not imported
GIVEN = "sequences"  # the name of the input in messages, if it is no file


def read_blocks(sequences: Sequences, block_bytes: int = BLOCK_BYTES) -> tuple[str, Iterator[list[FastaRecord]]]:
    """Return the name of the input, for messages, and an iterator over blocks of its records.

    Args:
        sequences: one sequence, several in any iterable, a dict from ids to sequences, or a FASTA file (plain, gzip,
            bgzip or zstd). A sequence is text, a Bio.Seq, a SeqRecord, or a pair of an id and one of these; without an
            id, it gets its number, from 1 on. A file is a Path, or text with a "." or a "/", which no sequence has.
        block_bytes: about how much text a block has.

    Raises:
        SeqmillError: from the iterator too; the file is not FASTA, a sequence is none of these types, or a text can be
            a sequence as well as the name of a file that exists.
    """
    if isinstance(sequences, os.PathLike):
        sequences = os.fspath(sequences)
    elif isinstance(sequences, str) and not {".", "/", os.sep} & set(sequences):
        if os.path.exists(sequences):  # noqa: PTH110  (Path.exists raises for a long name)
            raise SeqmillError(f"{sequences}: a file has this name; give Path({sequences!r}) to embed what is in it")
        sequences = [sequences]
    if isinstance(sequences, str):
        return sequences, FastaFile(Path(sequences).expanduser()).blocks(block_bytes)
    if _is_sequence(sequences):
        sequences = [sequences]
    items = sequences.items() if isinstance(sequences, Mapping) else sequences
    if not isinstance(items, Iterable):
        raise SeqmillError(f"sequences: {type(items).__name__} is not a sequence, a collection of them or a FASTA file")
    return GIVEN, _blocks(items, block_bytes)


def _blocks(items: Iterable[Any], block_bytes: int) -> Iterator[list[FastaRecord]]:
    block: list[FastaRecord] = []
    size = 0
    for number, item in enumerate(items, start=1):
        record = _record(number, item)
        block.append(record)
        size += len(record.body)
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _record(number: int, item: object) -> FastaRecord:
    id_ = str(number)
    if isinstance(item, tuple) and len(item) == 2:
        id_, item = str(item[0]), item[1]
    elif _is_seq_record(item):
        id_ = str(item.id)  # type: ignore[attr-defined]
    if _is_seq_record(item):
        item = item.seq  # type: ignore[attr-defined]
    try:
        if isinstance(item, str):
            return FastaRecord(number, id_, "", item.encode())
        if _is_sequence(item):
            return FastaRecord(number, id_, "", bytes(item))  # type: ignore[call-overload]
    except ValueError as error:  # a Bio.Seq of undefined content, half of a surrogate pair
        raise SeqmillError(f"{GIVEN}: record {number} ({id_[:SHOWN_ID]!r}): {error}") from error
    kind = type(item).__name__
    raise SeqmillError(
        f"{GIVEN}: record {number} ({id_[:SHOWN_ID]!r}) is of type {kind}; give text, a Bio.Seq, a SeqRecord or a pair "
        "of an id and one of these"
    )


def _is_sequence(item: object) -> bool:
    """Return whether an object is bytes, a Bio.Seq or a SeqRecord, known by their methods."""
    return (
        isinstance(item, bytes) or (hasattr(item, "__bytes__") and hasattr(item, "translate")) or _is_seq_record(item)
    )


def _is_seq_record(item: object) -> bool:
    return hasattr(item, "seq") and hasattr(item, "id")
