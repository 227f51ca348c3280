"""`seqmill run`: dry runs of the workflow in a folder without a clone, and everything that it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snakemake_executor_plugin_slurm.partitions import read_partition_file

from pipeline import IMPATIENT, MODEL, REPOSITORY
from seqmill.run.started import FOLDER

DOCS = REPOSITORY / "docs"
SLUG = "untrained-esm2_t6_8M_UR50D"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    return tmp_path


def run(folder: Path, *arguments: str, missing: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command; the module `missing` can't be imported, and there is no network."""
    command = f"import sys; sys.modules.update(dict.fromkeys({missing.split()})); sys.argv[0] = 'run.py'\n"
    command += "from seqmill.cli.main import launch; launch('run', 'seqmill run')"
    environment = {"PYTHONPATH": IMPATIENT, "SEQMILL_WEIGHTS_URL": "http://127.0.0.1:9", "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=folder,
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def jobs(output: str) -> dict[str, int]:
    """Return how often Snakemake would run each rule."""
    table = output.partition("Job stats:")[2].partition("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def files(folder: Path) -> list[str]:
    """Return all files but Snakemake's own."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if ".snakemake" not in path.parts)


def test_a_dry_run_of_a_fasta_in_another_folder(folder: Path) -> None:
    (folder / "p.faa").rename(folder / "my #1: proteins.faa")
    (folder / "numpy.py").write_text("raise SystemExit('the current folder was searched for packages')\n")
    done = run(
        folder, "my #1: proteins.faa", "--model", MODEL, "--output", "a/b c", "--gpus", "3", "--", "-n", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    done = run(folder, "my #1: proteins.faa", "--output", "a/b c", "--config", f"model={MODEL}", "shards=2", "--", "-n")
    assert done.returncode == 0, done.stderr
    stats = {"build_index": 1, "embed_shard": 2, "merge_shards": 1, "report": 1, "all": 1}
    assert jobs(done.stdout) == stats
    assert f"results/my_1_proteins/{SLUG}/embeddings.h5" in done.stdout
    assert f"input: {folder}/my #1: proteins.faa" in done.stdout
    assert files(folder) == ["my #1: proteins.faa", "numpy.py"]


def test_gpus_are_shards_that_run_at_a_time(folder: Path) -> None:
    done = run(folder, "p.faa", "--model", MODEL, "--gpus", "3", "--config", "exports=npy", "dtype=float16", "--", "-n")
    assert done.returncode == 0, done.stderr
    assert (jobs(done.stdout)["embed_shard"], jobs(done.stdout)["export_npy"]) == (3, 1)
    assert "--resources gpu=3" in done.stderr
    assert "no GPU is visible here: the 3 shards are computed on the CPU, one after another" in done.stderr


def test_a_dry_run_on_slurm(folder: Path) -> None:
    with (folder / "p.faa").open("ab") as file:
        file.write(b">b\n")
        file.truncate(10**9)  # sparse
    done = run(folder, "p.faa", "--model", "untrained:esm2_t33_650M_UR50D", "--profile", "slurm", "--", "-n")
    assert done.returncode == 0, done.stderr
    shards = jobs(done.stdout)["embed_shard"]
    assert 1 < shards < 64
    assert f"shards: auto splits about 1,000,000,000 tokens into {shards} shards, one cluster job each" in done.stderr
    assert "profiles/slurm" in done.stderr
    assert "--cores" not in done.stderr  # the profile's own limits count
    assert re.search(r"rule embed_shard:.*?resources: .*?gpu=1", done.stdout, re.DOTALL)


def test_a_profile_of_ones_own_is_written_edited_and_used(folder: Path) -> None:
    done = run(folder, "--write-profile", "my cluster")
    assert (done.returncode, done.stderr) == (0, "")
    path = folder / "my cluster/profile.yaml"
    assert done.stdout.startswith("my cluster/profile.yaml: ")
    assert re.search(r"run(\.py)? proteins\.faa --profile 'my cluster' -- --dry-run\n$", done.stdout)
    text = path.read_text()
    edits = {
        "  # - slurm_partition=normal ": "  - slurm_partition=long ",
        "  # - slurm_account=my_project ": "  - slurm_account=p17 ",
        "    # gpu_model: a100 ": "    gpu_model: h100 ",
        "    # slurm_partition: gpu\n": "    slurm_partition: accel\n",
        "    # runtime: 120 ": "    runtime: 77 ",
        "# slurm-partition-config: ": "slurm-partition-config: ",
        "# slurm-efficiency-report: ": "slurm-efficiency-report: ",
    }
    for before, after in edits.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    path.write_text(text)
    page = (DOCS / "how-to/cluster.md").read_text()
    (partitions,) = re.findall(r"```yaml\n(partitions:\n.+?)```", page, re.DOTALL)
    (folder / "partitions.yaml").write_text(partitions)
    assert [found.name for found in read_partition_file(folder / "partitions.yaml")] == ["normal", "gpu"]
    done = run(folder, "p.faa", "--model", MODEL, "--profile", "my cluster", "--config", "shards=2", "--", "--dry-run")
    assert done.returncode == 0, done.stderr
    asked = {
        rule: dict(re.findall(r"(\w+)=([^,\n]+)", resources))
        for rule, resources in re.findall(r"rule (\w+):\n.*?    resources: (.*?)\n", done.stdout, re.DOTALL)
    }
    everywhere = {"slurm_partition": "long", "slurm_account": "p17"}
    assert everywhere.items() <= asked["build_index"].items()
    shard = {**everywhere, "slurm_partition": "accel", "gpu": "1", "gpu_model": "h100", "runtime": "77"}
    assert shard.items() <= asked["embed_shard"].items()
    done = run(folder, "--write-profile", "my cluster")
    assert done.returncode == 1
    line = "my cluster/profile.yaml: exists already, and may hold your settings: give another folder, or remove it"
    assert done.stderr.endswith(f"ERROR {line}\n")
    assert path.read_text() == text


def test_a_folder_with_settings_needs_no_fasta(folder: Path) -> None:
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(f"fasta: p.faa\nmodel: {MODEL}\nshards: 4\n")
    done = run(folder, "--", "-n")
    assert done.returncode == 0, done.stderr
    assert jobs(done.stdout)["embed_shard"] == 4
    (folder / "config/config.yaml").write_text(f"fasta: p.faa\nmodel: {MODEL}\n")
    done = run(folder, "--", "-n", "--jobs", "3")  # on this machine, where the limit of jobs is that of cores
    assert jobs(done.stdout)["embed_shard"] == 1
    assert "shards: auto" not in done.stderr


def test_weights_are_fetched_before_snakemake_starts_unless_it_computes_nothing(folder: Path) -> None:
    done = run(folder, "p.faa", "--model", "esm2_t6_8M_UR50D")
    assert done.returncode == 1
    assert "cannot fetch http://127.0.0.1:9/esm2_t6_8M_UR50D.pt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / ".snakemake").exists()
    for options in (["-n"], ["-np"], ["plan", "--dry-run"], ["--delete-all-output", "--dryrun"], ["-D"]):
        done = run(folder, "p.faa", "--model", "esm2_t6_8M_UR50D", "--", *options)
        assert done.returncode == 0, done.stderr
        assert "cannot fetch" not in done.stderr
    assert not (folder / FOLDER).exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["q.faa"], r"q.faa: no such FASTA file \(looked in .+\)"),
        (["."], r"\.: is a folder, not a FASTA file"),
        (["no.txt"], r"no.txt: .*FASTA.*"),
        (["p.faa", "--model", "esm2_t6_8M"], r"model 'esm2_t6_8M' is not known; did you mean .+"),
        (["p.faa", "--profile", "pbs"], r"profile pbs: no such folder with a profile.yaml; give default or slurm.+"),
        (["p.faa", "--output", "p.faa"], r"p.faa: no files can be written there: .+; give another --output"),
        (["p.faa", "--output", "/proc"], r"/proc: no files can be written there: .+; give another --output"),
        ([], r"nothing to embed: give a FASTA file, --config datasets=TABLE, or settings in config/config.yaml"),
        (["--config", "datasets=t.tsv"], r"t.tsv: no such table of datasets; .+"),
        (["p.faa", "--", "--config", "shards=2"], r"--config cannot be given after --: give --config before --"),
    ],
)
def test_what_cannot_be_run_gives_one_line_and_writes_nothing(folder: Path, arguments: list[str], line: str) -> None:
    (folder / "no.txt").write_text("not FASTA\n")
    done = run(folder, *(arguments if "--model" in arguments else ["--model", MODEL, *arguments]))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"\d\d:\d\d:\d\d ERROR {line}\n", done.stderr), done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["no.txt", "p.faa"]


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("snakemake", "this needs snakemake: pip install 'seqmill[workflow]'"),
        ("torch", "this needs torch: pip install 'seqmill[embed]'"),
        ("snakemake torch yaml", "this needs snakemake and torch: pip install 'seqmill[embed,workflow]'"),
        (
            "snakemake_executor_plugin_slurm",
            "this needs snakemake-executor-plugin-slurm: pip install 'seqmill[slurm]'",
        ),
    ],
)
def test_missing_packages_are_named_with_their_extra(folder: Path, missing: str, line: str) -> None:
    profile = ["--profile", "slurm"] if "slurm" in missing else []
    done = run(folder, "p.faa", "--model", MODEL, *profile, missing=missing)
    assert done.returncode == 1
    assert re.fullmatch(rf"\d\d:\d\d:\d\d ERROR {re.escape(line)}\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["p.faa", "--config", "shards"], "'shards' is not KEY=VALUE"),
        (["p.faa", "--gpus", "0"], "0 is below 1"),
        (["p.faa", "--unlock"], "and several FASTA files into a table (--config datasets=TABLE)"),
        (["p.faa", "--cores", "some"], "'some' is not an integer"),
        (["p.faa", "--config", "fasta=q.faa"], "fasta is given twice: p.faa and --config fasta=q.faa"),
        (["--write-profile", "x", "p.faa"], "--write-profile only writes a profile: give it alone"),
        (["--write-profile", "x", "--", "-n"], "--write-profile only writes a profile: give it alone"),
        (["p.faa", "--gpus", "2", "--config", "shards=3"], "shards is given twice: 2 and --config shards=3"),
        (["--config", "shards=2", "shards=3"], "shards is given twice: --config shards=2 and --config shards=3"),
    ],
)
def test_wrong_usage_has_exit_code_2(folder: Path, arguments: list[str], line: str) -> None:
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(line)
    assert files(folder) == ["p.faa"]


def test_the_exit_code_is_that_of_snakemake(folder: Path) -> None:
    done = run(folder, "p.faa", "--model", MODEL, "--", "--no-such-option")
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-option" in done.stderr
