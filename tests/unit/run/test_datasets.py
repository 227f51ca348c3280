"""The table of datasets: what it may contain, and errors that name its line."""

import gzip
import re
from pathlib import Path

import pytest

from seqmill.errors import SeqmillError
from seqmill.run.datasets import (
    dataset_of_file,
    datasets_of_mapping,
    find_fasta,
    read_datasets,
    refuse_shared_folders,
    safe_name,
)

DEFAULT = "untrained:esm2_t6_8M_UR50D"
OTHER = "untrained:esm2_t12_35M_UR50D"
HEADER = "dataset\tfasta\tmodel\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with FASTA files a.faa, b.faa and sub/c.faa."""
    for name in ("a.faa", "b.faa", "b{c}.faa", "sub/c.faa"):
        write_fasta(tmp_path / name)
    return tmp_path


def write_fasta(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(">p1\nMKV\n")
    return path


def write_table(folder: Path, content: str | bytes) -> Path:
    table = folder / "datasets.tsv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return table


def rows(folder: Path, content: str | bytes) -> list[tuple[str, str, str]]:
    datasets = read_datasets(write_table(folder, content), DEFAULT, [folder])
    return [(d.name, d.fasta.relative_to(folder).as_posix(), d.model.name) for d in datasets]


def refusal(folder: Path, content: str | bytes) -> str:
    table = write_table(folder, content)
    with pytest.raises(SeqmillError) as caught:
        read_datasets(table, DEFAULT, [folder])
    message = str(caught.value)
    assert message.startswith(f"{table}: ")
    assert "\n" not in message
    return message.removeprefix(f"{table}: ")


EXPECTED = [("first", "a.faa", DEFAULT), ("second", "sub/c.faa", OTHER)]


@pytest.mark.parametrize(
    "content",
    [
        HEADER + f"first\ta.faa\t{DEFAULT}\nsecond\tsub/c.faa\t{OTHER}\n",
        HEADER + f"first\ta.faa\t\nsecond\tsub/c.faa\t{OTHER}",
        HEADER + f"first\ta.faa\nsecond\tsub/c.faa\t{OTHER}\n",
        f"# ours\n\n{HEADER}# first\tb.faa\t\nfirst\ta.faa\t\n\n \t \nsecond\tsub/c.faa\t{OTHER}\n#\n\n",
        (HEADER + f"first\ta.faa\t\nsecond\tsub/c.faa\t{OTHER}\n").replace("\n", "\r\n"),
        "\ufeff" + HEADER + f"first\ta.faa\t\nsecond\tsub/c.faa\t{OTHER}\n",
        "\ufeff# ours\r\n" + HEADER + f"first\ta.faa\t\r\nsecond\tsub/c.faa\t{OTHER}\r\n",
        HEADER + f" first \t a.faa\t \nsecond\tsub/c.faa\t {OTHER} \n",
        HEADER + f'first\t"a.faa"\t""\n"second"\tsub/c.faa\t"{OTHER}"\n',
    ],
    ids=["full", "empty cell", "no cell", "comments", "CRLF", "BOM", "BOM and comment", "spaces", "quoted"],
)
def test_good_tables(folder: Path, content: str) -> None:
    assert rows(folder, content) == EXPECTED


@pytest.mark.parametrize("header", ["dataset\tfasta\n", "dataset\tfasta\t\n"])
def test_a_table_without_models(folder: Path, header: str) -> None:
    assert rows(folder, header + "first\ta.faa\nsecond\tsub/c.faa\t\n") == [
        ("first", "a.faa", DEFAULT),
        ("second", "sub/c.faa", DEFAULT),
    ]


def test_every_bad_line_is_named(folder: Path) -> None:
    lines = ("good\ta.faa\t", "x y\ta.faa\t", "x\tabsent.faa\t", "good\tb.faa\t", "x\ta.faa\tesm3", "x\tsub\t")
    table = write_table(folder, HEADER + "\n".join(lines))
    with pytest.raises(SeqmillError) as caught:
        read_datasets(table, DEFAULT, [folder])
    expected = (
        "line 3: dataset 'x y': use letters, digits",
        "line 4: absent.faa: no such FASTA file",
        "line 5: dataset good with model untrained-esm2_t6_8M_UR50D is listed twice",
        "line 6: model 'esm3' is not known",
        f"line 7: {folder}/sub: is a folder",
    )
    for line, told in zip(str(caught.value).splitlines(), expected, strict=True):
        assert line.startswith(f"{table}: {told}")


def test_home_folders_in_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "own.pt").touch()
    (dataset,) = read_datasets(write_table(folder, HEADER + "x\t~/a.faa\t~/own.pt\n"), DEFAULT, [Path()])
    assert (dataset.fasta, dataset.model.path, dataset.model.slug) == (folder / "a.faa", folder / "own.pt", "own")


def test_the_default_model_is_not_needed_if_every_row_has_one(folder: Path) -> None:
    table = write_table(folder, HEADER + f"first\ta.faa\t{OTHER}\n")
    (dataset,) = read_datasets(table, "", [folder])
    assert dataset.model.name == OTHER


def test_one_fasta_with_two_models_and_two_datasets_of_one_fasta(folder: Path) -> None:
    content = HEADER + f"x\ta.faa\t{DEFAULT}\nx\ta.faa\t{OTHER}\ny\ta.faa\t\n"
    assert rows(folder, content) == [("x", "a.faa", DEFAULT), ("x", "a.faa", OTHER), ("y", "a.faa", DEFAULT)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("only", "expected a dataset, a fasta and a model"),
        ("\ta.faa\t", "expected a dataset, a fasta and a model"),
        ("x\t\t", "expected a dataset, a fasta and a model"),
        ("x a.faa esm2", "expected a dataset, a fasta and a model"),
        ("x\ta.faa\t\textra", "expected a dataset, a fasta and a model"),
        ("x/y\ta.faa\t", "dataset 'x/y': use letters"),
        ("..\ta.faa\t", "dataset '..': use letters"),
        ("-x\ta.faa\t", "dataset '-x': use letters"),
        (".x\ta.faa\t", "dataset '.x': use letters"),
        ("K&ln\ta.faa\t", "dataset 'K&ln': use letters"),
        ("x y\ta.faa\t", "dataset 'x y': use letters"),
        ("x\tabsent.faa\t", "absent.faa: no such FASTA file"),
        ("x\tsub\t", "is a folder"),
        ("x\t.\t", "is a folder"),
        ("x\tdatasets.tsv\t", "not a FASTA file"),
        ("x\ta.faa\tesm2_t6_8M", "did you mean esm2_t6_8M_UR50D?"),
        ("good\tb.faa\t", "dataset good with model untrained-esm2_t6_8M_UR50D is listed twice"),
        (f"good\tb.faa\t{DEFAULT}", "is listed twice"),
        ('x\t"a.faa\t', "unexpected end of data"),
        ('x\ta.faa\t"', "unexpected end of data"),
        ("x\ta.faa\t~no-such-user/own.pt", "model ~no-such-user/own.pt: "),
        ("x\tb{c}.faa\t", "b{c}.faa: Snakemake takes braces for wildcards"),
        ("x\t~no-such-user/a.faa\t", "~no-such-user/a.faa: "),
        ("x\t" + "long" * 1000 + "\t", "File name too long"),
        ("x\ta.faa\t" + "m" * 200_000, "field larger than field limit"),
    ],
)
def test_an_error_names_its_line(folder: Path, line: str, expected: str) -> None:
    message = refusal(folder, f"# ours\n{HEADER}good\ta.faa\t\n\n{line}\nlast\tb.faa\t\n")
    assert message.startswith("line 5: ")
    assert expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the first line must be the tab-separated names dataset, fasta, model; model may be left out"),
        (
            "dataset\tfasta\nfirst\ta.faa\tesm2_t6_8M_UR50D\n",
            "line 2: expected a dataset and a fasta, separated by tabs",
        ),
        ("\n# nothing\n", "the first line must be"),
        ("first\ta.faa\t\n", "the first line must be"),
        ("dataset,fasta,model\nfirst,a.faa,\n", "the first line must be"),
        ("dataset fasta model\n", "the first line must be"),
        ("fasta\tdataset\tmodel\n", "the first line must be"),
        (HEADER, "has no datasets"),
        (HEADER + "# first\ta.faa\t\n", "has no datasets"),
        (HEADER.encode() + b"K\xf6ln\ta.faa\t\n", "cannot be read as UTF-8 text"),
        (HEADER.encode("utf-16"), "cannot be read as UTF-8 text"),
    ],
)
def test_an_error_of_the_whole_table(folder: Path, content: str | bytes, expected: str) -> None:
    assert expected in refusal(folder, content)


def test_a_missing_table(folder: Path) -> None:
    for table in (folder / "absent.tsv", folder):
        with pytest.raises(SeqmillError, match=f"^{re.escape(str(table))}: no such table of datasets"):
            read_datasets(table, DEFAULT, [folder])


def test_relative_paths_are_looked_up_in_order(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = tmp_path / "second"
    write_fasta(second / "a.faa")
    write_fasta(second / "only.faa")
    assert find_fasta("a.faa", [folder, second]) == folder / "a.faa"
    assert find_fasta("a.faa", [second, folder]) == second / "a.faa"
    assert find_fasta("only.faa", [folder, second]) == second / "only.faa"
    assert find_fasta("sub/../a.faa", [second, folder]) == folder / "sub/../a.faa"
    assert find_fasta(str(folder / "a.faa"), [second]) == folder / "a.faa"  # absolute

    monkeypatch.setenv("HOME", str(second))
    assert find_fasta("~/only.faa", [folder]) == second / "only.faa"
    monkeypatch.chdir(second)
    assert find_fasta("only.faa", [Path(), folder]) == Path("only.faa")  # stays relative
    with pytest.raises(SeqmillError) as caught:
        find_fasta("absent.faa", [Path(), folder, second])
    assert str(caught.value) == f"absent.faa: no such FASTA file (looked in {second}, {folder})"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("proteins.faa", "proteins"),
        ("proteins.faa.gz", "proteins"),
        ("proteins.fasta.bgz", "proteins"),
        ("proteins.pep.zst", "proteins"),
        ("PROTEINS.FA", "PROTEINS"),
        ("proteins", "proteins"),
        ("proteins.txt", "proteins.txt"),
        ("GCF_000005845.2_ASM584v2.faa.gz", "GCF_000005845.2_ASM584v2"),
        ("UP000005640_9606 (human).fasta", "UP000005640_9606_human_"),
        ("Köln & Bonn.faa", "Köln_Bonn"),
        ("a\tb\nc.fa", "a_b_c"),
        (".hidden.faa", "hidden"),
        ("..faa", "dataset"),
        (".faa", "faa"),
        ("--model.faa", "model"),
        ("日本.faa", "日本"),
        ("...", "dataset"),
    ],
)
def test_a_dataset_is_named_after_its_file(tmp_path: Path, file: str, name: str) -> None:
    path = write_fasta(tmp_path / file)
    dataset = dataset_of_file(file, DEFAULT, [tmp_path])
    assert (dataset.name, dataset.fasta, dataset.model.name) == (name, path, DEFAULT)
    assert safe_name(dataset.name) == dataset.name


def test_a_file_is_checked(tmp_path: Path) -> None:
    packed = tmp_path / "packed.faa.gz"
    packed.write_bytes(gzip.compress(b">p1\nMKV\n"))
    assert dataset_of_file("packed.faa.gz", DEFAULT, [tmp_path]).fasta == packed
    for content in (b"", b"MKV\n", packed.read_bytes()[:-9]):
        path = tmp_path / "bad.faa"
        path.write_bytes(content)
        with pytest.raises(SeqmillError, match=f"^{re.escape(str(path))}: "):
            dataset_of_file("bad.faa", DEFAULT, [tmp_path])


def test_the_model_of_a_single_file_is_looked_up(tmp_path: Path) -> None:
    write_fasta(tmp_path / "a.faa")
    with pytest.raises(SeqmillError, match="did you mean esm2_t6_8M_UR50D"):
        dataset_of_file("a.faa", "esm2_t6_8M", [tmp_path])


def test_two_datasets_with_the_same_results_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results/a/m").mkdir(parents=True)
    (tmp_path / "results/b").symlink_to("a")
    refuse_shared_folders([tmp_path / "results/a/m", tmp_path / "results/a/n", tmp_path / "results/c/m"])
    with pytest.raises(SeqmillError, match=r"results/b/m and .*results/a/m are the same folder, through a link"):
        refuse_shared_folders([tmp_path / "results/a/m", tmp_path / "results/b/m"])
    with pytest.raises(SeqmillError, match=r"results/b/new and .*results/a/new are the same folder"):
        refuse_shared_folders([tmp_path / "results/a/new", tmp_path / "results/b/new"])


def test_datasets_in_the_settings(folder: Path) -> None:
    datasets = {"x": "a.faa", "y": {"fasta": "b.faa"}, "z": {"fasta": "a.faa", "model": OTHER}}
    found = [
        (dataset.name, dataset.fasta, dataset.model.name)
        for dataset in datasets_of_mapping(datasets, DEFAULT, [folder])
    ]
    assert found == [("x", folder / "a.faa", DEFAULT), ("y", folder / "b.faa", DEFAULT), ("z", folder / "a.faa", OTHER)]
    with pytest.raises(SeqmillError) as error:
        datasets_of_mapping(
            {"x": "none.faa", "y/z": "a.faa", "z": {"fasta": "a.faa", "model": "esm9"}}, DEFAULT, [folder]
        )
    for value in (None, [], 5, {"model": DEFAULT}, {"fasta": 5}):
        with pytest.raises(SeqmillError, match="config datasets: x: give a FASTA file, or fasta and model"):
            datasets_of_mapping({"x": value}, DEFAULT, [folder])
    with pytest.raises(SeqmillError, match="config datasets: 5: is listed twice"):
        datasets_of_mapping({"5": "a.faa", 5: "b.faa"}, DEFAULT, [folder])
    first, second, *rest = str(error.value).split("\n")
    assert first.startswith("config datasets: x: none.faa: no such FASTA file")
    assert second.startswith("config datasets: y/z: dataset 'y/z': use letters")
    assert rest[0].startswith("config datasets: z: model 'esm9' is not known")
