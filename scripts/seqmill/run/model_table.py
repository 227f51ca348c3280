"""The table of released models: what they are, where their weights are on this disk, and what they need."""

from seqmill.base.commands import command
from seqmill.run.resources import CPU_PIECE_TOKENS, memory_mb, num_parameters
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.released import Measured, Release, read_releases

HEADER = ("model", "kind", "layers", "dim", "parameters", "license", "weights", "memory", "speed", "on this disk")
PRECISIONS = ("bfloat16", "float32")
NOT_MEASURED = "not measured"


def model_table() -> list[str]:
    """Return the lines of the table and its notes."""
    releases = read_releases()
    rows = [HEADER, *(_row(find_model(name), release) for name, release in releases.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *_notes(releases)]


def _row(model: ModelSource, release: Release) -> tuple[str, ...]:
    shape, measured = model.architecture, release.measured
    assert shape is not None
    assert model.path is not None
    return (
        model.name,
        "protein" if model.family.is_protein else "nucleotide",
        str(shape.num_layers),
        str(shape.hidden_dim),
        _large(num_parameters(model)),
        release.license.name if release.license else "unknown",
        _gigabytes(release.size) if release.size else "unknown",
        _memory(model, measured),
        _speed(measured) if measured else NOT_MEASURED,
        str(model.path) if model.is_on_disk else f"no: {command('fetch', model.name)}",
    )


def _memory(model: ModelSource, measured: Measured | None) -> str:
    if measured:
        return _gigabytes(max(measured.peak_bytes.values()))
    return f"~{_gigabytes(1e6 * memory_mb(model, CPU_PIECE_TOKENS, threads=1, attempt=1))}"


def _speed(measured: Measured) -> str:
    return " / ".join(f"{measured.per_second[precision]:,}" for precision in PRECISIONS)


def _large(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M" if number >= 1e8 else f"{number / 1e6:.1f} M"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2g} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:.0f} GB"


def _notes(releases: dict[str, Release]) -> list[str]:
    """Explain the columns, and name the machines, the licenses' pages, and the publications."""
    machines: dict[str, list[str]] = {}
    rights: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for name, release in releases.items():
        if seen := release.measured:
            where = f"{seen.unit} per second ({' / '.join(PRECISIONS)}): {seen.machine}, {seen.date}, {seen.origin}"
            machines.setdefault(where, []).append(name)
        if release.license and release.citation:
            names, pages = rights.setdefault((release.license.name, release.citation.text), ([], []))
            names.append(name)
            pages.append(release.license.origin)
    lines = [
        "parameters: without the heads, which seqmill does not use. weights: the files to fetch.",
        "memory: the peak of the run on a CPU that measured the speed. ~: not measured; this is what seqmill requests",
        "for a job with one CPU thread, which is more than it should need.",
        *(f"speed of {_in_short(names)}: {where}" for where, names in machines.items()),
    ]
    for (license, citation), (names, pages) in rights.items():
        lines += [
            "",
            f"{_in_short(names)}: license {license}, {_in_short(list(dict.fromkeys(pages)))}",
            f"  cite {citation}",
        ]
    return lines


def _in_short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"
