"""Names that are safe and unique, made from ids, of which any is legal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

UNNAMED = "unnamed"
NAME_BYTES = 200  # file systems take 255, of which a suffix needs some

_UNIPROT = re.compile(r"(?:sp|tr)\|([^|]+)\|")
_UNSAFE = re.compile(r"[/\x00-\x1f\x7f]")


def dataset_name(id_: str) -> str:
    """Return an id as the name of an HDF5 dataset; of a UniProt id (`sp|P12345|NAME`) its accession.

    In HDF5 `/` separates groups and a lone `.` is the group itself; a dot within a name, as in `NP_051037.1`, is not
    special and stays.
    """
    uniprot = _UNIPROT.match(id_)
    name = _UNSAFE.sub("_", uniprot[1] if uniprot else id_)
    return name if name.strip(".") else UNNAMED


def file_name(id_: str) -> str:
    """Return an id as the name of a file, without its ending: no `/`, at most `NAME_BYTES` bytes of UTF-8."""
    return _UNSAFE.sub("_", id_).encode()[:NAME_BYTES].decode(errors="ignore") or UNNAMED


class UniqueNames:
    """Names made unique as AnnData's `obs_names_make_unique` does: `a`, `a-1`, `a-2`.

    An id that may stay as it is has itself as its name (of several records with it, the first); else the first bearer
    of a name keeps it. A new name is never one that stands in the file. Asked in the order of the ids that it was
    made from. Memory: 8 bytes an id, and the names that occur more than once.
    """

    def __init__(self, ids: Iterable[str], name_of: Callable[[str], str] = str) -> None:
        self._name_of = name_of
        names = ((name_of(id_), id_) for id_ in ids)
        found = np.fromiter(((hash(name), name == id_) for name, id_ in names), [("hash", np.int64), ("is_id", bool)])
        hashes = found["hash"]
        ids_kept = hashes[found["is_id"]]
        hashes = np.sort(hashes)
        self._hashes = hashes
        self._repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        self._reserved = self._repeated[np.isin(self._repeated, ids_kept)]
        self._given: set[str] = set()
        self._last: dict[str, int] = {}

    def next(self, id_: str) -> str:
        """Return the name for the next id."""
        name = self._name_of(id_)
        if not _holds(self._repeated, name):
            return name
        # A hash that another name happens to share only costs a number.
        if name not in self._given and (name == id_ or not _holds(self._reserved, name)):
            self._given.add(name)
            return name
        number = self._last.get(name, 0) + 1
        while _holds(self._hashes, f"{name}-{number}"):
            number += 1
        self._last[name] = number
        return f"{name}-{number}"


def _holds(hashes: np.ndarray, name: str) -> bool:
    value = hash(name)
    place = int(np.searchsorted(hashes, value))
    return place < len(hashes) and int(hashes[place]) == value
