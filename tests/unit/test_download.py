"""Fetching weights: scripts/fetch_weights.py against a real HTTP server that misbehaves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dnabert_reference import save_folder
from reference import fair_esm_model, save_checkpoint
from seqpack.download import TRIES, URL_VARIABLE
from seqpack.models.dnabert_s import parameter_shapes
from seqpack.models.dnabert_weights import LAYER_PARTS, PARTS
from seqpack.models.registry import DNABERT_MODELS, MODELS, RELEASED_FILES, UNTRAINED_TOKENIZER

PROGRAM = Path(__file__).parents[2] / "scripts" / "fetch_weights.py"
NAME = "esm2_t6_8M_UR50D"
PATIENCE_SECONDS = 60.0  # for what must happen; none of it takes so long


class Mirror(ThreadingHTTPServer):
    """Serves files of models, as badly as its attributes say.

    Attributes:
        files: the bytes by path below models.
        ranges: whether Range requests are understood.
        errors: statuses that the next requests get.
        cuts: so many answers end in the middle.
        gate: if given, answers stop in the middle until it is set.
        halfway: set when an answer has stopped there.
        asked: the Range header of every request.
        paths: the path of every request, below models.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.ranges = True
        self.errors: list[int] = []
        self.cuts = 0
        self.gate: threading.Event | None = None
        self.halfway = threading.Event()
        self.asked: list[str | None] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/models"

    @property
    def content(self) -> bytes:
        """The file of ESM-2."""
        return self.files[f"{NAME}.pt"]

    @content.setter
    def content(self, content: bytes) -> None:
        self.files[f"{NAME}.pt"] = content


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client was killed
            self.answer(self.server)

    def answer(self, mirror: Mirror) -> None:
        wanted = self.headers.get("Range")
        mirror.asked.append(wanted)
        path = self.path.removeprefix("/models/")
        mirror.paths.append(path)
        if mirror.errors:
            self.send_error(mirror.errors.pop(0))
            return
        if path not in mirror.files:
            self.send_error(404)
            return
        content = mirror.files[path]
        total = len(content)
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and mirror.ranges else 0
        if first >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(total - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.end_headers()
        middle = (first + total) // 2
        self.wfile.write(content[first:middle])
        if mirror.cuts:
            mirror.cuts -= 1
            return
        if mirror.gate:
            mirror.halfway.set()
            mirror.gate.wait(PATIENCE_SECONDS)
        self.wfile.write(content[middle:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mirror") / f"{NAME}.pt"
    return save_checkpoint(fair_esm_model(MODELS[NAME]), path).read_bytes()


@pytest.fixture(scope="module")
def folder_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The three files of DNABERT-S by path. Its tensors share one small storage, as only their shapes are looked at."""
    architecture, storage, state = DNABERT_MODELS["dnabert_s"], torch.zeros(1 << 14), {}
    for name, shape in parameter_shapes(architecture).items():
        name = name.replace("layers.", "encoder.layer.")
        for ours, theirs in (PARTS | LAYER_PARTS).items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        state[name] = storage[:1].expand(shape)
    folder = save_folder(state, architecture, tmp_path_factory.mktemp("folder"))
    (folder / "tokenizer.json").write_bytes(UNTRAINED_TOKENIZER.read_bytes())
    return {f"dnabert_s/{name}": (folder / name).read_bytes() for name in RELEASED_FILES}


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[Mirror]:
    with Mirror(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def mirror(checkpoint: bytes) -> Iterator[Mirror]:
    with served({f"{NAME}.pt": checkpoint}) as server:
        yield server


@pytest.fixture
def folder_mirror(folder_files: dict[str, bytes]) -> Iterator[Mirror]:
    with served(dict(folder_files)) as server:
        yield server


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "resources" / "models" / f"{NAME}.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "resources" / "models" / "dnabert_s"


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def write_part(output: Path, content: bytes) -> None:
    output.parent.mkdir(parents=True)
    part_of(output).write_bytes(content)


def start(url: str, output: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.Popen(
        [sys.executable, PROGRAM, "--model", output.name.removesuffix(".pt"), "--output", output],
        env=environment | {URL_VARIABLE: url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return the standard error of a program that succeeds."""
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stderr
    return stderr


def fetch(url: str, output: Path) -> str:
    return finish(start(url, output))


def failure(url: str, output: Path, warnings: int = 0) -> str:
    """Return the one error line of a program that fails, as it must, without a file."""
    process = start(url, output)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    lines = stderr.splitlines()
    assert sum(" WARNING " in line for line in lines) == warnings, stderr
    errors = [line for line in lines if " ERROR " in line]
    assert errors == lines[-1:], stderr
    return errors[0]


def assert_fetched(output: Path, content: bytes) -> None:
    assert output.read_bytes() == content
    assert not part_of(output).exists()


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def damaged(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 0xFF]) + content[offset + 1 :]


def test_a_file_is_fetched_once(mirror: Mirror, output: Path) -> None:
    fetch(mirror.url + "/", output)
    assert_fetched(output, mirror.content)
    assert mirror.asked == [None]

    stderr = fetch(mirror.url, output)
    assert "there already" in stderr
    assert mirror.asked == [None]
    assert_fetched(output, mirror.content)


def test_a_broken_download_goes_on_where_it_stopped(mirror: Mirror, output: Path) -> None:
    mirror.cuts = 2
    fetch(mirror.url, output)
    total = len(mirror.content)
    first = total // 2
    assert mirror.asked == [None, f"bytes={first}-", f"bytes={(first + total) // 2}-"]
    assert_fetched(output, mirror.content)


def test_a_server_that_keeps_breaking_off_leaves_what_came(mirror: Mirror, output: Path) -> None:
    mirror.cuts = TRIES
    message = failure(mirror.url, output, warnings=TRIES)
    assert "ended early" in message
    assert len(mirror.asked) == TRIES
    size = part_of(output).stat().st_size
    assert part_of(output).read_bytes() == mirror.content[:size]
    assert size > len(mirror.content) // 2  # of several answers

    fetch(mirror.url, output)
    assert mirror.asked[TRIES:] == [f"bytes={size}-"]
    assert_fetched(output, mirror.content)


def test_a_server_that_cannot_resume_sends_all_again(mirror: Mirror, output: Path) -> None:
    mirror.ranges = False
    mirror.cuts = 1
    fetch(mirror.url, output)
    assert mirror.asked == [None, f"bytes={len(mirror.content) // 2}-"]
    assert_fetched(output, mirror.content)


def test_a_part_of_an_earlier_run_is_used(mirror: Mirror, output: Path) -> None:
    write_part(output, mirror.content[:1000])
    fetch(mirror.url, output)
    assert mirror.asked == ["bytes=1000-"]
    assert_fetched(output, mirror.content)


def test_a_killed_download_is_resumed(mirror: Mirror, output: Path) -> None:
    mirror.gate = threading.Event()
    process = start(mirror.url, output)
    assert mirror.halfway.wait(PATIENCE_SECONDS)
    assert wait_until(lambda: part_of(output).exists() and part_of(output).stat().st_size > 0)
    process.kill()
    process.communicate()
    mirror.gate.set()
    mirror.gate = None
    assert not output.exists()
    size = part_of(output).stat().st_size

    fetch(mirror.url, output)
    assert mirror.asked == [None, f"bytes={size}-"]
    assert_fetched(output, mirror.content)


def test_a_complete_part_is_kept(mirror: Mirror, output: Path) -> None:
    write_part(output, mirror.content)
    fetch(mirror.url, output)
    assert mirror.asked == [f"bytes={len(mirror.content)}-"]
    assert_fetched(output, mirror.content)


def test_a_part_longer_than_the_file_is_begun_anew(mirror: Mirror, output: Path) -> None:
    write_part(output, mirror.content + b"of another file")
    fetch(mirror.url, output)
    assert mirror.asked == [f"bytes={len(mirror.content) + 15}-", None]
    assert_fetched(output, mirror.content)


def test_a_server_in_trouble_is_asked_again(mirror: Mirror, output: Path) -> None:
    mirror.errors = [503, 502]
    fetch(mirror.url, output)
    assert len(mirror.asked) == 3
    assert_fetched(output, mirror.content)


def test_a_full_disk_is_not_taken_for_a_bad_network(mirror: Mirror, output: Path) -> None:
    output.parent.mkdir(parents=True)
    part_of(output).symlink_to("/dev/full")
    message = failure(mirror.url, output)
    assert f"{part_of(output)}: cannot be written: No space left on device" in message
    assert len(mirror.asked) == 1


@pytest.mark.parametrize("where", ["tensor", "pickle", "directory"])
def test_a_damaged_file_is_thrown_away(mirror: Mirror, output: Path, where: str) -> None:
    good = mirror.content
    offsets = {"tensor": len(good) // 2, "pickle": 700, "directory": good.rindex(b"PK\x01\x02")}
    mirror.content = damaged(good, offsets[where])
    message = failure(mirror.url, output)
    assert "damaged" in message
    assert not part_of(output).exists()

    if where == "directory":  # once is enough
        mirror.content = good
        fetch(mirror.url, output)
        assert mirror.asked == [None, None]
        assert_fetched(output, good)


def other_architecture(tmp_path: Path) -> bytes:
    model = fair_esm_model(replace(MODELS[NAME], num_layers=1))
    return save_checkpoint(model, tmp_path / "other.pt").read_bytes()


@pytest.mark.parametrize("what", ["page", "truncated", "architecture"])
def test_something_else_under_that_name_is_refused(mirror: Mirror, output: Path, tmp_path: Path, what: str) -> None:
    mirror.content = {
        "page": b"<!DOCTYPE html><html><body>Please log in</body></html>",
        "truncated": mirror.content[:-100],
        "architecture": other_architecture(tmp_path),
    }[what]
    message = failure(mirror.url, output)
    assert f"not {NAME} and was removed" in message
    assert ("num_layers=1," in message) == (what == "architecture")
    assert ("truncated, or not" in message) == (what != "architecture")
    assert not part_of(output).exists()


def test_a_file_that_the_server_lacks(mirror: Mirror, output: Path) -> None:
    url = mirror.url + "/elsewhere"
    message = failure(url, output)
    assert f"{url}/{NAME}.pt" in message
    assert "404" in message
    assert len(mirror.asked) == 1
    assert not part_of(output).exists()


def test_no_server(output: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        message = failure(url, output)
    assert f"{url}/{NAME}.pt" in message
    assert "snakemake fetch_models" in message
    assert str(output) in message
    assert URL_VARIABLE in message
    assert not part_of(output).exists()


@pytest.mark.parametrize("url", ["mirror.example/models", ""])
def test_a_mirror_that_is_no_url(output: Path, url: str) -> None:
    message = failure(url, output)
    assert f"{url}/{NAME}.pt" in message
    assert URL_VARIABLE in message


def test_two_programs_fetch_a_file_once(mirror: Mirror, output: Path) -> None:
    mirror.gate = threading.Event()
    processes = [start(mirror.url, output) for _ in range(2)]
    assert mirror.halfway.wait(PATIENCE_SECONDS)
    wait_until(lambda: len(mirror.asked) > 1, seconds=1.0)  # time to do it wrong
    mirror.gate.set()
    stderrs = [finish(process) for process in processes]
    assert len(mirror.asked) == 1
    assert sum("there already" in stderr for stderr in stderrs) == 1
    assert_fetched(output, mirror.content)


def assert_folder(folder: Path, files: dict[str, bytes]) -> None:
    assert {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()} == files
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert not part_of(folder).exists()


def paths_in(folder: Path) -> list[str]:
    return sorted(path.name for path in part_of(folder).iterdir())


def test_a_folder_is_fetched_once(folder_mirror: Mirror, folder: Path) -> None:
    folder_mirror.cuts = 1
    fetch(folder_mirror.url + "/", folder)
    assert_folder(folder, folder_mirror.files)
    first, *others = folder_mirror.files
    assert folder_mirror.paths == [first, first, *others]
    middle = len(folder_mirror.files[first]) // 2
    assert folder_mirror.asked == [None, f"bytes={middle}-", None, None]

    assert "there already" in fetch(folder_mirror.url, folder)
    assert len(folder_mirror.paths) == 4


def test_a_folder_of_which_a_part_is_there_goes_on(folder_mirror: Mirror, folder: Path) -> None:
    _, tokenizer, weights = folder_mirror.files
    content = folder_mirror.files.pop(weights)
    message = failure(folder_mirror.url, folder)
    assert f"{folder_mirror.url}/{weights}: the server answers 404" in message
    assert paths_in(folder) == ["config.json", "tokenizer.json"]

    folder_mirror.files[weights] = content
    (part_of(folder) / "pytorch_model.bin.part").write_bytes(content[:1000])
    fetch(folder_mirror.url, folder)
    assert folder_mirror.paths[3:] == [weights]
    assert folder_mirror.asked[3:] == ["bytes=1000-"]
    assert_folder(folder, folder_mirror.files)

    (folder / "tokenizer.json").unlink()
    fetch(folder_mirror.url, folder)
    assert folder_mirror.paths[4:] == [tokenizer]
    assert_folder(folder, folder_mirror.files)


def test_another_model_of_the_same_shape_has_its_own_folder(folder_mirror: Mirror, folder: Path) -> None:
    folder_mirror.files = {path.replace("_s/", "_2/"): content for path, content in folder_mirror.files.items()}
    fetch(folder_mirror.url, folder.with_name("dnabert_2"))
    assert_folder(folder.with_name("dnabert_2"), folder_mirror.files)


def test_damaged_weights_of_a_folder_are_thrown_away_alone(folder_mirror: Mirror, folder: Path) -> None:
    weights = "dnabert_s/pytorch_model.bin"
    good = folder_mirror.files[weights]
    folder_mirror.files[weights] = damaged(good, len(good) // 2)
    assert "damaged on the way" in failure(folder_mirror.url, folder)
    assert paths_in(folder) == ["config.json", "tokenizer.json"]

    folder_mirror.files[weights] = good
    fetch(folder_mirror.url, folder)
    assert folder_mirror.paths[3:] == [weights]
    assert_folder(folder, folder_mirror.files)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"<!DOCTYPE html><html><body>Please log in</body></html>", "no JSON and was removed"),
        ("config.json", b'{"num_hidden_layers": 6}', "not dnabert_s and was removed: "),
        ("tokenizer.json", b"{}", "not dnabert_s and was removed: "),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1", "not dnabert_s and was removed: "),
    ],
)
def test_something_else_in_a_folder_is_refused(
    folder_mirror: Mirror, folder: Path, name: str, content: bytes, expected: str
) -> None:
    folder_mirror.files[f"dnabert_s/{name}"] = content
    message = failure(folder_mirror.url, folder)
    assert expected in message
    assert name in message
    assert not (part_of(folder) / name).exists()
