"""The command of Snakemake for a run that was asked for, and what the run will embed."""

import os
from pathlib import Path

import pytest
import yaml

from pipeline import DEMO, REPOSITORY
from seqmill.errors import SeqmillError
from seqmill.run.launch import Launch
from seqmill.run.workflow_files import workflow_folder, write_profile

HERE = Path()
FASTA = ">a\nMKV\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a FASTA file and a checkpoint."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("p.faa").write_text(FASTA)
    Path("mine.pt").write_bytes(b"")
    return folder


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def settings_in(command: list[str]) -> dict[str, str]:
    return (
        dict(item.split("=", 1) for item in command[command.index("--config") + 1 :]) if "--config" in command else {}
    )


def test_in_a_clone_the_workflow_is_the_repository() -> None:
    assert workflow_folder() == REPOSITORY


def test_the_command_of_a_run_in_the_current_folder() -> None:
    command = Launch(
        {"fasta": "p.faa", "model": "mine.pt"}, HERE, cores="4", gpus=2, options=["--retries", "0"]
    ).command()
    assert command[1:6] == ["-P", "-m", "snakemake", "--retries", "0"]
    assert value_of(command, "--snakefile") == str(REPOSITORY / "Snakefile")
    assert value_of(command, "--workflow-profile") == str(REPOSITORY / "profiles/default")
    assert (value_of(command, "--cores"), value_of(command, "--resources")) == ("4", "gpu=2")
    assert "--directory" not in command
    assert settings_in(command) == {"fasta": "p.faa", "model": "mine.pt"}


def test_paths_become_absolute_for_another_folder(folder: Path) -> None:
    given = {
        **{"fasta": "p.faa", "model": "mine.pt", "metadata": "t/{dataset}.tsv", "datasets": "t.tsv"},
        **{"reuse": "[a.h5, ../b.h5]", "color": "p.faa", "container": ""},
    }
    command = Launch(given, Path("out")).command()
    assert value_of(command, "--directory") == "out"
    assert "--cores" not in command
    found = settings_in(command)
    assert yaml.safe_load(found.pop("metadata")) == f"{folder}/t/{{dataset}}.tsv"
    assert found == {
        **{"fasta": f"{folder}/p.faa", "model": f"{folder}/mine.pt", "datasets": f"{folder}/t.tsv"},
        **{"reuse": f"[{folder}/a.h5,{folder}/../b.h5]", "color": "p.faa", "container": ""},
    }
    for name in ("esm2_t6_8M_UR50D", "untrained:dnabert_s"):
        assert settings_in(Launch({"model": name}, Path("out")).command()) == {"model": name}


@pytest.mark.parametrize(
    "name", ["a #1: b.faa", "it's.faa", "1e3", "12", "true", "[x].faa", "é 日本.faa", "p.faa", "d/1"]
)
def test_snakemake_reads_the_name_of_the_fasta_unchanged(name: str) -> None:
    from snakemake.cli import parse_config

    command = Launch({"fasta": name}, HERE).command()
    assert parse_config(command[command.index("--config") + 1 :]) == {"fasta": name}


def test_snakemake_reads_names_that_are_not_utf8_unchanged() -> None:
    from snakemake.cli import parse_config

    name = os.fsdecode(b"\xff #1.faa")
    assert parse_config(Launch({"fasta": name}, HERE).command()[-1:]) == {"fasta": name}


def test_profiles_are_those_of_the_workflow_or_folders(folder: Path) -> None:
    own = folder / "profiles/mine"
    own.mkdir(parents=True)
    (own / "profile.yaml").write_text("cores: 1\n")
    for name, expected in (("slurm", REPOSITORY / "profiles/slurm"), ("profiles/mine", own), (str(own), own)):
        assert value_of(Launch({}, HERE, profile=name).command(), "--workflow-profile") == str(expected)
    said = r"^profile mine: no such folder with a profile.yaml; give default or slurm, or a folder of your own \(.+run"
    with pytest.raises(SeqmillError, match=said + r".+--write-profile mine` writes one for SLURM\)$"):
        Launch({}, HERE, profile="mine").command()


def test_a_written_profile_is_that_of_slurm_and_is_never_replaced(folder: Path) -> None:
    path = write_profile(Path("a/b"))
    assert path == Path("a/b/profile.yaml")
    assert path.read_bytes() == (REPOSITORY / "profiles/slurm/profile.yaml").read_bytes()
    assert value_of(Launch({}, HERE, profile="a/b").command(), "--workflow-profile") == str(folder / "a/b")
    path.write_text("jobs: 1\n")
    with pytest.raises(SeqmillError, match=r"^a/b/profile.yaml: exists already"):
        write_profile(Path("a/b"))
    assert path.read_text() == "jobs: 1\n"
    with pytest.raises(SeqmillError, match=r"^p.faa: no profile can be written there: "):
        write_profile(Path("p.faa"))


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        *[("--config", "--config"), ("-C", "--config"), ("--conf", "--config"), ("--cores=3", "--cores")],
        *[("-c3", "--cores"), ("-c", "--cores"), ("--directory", "--output"), ("-d", "--output")],
        *[("--workflow-profile=x", "--profile"), ("--snakefile", "options"), ("--res", "all of --resources")],
    ],
)
def test_options_that_seqmill_gives_are_refused_after_the_dashes(option: str, instead: str) -> None:
    with pytest.raises(SeqmillError, match=rf"cannot be given after --: give {instead}"):
        Launch({}, HERE, gpus=1, options=["-n", option]).command()


def test_other_options_of_snakemake_are_passed_on() -> None:
    options = ["-n", "--resources", "mem_mb=1", "--configfile", "x.yaml", "--consider-ancient", "--dag", "-k", "plan"]
    assert Launch({}, HERE, options=options).command()[4 : 4 + len(options)] == options


def names(launch: Launch) -> list[tuple[str, str, str]]:
    return [(dataset.name, str(dataset.fasta), dataset.model.name) for dataset in launch.datasets()]


def test_what_is_embedded_is_what_the_workflow_reads(folder: Path) -> None:
    default, small = "esm2_t33_650M_UR50D", "esm2_t6_8M_UR50D"
    assert names(Launch({"fasta": "p.faa"}, Path("out"))) == [("p", "p.faa", default)]
    table = folder / "tables/t.tsv"
    table.parent.mkdir()
    table.write_text(f"dataset\tfasta\tmodel\na\tx.faa\nb\tx.faa\t{small}\n")
    (table.parent / "x.faa").write_text(FASTA)
    found = [("a", "tables/x.faa", default), ("b", "tables/x.faa", small)]
    assert names(Launch({"datasets": "tables/t.tsv"}, Path("out"))) == found
    config = folder / "out/config/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"fasta: own.faa\nmodel: {small}\nshards: 3\n")
    (folder / "out/own.faa").write_text(FASTA)
    assert names(Launch({}, Path("out"))) == [("own", "out/own.faa", small)]
    assert names(Launch({"fasta": "p.faa"}, Path("out"))) == [("p", "p.faa", small)]
    assert names(Launch({"model": default}, Path("out"))) == [("own", "out/own.faa", default)]
    config.write_text("datasets: tables/t.tsv\n")
    with pytest.raises(SeqmillError, match="no such table"):
        names(Launch({}, Path("out")))


def test_the_table_may_be_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    (folder / "home/t.tsv").write_text(f"dataset\tfasta\nx\t{DEMO}\n")
    for output in (HERE, Path("out")):
        assert [dataset.name for dataset in Launch({"datasets": "~/t.tsv"}, output).datasets()] == ["x"]


@pytest.mark.parametrize("text", ["a: [", "- a\n", "\xff"])
def test_a_damaged_configuration_is_named_in_one_line(text: str) -> None:
    Path("config").mkdir()
    Path("config/config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SeqmillError, match=r"^config/config.yaml: (cannot be read as YAML: .+|holds no settings.+)$"):
        Launch({}, HERE).datasets()


def test_datasets_by_name_in_the_configuration() -> None:
    Path("config").mkdir()
    named = "{a: p.faa, b: {fasta: p.faa, model: untrained:esm2_t6_8M_UR50D}}"
    Path("config/config.yaml").write_text(f"datasets: {named}\n")
    found = {dataset.name: dataset.model.name for dataset in Launch({}, HERE).datasets()}
    assert found == {"a": "esm2_t33_650M_UR50D", "b": "untrained:esm2_t6_8M_UR50D"}


def test_what_a_model_does_not_have_is_refused_before_its_weights_are_fetched() -> None:
    def refused(model: str, **settings: str) -> str:
        launch = Launch({"fasta": "p.faa", "model": model, **settings}, HERE)
        with pytest.raises(SeqmillError) as refusal:
            launch.require_possible(launch.datasets())
        return str(refusal.value)

    said = refused("prott5_xl_u50", precision="float16")
    assert said.startswith("dataset p, model prott5_xl_u50: precision float16 is not for ProtT5: T5's feed-forward")
    assert "precision float8 is not for ESM C" in refused("esmc_300m", precision="float8")
    assert "pooling cls: ProstT5 has no cls token" in refused("prostt5", pooling="[mean,cls]")
    Path("config").mkdir()
    Path("config/config.yaml").write_text("precision: float16\npooling: [max, cls]\n")
    assert "precision float16 is not for ProtT5" in refused("prott5_xl_u50")
    assert "pooling cls: ProtT5 has no cls token" in refused("prott5_xl_u50", precision="auto")
    for model, settings in (("prott5_xl_u50", {"precision": "auto", "pooling": "std"}), ("esmc_6b", {})):
        launch = Launch({"fasta": "p.faa", "model": model, **settings}, HERE)
        launch.require_possible(launch.datasets())
