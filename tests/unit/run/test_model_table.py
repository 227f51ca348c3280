"""The table of `seqmill models`: its figures are those of the benchmarks and of the disk."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from pipeline import run_script
from seqmill.run.model_table import HEADER, model_table
from seqmill.spec.models import DNABERT_MODELS, ESM2_MODELS, NAMES
from seqmill.spec.released import read_releases

REPOSITORY = Path(__file__).parents[3]


def rows() -> dict[str, list[str]]:
    """Return the table's cells by model; its columns are where the header's begin."""
    header, *lines = model_table()[: 1 + len(NAMES)]
    starts = [header.index(name) for name in HEADER]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    return {row[0]: row for row in cells}


def benchmark(name: str, origin: str) -> tuple[int, dict[str, Any]]:
    """Return the residues or bases of a benchmark, and its runs; a protein has two special tokens."""
    found = json.loads((REPOSITORY / origin).read_text())
    if "models" in found:
        found = found["models"][name]
        return found["tokens"] - 2 * found["sequences"], found["runs"]
    return found["bases"], found["runs"]


def test_the_speeds_and_the_memory_are_those_of_the_benchmarks() -> None:
    measured = {name: release.measured for name, release in read_releases().items() if release.measured}
    assert measured.keys() == {*list(ESM2_MODELS)[:4], "esmc_300m", "dnabert_s"}
    for name, figures in measured.items():
        letters, runs = benchmark(name, figures.origin)
        assert figures.date == json.loads((REPOSITORY / figures.origin).read_text())["date"]
        assert re.fullmatch(r"AMD EPYC \(Zen [45]\), 2 cores", figures.machine)
        assert figures.unit == ("bases" if name == "dnabert_s" else "residues")
        for precision, speed in figures.per_second.items():
            timed = runs[f"seqmill {precision}"]
            assert speed == round(letters / statistics.median(run["seconds"] for run in timed))
            assert figures.peak_bytes[precision] == max(run["peak_bytes"] for run in timed)


def test_a_row_for_each_model() -> None:
    table = rows()
    assert list(table) == NAMES
    assert table["esm2_t33_650M_UR50D"][1:9] == [
        *("protein", "33", "1280", "649 M", "MIT", "2.6 GB", "6.2 GB", "239 / 130")
    ]
    assert table["dnabert_s"][1:6] == ["nucleotide", "12", "768", "116 M", "Apache-2.0"]
    for name in ("esm2_t36_3B_UR50D", "esm2_t48_15B_UR50D", "esmc_600m", "prostt5", "dnabert_2"):
        assert table[name][8] == "not measured"
        assert table[name][7].startswith("~")
    assert table["esm2_t48_15B_UR50D"][6] == "unknown"
    assert table["esmc_6b"][1:7] == ["protein", "80", "2560", "6.3 B", "MIT", "25 GB"]
    assert table["prott5_xl_u50"][1:7] == ["protein", "24", "1024", "1.2 B", "AFL-3.0", "2.4 GB"]
    assert all(row[5] in ("MIT", "AFL-3.0", "Apache-2.0") for row in table.values())
    assert {name for name, row in table.items() if row[1] == "nucleotide"} == DNABERT_MODELS.keys()


def test_the_license_and_the_publication_of_each_model() -> None:
    notes = model_table()[1 + len(NAMES) :]
    credits = {line: notes[number + 1] for number, line in enumerate(notes) if ": license " in line}
    for release in read_releases().values():
        (line,) = (line for line, cited in credits.items() if cited == f"  cite {release.citation.text}")
        assert f": license {release.license.name}, https://" in line
    assert [line.partition(":")[0] for line in credits] == [
        "esm2_t6_8M_UR50D ... esm2_t48_15B_UR50D", "esmc_300m ... esmc_6b", *NAMES[-4:]
    ]  # fmt: skip
    assert credits["prostt5: license MIT, https://github.com/mheinzinger/ProstT5"].endswith(
        "NAR Genomics and Bioinformatics 6, lqae150. https://doi.org/10.1093/nargab/lqae150"
    )


def test_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_MODELS", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    name, other = list(ESM2_MODELS)[:2]
    assert rows()[name][9].endswith(f"fetch {name}")
    assert rows()[name][9].startswith("no: ")
    for path in (tmp_path / f"user/{name}.pt", tmp_path / f"resources/models/{other}.pt"):
        path.parent.mkdir(parents=True)
        path.touch()
    assert rows()[name][9] == str(tmp_path / f"user/{name}.pt")
    assert rows()[other][9] == f"resources/models/{other}.pt"


def test_the_program_prints_it(tmp_path: Path) -> None:
    done = run_script("models.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].split()[:3] == ["model", "kind", "layers"]
