"""What the programs import: that is most of the time that a small input takes (docs/explanation/performance.md)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, SCRIPTS, Run

LARGE = {"esm", "huggingface_hub", "pandas", "sympy", "torch", "torch._dynamo", "transformers"}
# Runs a program of the command line and prints which large packages were imported by its end.
PROGRAM = f"""
import atexit, json, sys
from seqmill.cli.main import main
found = {{}}
note = lambda when: found.setdefault(when, sorted({LARGE} & sys.modules.keys()))
atexit.register(lambda: (note("end"), print(json.dumps(found))))
"""
# Also notes them at the first pack.
WATCHED = """
from seqmill.embedding.embedder import PackEmbedder
embed = PackEmbedder.__call__
PackEmbedder.__call__ = lambda *arguments: (note("first pack"), embed(*arguments))[1]
"""


def imported(*arguments: object, watch: str = "") -> dict[str, list[str]]:
    command = [sys.executable, "-c", f"{PROGRAM}{watch}\nmain()", *map(str, arguments)]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--help",), {"main"}),
        (("--version",), {"main"}),
        (("docter",), {"main"}),
        (("plan", "--help"), {"main", "plan", "program"}),
        (("fetch", "--help"), {"main", "fetch", "program"}),
        (("completion", "--help"), {"main", "completion", "program"}),
    ],
)
def test_only_the_named_subcommand_is_imported(arguments: tuple[str, ...], expected: set[str]) -> None:
    program = """
import atexit, sys
from seqmill.cli.main import main
names = lambda: sorted(name.removeprefix("seqmill.cli.") for name in sys.modules if name.startswith("seqmill.cli."))
atexit.register(lambda: print("imported", *names()))
main()
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=SCRIPTS, capture_output=True, text=True)
    assert set(done.stdout.splitlines()[-1].split()) == {"imported", *expected}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"), 1)
    (run.folder / "proteins.faa").write_text(">a\nMKTAYIAKQR\n>b\nMKV\n>c\nMSHHWGYGK\n")
    return run.build(run.folder / "proteins.faa").embed().merge()


def test_a_worker_imports_fair_esm_only_for_the_audit_and_never_torch_s_compiler(run: Run, tmp_path: Path) -> None:
    shard, status = tmp_path / "shard.h5", tmp_path / "status.json"
    options = ("--index", run.index, "--rank", 0, "--world-size", 1, "--device", "cpu")
    found = imported("shard", *options, "--output", shard, "--status", status, watch=WATCHED)
    assert found == {"first pack": ["torch"], "end": ["esm", "torch"]}
    audit = json.loads(status.read_text())["audit"]
    assert (audit["sequences"], audit["verdict"], audit["reference"][:8]) == (3, "ok", "fair-esm")


def test_the_programs_around_the_worker_do_not_import_torch(run: Run, tmp_path: Path) -> None:
    build = ("index", "--fasta", run.folder / "proteins.faa", "--model", MODEL, "--output", tmp_path / "index.h5")
    assert imported(*build) == {"end": []}
    merge = ("merge", "--index", run.index, "--shards", *run.shards, "--statuses", *run.statuses)
    assert imported(*merge, "--output", tmp_path / "embeddings.h5") == {"end": []}
    report = ("report", "--embeddings", run.embeddings, "--output", tmp_path / "report.html")
    assert imported(*report) == {"end": ["pandas"]}


# Reads results and asks every program for help while no package of an extra can be imported.
READER = """
import sys
from pathlib import Path
from seqmill.base.extras import EXTRA_OF
sys.modules.update(dict.fromkeys(EXTRA_OF))
import seqmill
from seqmill.cli.main import COMMANDS, main
path, folder = sys.argv[1:]
embeddings = seqmill.open_embeddings(path)
assert embeddings.to_pandas().shape == (3, 320)
assert len(seqmill.search(embeddings[0], embeddings, k=2)) == 2
assert len(embeddings.nearest(0, k=2)) == 2
help(seqmill)
for missing in (lambda: seqmill.load("esm2_t6_8M_UR50D"), embeddings.to_torch, embeddings.to_anndata):
    try:
        missing()
    except seqmill.SeqmillError as error:
        print("ERROR", error, file=sys.stderr)
def run(*arguments):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
for name in COMMANDS:
    assert run(name, "--help") == 0
assert run("report", "--embeddings", path, "--output", f"{folder}/report.html") == 0
assert run("export", "--embeddings", path, "--output", f"{folder}/e.npy", "--format", "npy") == 0
assert run("export", "--embeddings", path, "--output", f"{folder}/e", "--format", "parquet") == 1
assert run("export", "--embeddings", path, "--output", f"{folder}/e", "--format", "pt") == 1
"""


def test_results_are_read_without_any_extra(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER, str(run.embeddings), str(tmp_path)]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.npy.ids.txt", "report.html"]
    errors = [line.partition("ERROR ")[2] for line in done.stderr.splitlines() if "ERROR" in line]
    assert re.search(
        r"load\(\s*model: str \| pathlib\S*\.Path", done.stdout
    )  # 3.13: pathlib._local.Path, on a new line
    assert errors == [
        "this needs torch: pip install 'seqmill[embed]'",
        "this needs torch: pip install 'seqmill[embed]'",
        "this needs anndata: pip install 'seqmill[export]'",
        "this needs pyarrow: pip install 'seqmill[export]'",
        "this needs torch: pip install 'seqmill[embed]'",
    ]


def test_import_seqmill_imports_only_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import seqmill; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in done.stdout.split()}
    assert found - set(sys.stdlib_module_names) == {"seqmill"}
