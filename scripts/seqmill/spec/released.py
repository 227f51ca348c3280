"""Facts about released models: where to fetch them, the digests of their files, numbers that they compute.

They are in released.json, each with the public page that states it. Imports no torch.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError
from seqmill.spec.models import NAMES

RELEASED = Path(__file__).with_name("released.json")


@dataclass(frozen=True)
class FileFact:
    """A file as it was published.

    Attributes:
        size: in bytes; None if no public page states it.
        algorithm: "sha256", "md5" or "git_sha1" (of a git blob, for small files on Hugging Face).
        digest: hexadecimal.
    """

    size: int | None
    algorithm: str
    digest: str


@dataclass(frozen=True)
class WeightsSource:
    """Where a model's files can be fetched: a folder on a server, or a commit of a repository on Hugging Face."""

    url: str | None
    repository: str | None
    commit: str | None
    files: dict[str, FileFact]

    @property
    def name(self) -> str:
        return self.url or f"{self.repository} at commit {self.commit} on Hugging Face"


@dataclass(frozen=True)
class Case:
    """A sequence, and published numbers that the trained model computes for it; None if not published.

    Attributes:
        sequence: residues or bases.
        tokens: its token ids, special ones included.
        hidden: the first dimensions of the last hidden states of the first tokens.
        mean: the first dimensions of the mean (ESM-2: over residues, DNABERT-S: over all tokens).
    """

    sequence: str
    tokens: list[int] | None = None
    hidden: list[list[float]] | None = None
    mean: list[float] | None = None


@dataclass(frozen=True)
class Published:
    """Published numbers, their origin, and the accepted absolute difference."""

    origin: str
    tolerance: float
    cases: list[Case]


@dataclass(frozen=True)
class Release:
    """A released model: its sources, the preferred one first, and published numbers if there are any."""

    sources: list[WeightsSource]
    published: Published | None


def read_releases(path: Path = RELEASED) -> dict[str, Release]:
    """Return the facts by the model's name; raises a SeqmillError if the file is unreadable or incomplete."""
    try:
        return {name: _release(facts) for name, facts in read_json(path).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SeqmillError(f"{path}: not facts of released models: {type(error).__name__}: {error}") from error


def release_of(name: str, path: Path = RELEASED) -> Release:
    """Return the facts about a model; raises a SeqmillError for a name that can't be fetched."""
    releases = read_releases(path)
    if name not in NAMES or name not in releases:
        raise SeqmillError(f"model {name!r} can't be fetched; use one of {', '.join(NAMES)}")
    return releases[name]


def why_not_as_published(path: Path, fact: FileFact) -> str:
    """Read a file and return how it differs from the published one; empty if it does not."""
    size = path.stat().st_size
    if fact.size is not None and size != fact.size:
        return f"it has {size:,} bytes, not {fact.size:,}"
    digest = hashlib.new(fact.algorithm.removeprefix("git_"), usedforsecurity=False)
    if fact.algorithm == "git_sha1":
        digest.update(f"blob {size}\0".encode())
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != fact.digest:
        return f"its {fact.algorithm.upper().replace('_', ' ')} is {digest.hexdigest()}, not {fact.digest}"
    return ""


def _release(facts: dict[str, Any]) -> Release:
    tested = facts.get("self_test")
    published = tested and Published(
        tested["from"], float(tested["tolerance"]), [Case(**case) for case in tested["cases"]]
    )
    return Release([_source(source) for source in facts["sources"]], published)


def _source(facts: dict[str, Any]) -> WeightsSource:
    files = {}
    for name, fact in facts["files"].items():
        ((algorithm, digest),) = ((key, value) for key, value in fact.items() if key != "size")
        files[name] = FileFact(fact.get("size"), algorithm, digest)
    return WeightsSource(facts.get("url"), facts.get("repository"), facts.get("commit"), files)
