"""The search finds the same neighbors as a brute-force comparison in float64, for any block sizes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

import seqmill
from embeddings_file import random_blocks, write_blocks, write_embeddings
from pipeline import SCRIPTS, run_script
from seqmill import SeqmillError, neighbors, open_embeddings, search

WIDTH = 48


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "TARGET_ROWS", 50)
    monkeypatch.setattr(neighbors, "QUERY_ROWS", 7)


def by_brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and cosines of the nearest vectors, pair by pair in float64; a zero vector has cosine 0."""
    rows, scores = [], []
    for query in queries.astype(np.float64):
        products = (vectors.astype(np.float64) * query).sum(axis=1)
        norms = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1) * (query**2).sum())
        cosines = np.divide(products, norms, out=np.zeros(len(vectors)), where=norms > 0)
        order = np.argsort(-cosines, kind="stable")[:k]
        rows.append(order)
        scores.append(cosines[order])
    return np.array(rows), np.array(scores)


def in_rows(found: pandas.DataFrame, k: int) -> tuple[np.ndarray, np.ndarray]:
    return found["row"].to_numpy().reshape(-1, k), found["score"].to_numpy().reshape(-1, k)


def normal(rows: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH), np.float32)


@pytest.mark.parametrize("k", [1, 10, 49, 50, 51, 120, 333])
def test_agrees_with_brute_force(k: int, tmp_path: Path) -> None:
    vectors, queries = normal(333), normal(16, 4)
    rows, scores = in_rows(search(queries, write_embeddings(tmp_path / "e.h5", vectors), k), k)
    expected_rows, expected_scores = by_brute_force(queries, vectors, k)
    assert np.array_equal(rows, expected_rows)
    assert np.allclose(scores, expected_scores, rtol=0, atol=1e-14)


def test_cosines_that_float32_cannot_tell_apart_are_in_order(tmp_path: Path) -> None:
    common = normal(1)
    vectors, queries = common + 1e-4 * normal(400, 5), common + 1e-4 * normal(9, 6)
    expected, cosines = by_brute_force(queries, vectors, 20)
    assert (np.diff(cosines) < -1e-15).all()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert not np.array_equal(np.argsort(-(queries @ unit.T), kind="stable")[:, :20], expected)  # float32 alone fails
    rows, _ = in_rows(search(queries, write_embeddings(tmp_path / "e.h5", vectors), 20), 20)
    assert np.array_equal(rows, expected)


def test_ties_are_in_row_order(tmp_path: Path) -> None:
    vectors = normal(210)
    twins = [3, 49, 50, 51, 99, 130, 209]
    vectors[twins] = vectors[3]
    found = search(vectors[[3, 8]], write_embeddings(tmp_path / "e.h5", vectors), 9)
    rows, scores = in_rows(found, 9)
    assert rows[0, :7].tolist() == twins
    assert len(set(scores[0, :7].tolist())) == 1
    assert found["rank"].tolist() == [*range(1, 10)] * 2
    rows, scores = in_rows(search(vectors[3], tmp_path / "e.h5", 4), 4)
    assert rows.tolist() == [twins[:4]]
    rows, scores = in_rows(search(normal(3, 9), write_embeddings(tmp_path / "same.h5", np.ones((120, WIDTH))), 60), 60)
    assert (rows == np.arange(60)).all()
    assert (scores == scores[:, :1]).all()


def test_zero_vectors_have_score_0(tmp_path: Path) -> None:
    vectors, queries = -np.abs(normal(120)), np.abs(normal(3, 4))
    vectors[[60, 7, 119]] = 0
    queries[1] = 0
    rows, scores = in_rows(search(queries, write_embeddings(tmp_path / "e.h5", vectors), 5), 5)
    assert rows[0, :3].tolist() == rows[2, :3].tolist() == [7, 60, 119]
    assert (scores[[0, 2], :3] == 0).all()
    assert (scores[[0, 2], 3:] < 0).all()
    assert rows[1].tolist() == [0, 1, 2, 3, 4]
    assert (scores[1] == 0).all()


def test_magnitudes_that_overflow_float32_when_squared(tmp_path: Path) -> None:
    vectors = normal(150)
    factors = np.array([1e-38, 1e-30, 1, 1e15, 1e25, 1e37], np.float32)
    vectors *= np.resize(factors, 150)[:, None]
    queries = vectors[[0, 1, 2, 4, 5]]
    rows, scores = in_rows(search(queries, write_embeddings(tmp_path / "e.h5", vectors), 30), 30)
    expected_rows, expected_scores = by_brute_force(queries, vectors, 30)
    assert np.array_equal(rows, expected_rows)
    assert np.allclose(scores, expected_scores, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1e200, 1e-200, 1e-310, -1e308])
def test_queries_whose_squares_do_not_fit_float64(factor: float, tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", normal(120))
    queries = np.sign(normal(3, 4)).astype(np.float64)
    rows, scores = in_rows(search(queries * factor, path, 5), 5)
    expected_rows, expected = in_rows(search(queries * np.sign(factor), path, 5), 5)
    assert np.array_equal(rows, expected_rows)
    assert np.allclose(scores, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("distinct", [1, 5])
def test_a_file_of_copies(distinct: int, tmp_path: Path) -> None:
    k, vectors, queries = 4, np.tile(normal(distinct), (1000 // distinct, 1)), normal(7, 4)
    rows, scores = in_rows(search(queries, write_embeddings(tmp_path / "e.h5", vectors), k), k)
    expected_rows, expected_scores = by_brute_force(queries, vectors, k)
    assert np.array_equal(rows, expected_rows)
    assert np.allclose(scores, expected_scores, rtol=0, atol=1e-14)


def test_results_do_not_depend_on_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = normal(300)
    vectors[100:200] = vectors[:100]
    path = write_embeddings(tmp_path / "e.h5", vectors)
    small = search(path, path, 6)
    for name, value in (("TARGET_ROWS", 8192), ("QUERY_ROWS", 1024)):
        monkeypatch.setattr(neighbors, name, value)
    pandas.testing.assert_frame_equal(search(path, path, 6), small, check_exact=True)
    alone = search(vectors[5], path, 6)
    pandas.testing.assert_frame_equal(
        alone[["rank", "id", "row", "score"]],
        small[small["query_row"] == 5][["rank", "id", "row", "score"]].reset_index(drop=True),
        check_exact=True,
    )


def test_a_file_as_query(tmp_path: Path) -> None:
    vectors = normal(60)
    target = open_embeddings(write_embeddings(tmp_path / "target.h5", vectors, [f"t{row}" for row in range(60)]))
    query = write_embeddings(tmp_path / "query.h5", vectors[[9, 59, 9]], ["a", "NA", "a"])
    found = search(query, target, 2)
    assert list(found.columns) == ["query", "query_row", "rank", "id", "row", "score"]
    assert found["query"].tolist() == ["a", "a", "NA", "NA", "a", "a"]
    assert found["query_row"].tolist() == [0, 0, 1, 1, 2, 2]
    assert found[found["rank"] == 1]["id"].tolist() == ["t9", "t59", "t9"]
    assert found["id"].tolist() == [f"t{row}" for row in found["row"]]
    pandas.testing.assert_frame_equal(search(str(query), str(target.path), 2), found)


def test_more_neighbors_than_records_and_no_records(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", normal(3))
    assert sorted(search(normal(1, 4), path)["row"]) == [0, 1, 2]
    assert len(search(normal(2, 4), path, 1000)) == 6
    empty = write_embeddings(tmp_path / "empty.h5", np.empty((0, WIDTH)))
    for found in (search(normal(1), empty), search(empty, path), search(np.empty((0, WIDTH)), path)):
        assert len(found) == 0
        assert list(found.columns) == list(neighbors.COLUMNS)


def test_inputs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", normal(9))
    for field, value in (("model_digest", "2"), ("layers", "5"), ("pooling", "cls")):
        other = write_embeddings(tmp_path / "other.h5", normal(9), **{field: value})
        with pytest.raises(
            SeqmillError, match=rf"other\.h5 and .*e\.h5 can't be compared: {field.removesuffix('s')} is {value} and"
        ):
            search(other, path)
    same = write_embeddings(tmp_path / "same.h5", normal(9), precision="bfloat16", index_digest="9")
    assert len(search(same, path, 1)) == 9
    with pytest.raises(SeqmillError, match=r"the queries have 47 dimensions, .* has 48"):
        search(np.zeros(WIDTH - 1), path)
    with pytest.raises(SeqmillError, match="k is 0"):
        search(normal(1), path, 0)
    with pytest.raises(SeqmillError, match="query 8 is not finite"):
        search(np.concatenate([normal(8), np.full((1, WIDTH), np.nan)]), path)
    with pytest.raises(SeqmillError, match=r"a query is a vector .* not <U1"):
        search(np.array(["a"]), path)
    with pytest.raises(SeqmillError, match="P12345: no such embeddings file"):
        search("P12345", path)
    broken = normal(90)
    broken[77, 3] = np.inf
    with pytest.raises(SeqmillError, match=r"broken\.h5: row 77 is not finite"):
        search(normal(1), write_embeddings(tmp_path / "broken.h5", broken))


def test_search_is_a_function() -> None:
    assert callable(seqmill.search)


def test_the_program(tmp_path: Path) -> None:
    target = write_embeddings(tmp_path / "t.h5", normal(70), [f"id\t{row}" for row in range(70)])
    query = write_embeddings(tmp_path / "q.h5", normal(20, 4))
    arguments = ("--query", query, "--target", target, "--k", 3, "--output", tmp_path / "new.tsv")
    process = run_script("search.py", *arguments)
    assert process.returncode == 0, process.stderr
    table = pandas.read_csv(tmp_path / "new.tsv", sep="\t", dtype={"query": str, "id": str}, keep_default_na=False)
    pandas.testing.assert_frame_equal(table, search(query, target, 3), check_exact=True)
    write_embeddings(query, normal(20), layers="5")
    process = run_script("search.py", *arguments)
    assert process.returncode == 1
    assert "can't be compared: layer is 5 and 6" in process.stderr
    assert "Traceback" not in process.stderr
    process = run_script("search.py", *arguments, "--layer", 6)
    assert process.returncode == 1
    assert "q.h5: has no such output; there is layer 5 pooled by mean" in process.stderr
    process = run_script("search.py", *arguments[:-1], tmp_path)
    assert "is a folder" in process.stderr
    process = run_script("search.py", *arguments[:-1], target)
    assert process.returncode == 1
    assert "is the input as well as the output" in process.stderr
    assert len(open_embeddings(target)) == 70


MEMORY = """
import sys
from pathlib import Path
import numpy as np
import seqmill
# Not getrusage: its peak begins with that of the parent.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
e = seqmill.open_embeddings(sys.argv[1])
queries = np.random.default_rng(2).standard_normal((100, 320), np.float32)
queries[0] = e[399_999]
before = peak()
found = seqmill.search(queries, e)
print(peak() - before, found["row"][0])
"""


@pytest.mark.full
def test_memory_is_bounded(tmp_path: Path) -> None:
    shape = (400_000, 320)
    path = write_blocks(tmp_path / "large.h5", shape, random_blocks(shape))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, path]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, nearest = map(int, process.stdout.split())
    assert nearest == 399_999
    assert grown < 200 < path.stat().st_size >> 20  # MB
