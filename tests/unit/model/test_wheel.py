"""A wheel has its platform's kernels compiled; with them, no compiler is needed; without them, it still works."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distributions import build_wheel, copy_sources
from pipeline import SCRIPTS
from seqmill.base.machine import processor
from seqmill.model.kernels.build import KERNELS, find_compiler, library_file

FOLDER = Path("seqmill/model/kernels")
HERE = [name for name, kernel in KERNELS.items() if kernel.machine == platform.machine()]
RUNNABLE = [name for name in HERE if KERNELS[name].features <= processor()[1]]
pytestmark = [
    pytest.mark.full,  # compiling takes half a minute
    pytest.mark.skipif(not RUNNABLE, reason="no kernel for this processor"),
    pytest.mark.skipif(find_compiler() is None, reason="no C compiler"),
]
# Prints where each kernel was loaded from, and a digest of what it computes.
CODE = """
import hashlib, logging, sys
import numpy as np, torch
from seqmill.model.kernels import compiled, cpu
logging.basicConfig(format="%(message)s")
torch.manual_seed(0)
lengths = np.array([350, 64, 17, 1])
for name in sys.argv[1:]:
    library = compiled.load(name)
    if library is None:
        continue
    digest = hashlib.sha256()
    for head_dim in cpu.HEAD_DIMS:
        qkv = torch.randn(int(lengths.sum()), 3, 2, head_dim).to(compiled.KERNELS[name].dtype)
        tables = torch.randn(2, 350, head_dim)
        for output in (
            cpu.rope_attention(name, qkv, *tables, lengths),
            cpu.rope_attention(name, qkv, *tables, lengths, (*torch.randn(2, 2 * head_dim), 1e-5)),
            cpu.alibi_attention(name, qkv, torch.tensor([0.5, 0.25]), lengths),
            cpu.relative_attention(name, qkv, torch.randn(2, 257), lengths),
        ):
            digest.update(output.view(torch.uint8).numpy())
    print(name, library._name, digest.hexdigest())
"""


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the sources; return it and pip's output."""
    return build_wheel(copy_sources(folder), folder / "wheels", **environment)


def libraries(wheel: Path) -> list[str]:
    return sorted(Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("source"))[0]


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """A folder with the installed wheel."""
    target = tmp_path / "installed"
    options = ["--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)
    return target


def run(
    packages: Path, tmp_path: Path, kernels: list[str], **environment: str
) -> tuple[dict[str, tuple[str, str]], list[str], list[Path]]:
    """Use kernels in a new process; return library and digest by name, lines of the log, and the cache's libraries.

    The cache is empty before. The process runs in an empty folder, because Python looks there for modules.
    """
    cache, nowhere = tmp_path / "cache", tmp_path / "nowhere"
    shutil.rmtree(cache, ignore_errors=True)
    nowhere.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(packages), "XDG_CACHE_HOME": str(cache), **environment}
    command = [sys.executable, "-c", CODE, *kernels]
    done = subprocess.run(command, env=environment, cwd=nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = {name: (library, digest) for name, library, digest in map(str.split, done.stdout.splitlines())}
    return used, done.stderr.splitlines(), list(cache.rglob("*.so"))


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "no_programs").mkdir()
    return {"PATH": str(tmp_path / "no_programs"), "CC": "cc"}


def test_the_wheel_is_for_its_platform_and_any_python(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert libraries(wheel) == sorted(map(library_file, HERE))


def test_its_kernels_need_no_compiler_and_give_the_same_bits(
    installed: Path, tmp_path: Path, without_compiler: dict[str, str]
) -> None:
    found, lines, cached = run(installed, tmp_path, HERE, **without_compiler)
    assert {name: library for name, (library, _) in found.items()} == {
        name: str(installed / FOLDER / library_file(name)) for name in RUNNABLE
    }
    assert (lines, cached) == ([], [])
    compiled, _, cached = run(SCRIPTS, tmp_path, RUNNABLE)
    assert len(cached) == len(RUNNABLE)
    assert {name: digest for name, (_, digest) in found.items()} == {
        name: digest for name, (_, digest) in compiled.items()
    }


@pytest.mark.parametrize("how", ["missing", "stale", "damaged"])
def test_a_library_that_cannot_be_used_is_compiled(
    installed: Path, tmp_path: Path, without_compiler: dict[str, str], how: str
) -> None:
    for library in (installed / FOLDER).glob("*.so"):
        if how == "missing":
            library.unlink()
        elif how == "damaged":
            library.write_bytes(b"")
    if how == "stale":
        with (installed / FOLDER / "positions.h").open("a") as header:
            header.write("/* newer than the libraries */\n")
    found, _, cached = run(installed, tmp_path, RUNNABLE[-1:])
    assert list(found) == RUNNABLE[-1:]
    assert len(cached) == 1
    found, lines, _ = run(installed, tmp_path, HERE, **without_compiler)
    assert not found
    (line,) = lines
    assert "attention may be 3 to 6 times slower; install" in line


def test_without_a_compiler_the_wheel_has_the_sources_alone(tmp_path: Path, without_compiler: dict[str, str]) -> None:
    wheel, output = build(tmp_path, **without_compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []
    assert str(FOLDER / "pack.h") in zipfile.ZipFile(wheel).namelist()
    assert "no C compiler found" in output


def test_a_kernel_that_the_compiler_cannot_build_is_left_out(tmp_path: Path) -> None:
    compiler = tmp_path / "old_cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *amx*|*avx512*) echo "unrecognized option" >&2; exit 1;; esac\n'
        f'exec {find_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    (tmp_path / "source").mkdir()
    wheel, output = build(tmp_path / "source", CC=str(compiler))
    old = [name for name in HERE if "amx" not in name and "avx512" not in name]
    assert libraries(wheel) == sorted(map(library_file, old))
    for name in set(HERE) - set(old):
        assert f"no {name} kernel" in output
