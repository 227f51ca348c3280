"""Facts about released models: where to fetch them, the digests of their files, numbers that they compute.

They are in released.json, each with the public page that states it. Imports no torch.
"""

import hashlib
from pathlib import Path

import msgspec

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError

RELEASED = Path(__file__).with_name("released.json")


class FileFact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file as it was published, with one hexadecimal digest; without one if no public page states it."""

    size: int | None = None  # in bytes; None if no public page states it
    sha256: str = ""
    md5: str = ""
    git_sha1: str = ""  # of a git blob, for small files on Hugging Face

    def __post_init__(self) -> None:
        if sum(map(bool, (self.sha256, self.md5, self.git_sha1))) > 1:
            raise ValueError("a file has more than one digest")

    @property
    def is_pinned(self) -> bool:
        """Whether a public page states a digest."""
        return bool(self.sha256 or self.md5 or self.git_sha1)


class WeightsSource(msgspec.Struct, frozen=True):
    """Where a model's files can be fetched: a folder on a server, or a commit of a repository on Hugging Face."""

    files: dict[str, FileFact]
    url: str | None = None
    repository: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        return self.url or f"{self.repository} at commit {self.commit} on Hugging Face"


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sequence of residues or bases, and published numbers that the trained model computes for it."""

    sequence: str
    tokens: list[int] | None = None  # its token ids, special ones included
    hidden: list[list[float]] | None = None  # the first dimensions of the last hidden states of some tokens
    first_token: int = 0  # the first of these
    mean: list[float] | None = None  # its first dimensions; over residues, or all tokens of nucleotides


class Published(msgspec.Struct, frozen=True):
    """Published numbers, their origin, and the accepted absolute difference."""

    origin: str = msgspec.field(name="from")
    tolerance: float
    cases: list[Case]


class License(msgspec.Struct, frozen=True):
    """The license of a model's weights, and the page that states it."""

    name: str
    origin: str = msgspec.field(name="from")


class Citation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The publication that a model's authors ask to cite."""

    authors: str
    year: int
    title: str
    journal: str
    doi: str

    @property
    def link(self) -> str:
        return f"https://doi.org/{self.doi}"

    @property
    def text(self) -> str:
        return f"{self.authors} ({self.year}). {self.title}. {self.journal}. {self.link}"


class Measured(msgspec.Struct, frozen=True):
    """Median speed and peak memory of whole runs on a CPU, from FASTA to shard, by precision."""

    origin: str = msgspec.field(name="from")  # the file in the repository with all figures
    machine: str
    date: str
    unit: str  # residues or bases
    per_second: dict[str, int]
    peak_bytes: dict[str, int]


class Release(msgspec.Struct, frozen=True):
    """A released model: its sources, the preferred one first, and published or measured numbers if there are any."""

    sources: list[WeightsSource]
    published: Published | None = msgspec.field(name="self_test", default=None)
    license: License | None = None
    citation: Citation | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        for source in self.sources:
            unpinned = [name for name, file in source.files.items() if not file.is_pinned]
            if unpinned and not (source.repository and source.commit):
                raise ValueError(f"{unpinned[0]} has no digest, and no commit pins it")

    @property
    def files(self) -> dict[str, FileFact]:
        """The files of the preferred source."""
        return self.sources[0].files

    @property
    def size(self) -> int | None:
        """The bytes of the preferred source's files, but small JSON; None if no public page states them."""
        sizes = [file.size for name, file in self.files.items() if not name.endswith(".json")]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def read_releases(path: Path = RELEASED) -> dict[str, Release]:
    """Return the facts by the model's name; raise a SeqmillError if the file is unreadable or incomplete."""
    try:
        return msgspec.convert(read_json(path), dict[str, Release])
    except msgspec.ValidationError as error:
        raise SeqmillError(f"{path}: not facts of released models: {error}") from error


def release_of(name: str, path: Path = RELEASED) -> Release:
    """Return the facts about a model; raise a SeqmillError for a name that can't be fetched."""
    releases = read_releases(path)
    if name not in releases:
        raise SeqmillError(f"model {name!r} can't be fetched; use one of {', '.join(releases)}")
    return releases[name]


def why_not_as_published(path: Path, fact: FileFact) -> str:
    """Read a file and return how it differs from the published one; empty if it does not, as far as that is known."""
    size = path.stat().st_size
    if fact.size is not None and size != fact.size:
        return f"it has {size:,} bytes, not {fact.size:,}"
    if not fact.is_pinned:
        return ""
    algorithm = "sha256" if fact.sha256 else "md5" if fact.md5 else "git_sha1"
    digest, published = hashlib.new(algorithm.removeprefix("git_"), usedforsecurity=False), getattr(fact, algorithm)
    if algorithm == "git_sha1":
        digest.update(f"blob {size}\0".encode())
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != published:
        return f"its {algorithm.upper().replace('_', ' ')} is {digest.hexdigest()}, not {published}"
    return ""
