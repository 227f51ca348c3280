"""Input files: noted when they are read, recognized later without reading them again."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from seqmill.base.files import read_json, sha256_of_file, write_json
from seqmill.errors import SeqmillError

DIGESTS = ".snakemake/seqmill.digests.json"  # below the working directory of a workflow
SHOWN_DIGITS = 12  # of a SHA-256 in a message


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was read. `msgspec.convert` reads a note back; a damaged one raises a ValueError."""

    path: str  # as given; bytes that are not UTF-8 are escaped
    bytes: int  # size as stored
    sha256: str  # hexadecimal, of the stored bytes
    # See `stamp_of`; empty if an earlier version noted none.
    stamp: Annotated[str, msgspec.Meta(pattern=r"^$|^-?\d+( -?\d+){3}$")] = ""

    @classmethod
    def fasta_of(cls, attributes: Mapping[str, Any]) -> "InputFile":
        """Return the FASTA file noted in the attributes of an index or a merged result; ValueError if damaged."""
        names = {"path": "source_path", "bytes": "source_size", "sha256": "source_sha256", "stamp": "source_stamp"}
        return msgspec.convert({name: attributes.get(attribute, "") for name, attribute in names.items()}, cls)

    def __str__(self) -> str:
        return f"{self.path} ({self.bytes:,} bytes, SHA-256 {self.sha256[:SHOWN_DIGITS]}...)"


@dataclass(frozen=True)
class Change:
    """How an input differs from the one that results were made from."""

    before: str  # the file then, in words
    now: str  # the file now, in words
    # Whether the path is the same and was modified later, as by an edit. Otherwise it is another file, or one with an
    # earlier modification time was put in its place.
    is_edit: bool


def stamp_of(stat: os.stat_result) -> str:
    """Return a stamp that changes whenever a file's bytes do: size, mtime and ctime in ns, and inode."""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def shown_path(path: Path) -> str:
    """Return a path as text; bytes that are not UTF-8 are escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def note_file(path: Path) -> InputFile:
    """Digest a file; raise a SeqmillError if it changes meanwhile."""
    before = path.stat()
    noted = InputFile(shown_path(path), before.st_size, sha256_of_file(path), stamp_of(before))
    require_unchanged(path, noted.stamp)
    return noted


def require_unchanged(path: Path, stamp: str) -> None:
    """Raise a SeqmillError if a file no longer has this stamp."""
    if not path.exists() or stamp_of(path.stat()) != stamp:
        raise SeqmillError(f"{path}: the file changed while it was read; wait until it is complete and run again")


class KnownDigests:
    """Digests of files by their stamps, kept in a JSON file so that a touched file is read only once.

    An unreadable JSON file counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_news = False
        try:
            self._known = {name: (str(stamp), str(digest)) for name, (stamp, digest) in read_json(path).items()}
        except (SeqmillError, ValueError, TypeError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is read only if its stamp is new."""
        stamp, name = stamp_of(path.stat()), shown_path(path.absolute())
        if self._known.get(name, ("", ""))[0] != stamp:
            noted = note_file(path)
            self._known[name] = noted.stamp, noted.sha256
            self._has_news = True
        return self._known[name][1]

    def save(self) -> None:
        """Write the JSON file if a digest is new; forget files that no longer exist."""
        if self._has_news:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {name: known for name, known in self._known.items() if Path(name).exists()})
            self._has_news = False


def find_change(noted: Sequence[InputFile], paths: Sequence[Path], sha256: Callable[[Path], str]) -> Change | None:
    """Return the first difference between input files now and their notes; None if there is none.

    None also if a path does not exist (yet) or is not a regular file. `sha256` (`sha256_of_file` or
    `KnownDigests.sha256`) reads a file only if its stamp differs.

    Args:
        noted: the files when the results were made.
        paths: the files now: one file under any name, or several under the same names in any folder.
    """
    if not all(path.is_file() for path in paths):
        return None
    before = {"" if len(noted) == 1 else Path(file.path).name: file for file in noted}
    now = {"" if len(paths) == 1 else Path(shown_path(path)).name: path for path in paths}
    if before.keys() != now.keys():
        names = ", ".join(map(shown_path, paths))
        return Change(", ".join(file.path for file in noted) or "no file", names or "no file", _is_edit(noted, paths))
    for name, path in now.items():
        stat = path.stat()
        if stamp_of(stat) == before[name].stamp:
            continue
        found = InputFile(shown_path(path), stat.st_size, sha256(path))
        if found.sha256 != before[name].sha256:
            return Change(str(before[name]), str(found), _is_edit([before[name]], [path]))
    return None


def _is_edit(noted: Sequence[InputFile], paths: Sequence[Path]) -> bool:
    """Return whether the same paths, or several files in the same folders, were modified later."""
    places = {Path(file.path).absolute() for file in noted}, {Path(shown_path(path)).absolute() for path in paths}
    if len(noted) > 1 or len(paths) > 1:
        places = {path.parent for path in places[0]}, {path.parent for path in places[1]}
    if not noted or not paths or places[0] != places[1]:
        return False
    # Earlier versions noted no times: then any change counts as an edit.
    times = [int(file.stamp.split()[1]) if file.stamp else 0 for file in noted]
    return max(path.stat().st_mtime_ns for path in paths) > max(times)
