"""The table that colors the report's map is read exactly, or refused. Also: unfinished shards."""

import base64
import csv
import logging
from pathlib import Path

import numpy as np
import pandas
import pytest

from embeddings_file import write_embeddings
from seqmill.api.embeddings import Embeddings, open_embeddings
from seqmill.errors import SeqmillError
from seqmill.report.colors import column_scale, require_column
from seqmill.report.data import Sources
from seqmill.report.map import shown_rows
from seqmill.report.page import write_report
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.status import COMPLETE, RUNNING, RunFacts, ShardStatus, write_status

IDS = ["\"double\"'single'", '"', '""', '"whole"', "蛋白", "NA", "#1", "plain"]


def embeddings_of(folder: Path, ids: list[str]) -> Embeddings:
    return open_embeddings(write_embeddings(folder / "e.h5", np.eye(len(ids), 3), ids))


def table(folder: Path, text: str) -> Path:
    path = folder / "table.tsv"
    path.write_bytes(text.encode())
    return path


def scale_of(path: Path, embeddings: Embeddings, column: str = "kind", most: int = 100_000) -> dict:
    return column_scale(path, column, embeddings, shown_rows(len(embeddings), most), set())


def values_of(folder: Path, values: list[str]) -> dict:
    """Return the scale of a column with these values."""
    ids = [f"r{number}" for number in range(len(values))]
    text = "id\tkind\n" + "".join(f"{id_}\t{value}\n" for id_, value in zip(ids, values, strict=True))
    return scale_of(table(folder, text), embeddings_of(folder, ids))


def codes(scale: dict) -> list[int]:
    return list(base64.b64decode(scale["codes"]))


def test_a_quote_is_a_letter(tmp_path: Path) -> None:
    scale = values_of(tmp_path, ['"5 prime', "b", 'b"', '5"', '"'])
    assert scale["labels"] == [['"', 1], ['"5 prime', 1], ['5"', 1], ["b", 1], ['b"', 1]]
    assert codes(scale) == [2, 4, 5, 3, 1]


def test_a_table_from_pandas_or_csv_is_read_as_they_would(tmp_path: Path) -> None:
    """They put quotes around a field that contains one."""
    kinds = [f'{number} "{id_}"' for number, id_ in enumerate(IDS)]
    frame = pandas.DataFrame({"id": IDS, 'ki"nd': kinds})
    embeddings = embeddings_of(tmp_path, IDS)
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        frame.to_csv(tmp_path / "by_pandas.tsv", sep="\t", index=False, quoting=quoting)
        scale = scale_of(tmp_path / "by_pandas.tsv", embeddings, 'ki"nd')
        assert scale["labels"] == [[kind, 1] for kind in kinds]
        assert codes(scale) == list(range(1, len(IDS) + 1))


def test_names_with_an_underscore_are_not_numbers(tmp_path: Path) -> None:
    assert float("1_1") == 11  # Python accepts underscores
    scale = values_of(tmp_path, [f"{number}_{number}" for number in range(15)])
    assert (scale["kind"], scale["labels"][0], scale["labels"][-1]) == ("categories", ["0_0", 1], ["5 others", 5])
    assert values_of(tmp_path, [*map(str, range(15)), "1_000"])["kind"] == "categories"


@pytest.mark.parametrize("value", ["1e400", "-inf", "Infinity", "NAN", "-nan"])
def test_a_number_that_is_not_finite_is_named(value: str, tmp_path: Path) -> None:
    with pytest.raises(SeqmillError, match=rf"table\.tsv: '{value}', the kind of 'r60', is not a finite number"):
        values_of(tmp_path, [*map(str, range(60)), value])
    assert values_of(tmp_path, ["helix", value])["kind"] == "categories"


@pytest.mark.parametrize("missing", ["", "NA", "N/A", "NaN", "nan"])
def test_missing_values_are_the_same_everywhere(missing: str, tmp_path: Path) -> None:
    scale = values_of(tmp_path, [f"{number / 2}" for number in range(40)] + [missing])
    assert (scale["kind"], scale["low"], scale["high"], codes(scale)[-1]) == ("numbers", 0, 19.5, 0)
    scale = values_of(tmp_path, ["helix", "helix", missing])
    assert (scale["labels"], scale["missing"], codes(scale)) == ([["helix", 2]], 1, [1, 1, 0])
    scale = values_of(tmp_path, ["3", "3", missing])
    assert (scale["labels"], scale["missing"]) == ([["3", 2]], 1)
    scale = values_of(tmp_path, [missing, missing])
    assert (scale["labels"], scale["missing"]) == ([], 2)


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)  # the csv module's default
    path = table(tmp_path, f"id\tsequence\tkind\r\na\t{'M' * 200_000}\thelix\r\n\r\nb\t\tsheet\r\n")
    scale = scale_of(path, embeddings_of(tmp_path, ["a", "b"]))
    assert scale["labels"] == [["helix", 1], ["sheet", 1]]


def test_a_table_may_name_other_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(tmp_path, "id\tkind\nother\tx\nb\thelix\nsuperset\tx\nother\ty\n")
    with caplog.at_level(logging.INFO):
        scale = scale_of(path, embeddings_of(tmp_path, ["a", "b"]))
    assert (scale["labels"], scale["missing"], codes(scale)) == ([["helix", 1]], 1, [0, 1])
    assert "table.tsv: 1 of its 4 rows are of the 2 embeddings shown" in caplog.text


def test_a_table_that_names_no_record_is_refused(tmp_path: Path) -> None:
    embeddings = embeddings_of(tmp_path, ["a", "b"])
    path = table(tmp_path, "id\tkind\nA\tx\nB\ty\n")
    with pytest.raises(SeqmillError, match=r"table\.tsv: no record of .*e\.h5 has any of its ids: 'A', 'B'; "):
        scale_of(path, embeddings)
    # A quarantined record has no embedding to color, but the table is the right one.
    assert column_scale(path, "kind", embeddings, np.arange(2), {"B"})["labels"] == []
    # The same holds if its record is not shown.
    embeddings = embeddings_of(tmp_path, ["a", "b", "B", "c"])
    assert shown_rows(4, 1).tolist() != [2]
    assert scale_of(path, embeddings, most=1)["labels"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\tkind\na\n", "line 2: 1 fields, but the header has 2 names"),
        ("kind\tlength\na\thelix\t3\n", "no column 'kind'; the columns after the ids are: length"),
        (
            "color\tkind\na\thelix\t3\n",
            "line 2: 3 fields, but the header has 2 names",
        ),  # R omits the name of the first column
        ("id\tkind\na\tx\n\na\ty\n", "line 4: the id 'a' occurs twice"),
        ("", "its first line has no tab: ''; save it tab-separated"),
        ("id,kind\na,x\n", "its first line has no tab: 'id,kind'; save it tab-separated"),
    ],
)
def test_a_table_in_another_format_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SeqmillError, match=message):
        scale_of(table(tmp_path, text), embeddings_of(tmp_path, ["a", "b"]))


def test_a_table_is_checked_before_anything_runs(tmp_path: Path) -> None:
    require_column(table(tmp_path, '"id"\t"kind"\n'), "kind")
    with pytest.raises(SeqmillError, match="no column 'color'; the columns after the ids are: kind"):
        require_column(table(tmp_path, "id\tkind\na\tx\n"), "color")
    with pytest.raises(SeqmillError, match=r"nowhere\.tsv: no such table"):
        require_column(tmp_path / "nowhere.tsv", "kind")
    (tmp_path / "table.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(SeqmillError, match=r"table\.tsv\.gz: not a tab-separated table in UTF-8"):
        require_column(tmp_path / "table.tsv.gz", "kind")


def test_unfinished_shards_have_no_time_span(tmp_path: Path) -> None:
    embeddings = embeddings_of(tmp_path, ["a", "b"])
    fingerprint = Fingerprint.from_attributes(embeddings.attrs).attributes()
    paths = [tmp_path / f"shard_{rank}-of-2.status.json" for rank in range(2)]
    started, run = "2026-01-01T12:00:00+00:00", RunFacts(num_tokens=5)
    for ended in (("", ""), (started, ""), (started, started)):
        for rank, path in enumerate(paths):
            state = COMPLETE if ended[rank] else RUNNING
            times = {"started": started, "ended": ended[rank]}
            write_status(path, ShardStatus(rank, 2, state, "s.h5", fingerprint=fingerprint, run=run, **times))
        write_report(Sources(tmp_path / "e.h5", statuses=paths), tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert "Tokens in each shard." in page
        assert ("When each shard" in page) == all(ended)
