"""Safe and unique names made from ids, which may hold any character and repeat, and the files of names."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np

from seqmill.base.files import fsync, whole_or_absent

IDS, NAMES = ".ids.txt", ".names.tsv"  # suffixes of the file next to an export
UNNAMED = "unnamed"
NAME_BYTES = 200  # file systems allow 255, part of which the suffix needs

_UNIPROT = re.compile(r"(?:sp|tr)\|([^|]+)\|")
_UNSAFE = re.compile(r"[/\x00-\x1f\x7f]")


def hdf5_name(id_: str) -> str:
    """Return the name of a record's HDF5 dataset: its id, or the accession of a UniProt id (`sp|P12345|NAME`).

    In HDF5 `/` separates groups, and `.` alone is the group itself; `NP_051037.1` stays.
    """
    uniprot = _UNIPROT.match(id_)
    name = _UNSAFE.sub("_", uniprot[1] if uniprot else id_)
    return name if name.strip(".") else UNNAMED


def file_name(id_: str) -> str:
    """Return the name of a record's file, without suffix: its id without `/`, at most NAME_BYTES bytes of UTF-8."""
    return _UNSAFE.sub("_", id_).encode()[:NAME_BYTES].decode(errors="ignore") or UNNAMED


def unique_names(ids: Callable[[], Iterable[str]], name_of: Callable[[str], str] = str) -> Iterator[str]:
    """Yield names made unique as AnnData's `obs_names_make_unique` does: `a`, `a-1`, `a-2`.

    An id that is a legal name keeps it; among several records with this id, the first does. Otherwise the first record
    with a name keeps it. A new name is never one that another record has. `ids` is called twice, so that memory holds
    only 8 bytes per id and the names that occur more than once.
    """
    names = ((name_of(id_), id_) for id_ in ids())
    found = np.fromiter(((hash(name), name == id_) for name, id_ in names), [("hash", np.int64), ("is_id", bool)])
    hashes = np.sort(found["hash"])
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    reserved = repeated[np.isin(repeated, found["hash"][found["is_id"]])]
    given: set[str] = set()
    last: dict[str, int] = {}
    for id_ in ids():
        name = name_of(id_)
        is_repeated = _holds(repeated, name)  # or another name has the same hash, which may cost it a needless number
        if is_repeated and (name in given or (name != id_ and _holds(reserved, name))):
            last[name] = next(n for n in count(last.get(name, 0) + 1) if not _holds(hashes, f"{name}-{n}"))
            name = f"{name}-{last[name]}"
        elif is_repeated:
            given.add(name)
        yield name


def _holds(hashes: np.ndarray, name: str) -> bool:
    value = hash(name)
    place = int(np.searchsorted(hashes, value))
    return place < len(hashes) and int(hashes[place]) == value


@contextmanager
def whole_export(output: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; rename it to `output` if the block succeeds. Errors of the block name `output`.

    The old `beside`, which names the rows of the old `output`, is removed first, and the caller renames its successor
    last. So an interrupted export never leaves the ids of one export next to the vectors of another.
    """
    with whole_or_absent(output) as temporary:
        yield temporary
        if beside:
            beside.unlink(missing_ok=True)
            fsync(beside.parent)
