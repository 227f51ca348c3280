"""The cache of compiled kernels: damaged files and other users' files are not loaded."""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pipeline import SCRIPTS
from seqmill.model.kernels import compiled
from seqmill.model.kernels.build import find_compiler

KERNEL = next(filter(compiled.load, compiled.KERNELS), "")  # the first
pytestmark = pytest.mark.skipif(not KERNEL, reason="no kernel for this processor, or no C compiler")
COMPILER = find_compiler()
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
DAMAGE = {
    "empty": lambda content: b"",
    "short": lambda content: content[:40],
    "half": lambda content: content[: len(content) // 2],
    "page of zeros": lambda content: content[:8192] + bytes(4096) + content[12288:],
    "without its end": lambda content: content[:-1],
}
PLANTED = """
#include <fcntl.h>
__attribute__((constructor)) static void run(void) { open("MARK", O_CREAT | O_WRONLY, 0600); }
"""


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiler that compiles once, without optimizing, and then copies its first result."""
    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "cc"
    script.write_text(
        "#!/bin/sh\n"
        'for word; do [ "$previous" = -o ] && output=$word; previous=$word; done\n'
        f'[ -e {folder}/made ] || {COMPILER} "$@" -O0 -o {folder}/made || exit 1\n'
        f'cp {folder}/made "$output"\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture(autouse=True)
def machine(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    caplog.set_level(logging.INFO)


def load() -> object:
    """Load the kernel like a new process."""
    return compiled.load.__wrapped__(KERNEL)


@pytest.fixture
def library(machine: None, tmp_path: Path) -> Path:
    """A sound library in the cache."""
    load()
    (library,) = (tmp_path / "cache/seqmill").iterdir()
    return library


CODE = """
import sys
from pathlib import Path
from seqmill.model.kernels import compiled
kernel, library = sys.argv[1], Path(sys.argv[2])
sound = library.read_bytes()
for damaged in map(Path, sys.argv[3:]):
    damaged.replace(library)  # another inode, because the loader remembers inodes
    assert compiled.load.__wrapped__(kernel) is not None, damaged
    assert library.read_bytes() == sound, damaged
"""


@pytest.mark.full
def test_damaged_libraries_are_built_again(library: Path, tmp_path: Path) -> None:
    sound = library.read_bytes()
    for name, damage in DAMAGE.items():
        (tmp_path / name).write_bytes(damage(sound))
    command = [sys.executable, "-c", CODE, KERNEL, library, *(tmp_path / name for name in DAMAGE)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_fastest_kernel_of_a_dtype_is_found() -> None:
    assert compiled.of_dtype(compiled.KERNELS[KERNEL].dtype) == KERNEL
    assert compiled.of_dtype(torch.float16) is None


def test_a_sound_library_is_not_built_again(library: Path) -> None:
    before = library.stat()
    assert load() is not None
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.fixture
def planted(library: Path, tmp_path: Path) -> Path:
    """Replace the library with another user's code and a correct digest; return the file that the code creates."""
    mark, source, built = tmp_path / "mark", tmp_path / "planted.c", tmp_path / "planted.so"
    source.write_text(PLANTED.replace("MARK", str(mark)))
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", built, source], check=True)
    content = built.read_bytes()
    library.unlink()
    library.write_bytes(content + hashlib.sha256(content).digest())
    library.chmod(0o600)
    return mark


def test_our_own_library_is_loaded(planted: Path) -> None:
    """Shows that planted code runs if it is loaded; without this, the next tests would prove nothing."""
    load()
    assert planted.exists()


@pytest.mark.parametrize("how", ["mode", "link", pytest.param("owner", marks=needs_root)])
def test_a_library_of_another_user_is_not_loaded(planted: Path, library: Path, tmp_path: Path, how: str) -> None:
    if how == "mode":
        library.chmod(0o666)
    elif how == "owner":
        os.chown(library, 65534, 65534)
    else:
        library.rename(tmp_path / "theirs")
        library.symlink_to(tmp_path / "theirs")
    assert load() is not None
    assert not planted.exists()
    state = library.lstat()
    assert how == "link" or (state.st_uid, state.st_mode & 0o777) == (os.getuid(), 0o600)  # built again


@needs_root
def test_a_cache_of_another_user_is_not_used(
    planted: Path, library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.chown(library.parent, 65534, 65534)
    before = library.read_bytes()
    assert load() is not None
    (message,) = caplog.messages
    assert f"{library.parent} belongs to another user" in message
    assert not planted.exists()
    assert library.read_bytes() == before
    assert not list(tmp_path.glob("seqmill-*"))  # the library built for the process is removed


def test_a_cache_loses_the_write_permission_of_others(library: Path) -> None:
    library.parent.chmod(0o777)
    assert load() is not None
    assert library.parent.stat().st_mode & 0o777 == 0o755


def test_a_private_cache_replaces_one_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("")
    assert load() is not None
    (message,) = caplog.messages
    assert str(tmp_path / "cache") in message
    assert not list(tmp_path.glob("seqmill-*"))


def test_a_processor_without_our_kernels_is_noted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "processor", lambda: ("an old processor", frozenset()))
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    compiled._warn_without_kernel.cache_clear()
    for dtype in (torch.float32, torch.float32, torch.float64):
        assert compiled.of_dtype(dtype) is None
    (message,) = caplog.messages
    assert "no kernel of ours is for this processor and system in float32" in message


def test_a_compiler_that_fails_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'unknown option -mavx2' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    monkeypatch.setattr(compiled, "_REFUSED", {})
    assert compiled.why_not(KERNEL) == "it can't be compiled: unknown option -mavx2"
    assert "unknown option" in caplog.text
