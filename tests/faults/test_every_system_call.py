"""A system call fails, or the process is killed at it: each call, in each program that writes results.

The default is a sample; `--all-faults` tests them all, which takes most of an hour.
"""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from laboratory import RESULTS, SHARDS, STATUSES, UNFINISHED, Laboratory, Program, Snapshot, snapshot
from system_calls import CALLS, DISTURBANCES, Ended, Fault, compile_library, compiler

from pipeline import SCRIPTS
from reference import fair_esm_model, save_checkpoint
from seqmill.export.formats import FORMATS
from seqmill.spec.architectures import Esm2Architecture
from sequences import random_sequences

SAMPLE = 18  # faults per test
NAMES = ("index", "embed", "merge", "report", *(f"export {name}" for name in FORMATS))


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory):
    if compiler() is None:
        pytest.skip("no C compiler: install one (cc, or name it in CC) for the library that disturbs system calls")
    folder = tmp_path_factory.mktemp("laboratory").resolve()
    sequences = random_sequences(random.Random(6).choices(range(5, 90), k=70))  # 4 packs
    sequences[5] = sequences[2]
    fasta = folder / "some.fa"
    fasta.write_text("".join(f">id{n} record {n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    model = save_checkpoint(fair_esm_model(Esm2Architecture(2, 32, 4)), folder / "tiny.pt")
    laboratory = Laboratory(folder, fasta, model, compile_library(folder))
    yield laboratory
    laboratory.close()


def chosen(counts: dict[str, int], seed: str, everything: bool) -> list[Fault]:
    """Return all faults that a program can meet, or, without `everything`, a sample with each kind of call."""
    generator, faults = random.Random(seed), []
    total = sum(counts[call] * len(DISTURBANCES[call]) for call in CALLS)
    for call in CALLS:
        of_call = [Fault(call, n + 1, *what) for n in range(counts[call]) for what in DISTURBANCES[call]]
        wanted = min(max(SAMPLE * len(of_call) // total, 2), len(of_call))
        faults += of_call if everything else generator.sample(of_call, wanted)
    return faults


@pytest.mark.parametrize("over", [False, True], ids=["fresh", "over an earlier result"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_at_a_system_call(
    name: str, over: bool, laboratory: Laboratory, request: pytest.FixtureRequest
) -> None:
    """The result is right, or one line names the error and nothing is half-written; then the next run is right."""
    program = laboratory.programs[name]
    if over and not program.over:
        pytest.skip("it replaces nothing")
    before = laboratory.fill(program, over)
    undisturbed = laboratory.run(program)
    assert undisturbed.code == 0, undisturbed.log
    right = snapshot(laboratory.folder)
    tried, wrong = Counter[str](), []
    faults = chosen(undisturbed.counts, f"{name} {over}", request.config.getoption("all_faults"))
    for fault in faults:
        laboratory.fill(program, over)
        ended = laboratory.run(program, fault)
        trouble = judged(laboratory, program, before, right, fault, ended)
        refused = not program.over and (laboratory.folder / program.outputs[0]).exists()  # it exists, and is right
        if not trouble and ended.code and not refused:
            again = laboratory.run(program)
            trouble = "" if (again.code, snapshot(laboratory.folder)) == (0, right) else f"the next run: {again.log}"
        tried[fault.call] += bool(ended.path)
        if trouble:
            wrong.append(f"{fault}, {ended.path}: {trouble}")
    print(f"{tried.total()} faults:", *(f"{call} {number}" for call, number in tried.items()))
    assert tried.total() > len(faults) / 2  # a slow worker may write one more status JSON
    assert not wrong, "\n\n".join([f"{len(wrong)} of {tried.total()}", *wrong])


ONCE_WRONG = [
    ("export parquet", "close", ".some.parquet."),
    ("embed", "truncate", ".lock"),
    ("embed", "write", ".lock"),
]


@pytest.mark.parametrize(("name", "call", "file"), ONCE_WRONG)
def test_a_fault_that_was_not_reported_or_left_a_file(name: str, call: str, file: str, laboratory: Laboratory) -> None:
    """Not left to the sample: Arrow's error at close once named no file, and a failed write of a lock left the lock."""
    program = laboratory.programs[name]
    before = laboratory.fill(program, over=False)
    counts, right = laboratory.run(program).counts, snapshot(laboratory.folder)
    for number in range(1, counts[call] + 1):
        fault = Fault(call, number, "fail", errno.EIO)
        laboratory.fill(program, over=False)
        ended = laboratory.run(program, fault)
        if file in ended.path:
            break
    assert file in ended.path
    assert judged(laboratory, program, before, right, fault, ended) == ""
    assert told(ended.log, laboratory.folder)


WRITES_IN_PLACE = """
import sys
with open(sys.argv[1], "w", buffering=1) as file:
    file.writelines(f"line {n}\\n" for n in range(3))
sys.exit()
"""


def test_a_program_that_writes_in_place_is_caught(laboratory: Laboratory, tmp_path: Path) -> None:
    """The tests above can fail: they notice a half-written file, a traceback, and an ignored error."""
    script = tmp_path / "writes_in_place.py"
    script.write_text(WRITES_IN_PLACE)
    program = Program(str(script), (), ("report.html",), lambda folder: [folder / "report.html"])
    before = laboratory.fill(program, over=True)
    assert laboratory.run(program).code == 0
    right = snapshot(laboratory.folder)

    def trouble(fault: Fault) -> str:
        laboratory.fill(program, over=True)
        return judged(laboratory, program, before, right, fault, laboratory.run(program, fault))

    assert trouble(Fault("write", 2, "die")).startswith("neither the old nor the right one")
    assert trouble(Fault("write", 2, "die_after")).startswith("neither the old nor the right one")
    assert "not told" in trouble(Fault("write", 3, "fail", errno.EIO))
    assert trouble(Fault("write", 4, "die")) == ""  # there is no fourth write


CHANGING = {
    "open": ("open", "openat", "openat2", "creat"),
    "write": ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range"),
    "fsync": ("fsync", "fdatasync"),
    "rename": ("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    "unlink": ("unlink", "unlinkat", "rmdir"),
    "truncate": ("truncate", "ftruncate"),
    "allocate": ("fallocate",),
    "mkdir": ("mkdir", "mkdirat"),
}
KIND_OF = {name: call for call, names in CHANGING.items() for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_the_library_sees_every_system_call(name: str, laboratory: Laboratory, tmp_path: Path) -> None:
    """It counts what strace counts, except close: libc itself closes the folders that it lists."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    program, trace = laboratory.programs[name], tmp_path / "trace"
    command = ["strace", "-f", "-y", "-o", trace, "-e", f"trace={','.join(KIND_OF)}", sys.executable]
    laboratory.fill(program, program.over)
    arguments = [*command, SCRIPTS / program.script, *program.arguments(laboratory.folder)]
    traced = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    if "ptrace" in traced.stderr:
        pytest.skip(f"strace may not trace here: {traced.stderr}")
    assert traced.returncode == 0, traced.stderr
    laboratory.fill(program, program.over)
    counts = laboratory.run(program).counts
    assert traced_calls(trace, laboratory.folder) == {call: counts[call] for call in CHANGING if counts[call]}


def traced_calls(trace: Path, folder: Path) -> dict[str, int]:
    """Count the calls on files of a folder in strace's output: PID NAME(DESCRIPTOR<PATH>, "PATH" ..."""
    counts = Counter[str]()
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(r'\d+ +(\w+)\((?:(?:\d+|AT_FDCWD)<([^>]*)>)?(?:, )?(?:"([^"]*)")?(.*)', line)
        if not call or "O_DIRECTORY" in call[4]:  # libc lists a folder
            continue
        named = call[3] if KIND_OF[call[1]] in ("open", "rename", "unlink", "mkdir") else ""
        path = os.path.join(call[2] or "", named or "")  # noqa: PTH118
        counts[KIND_OF[call[1]]] += Path(path).is_relative_to(folder)
    return {call: number for call, number in counts.items() if number}


def judged(
    laboratory: Laboratory, program: Program, before: Snapshot, right: Snapshot, fault: Fault, ended: Ended
) -> str:
    """Return what is wrong with a run that met a fault; empty if nothing is wrong."""
    after = snapshot(laboratory.folder)
    if ended.code == 0:
        if fault.kills and ended.path:
            return "it was not killed"
        at_parts = "/parts/" in f"{ended.path}/"
        if fault.call == "unlink" or at_parts:  # a file that can't be removed, or read before removal, may stay
            after = {name: content for name, content in after.items() if name in right}
        if at_parts:  # a complete shard may lack its second name in parts/
            after, right = (
                {name: content for name, content in tree.items() if not name.startswith("parts/")}
                for tree in (after, right)
            )
        return "" if after == right else f"exit 0, but {difference(after, right)}: {ended.log}"
    if not ended.path:
        return f"without a fault: {ended.log}"
    if fault.kills:
        if ended.code != -9:
            return f"exit {ended.code}: {ended.log}"
    elif ended.code != 1 or not told(ended.log, laboratory.folder):
        return f"exit {ended.code}, not told in one line: {ended.log}"
    if not says_so(program, after, fault, Path(ended.path), laboratory.folder):
        return f"the status JSON says {after[STATUSES[0]]}"
    half = [name for name in after if not may_stay(name, program, before, fault)]
    changed = [name for name in program.inputs if after.get(name) != before[name]]
    if half or changed:
        return f"left: {half}, inputs changed: {changed}: {ended.log}"
    return of_two_results(program, before, right, after)


def told(log: str, folder: Path) -> bool:
    """Whether the last message is an error that names a file, and there is no traceback."""
    _, error, message = log.rpartition(" ERROR ")
    odd = ("Traceback", "PosixPath", "Exception ignored", "HDF5-DIAG")
    return bool(error) and str(folder) in message and not any(word in log for word in odd)


def says_so(program: Program, after: Snapshot, fault: Fault, path: Path, folder: Path) -> bool:
    """Whether a failed worker's status JSON says so, unless the fault was at the status JSON itself."""
    if STATUSES[0] not in program.outputs or fault.action != "fail":
        return True
    excused = path == folder or ".status.json" in path.name or ".lock" in path.name  # the lock is closed last
    return excused or after[STATUSES[0]] == "failed"


def may_stay(name: str, program: Program, before: Snapshot, fault: Fault) -> bool:
    """Whether a failed or killed run may leave this file or folder."""
    top = name.partition("/")[0]  # an export may be a folder
    if name in before or top in program.outputs:
        return True
    if program.outputs[0] == SHARDS[0] and (name == "parts" or name.endswith(".part.h5")):
        return True
    if name in (f"parts/{SHARDS[0]}", f"parts/{STATUSES[0]}"):  # a complete shard's second names
        return True
    path = name if top == "parts" else top
    return (fault.kills or fault.call == "unlink") and Path(path).name[0] == "." and path.endswith(UNFINISHED)


def of_two_results(program: Program, before: Snapshot, right: Snapshot, after: Snapshot) -> str:
    """Return what is wrong with the output files: each must be old, right, or absent, and all of one result."""
    results = {}
    for name in program.outputs:
        files = [path for path in (*after, *before, *right) if path == name or path.startswith(f"{name}/")]
        if any(path in after for path in files):
            olds, news, nows = ([tree.get(path) for path in files] for tree in (before, right, after))
            results[name] = {which for which, content in (("old", olds), ("right", news)) if nows == content}
    if after.get(STATUSES[0]) in ("running", "failed"):
        results[STATUSES[0]] = {"old", "right"}  # it does not claim a complete shard
    if broken := [name for name, which in results.items() if not which]:
        return f"neither the old nor the right one: {broken}"
    if program.outputs[0] not in results:
        return ""
    if program.outputs == RESULTS and len(results) < len(RESULTS):
        return f"only {list(results)}"
    return "" if set.intersection(*results.values()) else f"of two results: {results}"


def difference(found: Snapshot, right: Snapshot) -> str:
    return ", ".join(sorted(name for name in {**found, **right} if found.get(name) != right.get(name)))
