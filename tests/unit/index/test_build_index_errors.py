"""build_index with bad input or bad paths: one clear error line, an exit code, nothing left behind."""

import bz2
import gzip
import io
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from dnabert_reference import save_folder, seeded_state
from seqmill.errors import SeqmillError
from seqmill.index import build
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.lengths import LengthPolicy
from seqmill.store.index import open_index

PROGRAM = Path(__file__).parents[3] / "scripts" / "build_index.py"
MODEL = "untrained:esm2_t6_8M_UR50D"

NARROW = DnabertArchitecture(num_layers=1, hidden_dim=16, num_heads=1, vocabulary=64)

GOOD = b">first one\nMKVLA\n>second two\nACDEF\n>third three\nWWWWW\n"


def zipped(text: bytes) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("proteins.fasta", text)
    return stored.getvalue()


def random_fasta(num_records: int, length: int) -> bytes:
    letters = (b"ACDEFGHIKLMNPQRSTVWY" * 13)[:256]
    generator = random.Random(5)
    return b"".join(
        b">r%d\n%s\n" % (number, generator.randbytes(length).translate(letters)) for number in range(num_records)
    )


def with_flipped_byte(stored: bytes, position: int) -> bytes:
    return stored[:position] + bytes([stored[position] ^ 0xFF]) + stored[position + 1 :]


TEXT = random_fasta(50, 200)
GZIP = gzip.compress(TEXT)
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
ZSTD_WITHOUT_CHECKSUM = zstandard.ZstdCompressor(write_checksum=False).compress(TEXT)


@dataclass
class Bad:
    """An unusable file, and texts that the error line must have in addition to the file's name."""

    stored: bytes
    told: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


BAD_FILES = {
    "empty": Bad(b"", ("empty",)),
    "blank lines": Bad(b"\n\r\n  \n\t\n", ("empty",)),
    "empty gzip": Bad(gzip.compress(b""), ("empty",)),
    "prose": Bad(b"Dear all,\nhere are the proteins.\n", ("not a FASTA file", "Dear all,")),
    "web page": Bad(b"<!DOCTYPE html>\n<html>\n>a\nMK\n", ("not a FASTA file", "<!DOCTYPE html>")),
    "sequence without header": Bad(b"MKVLA\n>b\nMK\n", ("not a FASTA file", "MKVLA")),
    "FASTQ": Bad(b"@read1\nACGT\n+\nIIII\n", ("not a FASTA file", "FASTQ")),
    "FASTQ, gzip": Bad(gzip.compress(b"@read1\nACGT\n+\nIIII\n"), ("not a FASTA file", "FASTQ")),
    "binary": Bad(random.Random(1).randbytes(5000), ("binary",)),
    "UTF-16": Bad(GOOD.decode().encode("utf-16"), ("binary",)),
    "binary after a header": Bad(b">a\n" + bytes(range(128, 256)), ("record 1 ('a')", "0x80", "residue 1")),
    "NUL in a header": Bad(b">a\nMK\n>b\0c\nMK\n", ("record 2", "NUL")),
    "NUL in a sequence": Bad(b">a\nMK\n>b\nM\0K\n", ("record 2 ('b')", "0x00", "residue 2")),
    "no sequence, first": Bad(b">a x\n>b\nMK\n", ("record 1 ('a')", "no sequence")),
    "no sequence, middle": Bad(b">a\nMK\n>b x\n\n \n>c\nMK\n", ("record 2 ('b')", "no sequence")),
    "no sequence, last": Bad(b">a\nMK\n>b", ("record 2 ('b')", "no sequence")),
    "no sequence, only a stop": Bad(b">a\nMK\n>b\n*\n>c\nMK\n", ("record 2 ('b')", "no sequence")),
    "no sequence, only spaces": Bad(b">a\nMK\n>b\n   \t\n", ("record 2 ('b')", "no sequence")),
    "no id and no sequence": Bad(b">a\nMK\n>\n>b\nMK\n", ("record 2 ('')", "no sequence")),
    "gap -": Bad(b">a\nMK\n>b/1-9 x\nMK-\nVL\n", ("record 2 ('b/1-9')", "'-' at residue 3", "alignment")),
    "gap .": Bad(b">a\nMK\n>b\nMKV\n.L\n", ("record 2 ('b')", "'.' at residue 4", "alignment")),
    "digits": Bad(b">a\n1 MKVLA 5\n", ("record 1 ('a')", "'1' at residue 1", "numbers")),
    "other letter": Bad(b">a\nMK\n>b\nmk@vl\n", ("record 2 ('b')", "'@' at residue 3")),
    "letter that is not ASCII": Bad(">a\nMKé\n".encode(), ("record 1 ('a')", "0xc3", "residue 3")),
    "> in a sequence": Bad(b">a\nMK>b\nMK\n", ("record 1 ('a')", "'>' at residue 3")),
    "odd id": Bad(">b'\"\u00e9\u2028\x1b[2J x\nMK1\n".encode(), ("record 1 (", "'1' at residue 3")),
    "lone CR": Bad(b">a\rMKV\r>b\rACD\r", ("record 1", "carriage return", "tr ")),
    "all rejected": Bad(
        GOOD,
        ("all records are rejected", "3 longer than max_length=4"),
        ("--long-sequences", "reject", "--max-length", "4"),
    ),
    "truncated gzip": Bad(GZIP[: len(GZIP) // 2], ("truncated or damaged",)),
    "gzip without its last byte": Bad(GZIP[:-1], ("truncated or damaged",)),
    "damaged gzip": Bad(with_flipped_byte(GZIP, len(GZIP) // 2)),  # inflates to junk letters, or not at all
    "damaged gzip checksum": Bad(with_flipped_byte(GZIP, len(GZIP) - 6), ("truncated or damaged",)),
    "garbage after gzip": Bad(GZIP + b"garbage", ("truncated or damaged",)),
    "zstd cut by 3 bytes": Bad(ZSTD[:-3], ("truncated or damaged",)),
    "zstd without checksum cut by 3 bytes": Bad(ZSTD_WITHOUT_CHECKSUM[:-3], ("truncated or damaged",)),
    "zstd cut in the middle": Bad(ZSTD[: len(ZSTD) // 2], ("truncated or damaged",)),
    "zstd cut after its magic number": Bad(ZSTD[:4], ("truncated or damaged",)),
    "zstd cut in the second frame": Bad(ZSTD + ZSTD[:-3], ("truncated or damaged",)),
    "damaged zstd checksum": Bad(with_flipped_byte(ZSTD, len(ZSTD) - 2), ("truncated or damaged",)),
    "bzip2": Bad(bz2.compress(GOOD), ("bzip2",)),
    "xz": Bad(lzma.compress(GOOD), ("xz",)),
    "zip": Bad(zipped(GOOD), ("zip",)),
    "bad record far into the file": Bad(TEXT * 20 + b">last x\nMK-\n", ("record 1001 ('last')", "'-' at residue 3")),
}


def command(fasta: Path, output: Path, *options: str) -> list[str]:
    arguments = ["--fasta", str(fasta), "--output", str(output), "--model", MODEL, *options]  # the last --model is used
    return [sys.executable, "-B", str(PROGRAM), *arguments]  # -B: no half-written bytecode, however it ends


def run(fasta: Path, output: Path, *options: str, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(
        command(fasta, output, *options), capture_output=True, text=True, preexec_fn=limit, check=False
    )


def the_error(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the single error line of a program that failed as expected."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    assert result.stdout == ""
    return errors[0]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results" / "index.h5"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(GOOD)
    return path


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, fasta: Path, output: Path):
    bad = BAD_FILES[name]
    fasta.write_bytes(bad.stored)
    error = the_error(run(fasta, output, *bad.options))
    assert f"ERROR {fasta}: " in error
    for told in bad.told:
        assert told in error
    assert list(output.parent.iterdir()) == []


def test_the_same_command_accepts_good_files(fasta: Path, output: Path):
    for stored in (GOOD, GZIP, ZSTD, ZSTD_WITHOUT_CHECKSUM):
        fasta.write_bytes(stored)
        result = run(fasta, output)
        assert result.returncode == 0, result.stderr
        assert "ERROR" not in result.stderr
        assert open_index(output).num_records == (3 if stored == GOOD else 50)
    assert [path.name for path in output.parent.iterdir()] == ["index.h5"]


def test_missing_file(tmp_path: Path, output: Path):
    error = the_error(run(tmp_path / "absent.fasta", output))
    assert f"{tmp_path}/absent.fasta: cannot be read: No such file" in error
    assert list(output.parent.iterdir()) == []


def test_a_folder_instead_of_a_file(tmp_path: Path, output: Path):
    error = the_error(run(tmp_path, output))
    assert f"{tmp_path}: cannot be read: Is a directory" in error
    assert list(output.parent.iterdir()) == []


def test_a_file_without_read_permission(fasta: Path, output: Path):
    fasta.chmod(0)
    if os.access(fasta, os.R_OK):
        pytest.skip("this user, being root, may read any file")
    error = the_error(run(fasta, output))
    assert f"{fasta}: cannot be read: Permission denied" in error
    assert list(output.parent.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_file_that_fails_while_it_is_read(output: Path):
    error = the_error(run(Path("/proc/self/mem"), output))
    assert "/proc/self/mem: cannot be read: Input/output error" in error
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--max-length", "0"), "--max-length: 0 is below 1"),
        (("--max-length", "-5"), "--max-length: -5 is below 1"),
        (("--max-length", "1e3"), "--max-length: '1e3' is not an integer"),
        (("--long-sequences", "drop"), "--long-sequences: invalid choice: 'drop'"),
        (("--window", "0"), "--window: 0 is below 1"),
        (("--stride", "none"), "--stride: 'none' is not an integer"),
        (("--strand", "reverse"), "--strand: invalid choice: 'reverse'"),
    ],
)
def test_bad_options(options: tuple[str, ...], told: str, fasta: Path, output: Path):
    assert told in the_error(run(fasta, output, *options), code=2)
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("esm2_t33_650M", "did you mean esm2_t33_650M_UR50D?"),
        ("untrained:esm2_t6_8M", "did you mean untrained:esm2_t6_8M_UR50D?"),
        ("bert", "model 'bert' is not known"),
        ("absent.pt", "absent.pt: no such"),
    ],
)
def test_unknown_models(model: str, told: str, fasta: Path, output: Path):
    error = the_error(run(fasta, output, "--model", model))
    assert model in error
    assert told in error
    assert not output.parent.exists()


DNA = b">a\n" + b"ACGTTGCA" * 40 + b"\n"
NUCLEOTIDES = ("--model", "untrained:dnabert_s")
WRONG_FAMILY = {
    "DNA to ESM-2": Bad(DNA, ("looks like nucleotides", "embed them with dnabert_s")),
    "RNA in lower case to ESM-2": Bad(DNA.lower().replace(b"t", b"u"), ("looks like nucleotides",)),
    "proteins to DNABERT-S": Bad(
        b">first one\nMKVLA\n",
        ("record 1 ('first')", "'L' at base 4", "looks like a protein; use a protein model, e.g. esm2_t33_650M_UR50D"),
        NUCLEOTIDES,
    ),
    "proteins of IUPAC letters to DNABERT-S": Bad(
        b">a\n" + b"MKVSDHRWTY" * 5 + b"\n",
        ("looks like proteins", "use a protein model, e.g. esm2_t33_650M_UR50D"),
        NUCLEOTIDES,
    ),
    "gaps in DNA": Bad(b">a\nACGT\n>b\nAC-GT\n", ("record 2 ('b')", "'-' at base 3", "alignment"), NUCLEOTIDES),
    "no base": Bad(b">a\nACGT\n>b\n", ("record 2 ('b')", "no sequence"), NUCLEOTIDES),
    "a masked base": Bad(b">a\nACXT\n", ("record 1 ('a')", "'X' at base 3", "write N"), NUCLEOTIDES),
    "all rejected": Bad(
        b">a\nACGTT\n",
        ("all records are rejected", "1 longer than max_length=4"),
        (*NUCLEOTIDES, "--long-sequences", "reject", "--max-length", "4"),
    ),
}


@pytest.mark.parametrize("name", WRONG_FAMILY)
def test_sequences_of_another_family(name: str, fasta: Path, output: Path):
    bad = WRONG_FAMILY[name]
    fasta.write_bytes(bad.stored)
    error = the_error(run(fasta, output, *bad.options))
    assert f"ERROR {fasta}: " in error
    for told in bad.told:
        assert told in error
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--long-sequences", "window", "--stride", "5"),
            "stride must be at least a 64th of the window of 1022, not 5",
        ),
        (
            (*NUCLEOTIDES, "--window", "100", "--stride", "101"),
            "stride must be 1 to 100 residues or bases, no longer than the window",
        ),
        (
            (*NUCLEOTIDES, "--max-length", "99", "--window", "100"),
            "window must be 1 to 99 residues or bases, no longer than",
        ),
    ],
)
def test_impossible_windows(options: tuple[str, ...], told: str, fasta: Path, output: Path):
    assert told in the_error(run(fasta, output, *options))
    assert not output.parent.exists()


def test_a_tokenizer_of_another_model(tmp_path: Path, fasta: Path, output: Path):
    """Folders whose tokenizer.json has more tokens than the model, or is not a tokenizer."""
    fasta.write_bytes(DNA)
    narrow = save_folder(seeded_state(NARROW), NARROW, tmp_path / "narrow")
    error = the_error(run(fasta, output, "--model", str(narrow)))
    assert "tokenizer.json: it has 4,096 ids and the model knows 64" in error
    (narrow / "tokenizer.json").write_text("{}")
    assert f"{narrow}/tokenizer.json: not a tokenizer.json" in the_error(run(fasta, output, "--model", str(narrow)))
    (narrow / "tokenizer.json").unlink()
    assert "the folder has no tokenizer.json" in the_error(run(fasta, output, "--model", str(narrow)))
    assert index_like_files(output.parent) == []


def test_longest_allowed_length(fasta: Path, output: Path):
    error = the_error(run(fasta, output, "--max-length", "1000001"))
    assert "max_length must be 1 to 1000000 residues or bases, not 1000001" in error
    assert not output.parent.exists()


def test_a_folder_without_write_permission(fasta: Path, output: Path):
    output.parent.mkdir()
    output.parent.chmod(0o500)
    if os.access(output.parent, os.W_OK):
        pytest.skip("this user, being root, may write to any folder")
    error = the_error(run(fasta, output))
    assert f"Permission denied: '{output.parent}" in error
    assert list(output.parent.iterdir()) == []


def test_a_file_where_the_output_folder_should_be(fasta: Path, output: Path):
    output.parent.write_text("not a folder")
    assert str(output.parent) in the_error(run(fasta, output))
    assert output.parent.read_text() == "not a folder"


def test_a_folder_where_the_output_should_be(fasta: Path, output: Path):
    output.mkdir(parents=True)
    assert str(output) in the_error(run(fasta, output))
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_that_accepts_no_files(fasta: Path):
    assert "'/proc/results'" in the_error(run(fasta, Path("/proc/results/index.h5")))
    assert "'/proc/self/" in the_error(run(fasta, Path("/proc/self/index.h5")))


def test_a_failed_run_does_not_change_an_older_index(fasta: Path, output: Path):
    assert run(fasta, output).returncode == 0
    before = output.read_bytes()
    fasta.write_bytes(GOOD + b">bad\n-\n")
    assert "record 4 ('bad')" in the_error(run(fasta, output))
    assert output.read_bytes() == before
    assert list(output.parent.iterdir()) == [output]


def test_no_room_for_the_output(fasta: Path, output: Path):
    """A limit on file size imitates a full disk, at many points of the run."""
    fasta.write_bytes(random_fasta(2000, 100))
    assert run(fasta, output).returncode == 0
    size = output.stat().st_size
    output.unlink()
    for limit in (0, 4096, 100_000, *range(size // 5, size, size // 6), size - 1):
        assert f"File too large: '{output.parent}" in the_error(run(fasta, output, file_limit=limit))
        assert list(output.parent.iterdir()) == []
    assert run(fasta, output, file_limit=size).returncode == 0


def index_like_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".h5")]


def test_killed_while_it_reads(fasta: Path, output: Path):
    fasta.write_bytes(random_fasta(30_000, 500))  # takes much longer to read than the test needs to see it open
    with subprocess.Popen(command(fasta, output), stderr=subprocess.DEVNULL) as process:
        while not has_open(process.pid, fasta):
            assert process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(output.parent.iterdir()) == []  # the spilled columns are temporary files without names
    fasta.write_bytes(GOOD)
    assert run(fasta, output).returncode == 0
    assert index_like_files(output.parent) == ["index.h5"]


def has_open(process: int, path: Path) -> bool:
    """Return whether a process has a file open."""
    with suppress(OSError):  # the process may close a descriptor meanwhile
        return any(link.readlink() == path for link in Path(f"/proc/{process}/fd").iterdir())
    return False


def test_killed_while_it_writes(fasta: Path, output: Path):
    fasta.write_bytes(random_fasta(80_000, 500))
    output.parent.mkdir()
    for _ in range(5):
        output.unlink(missing_ok=True)
        with subprocess.Popen(command(fasta, output), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not list(output.parent.glob(".*.tmp")):
                time.sleep(0.001)
            process.kill()
        if process.returncode != 0:  # else it ended before the signal
            break
    assert process.returncode == -signal.SIGKILL
    assert len(list(output.parent.glob(".*.tmp"))) == 1  # it was killed in the middle of writing
    assert index_like_files(output.parent) == []
    fasta.write_bytes(GOOD)
    assert run(fasta, output).returncode == 0
    assert open_index(output).num_records == 3


def test_the_index_never_replaces_the_weights(fasta: Path):
    weights = fasta.with_name("model.pt")
    weights.write_bytes(b"weights")
    done = run(fasta, weights, "--model", str(weights))
    assert f"{weights}: is the input as well as the output" in the_error(done)
    assert weights.read_bytes() == b"weights"


def test_old_temporary_files_of_another_machine_are_removed(fasta: Path, output: Path):
    output.parent.mkdir()
    old, alive = (output.with_name(f".{output.name}.{host}.12.tmp") for host in ("node-17", "node-18"))
    for left in (old, alive):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert run(fasta, output).returncode == 0
    assert sorted(output.parent.iterdir()) == [alive, output]


def test_a_fasta_that_grows_while_it_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records appended after the last read would be lost for good, because the index is newer than the file."""
    fasta, output = tmp_path / "growing.fa", tmp_path / "index.h5"
    fasta.write_text(">a\nMKV\n")

    def write_while_the_file_grows(*arguments: object) -> None:
        with fasta.open("a") as file:
            file.write(">b\nMKL\n")
        write(*arguments)

    write = build._write
    monkeypatch.setattr(build, "_write", write_while_the_file_grows)
    with pytest.raises(SeqmillError, match=r"growing\.fa: the file changed while it was read; wait until it is comple"):
        build.build_index(fasta, output, MODEL, LengthPolicy())
    assert list(tmp_path.iterdir()) == [fasta]
    monkeypatch.setattr(build, "_write", write)
    build.build_index(fasta, output, MODEL, LengthPolicy())
    assert open_index(output).num_records == 2
