"""The forms in which sequences may be given in Python, as records of a FASTA file."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seqmill.errors import SeqmillError
from seqmill.index.fasta import BLOCK_BYTES, SHOWN_ID, FastaFile, FastaRecord

Sequences = Any  # see `read_blocks`; types of Biopython and pandas are not imported
GIVEN = "sequences"  # the name of the input in messages, unless it is a file


def read_blocks(sequences: Sequences, block_bytes: int = BLOCK_BYTES) -> tuple[str, Iterator[list[FastaRecord]]]:
    """Return the name of the input, for messages, and an iterator over blocks of its records.

    Args:
        sequences: one sequence, several in any iterable, a dict or a pandas Series from ids to sequences, or a FASTA
            file (plain, gzip, bgzip or zstd). A sequence is text, a Bio.Seq or a SeqRecord; in an iterable also a tuple
            of an id and one of these. Without an id, it gets its number, from 1 on. A file is a Path, or text with a
            "." or a "/", which no sequence has.
        block_bytes: about how much text a block has.

    Raises:
        SeqmillError: the file is not FASTA, a sequence has another type, or a text can be a sequence as well as the
            name of a file that exists; also raised by the iterator.
    """
    if isinstance(sequences, os.PathLike):
        return _read_file(os.fspath(sequences), block_bytes)
    if isinstance(sequences, str):
        if sequences.lstrip().startswith(">"):
            raise SeqmillError(f"{GIVEN}: this text is FASTA; write it to a file, and give the file's Path")
        if {".", "/", os.sep} & set(sequences):
            return _read_file(sequences, block_bytes)
        if os.path.exists(sequences):  # noqa: PTH110  (Path.exists raises for a long name)
            raise SeqmillError(f"{sequences}: a file has this name; give Path({sequences!r}) to embed what is in it")
    if isinstance(sequences, str) or (_is_sequence(sequences) and not hasattr(sequences, "columns")):
        sequences = [sequences]
    return GIVEN, _blocks(_items(sequences), block_bytes)


def _read_file(path: str, block_bytes: int) -> tuple[str, Iterator[list[FastaRecord]]]:
    return path, FastaFile(Path(path).expanduser()).blocks(block_bytes)


def _items(sequences: Sequences) -> Iterable[Any]:
    kind = type(sequences).__name__
    if isinstance(sequences, Mapping):
        return sequences.items()
    if hasattr(sequences, "columns"):  # iterating would yield their names, which may be sequences
        raise SeqmillError(f"{GIVEN}: a {kind} has several columns; give one, as in df.set_index('id')['sequence']")
    if hasattr(sequences, "read"):
        raise SeqmillError(f"{GIVEN}: a {kind} is an open file; give its Path")
    if hasattr(sequences, "items") and hasattr(sequences, "index"):  # a Series
        return sequences.items() if all(isinstance(id_, str) for id_ in sequences.index) else sequences
    if not isinstance(sequences, Iterable):
        raise SeqmillError(f"{GIVEN}: {kind} is not the type of a sequence, of a collection of sequences or of a path")
    return sequences


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
    named = f"{GIVEN}: record {number} ({id_[:SHOWN_ID]!r})"
    try:
        id_.encode()
        if isinstance(item, str):
            return FastaRecord(number, id_, "", item.encode())
        if _is_sequence(item):
            return FastaRecord(number, id_, "", bytes(item))  # type: ignore[call-overload]
    except ValueError as error:  # a Bio.Seq without content, half of a surrogate pair
        raise SeqmillError(f"{named}: {error}") from error
    if item is None or type(item).__name__ == "NAType" or (isinstance(item, float) and math.isnan(item)):  # pandas'
        raise SeqmillError(f"{named} is missing; leave it out, as with Series.dropna()")
    expected = "give text, a Bio.Seq, a SeqRecord, or a tuple of an id and one of these"
    raise SeqmillError(f"{named} is of type {type(item).__name__}; {expected}")


def _is_sequence(item: object) -> bool:
    """Return whether an object is bytes, a Bio.Seq or a SeqRecord, known by their methods."""
    is_seq = hasattr(item, "__bytes__") and hasattr(item, "translate")
    return isinstance(item, bytes) or is_seq or _is_seq_record(item)


def _is_seq_record(item: object) -> bool:
    return hasattr(item, "seq") and hasattr(item, "id")
