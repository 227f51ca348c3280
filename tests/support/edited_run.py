"""A small run whose input, settings and results are edited at random between repetitions."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from pipeline import Run
from reference import fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.base.input_files import KnownDigests
from seqmill.embedding.worker import embed_shard
from seqmill.index.build import build_index
from seqmill.merge.merge import merge_shards
from seqmill.run.stale import Request, find_fasta_edit, stale_results, started_world_size, status_path_of
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs
from seqmill.spec.task import ComputeSettings, ShardTask

FASTAS = (">a\nMKV\n>b\nMKLLV\n>c\nMKV\n", ">a\nMKV\n>b\nMKLLA\n>c\nMKW\n", ">x\nMKV\n>y z\nMKYYYYV\n>b\nMK\n")
DAY = 86400


@dataclass(frozen=True)
class Settings:
    """User settings; the defaults are those of the workflow, except precision and audit."""

    precision: str = "float32"
    pooling: str = "mean"
    layers: int = -1
    max_length: int = 1022
    dtype: str = "float32"
    shards: int | str = 1

    @property
    def outputs(self) -> Outputs:
        return Outputs((self.layers,), (self.pooling,))


@cache
def checkpoint(seed: int, folder: Path) -> bytes:
    """Return a small ESM-2 checkpoint; seeds change only the values, so all files have the same size."""
    path = folder / f"seed{seed}"
    save_checkpoint(fair_esm_model(Esm2Architecture(2, 32, 4), seed), path)
    return path.read_bytes()


@dataclass
class EditedRun:
    """A folder with a FASTA, a checkpoint and results.

    Attributes:
        folder: the working directory.
        random: chooses the edits.
        settings: the requested settings.
        edits: names of the edits so far, for messages.
    """

    folder: Path
    random: random.Random
    settings: Settings = field(default_factory=Settings)
    fasta: str = "a.fa"
    edits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.write("a.fa", FASTAS[0].encode(), 3)
        self.write("model.pt", checkpoint(0, self.folder), 3)

    @property
    def results(self) -> Path:
        return Path("results", Path(self.fasta).stem, "model")

    @property
    def outputs(self) -> list[Path]:
        return [self.results / name for name in ("embeddings.h5", "records.tsv.gz", "manifest.json")]

    def write(self, name: str, content: bytes, days_ago: float) -> None:
        """Replace a file by a rename, as mv, rsync and tar do, with a modification time in the past."""
        path = self.folder / name
        new = path.with_name("new")
        new.write_bytes(content)
        time = self.folder.stat().st_mtime - days_ago * DAY
        os.utime(new, (time, time))
        new.replace(path)

    def edit(self) -> None:
        name, edit = self.random.choice(list(EDITS.items()))
        self.edits.append(name)
        edit(self)

    def expected(self) -> "Expected":
        """Return the result of a fresh run."""
        folder = self.folder / "fresh"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run = Run(folder, 1).build(
            self.folder / self.fasta, "model.pt", LengthPolicy(max_length=self.settings.max_length)
        )
        run.embed(self.settings.precision, outputs=self.settings.outputs).merge(self.settings.dtype)
        return Expected.of(folder / "embeddings.h5")

    def run(self, until: str = "") -> list[str]:
        """Make missing or stale files, as the workflow does; return the programs that ran.

        Args:
            until: stop after this program, like a killed run.
        """
        fasta, model, digests = Path(self.fasta), find_model("model.pt"), KnownDigests(Path("digests.json"))
        policy, outputs = LengthPolicy(max_length=self.settings.max_length), self.settings.outputs
        edited = find_fasta_edit(self.results, fasta, digests)
        world_size = self.settings.shards
        if world_size == "auto":
            world_size = (0 if edited else started_world_size(self.results)) or 1
        index = self.results / "index.h5"
        shards = [self.results / f"shards/shard_{rank}-of-{world_size}.h5" for rank in range(world_size)]
        request = Request(fasta, model, policy, outputs, self.settings.precision, dtype=self.settings.dtype)
        stale = stale_results(self.results, request, shards, digests)
        digests.save()
        ran = []

        def make(outputs: list[Path], needed: bool, name: str, program: Callable[[], object]) -> bool:
            missing = any(not path.exists() for path in outputs)
            if until in ran or not (missing or needed or not stale.keys().isdisjoint(outputs)):
                return False
            for path in outputs:
                path.unlink(missing_ok=True)
            program()
            ran.append(name)
            return True

        merge = not all(path.exists() for path in self.outputs) or self.outputs[0] in stale
        shards_needed = any(not shard.exists() or shard in stale for shard in shards)
        # Without an index nobody knows whether the shards match it, so Snakemake makes them again after the index.
        new_index = False
        if index.exists() or merge or shards_needed:
            new_index = make([index], False, "index", lambda: build_index(fasta, index, "model.pt", policy))
        for rank, shard in enumerate(shards):
            compute = ComputeSettings("cpu", self.settings.precision, outputs=outputs)
            task = ShardTask(index, rank, world_size, shard, status_path_of(shard), compute, "model.pt")
            task = replace(task, audit_seconds=0, save_seconds=0)
            merge |= not shard.exists()
            make([shard], new_index, "embed", lambda task=task: embed_shard(task))
        make(
            self.outputs,
            merge,
            "merge",
            lambda: merge_shards(
                index, shards, list(map(status_path_of, shards)), *self.outputs, self.settings.dtype, fasta
            ),
        )
        return ran

    def found(self) -> "Expected":
        return Expected.of(self.results / "embeddings.h5")


@dataclass(frozen=True)
class Expected:
    """Ids, and the bits, shape and dtype of the vectors."""

    ids: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bits: bytes

    @classmethod
    def of(cls, path: Path) -> "Expected":
        embeddings = open_embeddings(path)
        values = np.array(embeddings.array)
        return cls(tuple(embeddings.ids), values.shape, str(values.dtype), values.tobytes())


def _set(name: str, *values: object) -> Callable[[EditedRun], None]:
    def edit(run: EditedRun) -> None:
        others = [value for value in values if value != asdict(run.settings)[name]]
        run.settings = replace(run.settings, **{name: run.random.choice(others)})

    return edit


def _replace_fasta(days_ago: float) -> Callable[[EditedRun], None]:
    return lambda run: run.write(run.fasta, run.random.choice(FASTAS).encode(), days_ago * run.random.random())


def _replace_weights(days_ago: float) -> Callable[[EditedRun], None]:
    def edit(run: EditedRun) -> None:
        run.write("model.pt", checkpoint(run.random.randrange(3), run.folder), days_ago * run.random.random())

    return edit


def _overwrite_fasta(run: EditedRun) -> None:
    """Overwrite the file in place and restore its time, as cp -p from another file of that time would."""
    path = run.folder / run.fasta
    before = path.stat()
    path.write_text(run.random.choice(FASTAS))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _append(run: EditedRun) -> None:
    with (run.folder / run.fasta).open("a") as file:
        file.write(">new\nMKAV\n")


def _rename(run: EditedRun) -> None:
    """Move the FASTA to another folder; its name and so the dataset's name stay the same."""
    new = "sub/a.fa" if run.fasta == "a.fa" else "a.fa"
    (run.folder / "sub").mkdir(exist_ok=True)
    (run.folder / run.fasta).rename(run.folder / new)
    run.fasta = new


def _link(run: EditedRun) -> None:
    """Make the FASTA a link to a file with other content."""
    run.write("target.fa", run.random.choice(FASTAS).encode(), 5 * run.random.random())
    (run.folder / run.fasta).unlink()
    (run.folder / run.fasta).symlink_to((run.folder / "target.fa").absolute())


def _touch(run: EditedRun) -> None:
    os.utime(run.folder / run.fasta)
    os.utime(run.folder / "model.pt")


def _delete(run: EditedRun) -> None:
    files = sorted(path for path in run.folder.glob("results/**/*") if path.is_file())
    if files:
        run.random.choice(files).unlink()


def _forget(run: EditedRun) -> None:
    shutil.rmtree(run.folder / ".snakemake", ignore_errors=True)
    (run.folder / "digests.json").unlink(missing_ok=True)


def _copy_results(run: EditedRun) -> None:
    """Replace the results by a copy of them: all times are new, in any order."""
    if (run.folder / "results").exists():
        shutil.copytree(run.folder / "results", run.folder / "copy", copy_function=shutil.copyfile)
        shutil.rmtree(run.folder / "results")
        (run.folder / "copy").rename(run.folder / "results")


EDITS: dict[str, Callable[[EditedRun], None]] = {
    "FASTA replaced, older": _replace_fasta(30),
    "FASTA replaced, newer": _replace_fasta(0.5),
    "FASTA overwritten, same time": _overwrite_fasta,
    "FASTA grown": _append,
    "FASTA moved": _rename,
    "FASTA linked": _link,
    "weights replaced, older": _replace_weights(30),
    "weights replaced, newer": _replace_weights(0.5),
    "input touched": _touch,
    "precision": _set("precision", "float32", "bfloat16"),
    "pooling": _set("pooling", "mean", "max"),
    "layers": _set("layers", -1, 0, 1, 2),
    "max_length": _set("max_length", 1022, 4),
    "dtype": _set("dtype", "float32", "float16"),
    "shards": _set("shards", 1, 2, 3, "auto"),
    "records of runs deleted": _forget,
    "an output deleted": _delete,
    "results copied": _copy_results,
}
