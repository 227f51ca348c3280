"""The workflow's work before any job runs: datasets, shards, stale files, refusals, options and requests."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from families import write_fasta
from pipeline import CONTIGS_DEMO, DEMO, MODEL, REPOSITORY
from seqmill.embedding.worker import embed_shard
from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.merge.merge import merge_shards
from seqmill.run.dataset_run import DatasetRun, export_options
from seqmill.run.project import MARK, Project
from seqmill.run.resources import BASE_MB, BASE_MINUTES
from seqmill.run.settings import check_settings
from seqmill.spec.task import ComputeSettings, ShardTask
from seqmill.store.layout import SHARD

SCHEMA = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
SLUG = "untrained-esm2_t6_8M_UR50D"
CONTIGS = {"fasta": str(CONTIGS_DEMO), "model": "untrained:dnabert_s"}
SEQUENCES = ["MKV", "MKLLV", "MKV"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a FASTA file and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_fasta(Path("p.faa"), SEQUENCES)
    return tmp_path


def open_project(
    *,
    cores: int = 2,
    jobs_get_gpu: bool = False,
    is_main: bool = True,
    cluster_threads: int | None = None,
    gpus_at_once: int | None = None,
    **settings: object,
) -> Project:
    given = {"fasta": "p.faa", "model": MODEL, "precision": "float32", **settings}
    asked = check_settings(given, SCHEMA, [])
    return Project.open(asked, REPOSITORY, cores, jobs_get_gpu, is_main, cluster_threads, gpus_at_once)


def open_run(**settings: object) -> DatasetRun:
    (run,) = open_project(**settings)
    return run


def test_home_folders_in_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    Path("home").mkdir()
    write_fasta(Path("home/p.faa"), SEQUENCES)
    Path("home/table.tsv").write_text("dataset\tfasta\na\t~/p.faa\n")
    Path("home/colors-a.tsv").write_text("id\tkind\nseq0\tone\n")
    given = {"fasta": "", "datasets": "~/table.tsv", "metadata": "~/colors-{dataset}.tsv", "color": "kind"}
    run = open_run(**given)
    assert run.fasta == folder / "home/p.faa"
    assert run.settings["metadata"] == f"{folder}/home/colors-{{dataset}}.tsv"
    compute(run)
    taken = open_run(fasta="home/p.faa", reuse="~/../results/a/untrained-esm2_t6_8M_UR50D/embeddings.h5").reused
    assert [path.resolve() for path in taken] == [run.folder.embeddings.resolve()]
    with pytest.raises(SeqmillError, match=r"^~no-such-user/table\.tsv: no such table of datasets"):
        open_project(fasta="", datasets="~no-such-user/table.tsv")


def compute(run: DatasetRun) -> None:
    """Do the work of a dataset's jobs."""
    folder = run.folder
    build_index(run.fasta, folder.index, run.model.name, run.policy, list(run.reused))
    for rank, (shard, status) in enumerate(zip(run.shards, run.statuses, strict=True)):
        settings = ComputeSettings("cpu", "float32", outputs=run.outputs)
        task = ShardTask(folder.index, rank, run.world_size, shard, status, settings, audit_seconds=0)
        embed_shard(task)
    merge_shards(folder.index, run.shards, run.statuses, *folder.merged, run.settings["dtype"], run.fasta)


def names(paths: object) -> list[str]:
    return [path.name for path in paths]


def test_a_job_finds_its_dataset_and_the_workflow_all_files() -> None:
    Path("table.tsv").write_text(f"dataset\tfasta\tmodel\none\tp.faa\t{MODEL}\ntwo\t{DEMO}\n")
    project = open_project(fasta="", datasets="table.tsv", model="dnabert_s", shards=2, exports=["npy"], cores=3)
    assert [run.folder.name for run in project] == [f"one/{SLUG}", "two/dnabert_s"]
    assert project[SimpleNamespace(dataset="two", model="dnabert_s")].fasta == DEMO
    made = [str(path) for path in project.targets]
    assert sorted(made) == sorted(
        f"results/{folder}/{name}"
        for folder in (f"one/{SLUG}", "two/dnabert_s")
        for name in (
            *("embeddings.h5", "report.html", "exports/embeddings.npy"),
            *("shards/shard_0-of-2.h5", "shards/shard_1-of-2.h5"),
        )
    )
    # Only released weights can be fetched.
    assert names(project.weights) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


def test_the_table_and_the_files_of_the_demo_are_found_from_any_folder() -> None:
    project = open_project(fasta="", datasets="config/datasets.tsv")
    assert [run.fasta for run in project] == [DEMO, CONTIGS_DEMO]


def test_auto_is_one_shard_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_run().world_size == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert open_run().world_size == 3
    assert names(open_run().shards) == [f"shard_{rank}-of-3.h5" for rank in range(3)]
    assert names(open_run().statuses) == [f"shard_{rank}-of-3.status.json" for rank in range(3)]
    assert open_run(device="cpu").world_size == 1
    assert open_run(shards=5).world_size == 5


def test_auto_keeps_the_previous_number_of_shards_unless_the_fasta_was_edited() -> None:
    compute(open_run(shards=2))
    assert open_run().world_size == 2
    write_fasta(Path("p.faa"), [*SEQUENCES, "MKYY"])
    assert open_run().world_size == 1


ON_CLUSTER = {"model": "esm2_t33_650M_UR50D", "precision": "auto", "jobs_get_gpu": True, "cluster_threads": 1}


def write_residues(number: int) -> None:
    """Write one FASTA of so many residues, sparse on the disk."""
    with Path("p.faa").open("wb") as file:
        file.write(b">a\nMKV\n>b\n")
        file.truncate(number)


def test_on_a_cluster_auto_gives_shards_of_about_an_hour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_run(**ON_CLUSTER).world_size == 1
    said = capsys.readouterr().err
    assert said.startswith("seqmill: results/p/esm2_t33_650M_UR50D: shards: auto splits about 29 tokens into 1 shard, ")
    for letters in (10**8, 10**9, 2 * 10**9):
        write_residues(letters)
        run = open_run(**ON_CLUSTER)
        assert 1 < run.world_size < 64
        assert 30 < run.shard_minutes(run.world_size, 1, 1) - BASE_MINUTES <= 60
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"about 2,000,000,000 tokens into {run.world_size} shards, one cluster job each, of at most" in said
    assert said.endswith(" min on a slow GPU; to set the number: --config shards=N")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # of the login node
    assert open_run(**ON_CLUSTER).world_size == run.world_size
    # On CPUs, or with a larger model, the same tokens are more work.
    larger = open_run(**{**ON_CLUSTER, "model": "esm2_t36_3B_UR50D"})
    assert larger.world_size == 64
    write_residues(2 * 10**6)
    on_cpu = {**ON_CLUSTER, "device": "cpu", "jobs_get_gpu": False}
    one, eight = (open_run(**{**on_cpu, "cluster_threads": threads}).world_size for threads in (1, 8))
    assert one > eight > open_run(**ON_CLUSTER).world_size == 1


def test_on_a_cluster_a_compressed_fasta_counts_with_its_letters() -> None:
    write_residues(2 * 10**8)
    plain = open_run(**ON_CLUSTER).world_size
    Path("p.faa").rename("p.faa.gz")
    assert open_run(**{**ON_CLUSTER, "fasta": "p.faa.gz"}).world_size > 2 * plain


def test_on_a_cluster_a_number_or_an_earlier_run_comes_before_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"jobs_get_gpu": False, "cluster_threads": 1, "device": "cpu"}
    assert open_run(shards=7, **tiny).world_size == 7
    run = open_run(shards=3)
    compute(run)
    assert open_run(**tiny).world_size == 3
    assert capsys.readouterr().err == ""
    # After an edit the old index does not count.
    write_residues(10**7)
    assert open_run(**tiny).world_size > 3
    assert "shards: auto splits about 10,000,000 tokens" in capsys.readouterr().err


def test_a_job_merges_the_shards_that_exist_whatever_it_would_choose(capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(shards=3)
    compute(run)
    for path in run.folder.merged:
        path.unlink()
    job = open_project(is_main=False, cluster_threads=1)  # the node of a job, which would choose 1
    assert [found.shards for found in job] == [run.shards]
    write_residues(10**8)
    (job_run,) = open_project(is_main=False, **ON_CLUSTER)
    (main_run,) = open_project(**ON_CLUSTER)
    assert job_run.world_size == main_run.world_size > 1
    assert len(capsys.readouterr().err.splitlines()) == 1  # the main process alone says it


@pytest.mark.parametrize(
    ("device", "visible", "jobs_get_gpu", "expected"),
    [
        *[("auto", "", False, False), ("auto", "0", False, True), ("auto", "", True, True)],
        *[("cuda", "", False, True), ("cpu", "0", True, False)],
    ],
)
def test_shards_use_gpus_if_visible_or_requested(
    device: str, visible: str, jobs_get_gpu: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = open_run(device=device, jobs_get_gpu=jobs_get_gpu, cores=6)
    assert run.use_gpu == expected
    assert run.shard_threads == (4 if expected else 6)


@pytest.mark.parametrize(
    ("cores", "visible", "at_once", "threads"),
    [
        *[(1, "0", None, 1), (3, "0", None, 3), (64, "0", None, 4), (8, "0,1,2,3", None, 2), (2, "0,1,2,3", None, 1)],
        *[(8, "0,1,2,3", 2, 4), (8, "0,1", 4, 4), (8, "", None, 4), (8, "", 8, 1)],
    ],
)
def test_a_gpus_worker_has_its_share_of_the_cores(
    cores: int, visible: str, at_once: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    # With `device: cuda` even if no GPU is visible where the run is planned.
    assert open_run(device="cuda", cores=cores, gpus_at_once=at_once).shard_threads == threads
    assert open_run(device="cpu", cores=cores, gpus_at_once=at_once).shard_threads == cores


def test_a_gpus_worker_on_a_cluster_has_two_cores() -> None:
    """Snakemake does not know the cores of the nodes; a profile can set another number."""
    assert open_run(**ON_CLUSTER, cores=1).shard_threads == 2


def test_finished_results_are_current_until_the_settings_change(capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(shards=2)
    assert not open_project(shards=2).are_current(run.folder.merged)
    compute(run)
    project, before = open_project(shards=2), MARK.read_text()
    assert project.stale == {}
    assert project.are_current([run.folder.index, *run.folder.merged, *run.shards])
    assert capsys.readouterr().err == ""
    assert MARK.read_text() == before

    project = open_project(shards=2, dtype="float16")
    assert project.stale == {run.folder.embeddings: "dtype was float32 and is float16 now"}
    assert not project.are_current(run.folder.merged)
    assert project.are_current([run.folder.index, *run.shards])
    said = f"seqmill: results/p/{SLUG} will be computed again: dtype was float32 and is float16 now\n"
    assert capsys.readouterr().err == said
    assert "dtype was float32" in MARK.read_text()
    assert MARK.stat().st_mtime >= run.folder.embeddings.stat().st_mtime

    project = open_project(shards=2, pooling="max")
    assert [path for path in project.stale if SHARD.fullmatch(path.name)] == run.shards
    assert run.folder.index not in project.stale


def test_only_the_planning_process_judges_results() -> None:
    compute(open_run())
    MARK.unlink()
    project = open_project(is_main=False, dtype="float16")
    assert project.stale == {}
    assert not MARK.exists()


def test_another_fasta_with_the_same_name_is_refused() -> None:
    compute(open_run())
    Path("other").mkdir()
    write_fasta(Path("other/p.faa"), ["MKYY"])
    with pytest.raises(SeqmillError, match=r"holds the results of p\.faa; to embed other/p\.faa, rename its dataset"):
        open_run(fasta="other/p.faa")


REFUSED = {
    "a layer too many": ({"layers": 7}, f"dataset p, model {MODEL}: layer 7: the model has layers 0 to 6, or -7 to -1"),
    "a layer twice": ({"layers": [6, -1]}, "layers must be one or more, each once, not 6, 6"),
    "a long stride": (
        {**CONTIGS, "window": 100, "stride": 101},
        "model untrained:dnabert_s: stride must be 1 to 100 residues or bases, no longer than the window",
    ),
    "residues of contigs": ({**CONTIGS, "per_residue": True}, "per_residue is for proteins"),
    "an export of no residues": ({"exports": ["h5_residues"]}, "exports: h5_residues needs per_residue: float16 or"),
    "a color alone": ({"color": "kind"}, "metadata and color go together: a table, and its column"),
    "a table alone": ({"metadata": "kinds.tsv"}, "set both or neither"),
    "an unknown wildcard": (
        {"metadata": "{name}.tsv", "color": "kind"},
        "metadata {name}.tsv: Snakemake takes braces for wildcards, and the known ones are {dataset} and {model}; ",
    ),
    "no such column": ({"metadata": "{dataset}.tsv", "color": "colour"}, "p.tsv: has no column 'colour'"),
    "braces": ({"fasta": "a{b}.faa"}, "a{b}.faa: Snakemake takes braces for wildcards; rename the file or link to it"),
    "no FASTA": ({"fasta": "none.faa"}, "none.faa: no such FASTA file"),
    "no table": ({"fasta": "", "datasets": "none.tsv"}, "none.tsv: no such table of datasets"),
    "one folder twice": ({"fasta": "", "datasets": "linked.tsv"}, "are the same folder, through a link"),
    "float16 for T5": (
        {"model": "untrained:prott5_xl_u50", "precision": "float16"},
        "dataset p, model untrained:prott5_xl_u50: precision float16 is not for ProtT5: T5's feed-forward overflows in "
        "float16; use auto, bfloat16, or float32",
    ),
    "float8 for ESM C": (
        {"model": "untrained:esmc_300m", "precision": "float8"},
        "precision float8 is not for ESM C: it has no kernels in float8; use auto, bfloat16, float16, or float32",
    ),
    "cls of T5": (
        {"model": "untrained:prostt5", "pooling": ["mean", "cls"]},
        "dataset p, model untrained:prostt5: pooling cls: ProstT5 has no cls token; use mean, max, or std",
    ),
    "nothing to reuse": ({"reuse": "none.h5"}, "none.h5: no such file; take it out of reuse: finished results"),
    "braces in reuse": ({"reuse": "a{b}.faa"}, "a{b}.faa: Snakemake takes braces for wildcards"),
    "no result": ({"reuse": "p.faa"}, "p.faa: not a readable HDF5 embeddings file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_incompatible_settings_are_refused(name: str) -> None:
    settings, said = REFUSED[name]
    shutil.copy("p.faa", "a{b}.faa")
    Path("p.tsv").write_text("id\tkind\n0\thelix\n")
    Path("linked.tsv").write_text(f"dataset\tfasta\tmodel\na\tp.faa\t{MODEL}\nb\tp.faa\t{MODEL}\n")
    Path("results/a").mkdir(parents=True)
    Path("results/b").symlink_to("a")
    with pytest.raises(SeqmillError) as refusal:
        open_run(**settings)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def old(folder: Path) -> Path:
    """An earlier result in another folder."""
    compute(open_run())
    Path("results/p").rename("old")
    return Path("old", SLUG, "embeddings.h5").absolute()


def test_vectors_are_reused_from_files_of_the_same_model(old: Path) -> None:
    Path("table.tsv").write_text(f"dataset\tfasta\tmodel\np\tp.faa\t{MODEL}\nc\t{CONTIGS_DEMO}\tuntrained:dnabert_s\n")
    proteins, contigs = open_project(fasta="", datasets="table.tsv", reuse=str(old))
    assert list(proteins.reused) == [old]
    assert list(proteins.reused.values()) == list(proteins.request.reused)
    assert contigs.reused == {}
    with pytest.raises(
        SeqmillError, match=f"{old}: can't be reused: its model is {MODEL}, and no dataset has a model of"
    ):
        open_project(**CONTIGS, reuse=str(old))
    with pytest.raises(SeqmillError, match=f"its model is {MODEL}, and no dataset has a model of that family"):
        open_project(model="untrained:esmc_300m", reuse=str(old))
    with pytest.raises(SeqmillError, match="it has pooling=mean, this computation pooling=max"):
        open_project(reuse=str(old), pooling="max")


def test_reuse_continues_unless_the_fasta_was_edited(old: Path) -> None:
    run = open_run(reuse=str(old))
    compute(run)
    assert open_run().reused == run.reused
    assert open_project().stale == {}
    assert open_run(pooling="max").reused == {}
    with pytest.raises(SeqmillError, match="this run would replace it; move its folder, or copy it"):
        open_run(reuse=str(run.folder.embeddings))
    write_fasta(Path("p.faa"), ["MKYY"])
    assert open_run().reused == {}


def test_a_merge_needs_unchanged_earlier_results(old: Path) -> None:
    project = open_project(reuse=str(old))
    (run,) = project
    folder = run.folder
    jobs = [folder.index, *run.shards, *folder.merged]
    project.require_reused(jobs)
    with pytest.raises(
        SeqmillError, match=f"{old}: this run would replace it, and results/p/{SLUG} takes vectors from"
    ):
        project.require_reused([*jobs, Path("old", SLUG, "embeddings.h5")])
    compute(run)
    project = open_project(reuse=str(old))
    old.unlink()
    project.require_reused([folder.report, *run.shards])  # neither reads reused vectors
    for outputs in ([folder.index], folder.merged):
        with pytest.raises(SeqmillError, match=f"embeddings.h5.*results/p/{SLUG} takes vectors from it: bring it back"):
            project.require_reused(outputs)


def test_length_options_contain_what_the_model_needs() -> None:
    assert open_run().length_options == "--long-sequences truncate --max-length 1022"
    assert open_run(long_sequences="full").length_options == "--long-sequences full"
    options = open_run(**CONTIGS, window=3000, stride=1000, strand="both").length_options
    assert options == "--long-sequences window --max-length 3000 --window 3000 --stride 1000 --strand both"


def test_layers_count_from_0_if_the_model_is_known(folder: Path) -> None:
    assert open_run(layers=[-1, 2]).layers == (6, 2)
    Path("own.pt").touch()
    assert open_run(layers=[-1, 2], model="own.pt").layers == (-1, 2)


def test_each_output_is_exported_under_its_name() -> None:
    run = open_run(layers=[2, -1], pooling=["mean", "cls"], per_residue=True, exports=["pt", "h5_residues", "faiss"])
    vectors = ["embeddings", "embeddings_2_cls", "embeddings_6_mean", "embeddings_6_cls"]
    assert names(run.exports) == [
        *(f"{name}_pt" for name in vectors),
        *("residues.h5", "residues_6.h5"),
        *(f"{name}.faiss" for name in vectors),
    ]
    options = [export_options(name) for name in (*vectors[:2], "embeddings_-1_mean_tokens", "residues_6")]
    assert options == ["", "--layer 2 --pooling cls", "--layer -1 --pooling mean_tokens", "--layer 6"]


def test_a_tokenizer_is_an_input_only_if_it_comes_with_the_weights() -> None:
    assert open_run().tokenizer == []
    assert open_run(**CONTIGS).tokenizer == []
    assert names(open_run(**{**CONTIGS, "model": "dnabert_s"}).tokenizer) == ["tokenizer.json"]


def test_memory_grows_with_the_data_that_a_worker_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = "esm2_t33_650M_UR50D"
    plain = open_run(model=model)
    assert BASE_MB < plain.shard_memory(1, 1) < plain.shard_memory(8, 1) < plain.shard_memory(8, 2)
    assert plain.shard_memory(1, 1) < open_run(model=model, long_sequences="full").shard_memory(1, 1)
    windows = open_run(model=model, window=500)
    assert plain.shard_memory(1, 1) < windows.shard_memory(1, 1)
    assert windows.shard_memory(1, 1) < open_run(model=model, window=500, layers=[1, 2]).shard_memory(1, 1)
    residues = open_run(model=model, per_residue=True).shard_memory(1, 1)
    assert plain.shard_memory(1, 1) < residues
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    on_gpu = open_run(model=model)
    assert on_gpu.shard_memory(1, 1) == on_gpu.shard_memory(8, 1) < plain.shard_memory(1, 1)
    # Packs with the vectors of all residues are queued between the GPU and the disk.
    assert residues < open_run(model=model, per_residue=True).shard_memory(1, 1)
    contigs = open_run(**CONTIGS)
    assert contigs.shard_memory(1, 1) == open_run(**CONTIGS, window=10_000).shard_memory(1, 1)


def test_time_grows_with_the_tokens_of_a_shard(folder: Path) -> None:
    with Path("p.faa").open("w") as file:
        file.write(">a\n" + "M" * 100_000 + "\n>b\n" + "M" * 4_000_000 + "\n>c\n")
        file.truncate(600_000_000)
    run = open_run()
    assert run.index_minutes > 60
    # Of the 405 bytes of a protein's record, with its line ends, 167 are kept in memory (docs/explanation/scaling.md).
    assert run.index_memory > 8000 + 600 * 167 / 405 > open_run(fasta=str(DEMO)).index_memory
    assert run.shard_minutes(1, 4, 1) > run.shard_minutes(2, 4, 1) > run.shard_minutes(2, 8, 1)
    assert run.shard_minutes(1, 4, 2) == 2 * run.shard_minutes(1, 4, 1)
    twice = open_run(long_sequences="window", max_length=1000, window=1000, stride=500)
    assert twice.index_minutes > run.index_minutes
    assert twice.shard_minutes(1, 4, 1) > run.shard_minutes(1, 4, 1)
    # Once the index is built, its tokens count.
    build_index(DEMO, run.folder.index, MODEL, run.policy)
    assert run.shard_minutes(1, 4, 1) < 20


def test_byte_pair_encoding_uses_up_to_eight_cores() -> None:
    assert [open_run(cores=cores, **CONTIGS).index_threads for cores in (1, 3, 64)] == [1, 3, 8]
    assert open_run(cores=64).index_threads == 1
