"""The report shows the data of the files, its page is safe and complete, and errors name damaged inputs."""

import base64
import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest

from embeddings_file import write_embeddings
from pipeline import SCRIPTS, Run, run_script
from seqmill.api.embeddings import open_embeddings
from seqmill.errors import SeqmillError
from seqmill.report import map as report_map
from seqmill.report import page as report_page
from seqmill.report.charts import log_ticks, ticks
from seqmill.report.data import Sources, gather
from seqmill.report.map import principal_components, shown_rows
from seqmill.report.page import write_report
from seqmill.report.throughput import MAX_LINES, read_points, speeds
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs
from seqmill.store.status import MOST_POINTS, Throughput

ODD = [
    "</script><script>alert(1)</script>",
    "<img/src=x/onerror=alert(2)>",
    "<!--<script>",
    "&lt;b&gt;",
    "\"double\"'single'",
    "</style></title>",
    "\u2028\u2029\u86cb\u767d",
    "plain",
    "plain",
    "NA",
]
SEQUENCES = ["MKV", "MKVLA", "mkvja", "MKVLAGSTCY" * 3, "MKV", "ACDE*", "GHIKLMNP", "QRSTVWY", "MKVLAGST", "DDDD"]


def write_fasta(path: Path) -> Path:
    path.write_text("".join(f">{id_} about\n{s}\n" for id_, s in zip(ODD, SEQUENCES, strict=True)), encoding="utf-8")
    return path


def sources_of(run: Run) -> Sources:
    folder = run.folder
    return Sources(run.embeddings, folder / "records.tsv.gz", folder / "manifest.json", run.index)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("merged")
    fasta = write_fasta(folder / "odd <b>&name.faa")
    return Run(folder, 2).build(fasta, policy=LengthPolicy("truncate", 20)).embed(audit_seconds=1).merge()


@pytest.fixture(scope="module")
def rejecting(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rejecting")
    return Run(folder, 1).build(write_fasta(folder / "some.faa"), policy=LengthPolicy("reject", 20)).embed().merge()


@pytest.fixture
def own(merged: Run, tmp_path: Path) -> Run:
    """A copy of the merged results that the test may damage."""
    shutil.copytree(merged.folder, tmp_path / "own")
    return replace(merged, folder=tmp_path / "own")


class Page(HTMLParser):
    """The page as a browser reads it: elements, script text, and all other text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._within = ""
        self._depth = 0  # of charts
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._depth += tag == "svg"
        self.tags["name in a chart" if tag == "title" and self._depth else tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "svg"
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(sources: Sources, folder: Path) -> Page:
    write_report(sources, folder / "report.html")
    return Page(folder / "report.html")


def records_of(run: Run) -> list[dict[str, str]]:
    with gzip.open(run.folder / "records.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def decoded(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize(
    ("tokenizer", "unit"), [("esm2", "residues"), ("esmc", "residues"), ("prostt5", "residues"), ("bpe 1f", "bases")]
)
def test_lengths_are_in_the_unit_of_the_family(tokenizer: str, unit: str, tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.eye(4, 3))
    with h5py.File(path, "r+") as file:
        file.attrs["tokenizer"] = tokenizer
        file.attrs["letter_counts"] = json.dumps({"uzob_to_x": 3})
    page = page_of(Sources(path), tmp_path)
    assert page.data["unit"] == unit
    assert "<tr><td>U, Z, O, and B to X</td>" in (tmp_path / "report.html").read_text()


def test_numbers_are_those_of_the_manifest_and_the_records(merged: Run, tmp_path: Path):
    page = page_of(sources_of(merged), tmp_path)
    data, manifest, records = page.data, merged.manifest, records_of(merged)
    counts = manifest["counts"]
    assert data["fates"] == counts["fates"]
    assert Counter(r["fate"] for r in records) == {fate: n for fate, n in data["fates"].items() if n}
    assert data["letters"] == counts["letters"]
    assert data["letters"]["lower_case"] == 5
    assert data["counts"]["records"] == len(records) == counts["num_records"] == 10
    assert (data["counts"]["sequences"], data["counts"]["tokens"]) == (counts["num_sequences"], counts["num_tokens"])
    assert data["counts"]["packs"] == counts["num_packs"] == data["packs"]["number"] == sum(data["packs"]["counts"])
    firsts = [int(r["embedded_length"]) for r in records if r["fate"] != "duplicate"]
    assert data["counts"]["embedded"] == sum(firsts) == sum(s["run"]["num_residues"] for s in manifest["shards"])

    lengths = np.array([int(r["length"]) for r in records])
    histogram = data["lengths"]
    assert histogram["counts"] == np.histogram(lengths, histogram["edges"])[0].tolist()
    assert sum(histogram["counts"]) == len(records)
    assert (histogram["min"], histogram["max"]) == (lengths.min(), lengths.max())
    assert (histogram["median"], histogram["mean"]) == (np.median(lengths), lengths.mean())

    for shard, told in zip(data["shards"], manifest["shards"], strict=True):
        assert (shard["rank"], shard["seconds"], shard["audit"]) == (told["rank"], told["seconds"], told["audit"])
        for name in ("tokens_per_second", "num_tokens", "pack_fill", "device"):
            assert shard[name] == told["run"][name]
    assert data["audit"] == {name.removeprefix("audit_"): value for name, value in manifest["audit"].items()}
    assert data["audit"]["sequences"] > 0
    assert f"{data['audit']['worst_relative_error']:.2e}" in page.text
    assert manifest["shards"][0]["run"]["computed_by"][0] in page.text


def test_the_warning_about_untrained_weights_stands_out(merged: Run, tmp_path: Path):
    page = page_of(sources_of(merged), tmp_path)
    assert ("div", "role", "alert") in page.attributes
    assert page.text.index("UNTRAINED WEIGHTS") < page.text.index("Records")
    assert "random projections" in page.text


def test_left_out_records_are_named_at_the_top(rejecting: Run, tmp_path: Path):
    page = page_of(sources_of(rejecting), tmp_path)
    assert "1 record rejected" in page.text[: page.text.index("unique sequences")]
    assert (page.data["counts"]["embeddings"], page.data["fates"]["rejected"]) == (9, 1)


def test_both_causes_of_rejection_are_named(tmp_path: Path):
    fasta = tmp_path / "some.faa"
    fasta.write_text(">a\nMKVLA\n>b\nM-K\n>c\nMK\n>d\n\n>e\nMKV\n")
    run = Run(tmp_path, 1).build(fasta, policy=LengthPolicy("reject", 4), on_invalid="skip").embed().merge()
    page = page_of(sources_of(run), tmp_path)
    top = page.text[: page.text.index("unique sequences")]
    assert "1 record rejected: left out, being too long" in top
    assert "2 records rejected: left out, having a letter that is not allowed, or no sequence" in top
    assert page.data["fates"]["rejected"] == 3
    lengths = page.data["lengths"]
    assert [lengths[name] for name in ("min", "max", "mean")] == [2, 5, 10 / 3]  # of the others


def test_ids_and_names_are_data(merged: Run, tmp_path: Path):
    page = page_of(sources_of(merged), tmp_path)
    assert page.tags["script"] == 2
    assert [page.tags[tag] for tag in ("img", "style", "title", "b")] == [0, 1, 1, 0]
    assert page.data["points"]["ids"] == ODD
    assert page.data["points"]["lengths"] == open_embeddings(merged.embeddings).lengths.tolist()
    assert "odd <b>&name.faa" in page.text


def test_long_ids_are_shortened(tmp_path: Path):
    path = write_embeddings(tmp_path / "e.h5", np.eye(4, 3), ["a" * 500, "b", "c", "d"])
    assert gather(Sources(path))["points"]["ids"] == ["a" * 80 + "…", "b", "c", "d"]


def test_the_page_loads_nothing(merged: Run, tmp_path: Path):
    page = page_of(sources_of(merged), tmp_path)
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|url\(|@import|fetch\(|XMLHttp|import\(", page.source)
    assert [a for a in page.attributes if a[1] in ("src", "href", "srcset", "action")] == []
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert len(page.source) < 60_000


def test_equal_results_make_equal_pages(merged: Run, tmp_path: Path):
    first = page_of(sources_of(merged), tmp_path).source
    assert page_of(sources_of(merged), tmp_path).source == first


def test_embeddings_alone_are_enough(merged: Run, tmp_path: Path):
    shutil.copy(merged.embeddings, tmp_path)
    result = run_script("report.py", "--embeddings", tmp_path / "embeddings.h5", "--output", tmp_path / "r.html")
    assert result.returncode == 0, result.stderr
    data = Page(tmp_path / "r.html").data
    assert (data["shards"], data["packs"], data["counts"]["tokens"]) == ([], {}, None)
    assert data["fates"] == merged.manifest["counts"]["fates"]
    assert data["lengths"]["of"] == "embeddings"
    assert len(data["points"]["maps"]) >= 1


def test_files_in_the_same_folder_are_found(merged: Run, tmp_path: Path):
    result = run_script("report.py", "--embeddings", merged.embeddings, "--output", tmp_path / "r.html")
    assert result.returncode == 0, result.stderr
    assert Page(tmp_path / "r.html").data == page_of(sources_of(merged), tmp_path).data


def test_statuses_replace_a_missing_manifest(merged: Run, rejecting: Run):
    whole = gather(sources_of(merged))
    without = replace(sources_of(merged), manifest=None, statuses=merged.statuses[::-1])
    assert gather(without)["shards"] == whole["shards"]
    with pytest.raises(SeqmillError, match=r"status\.json: belongs to another result"):
        gather(replace(without, statuses=rejecting.statuses))


def test_no_embedding_at_all(tmp_path: Path):
    """For example, all records are quarantined."""
    page = page_of(Sources(write_embeddings(tmp_path / "e.h5", np.empty((0, 5)), [])), tmp_path)
    assert (page.data["points"]["maps"], page.data["lengths"]) == ([], {})
    assert "fewer than three embeddings" in page.text


def test_the_first_of_several_outputs_is_shown(tmp_path: Path):
    run = Run(tmp_path, 1).build(write_fasta(tmp_path / "some.faa"))
    page = page_of(sources_of(run.embed(outputs=Outputs((3, 6), ("max", "mean"))).merge()), tmp_path)
    assert (page.data["layer"], page.data["pooling"], page.data["outputs"]) == (3, "max", 4)
    assert "4 outputs" in page.text
    array = open_embeddings(run.embeddings, 3, "max").array
    points, _ = principal_components(array.__getitem__, np.arange(len(array)), array.shape[1], 2)
    assert page.data["points"]["maps"][0]["axes"][0]["high"] == pytest.approx(points[:, 0].max())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b'{"created": "now"'),
        ("manifest.json", b"[]"),
        ("manifest.json", b"\xff\xfe"),
        ("records.tsv.gz", b"no gzip"),
        ("records.tsv.gz", gzip.compress(b"record\tid\n1\ta\n", mtime=0)),
        ("records.tsv.gz", gzip.compress(b"", mtime=0)),
        ("index.h5", b"no HDF5"),
        ("embeddings.h5", b"no HDF5"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, own: Run, tmp_path: Path):
    (own.folder / name).write_bytes(content)
    result = run_script("report.py", "--embeddings", own.embeddings, "--output", tmp_path / "r.html")
    assert result.returncode == 1
    assert name in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("counts", {}), ("shards", [{"run": 3}]), ("shards", "none"), ("seconds", {"verify": "long"}), ("fasta", None)],
)
def test_a_manifest_with_wrong_values_is_named(name: str, value: object, own: Run):
    path = own.folder / "manifest.json"
    path.write_text(json.dumps({**own.manifest, name: value}))
    with pytest.raises(SeqmillError, match=r"manifest\.json: not a seqmill manifest"):
        gather(sources_of(own))


@pytest.mark.parametrize("number", [1, 5, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 1000, 4321])
def test_a_series_keeps_few_points_and_its_ends(number: int):
    generator = np.random.default_rng(number)
    seconds, tokens = np.cumsum(generator.exponential(3, number)), np.cumsum(generator.integers(1, 9999, number))
    throughput = Throughput()
    points = throughput.points
    for pair in zip(seconds.tolist(), tokens.tolist(), strict=True):
        throughput.add(*pair)
        assert len(points) <= MOST_POINTS
    throughput.add(seconds[-1], int(tokens[-1]), is_last=True)
    assert points[0] == (0, 0)
    assert points[-1] == (round(seconds[-1], 2), tokens[-1])
    given = set(zip(np.round(seconds, 2).tolist(), tokens.tolist(), strict=True))
    assert set(points[1:]) <= given
    assert len(points) >= min(number, MOST_POINTS // 3)
    if number > MOST_POINTS:
        assert np.diff(points, axis=0)[:, 0].max() < seconds[-1] / 10


def shard_of(rank: int, began: float, points: list[list[float]], attempt: int = 1) -> dict:
    seconds = {"import": 1.0, "load": 2.0, "compute": points[-1][0]}
    return {"rank": rank, "attempt": attempt, "started": began - 3, "seconds": seconds, "points": read_points(points)}


def tokens_of(line: dict) -> float:
    return sum(line["rates"]) * line["step"]


def test_speeds_of_two_shards_in_turn():
    """The second shard starts when the first is done, and is twice as fast."""
    first = shard_of(0, 1000, [[0, 0], [10, 100], [20, 200]])
    second = shard_of(1, 1020, [[0, 0], [5, 100], [20, 400]])
    found = speeds([first, second])
    assert (found["number"], found["later_attempts"]) == (2, False)
    assert found["all"] == {"begin": 0, "step": 10, "rates": [10, 10, 20, 20]}
    assert found["shards"] == [
        {"rank": 0, "begin": 0, "step": 10, "rates": [10, 10]},
        {"rank": 1, "begin": 20, "step": 10, "rates": [20, 20]},
    ]


def test_speeds_lose_no_token():
    generator = np.random.default_rng(4)
    shards, total = [], 0
    for rank in range(MAX_LINES + 5):
        number = int(generator.integers(1, MOST_POINTS))
        times, tokens = np.cumsum(generator.exponential(9, number)), np.cumsum(generator.integers(0, 9999, number))
        points = [[0, 0], *map(list, zip(times.tolist(), tokens.tolist(), strict=True))]
        shards.append(shard_of(rank, float(generator.uniform(0, 500)), points, attempt=1 + (rank == 7)))
        total += points[-1][1]
    found = speeds(shards)
    assert tokens_of(found["all"]) == pytest.approx(total, rel=1e-3)
    assert (found["number"], len(found["shards"]), found["later_attempts"]) == (MAX_LINES + 5, MAX_LINES, True)
    for line, shard in zip(found["shards"], shards, strict=False):
        assert tokens_of(line) == pytest.approx(shard["points"][-1, 1], rel=1e-2, abs=1)


def test_shards_without_recorded_speeds_have_none():
    nothing = {"rank": 0, "attempt": 1, "started": 5.0, "seconds": {}}
    assert speeds([]) == {}
    assert speeds([{**nothing, "points": read_points(None)}]) == {}
    assert speeds([{**nothing, "points": read_points([[0, 0], [0, 0]])}]) == {}  # all packs were resumed
    assert speeds([{**nothing, "started": None, "points": read_points([[0, 0], [1, 5]])}]) == {}


def with_throughput(run: Run, series: list[object]) -> Sources:
    """Return the run's sources, with these series in its manifest; None omits a series."""
    shards = run.manifest["shards"]
    for shard, points in zip(shards, series, strict=True):
        shard["run"].pop("throughput", None)
        if points is not None:
            shard["run"]["throughput"] = points
    (run.folder / "manifest.json").write_text(json.dumps({**run.manifest, "shards": shards}))
    return sources_of(run)


def test_speed_over_time_is_drawn(own: Run, tmp_path: Path):
    page = page_of(with_throughput(own, [[[0, 0], [10, 100]], [[0, 0], [20, 1000], [30, 1100]]]), tmp_path)
    drawn = Counter(value for tag, name, value in page.attributes if (tag, name) == ("path", "class"))
    assert (drawn["area"], drawn["line"]) == (1, 2)
    assert "shard 1: 37 tokens/s" in page.text
    assert "on average from 10 tokens/s (shard 0) to 37 (shard 1)" in page.text
    page = page_of(with_throughput(own, [[[0, 0], [10, 100]], None]), tmp_path)
    drawn = Counter(value for tag, name, value in page.attributes if (tag, name) == ("path", "class"))
    assert (drawn["area"], drawn["line"]) == (1, 0)
    page = page_of(with_throughput(own, [None, None]), tmp_path)  # written by an older version
    assert "Speed over time" not in page.text
    assert page.data["throughput"] == {}


def test_many_shards_are_summarized(merged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = gather(sources_of(merged))
    first = {**data["shards"][0], "num_tokens": 100, "device": "a <GPU>"}
    data["shards"] = [{**first, "rank": rank, "attempt": 1 + (rank < 2), "resumed_packs": 3} for rank in range(130)]
    data["shards"][7] |= {"num_tokens": 230, "sequences_on_cpu": 4, "audit": {"verdict": "fail"}}
    data["attributes"]["computed_by"] = "a <GPU>; a CPU"
    monkeypatch.setattr(report_page, "gather", lambda sources: data)
    page = page_of(sources_of(merged), tmp_path)
    text = " ".join(page.text.split())
    assert "The audit's verdict on 1 shard is fail: 7" in text
    assert "Computed by 2 kinds of device or kernel" in text
    assert "2.277: the most tokens in a shard, by their mean" in text
    assert "2 shards at a later attempt, with 6 packs of earlier ones" in text
    assert "sequences left to the CPU4" in text
    assert "packs split for lack of memory" not in text
    assert page.tags["gpu"] == 0
    listed = page.source.partition("The first 100 of 130 shards")[2].partition("</table>")[0]
    assert listed.count("<tr>") == 101
    assert "<th>device</th>" not in listed  # the same for all


@pytest.mark.parametrize("points", ["fast", [[0, 0], [1]], [[0, 0], [2, 5], [1, 6]], [[0, 0], ["a", 1]], 7, [{}]])
def test_a_series_with_wrong_values_is_named(points: object, own: Run):
    with pytest.raises(SeqmillError, match=r"manifest\.json: not a seqmill manifest"):
        gather(with_throughput(own, [points, None]))


def test_a_table_that_ends_too_early_is_named(own: Run):
    path = own.folder / "records.tsv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SeqmillError, match=r"records\.tsv\.gz: not a table of records, or damaged"):
        gather(sources_of(own))


@pytest.mark.parametrize("field", ["records", "manifest", "index"])
def test_files_of_another_result_are_refused(field: str, merged: Run, rejecting: Run):
    other = getattr(sources_of(rejecting), field)
    with pytest.raises(SeqmillError, match=re.escape(str(other))):
        gather(replace(sources_of(merged), **{field: other}))


@pytest.mark.parametrize("field", ["embeddings", "records", "manifest", "index", "metadata"])
def test_missing_files_are_named(field: str, merged: Run, tmp_path: Path):
    with pytest.raises(SeqmillError, match="nowhere: no such"):
        gather(replace(sources_of(merged), **{field: tmp_path / "nowhere", "color": "x"}))


def test_an_input_is_not_replaced(own: Run):
    with pytest.raises(SeqmillError, match="is the input as well"):
        write_report(sources_of(own), own.folder / "manifest.json")


def metadata_of(folder: Path, header: str, rows: list[tuple[str, str]]) -> Path:
    path = folder / "metadata.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([("id", "other", header), *((id_, "-", value) for id_, value in rows)])
    return path


def scale_of(run: Run, metadata: Path, column: str) -> dict:
    return gather(replace(sources_of(run), metadata=metadata, color=column))["points"]["scales"][0]


def test_colors_by_categories(merged: Run, tmp_path: Path):
    rows = [(ODD[0], "beta"), (ODD[1], "alpha"), (ODD[2], "beta"), ("plain", "alpha"), ("NA", "NA"), (ODD[3], "")]
    scale = scale_of(merged, metadata_of(tmp_path, "<b>kind", rows), "<b>kind")
    assert (scale["name"], scale["kind"], scale["missing"]) == ("<b>kind", "categories", 5)
    assert scale["labels"] == [["alpha", 3], ["beta", 2]]
    assert decoded(scale["codes"], "u1").tolist() == [2, 1, 2, 0, 0, 0, 0, 1, 1, 0]


def test_colors_by_numbers(merged: Run, tmp_path: Path):
    rows = [(ODD[0], "-1.5"), (ODD[1], "1.5"), (ODD[2], "0"), ("plain", "NA")]
    scale = scale_of(merged, metadata_of(tmp_path, "gravy", rows), "gravy")
    assert (scale["kind"], scale["low"], scale["high"], scale["log"]) == ("numbers", -1.5, 1.5, False)
    assert decoded(scale["codes"], "u1").tolist() == [1, 255, 128, 0, 0, 0, 0, 0, 0, 0]


def test_a_few_integers_are_categories(merged: Run, tmp_path: Path):
    rows = [(id_, str(number % 3)) for number, id_ in enumerate(dict.fromkeys(ODD))]
    assert scale_of(merged, metadata_of(tmp_path, "cluster", rows), "cluster")["labels"][0] == ["1", 4]


def test_rare_categories_are_merged(tmp_path: Path):
    ids = [f"r{number}" for number in range(40)]
    path = write_embeddings(tmp_path / "e.h5", np.random.default_rng(0).standard_normal((40, 5)), ids)
    rows = [(id_, f"kind {min(number, 20)}") for number, id_ in enumerate(ids)]
    sources = Sources(path, metadata=metadata_of(tmp_path, "kind", rows), color="kind")
    labels = gather(sources)["points"]["scales"][0]["labels"]
    assert labels[0] == ["kind 20", 20]
    assert labels[-1] == ["11 others", 11]
    assert sum(count for _, count in labels) == 40


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([(f"u{number}", "b") for number in range(9)], "kind", "'u0', 'u1', 'u2', 'u3', 'u4' and 4 more"),
        ([("plain", "a"), ("plain", "b")], "kind", "line 3: the id 'plain' occurs twice"),
        ([("plain", "a")], "color", "no column 'color'; the columns after the ids are: other, kind"),
        ([("plain", "a")], "id", "no column 'id'; the columns after the ids are"),
    ],
)
def test_metadata_that_do_not_fit(rows: list, column: str, message: str, merged: Run, tmp_path: Path):
    with pytest.raises(SeqmillError, match=message):
        scale_of(merged, metadata_of(tmp_path, "kind", rows), column)


def test_metadata_may_name_left_out_records(rejecting: Run, tmp_path: Path):
    metadata = metadata_of(tmp_path, "kind", [(ODD[3], "long"), ("plain", "short")])
    assert scale_of(rejecting, metadata, "kind")["labels"] == [["short", 2]]


def test_metadata_need_a_column(merged: Run, tmp_path: Path):
    result = run_script(
        "report.py", "--embeddings", merged.embeddings, "--output", tmp_path / "r.html", "--color", "kind"
    )
    assert result.returncode == 2
    assert "--metadata and --color go together" in result.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_principal_components_are_those_of_svd(dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_map, "BLOCK_BYTES", 8 * 20 * 7)  # seven rows per block
    generator = np.random.default_rng(1)
    array = (generator.standard_normal((60, 20)) * np.geomspace(4, 0.1, 20) + 3).astype(dtype)
    rows = np.arange(1, 60, 2)
    points, shares = principal_components(array.__getitem__, rows, 20, 3)
    centered = array[rows].astype(np.float64)
    centered -= centered.mean(axis=0)
    u, s, vt = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign([axis[np.abs(axis).argmax()] for axis in vt[:3]])
    np.testing.assert_allclose(points, u[:, :3] * s[:3] * signs, rtol=0, atol=1e-10)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:3], rtol=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_identical_rows_have_no_map(value: float, tmp_path: Path):
    path = write_embeddings(tmp_path / "e.h5", np.full((7, 4), value), list("abcdefg"))
    assert gather(Sources(path))["points"]["maps"] == []


def test_coordinates_are_rounded_to_1_in_65535(merged: Run):
    points = gather(sources_of(merged))["points"]
    drawn = points["maps"][0]
    array = open_embeddings(merged.embeddings).array
    expected, _ = principal_components(array.__getitem__, np.arange(len(array)), array.shape[1], 2)
    for axis, name, column in zip(drawn["axes"], "xy", expected.T, strict=True):
        levels = decoded(drawn[name], "<u2") / 65535
        width = axis["high"] - axis["low"]
        np.testing.assert_allclose(axis["low"] + levels * width, column, rtol=0, atol=0.51 * width / 65535)
    assert points["scales"][-1]["name"] == "Length (residues)"
    codes = decoded(points["scales"][-1]["codes"], "u1")
    lengths = np.array(points["lengths"])
    shares = np.log(lengths / lengths.min()) / np.log(lengths.max() / lengths.min())
    np.testing.assert_allclose(codes, 1 + 254 * shares, rtol=0, atol=0.51)


@pytest.mark.parametrize(("total", "most"), [(0, 5), (3, 5), (5, 5), (6, 5), (7, 5), (1000, 300), (10**9 + 7, 1000)])
def test_rows_shown_are_spread_over_the_file(total: int, most: int):
    rows = shown_rows(total, most)
    assert len(rows) == min(total, most)
    if total <= most:
        assert rows.tolist() == list(range(total))
    else:
        stretch = total / most
        assert (np.diff(rows) > 0).all()
        assert (np.abs(rows - np.arange(most) * stretch) <= stretch + 1).all()


def test_rows_shown_cover_every_phase_of_a_period():
    """A file has ten alternating kinds, and a tenth of its rows is shown: all kinds appear about equally often."""
    kinds = np.bincount(shown_rows(100_000, 10_000) % 10, minlength=10)
    assert kinds.min() > 900
    assert kinds.max() < 1100


def test_ticks_are_round_and_within_the_range():
    assert ticks(0, 97, 4) == [0, 20, 40, 60, 80]
    assert ticks(-0.37, 0.52, 4) == [-0.2, 0, 0.2, 0.4]
    assert ticks(3, 3, 4) == [3]
    assert log_ticks(12, 8000, 9) == [20, 50, 100, 200, 500, 1000, 2000, 5000]
    assert log_ticks(1, 10**7, 4)[0] == 1


MEASURE = """
import re, sys
from pathlib import Path
import pandas
from seqmill.report.page import write_report
from seqmill.report.data import Sources
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
folder = Path(sys.argv[1])
write_report(Sources(folder / "e.h5", folder / "records.tsv.gz"), folder / "report.html")
print(peak() - before)
"""


def test_memory_is_bounded(tmp_path: Path):
    """300,000 x 64: the file is 77 MB, and one centered float64 copy would be 307 MB."""
    total = 300_000
    vectors = np.random.default_rng(2).standard_normal((total, 64), np.float32)
    write_embeddings(tmp_path / "e.h5", vectors, [f"record{number}" for number in range(total)])
    with gzip.open(tmp_path / "records.tsv.gz", "wt", compresslevel=1) as table:
        table.write("id\tlength\tembedded_length\twindows\tfate\n")
        table.writelines(f"record{number}\t{number % 1000 + 1}\t5\t1\tembedded\n" for number in range(total))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SCRIPTS)})
    assert int(result.stdout) < 80 * 1024
    page = Page(tmp_path / "report.html")
    assert (page.data["points"]["shown"], page.data["points"]["total"]) == (100_000, total)
    assert page.data["points"]["ids"] == []
    assert sum(page.data["lengths"]["counts"]) == total
    assert "100,000 of 300,000 embeddings" in page.text
    expected, _ = principal_components(vectors.__getitem__, shown_rows(total, 100_000), 64, 2)
    assert page.data["points"]["maps"][0]["axes"][1]["low"] == pytest.approx(expected[:, 1].min())
    assert len(page.source) < 900_000
