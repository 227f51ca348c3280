"""Vectors of identical sequences from earlier results: the same bits, nothing computed twice, nothing mixed up."""

import csv
import gzip
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from families import PROTEINS, PROTT5, SMALL_ESM2, WINDOWS, Family, write_fasta
from pipeline import DEMO, MODEL, Run, results_of, run_script, save_parts
from seqmill import open_embeddings
from seqmill.errors import SeqmillError
from seqmill.index.order import find_reused
from seqmill.merge import merge
from seqmill.merge.verify import VerifiedSet, verify_shards
from seqmill.run.forecast import disk_needed
from seqmill.run.reuse_checks import known_settings, require_settings, reused_by
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs
from seqmill.store.index import open_index
from seqmill.store.reuse import Source, open_source
from seqmill.store.status import read_status
from sequences import random_sequences, relative_error

# A model with the proteins' architecture, known by name before its weights are read.
NAMED = replace(find_model(MODEL), architecture=SMALL_ESM2)
# The longest sequences of each family exceed max_length; the new ones fill several packs.
OLD = {"proteins": [1100, 300, 60, 60, 41, 7, 1], "windows": [1500, 601, 300, 300, 41, 7, 1]}
NEW = {"proteins": [1023, 800, 700, 90, 60, 3], "windows": [2400, 1700, 1300, 90, 60, 3]}


def sequences_of(family: Family) -> tuple[list[str], list[str]]:
    """Return old and new sequences, all different, some of equal length."""
    name = "windows" if family is WINDOWS else "proteins"
    sequences = family.random(OLD[name] + NEW[name])
    assert len(set(sequences)) == len(sequences)
    return sequences[: len(OLD[name])], sequences[len(OLD[name]) :]


def run_of(
    folder: Path, family: Family, sequences: list[str], reuse: list[Path] | None = None, world_size: int = 1
) -> Run:
    """Run the whole pipeline on sequences."""
    folder.mkdir()
    fasta = write_fasta(folder / "some.fa", sequences)
    return Run(folder, world_size).build(fasta, family.model, family.policy, reuse or []).embed().merge()


def records_of(run: Run) -> list[dict[str, str]]:
    with gzip.open(run.folder / "records.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def tokens_computed(run: Run) -> int:
    return sum(read_status(path).run.num_tokens for path in run.statuses)


@pytest.fixture(scope="module", params=[PROTEINS, WINDOWS, PROTT5], ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def old(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An earlier result in which the second sequence occurs twice."""
    sequences = sequences_of(family)[0]
    return run_of(tmp_path_factory.mktemp("old") / "old", family, [*sequences, sequences[1]])


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An earlier result of proteins."""
    sequences = sequences_of(PROTEINS)[0]
    return run_of(tmp_path_factory.mktemp("proteins") / "old", PROTEINS, [*sequences, sequences[1]])


@pytest.fixture
def copy(proteins: Run, tmp_path: Path) -> Run:
    """A copy of the earlier result that the test may damage."""
    shutil.copytree(proteins.folder, tmp_path / "old")
    return replace(proteins, folder=tmp_path / "old")


def grown(folder: Path, reuse: list[Path], sequences: list[str] | None = None) -> Run:
    """An index of proteins with reuse, not embedded or merged."""
    earlier, new = sequences_of(PROTEINS)
    folder.mkdir(parents=True, exist_ok=True)
    fasta = write_fasta(folder / "some.fa", sequences or [*earlier, new[-1]])
    return Run(folder, 1).build(fasta, PROTEINS.model, reuse=reuse)


@pytest.mark.parametrize("world_size", [1, 3])
def test_old_vectors_keep_their_bits_and_only_new_sequences_are_computed(
    family: Family, old: Run, tmp_path: Path, world_size: int
) -> None:
    earlier, new = sequences_of(family)
    # They are in another order, with one missing, and duplicates within and across the two sets.
    order = [new[0], earlier[6], earlier[0], new[1], new[2], earlier[1], new[0], earlier[5], *new[3:], *earlier[1:4]]
    run = run_of(tmp_path / "new", family, order, [old.embeddings], world_size)
    plain = run_of(tmp_path / "plain", family, order)
    alone = run_of(tmp_path / "alone", family, new)
    index = open_index(run.index)
    assert index.num_packs > 2
    found, source = open_embeddings(run.embeddings), open_embeddings(old.embeddings)
    expected, of_new = open_embeddings(plain.embeddings), open_embeddings(alone.embeddings)
    assert found.ids == expected.ids
    assert (found.lengths == expected.lengths).all()
    for row, sequence in enumerate(order):
        assert relative_error(found[row], expected[row]) < 1e-6
        # The new ones are packed as if they were alone, so their expected bits are known too.
        same = source[earlier.index(sequence)] if sequence in earlier else of_new[new.index(sequence)]
        assert (found[row] == same).all()
    assert tokens_computed(run) == tokens_computed(alone) == index.attributes["num_tokens"]
    assert tokens_computed(run) < tokens_computed(plain)
    assert open_index(plain.index).attributes["num_tokens"] == len(index.tokens)

    with h5py.File(run.embeddings) as file, h5py.File(plain.embeddings) as other:
        digests = file["sequence_digests"][:]
        assert (digests == other["sequence_digests"][:]).all()
        assert digests.dtype == np.uint8
        assert digests.shape == (len(order), 16)
        assert file["sequence_digests"].id.get_offset()

    rows = records_of(run)
    fates = Counter(row["fate"] for row in rows)
    too_long = family.policy.max_length
    for number, (row, sequence) in enumerate(zip(rows, order, strict=True)):
        first = order.index(sequence)
        if first < number:
            assert (row["fate"], row["same_as"]) == ("duplicate", str(first + 1))
        elif sequence in earlier:
            longer = f"; longer than max_length={too_long}" if len(sequence) > too_long else ""
            assert (row["fate"], row["reason"]) == ("reused", f"from {old.embeddings}{longer}")
        else:
            long_fate = "windowed" if family.policy.window else "truncated"
            assert row["fate"] == (long_fate if len(sequence) > too_long else "embedded")
        for column in ("id", "row", "length", "embedded_length", "windows"):
            assert row[column] == records_of(plain)[number][column]
    said = run.manifest["counts"]["fates"]
    assert said == json.loads(found.attrs["fate_counts"]) == {fate: fates[fate] for fate in said}
    assert sum(said.values()) == len(order)
    assert found.attrs["num_reused"] == said["reused"] == 6
    assert run.manifest["reuse"] == [
        {"path": str(old.embeddings), "fingerprint": source.attrs["fingerprint"], "sequences": 6}
    ]


def test_computed_sequences_come_first_by_length_and_reused_ones_keep_their_tokens(
    family: Family, old: Run, tmp_path: Path
) -> None:
    earlier, new = sequences_of(family)
    fasta = write_fasta(tmp_path / "some.fa", [*earlier, *new])
    index = open_index(Run(tmp_path / "a", 1).build(fasta, family.model, family.policy, [old.embeddings]).index)
    plain = open_index(Run(tmp_path / "b", 1).build(fasta, family.model, family.policy).index)
    sizes = np.diff(index.token_offsets)
    assert index.num_computed == len(new)
    for part in (slice(None, index.num_computed), slice(index.num_computed, None)):
        assert (np.diff(sizes[part]) <= 0).all()
        records = index.sequence_records[part]
        assert (np.diff(records)[np.diff(sizes[part]) == 0] > 0).all()
    assert set(index.sequence_records[: len(new)].tolist()) == set(range(len(earlier), len(earlier) + len(new)))
    for row, digest in enumerate(index.sequence_digests):
        (other,) = np.flatnonzero((plain.sequence_digests == digest).all(axis=1))
        for ours, theirs in zip(index.row_segments(row), plain.row_segments(int(other)), strict=True):
            assert (ours == theirs).all()
        assert (index.row_weights(row) == plain.row_weights(int(other))).all()
    assert index.max_tokens == np.concatenate([index.pack_lengths(pack) for pack in range(index.num_packs)]).max()


def test_everything_is_reused(family: Family, old: Run, tmp_path: Path) -> None:
    earlier = sequences_of(family)[0]
    run = run_of(tmp_path / "new", family, earlier[::-1], [old.embeddings], world_size=2)
    source, found = open_embeddings(old.embeddings), open_embeddings(run.embeddings)
    assert (found[:] == source[list(range(len(earlier)))][::-1]).all()
    assert run.manifest["counts"]["fates"]["reused"] == len(earlier)
    assert [read_status(path).num_packs for path in run.statuses] == [0, 0]
    assert open_index(run.index).num_packs == 0
    assert found.attrs["computed_by"] == source.attrs["computed_by"]
    assert found.attrs["audit_reference"] == source.attrs["audit_reference"]
    arguments = ("--fasta", run.folder / "some.fa", "--model", family.model, "--reuse", old.embeddings)
    policy = ("--long-sequences", family.policy.long_sequences, "--max-length", family.policy.max_length)
    if family.policy.window:
        policy += ("--window", family.policy.window, "--stride", family.policy.stride, "--strand", family.policy.strand)
    done = run_script("plan.py", *arguments, *policy, "--seconds", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"unique      {len(earlier)} sequences, 0 of them to compute, 0 tokens" in done.stdout
    assert f"reused      {len(earlier)} sequences from {old.embeddings}" in done.stdout


def test_a_source_may_have_any_path(copy: Run, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a\xff "b"\tc')
    copy.folder.rename(odd)
    run = grown(tmp_path / "new", [odd / "embeddings.h5"]).embed().merge()
    shown = f'{tmp_path}/a\\udcff "b"\tc/embeddings.h5'
    assert records_of(run)[1]["reason"] == f"from {shown}"
    assert [source["path"] for source in run.manifest["reuse"]] == [shown]


def test_a_result_that_reused_vectors_can_be_reused(proteins: Run, tmp_path: Path) -> None:
    earlier, new = sequences_of(PROTEINS)
    second = run_of(tmp_path / "second", PROTEINS, [*earlier[:4], new[3]], [proteins.embeddings])
    third = run_of(tmp_path / "third", PROTEINS, [new[4], new[3], earlier[2]], [second.embeddings])
    found, source = open_embeddings(third.embeddings), open_embeddings(second.embeddings)
    assert (found[1] == source[4]).all()
    assert (found[2] == open_embeddings(proteins.embeddings)[2]).all()
    assert tokens_computed(third) == len(new[4]) + 2


def test_the_first_of_several_files_counts(proteins: Run, tmp_path: Path) -> None:
    earlier, new = sequences_of(PROTEINS)
    other = run_of(tmp_path / "other", PROTEINS, [new[3], earlier[2]])
    for number, files in enumerate([[proteins, other], [other, proteins]]):
        paths = [run.embeddings for run in files]
        run = run_of(tmp_path / str(number), PROTEINS, [new[3], earlier[2], earlier[0], new[5]], paths)
        taken = {source["path"]: source["sequences"] for source in run.manifest["reuse"]}
        assert list(taken) == list(map(str, paths))
        assert taken == {str(proteins.embeddings): 2 - number, str(other.embeddings): 1 + number}
        reasons = [row["reason"] for row in records_of(run)]
        assert reasons[:2] == [f"from {other.embeddings}", f"from {paths[0]}"]
        assert (reasons[2].startswith(f"from {proteins.embeddings}; longer"), reasons[3]) == (True, "")
        assert tokens_computed(run) == len(new[5]) + 2


@pytest.mark.parametrize("seed", range(20))
def test_the_search_agrees_with_a_dictionary(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests have few values and trailing zeros, and repeat in files that are read in blocks."""
    monkeypatch.setattr("seqmill.index.order.BLOCK_ROWS", 7)
    generator = np.random.default_rng(seed)

    def digests(number: int) -> np.ndarray:
        values = np.zeros((number, 16), np.uint8)
        values[:, [0, 8, 15]] = generator.integers(0, 3, (number, 3)) * 127
        return values

    wanted = np.unique(digests(generator.integers(0, 20)), axis=0)
    generator.shuffle(wanted)
    contents = [digests(generator.integers(0, 40)) for _ in range(3)]
    sources = [Source(Path(), {}, Fingerprint(*6 * "0"), content, []) for content in contents]
    files, rows = find_reused(wanted, sources)
    places: dict[bytes, tuple[int, int]] = {}
    for number, content in enumerate(contents):
        for row, digest in enumerate(content):
            places.setdefault(digest.tobytes(), (number, row))
    assert list(zip(files.tolist(), rows.tolist(), strict=True)) == [
        places.get(digest.tobytes(), (-1, -1)) for digest in wanted
    ]


def test_an_index_depends_on_computations_not_paths(proteins: Run, copy: Run, tmp_path: Path) -> None:
    digests = [
        open_index(grown(tmp_path / name, reuse).index).digest
        for name, reuse in (("a", [proteins.embeddings]), ("b", [copy.embeddings]), ("c", []))
    ]
    assert digests[0] == digests[1] != digests[2]
    # The same sequences in the same rows, from another computation.
    shutil.copytree(copy.folder, tmp_path / "other")
    other = replace(copy, folder=tmp_path / "other").embed("bfloat16").merge()
    assert open_index(grown(tmp_path / "d", [other.embeddings]).index).digest not in digests


def test_resumed_packs_and_reused_vectors_together(proteins: Run, tmp_path: Path) -> None:
    earlier, new = sequences_of(PROTEINS)
    run = run_of(tmp_path / "new", PROTEINS, [*earlier, *new], [proteins.embeddings])
    before = open_embeddings(run.embeddings)[:]
    results, index = results_of(run), open_index(run.index)
    fingerprint = Fingerprint.from_attributes(read_status(run.statuses[0]).fingerprint)
    save_parts(run.folder / "parts", index, fingerprint, results[:2], "shard_0-of-1.h5")
    run.shards[0].unlink()
    run.embed()
    assert (read_status(run.statuses[0]).resumed_packs, len(results) > 2) == (2, True)
    run.embeddings.unlink()
    assert (open_embeddings(run.merge().embeddings)[:] == before).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_several_outputs_are_reused_together(dtype: str, tmp_path: Path) -> None:
    earlier, new = sequences_of(PROTEINS)
    outputs = Outputs((3, -1), ("max", "mean"))
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    write_fasta(tmp_path / "old/some.fa", earlier)
    write_fasta(tmp_path / "new/some.fa", [new[3], *earlier[::-1]])
    old = Run(tmp_path / "old", 1).build(tmp_path / "old/some.fa", PROTEINS.model).embed(outputs=outputs).merge(dtype)
    run = Run(tmp_path / "new", 2).build(tmp_path / "new/some.fa", PROTEINS.model, reuse=[old.embeddings])
    run.embed(outputs=outputs)
    run.merge(dtype)
    for layer, pooling in outputs.of(6).pairs:
        found = open_embeddings(run.embeddings, layer, pooling)
        source = open_embeddings(old.embeddings, layer, pooling)
        assert found.array.dtype == dtype
        assert (found[1:] == source[::-1]).all()


def test_a_result_with_residue_vectors_is_reused_without_them(copy: Run, tmp_path: Path) -> None:
    copy.embed(outputs=Outputs(per_residue="float16")).merge()
    run = grown(tmp_path / "new", [copy.embeddings]).embed().merge()
    found = open_embeddings(run.embeddings)
    assert (found[:7] == open_embeddings(copy.embeddings)[:7]).all()
    assert found.attrs["per_residue"] == ""


def test_results_of_before_are_reused(copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their attribute trained_weights is a bool, and they do not count invalid records."""
    attributes = merge._attributes

    def as_before(verified: VerifiedSet) -> dict[str, Any]:
        found = attributes(verified)
        del found["num_invalid"]
        return {**found, "trained_weights": bool(found["trained_weights"])}

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_attributes", as_before)
        copy.merge()
    assert open_embeddings(copy.embeddings).attrs["trained_weights"] is True
    before = open_embeddings(copy.embeddings)[:7]
    run = grown(tmp_path / "new", [copy.embeddings])
    with h5py.File(run.index, "r+") as file:
        del file.attrs["num_invalid"]
    found = open_embeddings(run.embed().merge().embeddings)
    assert (found[:7] == before).all()
    assert (found.attrs["trained_weights"], found.attrs["num_invalid"], found.attrs["num_reused"]) == (1, 0, 7)


def test_rounded_vectors_do_not_pass_for_exact_ones(copy: Run, tmp_path: Path) -> None:
    copy.merge("float16")
    run = grown(tmp_path / "new", [copy.embeddings]).embed()
    with pytest.raises(SeqmillError, match=r"rounded to float16, and dtype is float32.*set dtype: float16"):
        run.merge()
    assert not run.embeddings.exists()


def test_audits_and_devices_of_both_results_are_recorded(copy: Run, tmp_path: Path) -> None:
    copy.embed(audit_seconds=3600).merge()
    source = open_embeddings(copy.embeddings).attrs
    with h5py.File(copy.embeddings, "r+") as file:
        file.attrs["audit_worst_relative_error"] = 0.5
        file.attrs["computed_by"] = "another GPU; a CPU"
    copy.embeddings.with_name("manifest.json").unlink()
    run = grown(tmp_path / "new", [copy.embeddings]).embed(audit_seconds=3600).merge()
    found = open_embeddings(run.embeddings).attrs
    assert found["audit_sequences"] == source["audit_sequences"] + 1
    assert found["audit_worst_relative_error"] == run.manifest["audit"]["audit_worst_relative_error"] == 0.5
    kinds = found["computed_by"].split("; ")
    assert {"another GPU", "a CPU", source["computed_by"]} == set(kinds)
    # A source that no vector comes from is not recorded.
    run = run_of(tmp_path / "other", PROTEINS, sequences_of(PROTEINS)[1][3:], [copy.embeddings])
    assert open_embeddings(run.embeddings).attrs["computed_by"] == source["computed_by"]


POLICIES = {
    "long_sequences": LengthPolicy("reject", 1022),
    "max_length": LengthPolicy("truncate", 1021),
}


@pytest.mark.parametrize("name", POLICIES)
def test_sequences_under_another_policy_are_refused(name: str, proteins: Run, tmp_path: Path) -> None:
    values = (PROTEINS.policy, POLICIES[name])
    with pytest.raises(SeqmillError) as refused:
        Run(tmp_path, 1).build(DEMO, PROTEINS.model, POLICIES[name], reuse=[proteins.embeddings])
    theirs, ours = (getattr(policy, name) for policy in values)
    assert str(refused.value) == (
        f"{proteins.embeddings}: can't be reused: it has {name}={theirs}, this computation {name}={ours}; take it out "
        f"of reuse, or set {name}: {theirs}"
    )
    assert not (tmp_path / "index.h5").exists()


@pytest.mark.parametrize("changed", [{"window": 400}, {"stride": 200}, {"strand": "forward"}])
def test_other_windows_and_strands_are_refused(changed: dict[str, object], tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", WINDOWS, WINDOWS.random([700, 30]))
    (name,) = changed
    with pytest.raises(SeqmillError, match=f"it has {name}=.*or set {name}: {getattr(WINDOWS.policy, name)}"):
        Run(tmp_path, 1).build(
            old.folder / "some.fa", WINDOWS.model, replace(WINDOWS.policy, **changed), [old.embeddings]
        )


def test_files_that_are_not_results_are_refused(proteins: Run, tmp_path: Path) -> None:
    contigs = write_fasta(tmp_path / "contigs.fa", ["ACGT" * 9])
    with pytest.raises(SeqmillError, match=r"embeddings\.h5: can't be reused: it has tokenizer=esm2, .* tokenizer=bpe"):
        Run(tmp_path, 1).build(contigs, WINDOWS.model, WINDOWS.policy, [proteins.embeddings])
    for path, message in (
        (tmp_path / "none.h5", r"none\.h5: no such embeddings file"),
        (DEMO, r"NC_000932\.faa: not a readable HDF5 embeddings file"),
        (proteins.index, r"index\.h5: is not a seqmill embeddings file"),
    ):
        with pytest.raises(SeqmillError, match=message):
            Run(tmp_path, 1).build(DEMO, reuse=[path])
    done = run_script(
        "build_index.py",
        "--fasta",
        DEMO,
        "--model",
        PROTEINS.model,
        "--output",
        proteins.embeddings,
        "--reuse",
        proteins.embeddings,
    )
    assert done.returncode == 1
    assert "is the input as well as the output" in done.stderr


WORKERS = {
    "layers": ({"outputs": Outputs((3,))}, "it has layers=6, this computation layers=3; .*, or set layers: 6"),
    "pooling": ({"outputs": Outputs((-1,), ("max",))}, "pooling=mean, this .* pooling=max; .* set pooling: mean"),
    "residues": (
        {"outputs": Outputs(per_residue="float16")},
        "residues are not taken .*; take it out .*index.h5 and .*, or set per_residue: false$",
    ),
    "precision": ({"precision": "bfloat16"}, "precision=float32, this .* precision=bfloat16; .*set precision: float32"),
    "model": (
        {"model": "other"},
        "it has model_digest=[0-9a-f]{64}, .* remove .*index.h5 and the manifest.json in its folder$",
    ),
}


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_with_another_computation_computes_nothing(name: str, proteins: Run, tmp_path: Path) -> None:
    settings, message = WORKERS[name]
    run = grown(tmp_path, [proteins.embeddings])
    settings = {**settings, **({"model": MODEL} if name == "model" else {})}
    with pytest.raises(SeqmillError, match=f"{proteins.embeddings}: can't be reused: .*{message}"):
        run.embed(**settings)
    status = read_status(run.statuses[0])
    assert (status.status, status.done_packs) == ("failed", 0)
    assert not list((tmp_path / "parts").glob("*"))


def test_incompatible_settings_are_known_before_anything_runs(proteins: Run, copy: Run) -> None:
    source, model, policy, outputs = open_source(proteins.embeddings), NAMED, LengthPolicy(), Outputs()
    for settings in ((policy, outputs, "auto"), (policy, Outputs((6,)), "float32")):
        require_settings(source, model, known_settings(model, *settings), "float16")
    for settings, message in (
        ((LengthPolicy(max_length=1000), outputs, "auto"), "set max_length: 1022"),
        ((policy, Outputs((-2,)), "auto"), "it has layers=6, this computation layers=5"),
        ((policy, Outputs((-1,), ("cls",)), "auto"), "set pooling: mean"),
        ((policy, outputs, "bfloat16"), "set precision: float32"),
        ((policy, Outputs(per_residue="float16"), "auto"), "set per_residue: false"),
    ):
        with pytest.raises(SeqmillError, match=message):
            require_settings(source, model, known_settings(model, *settings), "float32")
    known = known_settings(model, policy, outputs, "auto")
    with pytest.raises(
        SeqmillError, match=f"its model is {PROTEINS.model}, not esm2_t33_650M_UR50D; take it out of reuse"
    ):
        require_settings(source, find_model("esm2_t33_650M_UR50D"), known, "float32")
    rounded = open_source(copy.merge("float16").embeddings)
    require_settings(rounded, model, known, "float16")
    with pytest.raises(SeqmillError, match="set dtype: float16"):
        require_settings(rounded, model, known, "float32")


def test_reuse_continues_until_the_request_changes(proteins: Run, tmp_path: Path) -> None:
    run, model = grown(tmp_path, [proteins.embeddings]), NAMED
    known = known_settings(model, LengthPolicy(), Outputs(), "auto")
    noted = {proteins.embeddings: open_source(proteins.embeddings).fingerprint.digest}

    def require_noted_until_something_else_is_wanted() -> None:
        assert reused_by(tmp_path, known) == noted
        for settings in (
            (LengthPolicy(max_length=1000), Outputs(), "auto"),
            (LengthPolicy(), Outputs((3,)), "auto"),
            (LengthPolicy(), Outputs((-1,), ("max",)), "auto"),
            (LengthPolicy(), Outputs(per_residue="float32"), "auto"),
            (LengthPolicy(), Outputs(), "bfloat16"),
        ):
            assert reused_by(tmp_path, known_settings(model, *settings)) == {}

    require_noted_until_something_else_is_wanted()
    run.embed().merge()
    require_noted_until_something_else_is_wanted()
    run.index.unlink()
    require_noted_until_something_else_is_wanted()
    (tmp_path / "manifest.json").unlink()
    assert reused_by(tmp_path, known) == {}
    assert reused_by(tmp_path / "none", known) == {}
    run.index.write_bytes(b"no index")
    assert reused_by(tmp_path, known) == {}


def flip(path: Path, dataset: str, row: int) -> None:
    with h5py.File(path) as file:
        position = file[dataset].id.get_offset() + row * file[dataset].nbytes // len(file[dataset])
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def replaced(old: Run) -> None:
    old.embed("bfloat16").merge()


def padded(old: Run) -> None:
    with old.embeddings.open("ab") as file:
        file.write(bytes(8))


def not_finite(old: Run) -> None:
    (old.folder / "manifest.json").unlink()
    with h5py.File(old.embeddings, "r+") as file:
        file["embeddings"][2, 5] = np.nan


def without_manifest(damage: Callable[[Run], None]) -> Callable[[Run], None]:
    def do(old: Run) -> None:
        (old.folder / "manifest.json").unlink()
        damage(old)

    return do


DAMAGES = {
    "a flipped bit": (lambda old: flip(old.embeddings, "embeddings", 3), "its bytes differ from the digests"),
    "in the lengths": (lambda old: flip(old.embeddings, "lengths", 0), "its bytes differ from the digests"),
    "in a digest": (lambda old: flip(old.embeddings, "sequence_digests", 4), "its sequences are not those"),
    "in a digest, unseen": (
        without_manifest(lambda old: flip(old.embeddings, "sequence_digests", 4)),
        "its sequences are not those",
    ),
    "gone": (lambda old: old.embeddings.unlink(), "no such embeddings file"),
    "longer": (padded, r"has bytes \d+, and had \d+ when the index was built"),
    "cut": (lambda old: old.embeddings.write_bytes(old.embeddings.read_bytes()[:-50]), "truncated or damaged"),
    "another result": (replaced, "has fingerprint [0-9a-f]{64}, and had "),
    "not finite": (not_finite, "the vector in its row 2 is not finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_changed_source_is_refused(name: str, copy: Run, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    run = grown(tmp_path / "new", [copy.embeddings]).embed()
    damage(copy)
    arguments = ("--index", run.index, "--shards", *run.shards, "--output", run.embeddings)
    done = run_script("merge_shards.py", *arguments)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert "Traceback" not in done.stderr
    with pytest.raises(SeqmillError, match=message) as refused:
        run.merge()
    assert str(refused.value).startswith(f"{copy.embeddings}: ")
    assert line.endswith(str(refused.value))
    assert "take" in str(refused.value)
    assert not run.embeddings.exists()
    assert not (run.folder / "manifest.json").exists()


@pytest.mark.parametrize("name", ["a flipped bit", "in the lengths", "not finite"])
def test_a_damaged_source_is_refused_before_anything_is_computed(name: str, copy: Run, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    damage(copy)
    with pytest.raises(SeqmillError, match=f"{copy.embeddings}: .*{message}.*; take it out of reuse"):
        grown(tmp_path / "new", [copy.embeddings])
    assert not (tmp_path / "new/index.h5").exists()
    # A damaged source does no harm if no vector comes from it.
    grown(tmp_path / "other", [copy.embeddings], sequences_of(PROTEINS)[1])


def test_every_output_of_a_source_must_be_finite(copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses several blocks, of which the last is incomplete."""
    copy.embed(outputs=Outputs((-1,), ("mean", "max"))).merge()
    (copy.folder / "manifest.json").unlink()
    monkeypatch.setattr("seqmill.store.reuse.BLOCK_BYTES", 3 * 4 * PROTEINS.hidden_dim)
    grown(tmp_path / "whole", [copy.embeddings])
    for dataset in ("embeddings", "embeddings_6_max"):
        for row in range(8):
            with h5py.File(copy.embeddings, "r+") as file:
                values = file[dataset][row]
                file[dataset][row, -1] = np.inf
            with pytest.raises(SeqmillError, match=f"the vector in its row {row} is not finite"):
                grown(tmp_path / "new", [copy.embeddings])
            with h5py.File(copy.embeddings, "r+") as file:
                file[dataset][row] = values


def test_values_that_cannot_be_checked_are_logged(copy: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = grown(tmp_path / "new", [copy.embeddings]).embed()
    manifest, other = copy.folder / "manifest.json", copy.manifest
    other["fingerprint"]["fingerprint"] = "0"
    caplog.set_level(logging.WARNING)
    for content, message in (
        (json.dumps(other), "manifest.json: of another result"),
        ("[]", "manifest.json: can't be read"),
        (None, "no manifest.json in its folder: its values can't be checked"),
    ):
        manifest.unlink()
        if content is not None:
            manifest.write_text(content)
        caplog.clear()
        run.merge()
        assert message in caplog.text
        assert run.manifest["counts"]["fates"]["reused"] == 7
        manifest.touch()


def test_a_sequence_without_a_vector_is_noticed(proteins: Run, tmp_path: Path) -> None:
    """The shard has a reused sequence in place of a computed one."""
    earlier, new = sequences_of(PROTEINS)
    run = run_of(tmp_path / "new", PROTEINS, [*earlier, *new], [proteins.embeddings], world_size=2)
    with h5py.File(run.shards[1], "r+") as file:
        file["index_rows"][-1] = open_index(run.index).num_computed
    with pytest.raises(SeqmillError, match="shard_1-of-2"):
        verify_shards(open_index(run.index), run.shards, run.statuses)


def test_the_doctor_reports_reused_and_missing_results(copy: Run, tmp_path: Path) -> None:
    run = grown(tmp_path / "results/d/m", [copy.embeddings])
    (run.folder / "shards").mkdir()
    shard, status = (run.folder / "shards" / path.name for path in (run.shards[0], run.statuses[0]))
    run.embed().merge()
    run.shards[0].rename(shard)
    run.statuses[0].rename(status)
    line = f"reused: 7 sequences from {copy.embeddings}"

    def doctor() -> str:
        return run_script("doctor.py", cwd=tmp_path).stdout

    assert line in doctor()
    copy.embeddings.unlink()
    assert "gone" not in doctor()
    index = run.index.read_bytes()
    run.index.unlink()
    assert line in doctor()
    run.index.write_bytes(index)
    run.embeddings.unlink()
    said = doctor()
    assert f"reused: {copy.embeddings} is gone, and the merge needs it" in said
    assert f"bring {copy.embeddings} back, or take it out of reuse and rm results/d/m/index.h5" in said


def test_the_plan_counts_the_sequences_to_compute(proteins: Run, tmp_path: Path) -> None:
    earlier, new = sequences_of(PROTEINS)
    run = run_of(tmp_path / "new", PROTEINS, [*earlier, *new, *random_sequences([30] * 40)], [proteins.embeddings])
    done = run_script("plan.py", "--index", run.index, "--seconds", 0.2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"unique      53 sequences, 46 of them to compute, {tokens_computed(run):,} tokens" in done.stdout
    assert f"reused      7 sequences from {proteins.embeddings}" in done.stdout
    disk = disk_needed(open_index(run.index), 1, PROTEINS.hidden_dim)
    merged = run.embeddings.stat().st_size + (run.folder / "records.tsv.gz").stat().st_size
    assert disk.shards == pytest.approx(run.shards[0].stat().st_size, rel=0.1)
    assert disk.merged == pytest.approx(merged, rel=0.1)
