"""Each program that writes results, in one folder: its inputs, its outputs, and the right result."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from system_calls import Ended, Fault, Server

from seqmill.export.formats import BESIDE, FORMATS

INDEX, RESULTS = "index.h5", ("embeddings.h5", "records.tsv.gz", "manifest.json")
SHARDS = ("shard_0-of-2.h5", "shard_1-of-2.h5")
STATUSES = ("shard_0-of-2.status.json", "shard_1-of-2.status.json")
LIGHT, WITH_TORCH = "light", "torch"
MODULES = {
    LIGHT: (
        *(
            "seqmill.index.build",
            "seqmill.merge.merge",
            "seqmill.report.page",
            "seqmill.export.export",
            "seqmill.merge.verify",
        ),
        *("faiss", "numpy.random", "pandas", "pyarrow.parquet"),
    ),
    WITH_TORCH: ("seqmill.embedding.rank", "seqmill.embedding.worker", "seqmill.export.export"),
}
UNFINISHED = (".tmp", ".lock")
# JSON fields that differ from run to run.
TIMES = {"created", "seconds"}
OF_STATUS = ("rank", "status", "num_sequences", "done_packs", "fingerprint", "shard_sha256")

Snapshot = dict[str, str]


@dataclass(frozen=True)
class Program:
    """A program as a workflow runs it.

    Attributes:
        script: its file in scripts/.
        inputs: names of the files in the folder that it reads.
        outputs: names of the files that it writes. If the first exists, the others exist and belong to it.
        arguments: returns a run's arguments, given the folder.
        server: which of `MODULES` it needs.
        over: whether it may replace an earlier result.
    """

    script: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: Callable[[Path], list[object]]
    server: str = LIGHT
    over: bool = True


def export(name: str) -> Program:
    outputs = (f"some.{name}", *([f"some.{name}{BESIDE[name]}"] if name in BESIDE else []))

    def arguments(folder: Path) -> list[object]:
        records = ("--records", folder / RESULTS[1]) if name == "pt" else ()
        return ["--embeddings", folder / RESULTS[0], "--format", name, "--output", folder / outputs[0], *records]

    server = WITH_TORCH if name == "pt" else LIGHT
    return Program("export.py", RESULTS, outputs, arguments, server, over=name != "pt")


def embed(rank: int) -> Program:
    def arguments(folder: Path) -> list[object]:
        return [
            *("--index", folder / INDEX, "--rank", rank, "--world-size", 2, "--output", folder / SHARDS[rank]),
            *("--status", folder / STATUSES[rank], "--device", "cpu", "--precision", "float32", "--save-seconds", 0),
            *("--audit-seconds", 0, "--per-residue", "float16"),
        ]

    return Program("embed_shard.py", (INDEX,), (SHARDS[rank], STATUSES[rank]), arguments, WITH_TORCH)


def merge_arguments(folder: Path) -> list[object]:
    shards = [folder / name for name in SHARDS]
    return ["--index", folder / INDEX, "--shards", *shards, "--output", folder / RESULTS[0]]


def report_arguments(folder: Path) -> list[object]:
    return ["--embeddings", folder / RESULTS[0], "--output", folder / "report.html"]


def programs(fasta: Path, model: Path) -> dict[str, Program]:
    """Return all programs by name, in the order that a workflow runs them."""

    def index_arguments(folder: Path) -> list[object]:
        return ["--fasta", fasta, "--model", model, "--output", folder / INDEX]

    return {
        "index": Program("build_index.py", (), (INDEX,), index_arguments),
        "embed": embed(0),
        "embed the other": embed(1),
        "merge": Program("merge_shards.py", (INDEX, *SHARDS, *STATUSES), RESULTS, merge_arguments),
        "report": Program("report.py", (INDEX, *RESULTS), ("report.html",), report_arguments),
        **{f"export {name}": export(name) for name in FORMATS},
    }


class Laboratory:
    """The folder in which programs run, and the files to fill it with. It never changes, because results contain paths.

    Args:
        folder: holds that folder and the stored files.
        fasta, model: what is embedded.
        library: fault_at.so.
    """

    def __init__(self, folder: Path, fasta: Path, model: Path, library: Path) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        self.programs = programs(fasta, model)
        self._stores = folder
        self._servers = cache(lambda kind: Server(library, self.folder, folder / f"{kind}.log", MODULES[kind]))
        self._server_kinds: set[str] = set()
        # The earlier results come from the same FASTA with other settings, so that each file differs.
        self._make_all("earlier", "--long-sequences", "truncate", "--max-length", 30)
        self._make_all("right")
        self._keep_parts()

    def run(self, program: Program, fault: Fault | None = None, *more: object) -> Ended:
        self._server_kinds.add(program.server)
        server = self._servers(program.server)
        arguments = [*program.arguments(self.folder), *more]
        return server.run(program.script, arguments, *([fault] if fault else []))

    def close(self) -> None:
        for kind in self._server_kinds:
            self._servers(kind).close()

    def fill(self, program: Program, over: bool) -> Snapshot:
        """Empty the folder and copy a run's inputs into it; with `over`, also an earlier result.

        For the worker and the merge, an earlier result includes the parts that an earlier attempt saved.
        """
        self._empty()
        for name in program.inputs:
            shutil.copy(self._stores / "right" / name, self.folder)
        if over:
            for name in program.outputs:
                shutil.copy(self._stores / "earlier" / name, self.folder)
            if SHARDS[0] in (*program.inputs, *program.outputs):
                shutil.copytree(self._stores / "parts", self.folder / "parts")
        return snapshot(self.folder)

    def _make_all(self, store: str, *index_options: object) -> None:
        self._empty()
        for name, program in self.programs.items():
            ended = self.run(program, None, *(index_options if name == "index" else ()))
            assert ended.code == 0, ended.log
        shutil.copytree(self.folder, self._stores / store)

    def _keep_parts(self) -> None:
        """Keep the parts of a worker that was killed before its shard got its name."""
        program, number = self.programs["embed"], 0
        while True:
            number += 1
            self.fill(program, False)
            ended = self.run(program, Fault("rename", number, "die"))
            assert ended.code, "the worker has come to its end without a shard"
            if ended.path == str(self.folder / SHARDS[0]):
                break
        shutil.copytree(self.folder / "parts", self._stores / "parts")

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def snapshot(folder: Path) -> Snapshot:
    """Map each relative path below a folder to the content that is the same in every run."""
    return {str(path.relative_to(folder)): content_of(path) for path in sorted(folder.rglob("*"))}


def content_of(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    data = path.read_bytes()
    try:
        if path.name == RESULTS[2]:
            return json.dumps({name: value for name, value in json.loads(data).items() if name not in TIMES})
        if path.suffix == ".json":
            status = json.loads(data)
            whole = status["status"] == "complete"
            return json.dumps({name: status[name] for name in OF_STATUS}) if whole else status["status"]
    except (ValueError, KeyError):
        return f"a broken {path.name}"
    return hashlib.sha256(data).hexdigest()
