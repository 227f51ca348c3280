"""Fetching weights: scripts/fetch_weights.py against a real, misbehaving HTTP server."""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dnabert_reference import save_folder
from hub_server import running
from hugging_face import hugging_face_model
from pipeline import IMPATIENT
from reference import fair_esm_hidden, fair_esm_model, save_checkpoint
from seqmill.errors import SeqmillError
from seqmill.fetch import retry
from seqmill.fetch.download import Pace
from seqmill.fetch.self_test import check_weights
from seqmill.fetch.weights import URL_VARIABLE, fetch_weights
from seqmill.model.dnabert_s import parameter_shapes
from seqmill.model.dnabert_weights import NAMING
from seqmill.model.weights import load_weights
from seqmill.spec.models import DNABERT_MODELS, ESM2_MODELS, MODELS, NAMES, UNTRAINED_TOKENIZER, ModelSource
from seqmill.spec.released import read_releases

PROGRAM = Path(__file__).parents[3] / "scripts" / "fetch_weights.py"
NAME = "esm2_t6_8M_UR50D"
WAITS = len(retry.WAITS)
PATIENCE_SECONDS = 60.0  # for events that must happen; none takes this long


class Mirror(ThreadingHTTPServer):
    """Serves model files, with the faults that its attributes set.

    Attributes:
        files: the bytes by path below models.
        ranges: whether Range requests are understood.
        errors: HTTP statuses for the next requests.
        retry_after: the header Retry-After of these answers, if not empty.
        cuts: number of answers that end in the middle.
        drips: number of answers that continue one byte at a time from the middle.
        drips_headers: number of answers that begin one byte at a time.
        redirect: where requests are redirected, if anywhere.
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
        self.retry_after = ""
        self.cuts = 0
        self.drips = 0
        self.drips_headers = 0
        self.redirect = ""
        self.gate: threading.Event | None = None
        self.halfway = threading.Event()
        self.asked: list[str | None] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/models"

    @property
    def content(self) -> bytes:
        """The checkpoint of ESM-2."""
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
            self.send_response(mirror.errors.pop(0))
            for name, value in {"Retry-After": mirror.retry_after, "Content-Length": "0"}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            return
        if mirror.drips_headers:
            mirror.drips_headers -= 1
            for letter in b"HTTP/1.0 200 OK\r\nX-Padding: " + b"x" * 10_000:
                self.wfile.write(bytes([letter]))
                time.sleep(0.02)
        if mirror.redirect:
            self.send_response(302)
            self.send_header("Location", f"{mirror.redirect}/{path}")
            self.send_header("Content-Length", "0")
            self.end_headers()
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
        if mirror.drips:
            mirror.drips -= 1
            for place in range(middle, total):
                self.wfile.write(content[place : place + 1])
                time.sleep(0.02)
        if mirror.gate:
            mirror.halfway.set()
            mirror.gate.wait(PATIENCE_SECONDS)
        self.wfile.write(content[middle:])

    def log_message(self, format: str, *args: object) -> None:
        pass


def fact(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_facts(path: Path, files: dict[str, bytes], **model: Any) -> Path:
    """Write the facts of one model: its published files, on a server that the tests replace by a mirror."""
    facts = {file.rpartition("/")[2]: fact(content) for file, content in files.items()}
    name = next(iter(files)).partition("/")[0].removesuffix(".pt")
    model = {"sources": [{"url": "https://original.example", "files": facts}]} | model
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: model}))
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.01, 0.02, 0.03))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mirror") / f"{NAME}.pt"
    return save_checkpoint(fair_esm_model(MODELS[NAME]), path).read_bytes()


@pytest.fixture(scope="module")
def folder_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The three files of DNABERT-S by path. Its tensors share one small storage: only shapes are checked."""
    architecture, storage, state = DNABERT_MODELS["dnabert_s"], torch.zeros(1 << 14), {}
    for name, shape in parameter_shapes(architecture).items():
        state.update(dict.fromkeys(NAMING.names_of(name), storage[:1].expand(shape)))
    folder = save_folder(state, architecture, tmp_path_factory.mktemp("folder"))
    (folder / "tokenizer.json").write_bytes(UNTRAINED_TOKENIZER.read_bytes())
    return {f"dnabert_s/{name}": (folder / name).read_bytes() for name in read_releases()["dnabert_s"].files}


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[Mirror]:
    with Mirror(files) as server, running(server):
        yield server


@pytest.fixture
def mirror(checkpoint: bytes) -> Iterator[Mirror]:
    with served({f"{NAME}.pt": checkpoint}) as server:
        yield server


@pytest.fixture
def folder_mirror(folder_files: dict[str, bytes]) -> Iterator[Mirror]:
    with served(dict(folder_files)) as server:
        yield server


@pytest.fixture
def output(tmp_path: Path, checkpoint: bytes) -> Path:
    write_facts(tmp_path / "facts.json", {f"{NAME}.pt": checkpoint})
    return tmp_path / "resources" / "models" / f"{NAME}.pt"


@pytest.fixture
def folder(tmp_path: Path, folder_files: dict[str, bytes]) -> Path:
    write_facts(tmp_path / "facts.json", folder_files)
    return tmp_path / "resources" / "models" / "dnabert_s"


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def write_part(output: Path, content: bytes) -> None:
    output.parent.mkdir(parents=True)
    part_of(output).write_bytes(content)


def facts_of(output: Path) -> Path:
    return output.parents[2] / "facts.json"


def start(url: str | None, output: Path, **variables: str) -> subprocess.Popen[str]:
    """Start the program; without a mirror's address it uses the sources in the facts."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    if url is not None:
        environment[URL_VARIABLE] = url
    environment["PYTHONPATH"] = IMPATIENT
    name = output.name.removesuffix(".pt")
    return subprocess.Popen(
        [sys.executable, PROGRAM, name, "--output", output, "--facts", facts_of(output)],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return the standard error of a program that succeeds."""
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stderr
    return stderr


class Lines(logging.Handler):
    """Collects log messages, one line per record."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def fetch(url: str | None, output: Path) -> str:
    """Fetch in this process, which has already imported torch; return the log."""
    log = Lines()
    with pytest.MonkeyPatch.context() as environment:
        if url is not None:
            environment.setenv(URL_VARIABLE, url)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            environment.delenv(name)
        logging.getLogger().addHandler(log)
        logging.getLogger("seqmill").setLevel(logging.INFO)
        try:
            fetch_weights(output.name.removesuffix(".pt"), output, facts_of(output))
        except SeqmillError as error:
            log.lines.append(f"ERROR {error}")
            raise
        finally:
            logging.getLogger().removeHandler(log)
            output.parents[2].joinpath("log").write_text("\n".join(log.lines))
    return "\n".join(log.lines)


def failure(url: str | None, output: Path, warnings: int = 0) -> str:
    """Return the error of a fetch that must fail and leave no file."""
    with pytest.raises(SeqmillError) as caught:
        fetch(url, output)
    assert not output.exists()
    lines = output.parents[2].joinpath("log").read_text()
    assert lines.count("WARNING ") == warnings, lines
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failing_program(url: str | None, output: Path, **variables: str) -> str:
    """Return the one error line of a program that must fail and leave no file."""
    process = start(url, output, **variables)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    lines = stderr.splitlines()
    errors = [line for line in lines if " ERROR " in line]
    assert errors == lines[-1:], stderr
    return errors[0]


def assert_fetched(output: Path, content: bytes) -> None:
    assert output.read_bytes() == content
    assert not part_of(output).exists()
    record = json.loads(record_of(output).read_text())
    assert record["files"][output.name] == fact(content)
    assert record["digest"] == load_weights(ModelSource(NAME, "checkpoint", None, output)).digest


def record_of(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".pt") + ".json")


def offset_of(header: str | None) -> int:
    return int(header.removeprefix("bytes=").removesuffix("-")) if header else 0


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
    finish(start(mirror.url + "/", output))
    assert_fetched(output, mirror.content)
    assert mirror.asked == [None]

    stderr = finish(start(mirror.url, output))
    assert "there already" in stderr
    assert mirror.asked == [None]
    assert_fetched(output, mirror.content)


def test_a_broken_download_resumes_where_it_stopped(mirror: Mirror, output: Path) -> None:
    mirror.cuts = 2
    fetch(mirror.url, output)
    offsets = [offset_of(header) for header in mirror.asked]
    assert len(offsets) == 3
    assert offsets[0] == 0
    assert all(offset >= 10 << 20 for offset in offsets[1:])  # huggingface_hub writes 10 MB at a time
    assert_fetched(output, mirror.content)


def test_a_file_of_unknown_size_with_an_md5(mirror: Mirror, output: Path) -> None:
    """15B is published like this."""
    digest = hashlib.md5(mirror.content, usedforsecurity=False).hexdigest()
    sources = [{"url": mirror.url, "files": {f"{NAME}.pt": {"size": None, "md5": digest}}}]
    write_facts(facts_of(output), {f"{NAME}.pt": b""}, sources=sources)
    mirror.cuts = 1
    fetch(None, output)
    assert len(mirror.asked) == 2
    assert_fetched(output, mirror.content)
    output.rename(part_of(output))
    fetch(None, output)
    assert mirror.asked[2:] == [f"bytes={len(mirror.content)}-"]
    assert_fetched(output, mirror.content)
    output.unlink()
    mirror.content = damaged(mirror.content, 1000)
    assert f"its MD5 is {hashlib.md5(mirror.content).hexdigest()}, not {digest}" in failure(None, output)


@pytest.mark.full
def test_a_server_that_keeps_breaking_off_leaves_a_partial_file(mirror: Mirror, output: Path) -> None:
    mirror.cuts = 1000
    assert f"cannot fetch {mirror.url}/{NAME}.pt: " in failure(mirror.url, output, WAITS)
    tries = len(mirror.asked)
    size = part_of(output).stat().st_size
    assert part_of(output).read_bytes() == mirror.content[:size]
    assert size >= 10 << 20

    mirror.cuts = 0
    fetch(mirror.url, output)
    assert mirror.asked[tries:] == [f"bytes={size}-"]
    assert_fetched(output, mirror.content)


def test_a_server_that_cannot_resume_sends_all_again(mirror: Mirror, output: Path) -> None:
    mirror.ranges = False
    mirror.cuts = 1
    fetch(mirror.url, output)
    assert len(mirror.asked) == 2
    assert offset_of(mirror.asked[1]) > 0
    assert_fetched(output, mirror.content)


# Bytes per second, and seconds: the loopback is a thousand times as fast, the mirror's drips are a tenth of it.
SLOWEST = Pace(500, 0.2)


def test_a_connection_that_drips_is_given_up_and_resumed(
    mirror: Mirror, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, mirror.url)
    mirror.drips = 2
    fetch_weights(NAME, output, facts_of(output), SLOWEST)
    offsets = [offset_of(header) for header in mirror.asked]
    assert len(offsets) == 3
    assert all(offset >= 10 << 20 for offset in offsets[1:])
    assert_fetched(output, mirror.content)


def test_an_answer_that_begins_byte_by_byte_is_given_up(
    mirror: Mirror, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, mirror.url)
    mirror.drips_headers = 1
    before = signal.getsignal(signal.SIGALRM)
    fetch_weights(NAME, output, facts_of(output), Pace(500, 2.0))
    assert mirror.asked == [None, None]
    assert_fetched(output, mirror.content)
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.full
def test_a_server_that_only_drips_is_an_error(mirror: Mirror, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, mirror.url)
    mirror.drips = 1000
    with pytest.raises(SeqmillError, match=r"only \d+ bytes per second came; at least 500 are needed"):
        fetch_weights(NAME, output, facts_of(output), SLOWEST)
    assert not output.exists()
    assert part_of(output).stat().st_size >= 10 << 20


def test_a_partial_file_of_an_earlier_run_is_used(mirror: Mirror, output: Path) -> None:
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


def test_a_complete_partial_file_is_kept(mirror: Mirror, output: Path) -> None:
    write_part(output, mirror.content)
    fetch(mirror.url, output)
    assert mirror.asked == []
    assert_fetched(output, mirror.content)


def test_a_partial_file_longer_than_the_file_is_not_used(mirror: Mirror, output: Path) -> None:
    write_part(output, mirror.content + b"of another file")
    fetch(mirror.url, output)
    assert mirror.asked == [None]
    assert_fetched(output, mirror.content)


def test_a_server_in_trouble_is_asked_again(mirror: Mirror, output: Path) -> None:
    mirror.errors = [503, 429, 408]
    said = fetch(mirror.url, output)
    assert len(mirror.asked) == 4
    url = f"{mirror.url}/{NAME}.pt"
    assert [line for line in said.splitlines() if "again" in line] == [
        f"WARNING {url}: the server answers 503 Service Unavailable; trying again in 0 s",
        f"WARNING {url}: the server answers 429 Too Many Requests; trying again in 0 s",
        f"WARNING {url}: the server answers 408 Request Timeout; trying again in 0 s",
    ]
    assert_fetched(output, mirror.content)


def test_a_server_that_stays_in_trouble(mirror: Mirror, output: Path) -> None:
    mirror.errors = [500] * 10
    assert "the server answers 500 Internal Server Error. Run `" in failure(mirror.url, output, WAITS)
    assert len(mirror.asked) == WAITS + 1


@pytest.mark.parametrize(("status", "waits"), [(401, 0), (403, 0), (404, 0), (416, WAITS)])
def test_only_trouble_that_may_pass_is_waited_for(mirror: Mirror, output: Path, status: int, waits: int) -> None:
    mirror.errors = [status] * 10
    assert f"the server answers {status}" in failure(mirror.url, output, waits)
    assert len(mirror.asked) == waits + 1


def test_a_server_that_says_how_long_to_wait(mirror: Mirror, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    mirror.retry_after = "7"
    mirror.errors = [429]
    assert "Too Many Requests; trying again in 7 s" in fetch(mirror.url, output)
    assert slept == [7.0]
    output.unlink()
    mirror.retry_after, mirror.errors = "100000", [503] * 2  # longer than anyone would wait
    assert "the server answers 503" in failure(mirror.url, output)
    assert slept == [7.0]


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("12", 12, 12),
        ("-3", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
        ("in an hour", 3000, 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_retry_after(text: str, least: float, most: float) -> None:
    if text == "in an hour":  # when the test runs, which may be long after pytest has collected it
        text = format_datetime(datetime.now(UTC) + timedelta(hours=1))
    assert least <= retry.seconds_asked({"Retry-After": text}) <= most
    assert retry.seconds_asked({}) == 0


def test_an_interrupt_ends_a_wait(mirror: Mirror, output: Path) -> None:
    mirror.errors, mirror.retry_after = [503] * 10, "250"
    process = start(mirror.url, output)
    assert process.stderr
    while "trying again in 250 s" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert len(mirror.asked) == 1


def test_a_full_disk_is_not_mistaken_for_a_bad_network(mirror: Mirror, output: Path) -> None:
    output.parent.mkdir(parents=True)
    part_of(output).symlink_to("/dev/full")
    message = failure(mirror.url, output)
    assert f"{part_of(output)}: cannot be written: No space left on device" in message
    assert len(mirror.asked) == 1


def test_a_damaged_file_is_deleted(mirror: Mirror, output: Path) -> None:
    good = mirror.content
    mirror.content = damaged(good, len(good) // 2)
    message = failure(mirror.url, output)
    assert (
        f"{mirror.url}/{NAME}.pt: what was fetched is not {NAME}.pt of {NAME} as published and was removed" in message
    )
    assert f"its SHA256 is {fact(mirror.content)['sha256']}, not {fact(good)['sha256']}" in message
    assert not part_of(output).exists()

    mirror.content = good
    fetch(mirror.url, output)
    assert mirror.asked == [None, None]
    assert_fetched(output, good)


def other_values(tmp_path: Path) -> bytes:
    """Weights with the same architecture and file size, as a mirror might offer under the released name."""
    return save_checkpoint(fair_esm_model(MODELS[NAME], seed=8), tmp_path / f"{NAME}.pt").read_bytes()


@pytest.mark.parametrize("what", ["page", "truncated", "values"])
def test_another_file_under_that_name_is_refused(mirror: Mirror, output: Path, tmp_path: Path, what: str) -> None:
    good = len(mirror.content)
    mirror.content = {
        "page": b"<!DOCTYPE html><html><body>Please log in</body></html>",
        "truncated": mirror.content[:-100],
        "values": other_values(tmp_path),
    }[what]
    assert len(mirror.content) == good or what != "values"
    message = failure(mirror.url, output)
    expected = "as published and was removed: its SHA256" if what == "values" else f"bytes, not {good:,} as published"
    assert expected in message
    assert not part_of(output).exists()
    assert not record_of(output).exists()


def test_a_published_file_with_another_model_is_refused(mirror: Mirror, output: Path, tmp_path: Path) -> None:
    model = fair_esm_model(replace(MODELS[NAME], num_layers=1))
    mirror.content = save_checkpoint(model, tmp_path / "other.pt").read_bytes()
    write_facts(facts_of(output), {f"{NAME}.pt": mirror.content})
    message = failure(mirror.url, output)
    assert f"what was fetched is not {NAME} and was removed" in message
    assert "num_layers=1," in message
    assert not part_of(output).exists()


def test_weights_that_differ_from_an_earlier_fetch(mirror: Mirror, output: Path, tmp_path: Path) -> None:
    """The record stays when the weights are removed, and a later fetch is compared with it."""
    fetch(mirror.url, output)
    record = record_of(output).read_bytes()
    output.unlink()
    mirror.content = other_values(tmp_path)
    write_facts(facts_of(output), {f"{NAME}.pt": mirror.content})
    message = failure(mirror.url, output)
    assert "the digest of their tensors is" in message
    assert str(record_of(output)) in message
    assert record_of(output).read_bytes() == record


def test_swapped_weights_are_not_loaded(mirror: Mirror, output: Path, tmp_path: Path) -> None:
    fetch(mirror.url, output)
    source = ModelSource(NAME, "released", MODELS[NAME], output)
    load_weights(source)
    output.write_bytes(other_values(tmp_path))
    with pytest.raises(SeqmillError) as caught:
        load_weights(source)
    assert f"{output}: these are not the weights of {NAME} that were fetched and tested" in str(caught.value)
    record_of(output).unlink()
    load_weights(source)  # nothing is known about weights that a user put there


def test_published_numbers_decide_which_files_are_kept(mirror: Mirror, output: Path, tmp_path: Path) -> None:
    """Files with the right digests whose model computes something else: none is kept or recorded."""
    model = fair_esm_model(MODELS[NAME])
    hidden = fair_esm_hidden(model, "GLDALQITV")[:3, :3].round(4).tolist()
    cases = [{"sequence": "GLDALQITV", "tokens": [0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2], "hidden": hidden}]
    test = {"from": "fair-esm 2.0.0", "tolerance": 1e-4, "cases": cases}
    good = mirror.content
    first, second = (model.layers[layer].fc1.weight for layer in (1, 4))
    first.data, second.data = second.data, first.data
    mirror.content = save_checkpoint(model, tmp_path / "swapped.pt").read_bytes()
    write_facts(facts_of(output), {f"{NAME}.pt": mirror.content}, self_test=test)
    message = failure(mirror.url, output)
    assert f"what was fetched is not {NAME} and was removed" in message
    assert "not the trained weights" in message
    assert [path.name for path in output.parent.glob("[!.]*")] == []

    mirror.content = good
    write_facts(facts_of(output), {f"{NAME}.pt": good}, self_test=test)
    fetch(mirror.url, output)
    assert_fetched(output, good)
    assert "computes the published numbers" in json.loads(record_of(output).read_text())["self_test"]


def doctor(output: Path) -> subprocess.CompletedProcess[str]:
    """Check the weights again, with a copy of the programs that has the test's facts."""
    root = output.parents[2]
    shutil.copytree(PROGRAM.parent, root / "scripts", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(facts_of(output), root / "scripts/seqmill/spec/released.json")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["SEQMILL_MODELS"] = str(root / "user")
    command = [sys.executable, root / "scripts/doctor.py", "--weights"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.full
def test_the_doctor_checks_weights(
    mirror: Mirror, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = doctor(output)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"no weights of released models in resources/models or {tmp_path / 'user'}\nnext: " in done.stdout
    model = fair_esm_model(MODELS[NAME])
    cases = [{"sequence": "GLDALQITV", "hidden": fair_esm_hidden(model, "GLDALQITV")[:3, :3].round(4).tolist()}]
    test = {"from": "fair-esm 2.0.0", "tolerance": 1e-4, "cases": cases}
    write_facts(facts_of(output), {f"{NAME}.pt": mirror.content}, self_test=test)
    fetch(mirror.url, output)
    done = doctor(output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NAME}: resources/models/{NAME}.pt: fetched from {mirror.url}; files and tensors" in done.stdout
    assert "are right; computes the published" in done.stdout

    def look() -> tuple[str, bool]:
        (found,) = check_weights(facts_of(output))
        return found

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQMILL_MODELS", str(tmp_path / "user"))
    assert look() == (done.stdout.strip(), True)
    output.parent.rename(tmp_path / "user")
    assert look() == (done.stdout.strip().replace("resources/models", str(tmp_path / "user")), True)
    (tmp_path / "user").rename(output.parent)
    record = record_of(output).read_text()
    record_of(output).unlink()
    text, right = look()
    assert right
    assert "put there by hand" in text

    output.write_bytes(other_values(tmp_path))
    text, right = look()
    assert not right
    assert f"{output.name}: not that of {NAME} as published: its SHA256 is" in text
    write_facts(facts_of(output), {f"{NAME}.pt": output.read_bytes()}, self_test=test)
    text, right = look()
    assert not right
    assert f"not the trained weights of {NAME}" in text
    record_of(output).write_text(record)
    text, right = look()
    assert not right
    assert "these are not the weights" in text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"digest": 3}', "[" * 100_000])
def test_a_record_that_cannot_be_read(tmp_path: Path, checkpoint: bytes, text: str) -> None:
    source = ModelSource(NAME, "released", MODELS[NAME], save(tmp_path / f"{NAME}.pt", checkpoint))
    (tmp_path / f"{NAME}.json").write_text(text)
    with pytest.raises(SeqmillError) as caught:
        load_weights(source)
    assert f"{tmp_path / NAME}.json: not a" in str(caught.value)


@pytest.mark.parametrize("how", ["mirror", "redirect"])
def test_plain_http_is_refused(mirror: Mirror, output: Path, how: str) -> None:
    mirror.redirect = "http://mirror.example/models"
    message = failure(mirror.redirect if how == "mirror" else mirror.url, output)
    assert f"http://mirror.example/models/{NAME}.pt: weights are fetched over https only" in message
    assert len(mirror.asked) == (how == "redirect")


@pytest.mark.full
def test_a_redirect_from_https_to_http_is_not_followed(mirror: Mirror, output: Path, tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", certificate, "-out", tmp_path / "public.pem"),
        ],
        check=True,
        capture_output=True,
    )
    certificate.write_bytes(certificate.read_bytes() + (tmp_path / "public.pem").read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with served({f"{NAME}.pt": mirror.content}) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        url = f"https://localhost:{secure.server_port}/models"
        finish(start(url, output, SSL_CERT_FILE=str(tmp_path / "public.pem")))
        output.unlink()
        secure.redirect = mirror.url
        message = failing_program(url, output, SSL_CERT_FILE=str(tmp_path / "public.pem"))
    assert f"redirects to {mirror.url}/{NAME}.pt, which is not https" in message
    assert mirror.asked == []


def test_a_file_that_the_server_lacks(mirror: Mirror, output: Path) -> None:
    url = mirror.url + "/elsewhere"
    message = failing_program(url, output)
    assert f"{url}/{NAME}.pt" in message
    assert "404" in message
    assert len(mirror.asked) == 1
    assert not part_of(output).exists()


def test_no_server(output: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        message = failure(url, output, retry.OFFLINE_WAITS)
    assert f"{url}/{NAME}.pt" in message
    assert re.search(f"Run `.* {NAME} --output {output}` where there is internet", message)
    assert str(output) in message
    assert URL_VARIABLE in message
    assert not part_of(output).exists()


@pytest.mark.parametrize("url", ["mirror.example/models", "", "https://[::1"])
def test_a_mirror_that_is_not_a_url(output: Path, url: str) -> None:
    message = failure(url, output)
    assert f"{url}/{NAME}.pt" in message
    assert URL_VARIABLE in message


@pytest.mark.full
def test_two_programs_fetch_a_file_once(mirror: Mirror, output: Path) -> None:
    mirror.gate = threading.Event()
    processes = [start(mirror.url, output) for _ in range(2)]
    assert mirror.halfway.wait(PATIENCE_SECONDS)
    wait_until(lambda: len(mirror.asked) > 1, seconds=1.0)  # long enough for the second program to go wrong
    mirror.gate.set()
    stderrs = [finish(process) for process in processes]
    assert len(mirror.asked) == 1
    assert sum("there already" in stderr for stderr in stderrs) == 1
    assert_fetched(output, mirror.content)


def assert_folder(folder: Path, files: dict[str, bytes]) -> None:
    assert {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()} == files
    record = json.loads(record_of(folder).read_text())
    assert record["files"] == {path.rpartition("/")[2]: fact(content) for path, content in files.items()}
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

    assert "there already" in fetch(folder_mirror.url, folder)
    assert len(folder_mirror.paths) == 4


def test_a_partly_fetched_folder_resumes(folder_mirror: Mirror, folder: Path) -> None:
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
    write_facts(facts_of(folder), folder_mirror.files)
    fetch(folder_mirror.url, folder.with_name("dnabert_2"))
    assert_folder(folder.with_name("dnabert_2"), folder_mirror.files)


def test_only_the_damaged_weights_of_a_folder_are_deleted(folder_mirror: Mirror, folder: Path) -> None:
    weights = "dnabert_s/pytorch_model.bin"
    good = folder_mirror.files[weights]
    folder_mirror.files[weights] = damaged(good, len(good) // 2)
    assert "its SHA256 is" in failure(folder_mirror.url, folder)
    assert paths_in(folder) == ["config.json", "tokenizer.json"]

    folder_mirror.files[weights] = good
    fetch(folder_mirror.url, folder)
    assert folder_mirror.paths[3:] == [weights]
    assert_folder(folder, folder_mirror.files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"num_hidden_layers": 6}'),
        ("tokenizer.json", b"{}"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1"),
    ],
)
def test_published_files_with_another_model_are_refused(
    folder_mirror: Mirror, folder: Path, name: str, content: bytes
) -> None:
    folder_mirror.files[f"dnabert_s/{name}"] = content
    write_facts(facts_of(folder), folder_mirror.files)
    message = failure(folder_mirror.url, folder)
    assert "not dnabert_s and was removed: " in message
    assert name in message
    assert not part_of(folder).exists()


def test_a_file_put_there_by_the_user_is_compared_with_its_digest(folder_mirror: Mirror, folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(b"{}")
    process = start(folder_mirror.url, folder)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert f"{tokenizer}: not that of dnabert_s as published: it has 2 bytes, not" in stderr
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    assert tokenizer.read_bytes() == b"{}"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_files(tmp_path: Path, checkpoint: bytes) -> dict[str, bytes]:
    """A repository's files on Hugging Face with the checkpoint's values, by path below models."""
    model = hugging_face_model(fair_esm_model(MODELS[NAME]))
    model.save_pretrained(tmp_path / "hub", safe_serialization=True)
    names = ("config.json", "model.safetensors")
    return {f"facebook/{NAME}/resolve/{COMMIT}/{name}": (tmp_path / "hub" / name).read_bytes() for name in names}


def hub_source(files: dict[str, bytes]) -> dict[str, Any]:
    facts = {path.rpartition("/")[2]: fact(content) for path, content in files.items()}
    config = files[next(iter(files))]
    git = hashlib.sha1(f"blob {len(config)}\0".encode() + config, usedforsecurity=False).hexdigest()
    facts["config.json"] = {"size": None, "git_sha1": git}
    return {"repository": f"facebook/{NAME}", "commit": COMMIT, "files": facts}


@pytest.mark.parametrize("trouble", ["404", "503"])
def test_the_second_source_is_used_if_the_first_fails(
    mirror: Mirror, output: Path, hub_files: dict[str, bytes], trouble: str
) -> None:
    """The second source is a repository at a pinned commit; its safetensors become a .pt with the same tensors."""
    original = mirror.content
    digest = load_weights(ModelSource(NAME, "checkpoint", None, save(output.parents[2] / "o.pt", original))).digest
    first = {"url": mirror.url, "files": {f"{NAME}.pt": fact(original)}}
    write_facts(facts_of(output), {f"{NAME}.pt": original}, sources=[first, hub_source(hub_files)])
    mirror.files = dict(hub_files)
    if trouble == "503":
        mirror.errors = [503] * (WAITS + 1)
    stderr = finish(start(None, output, HF_ENDPOINT=mirror.url))
    assert f"cannot fetch {mirror.url}/{NAME}.pt: the server answers {trouble}" in stderr
    assert mirror.paths[-2:] == list(hub_files)
    assert load_weights(ModelSource(NAME, "released", MODELS[NAME], output)).digest == digest
    record = json.loads(record_of(output).read_text())
    assert record["source"] == f"facebook/{NAME} at commit {COMMIT} on Hugging Face"
    assert sorted(path.name for path in output.parent.iterdir() if path.name[0] != ".") == [
        f"{NAME}.json",
        f"{NAME}.pt",
    ]


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_wrong_file_does_not_lead_to_the_second_source(
    mirror: Mirror, output: Path, hub_files: dict[str, bytes]
) -> None:
    first = {"url": mirror.url, "files": {f"{NAME}.pt": fact(mirror.content)}}
    write_facts(facts_of(output), {f"{NAME}.pt": b""}, sources=[first, hub_source(hub_files)])
    mirror.content = damaged(mirror.content, 1000)
    mirror.files |= hub_files
    assert "as published and was removed" in failing_program(None, output, HF_ENDPOINT=mirror.url)
    assert mirror.paths == [f"{NAME}.pt"]


@pytest.mark.full
def test_a_commit_of_nucleotides(folder_mirror: Mirror, folder: Path) -> None:
    files = {f"z/D/resolve/{COMMIT}/{path.partition('/')[2]}": data for path, data in folder_mirror.files.items()}
    facts = {path.rpartition("/")[2]: fact(content) for path, content in files.items()}
    source = {"repository": "z/D", "commit": COMMIT, "files": facts}
    write_facts(facts_of(folder), folder_mirror.files, sources=[source])
    wanted, folder_mirror.files = folder_mirror.files, files
    finish(start(None, folder, HF_ENDPOINT=folder_mirror.url))
    assert_folder(folder, wanted)


@pytest.mark.parametrize("name", [NAME, "dnabert_s"])
def test_without_an_output_the_user_s_folder_is_used_unless_the_weights_are_on_this_disk(
    checkpoint: bytes, folder_files: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    files = {f"{NAME}.pt": checkpoint} if name == NAME else folder_files
    facts = write_facts(tmp_path / "facts.json", files)
    (tmp_path / "here").mkdir()

    def seqmill_fetch(name: str) -> str:
        command = [sys.executable, PROGRAM, name, "--facts", facts]
        variables = {**os.environ, URL_VARIABLE: mirror.url, "SEQMILL_MODELS": str(tmp_path / "user")}
        done = subprocess.run(command, cwd=tmp_path / "here", env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    path = tmp_path / "user" / (f"{NAME}.pt" if name == NAME else name)
    on_hub = {NAME: f"facebook/{NAME}", "dnabert_s": "zhihan1996/DNABERT-S"}[name]
    with served(dict(files)) as mirror:
        assert seqmill_fetch(on_hub) == f"{name}: fetched: {path}\n"
        assert seqmill_fetch(name) == f"{name}: on this disk already: {path}\n"
        (tmp_path / "here/resources").mkdir()
        path.parent.rename(tmp_path / "here/resources/models")
        assert seqmill_fetch(name) == f"{name}: on this disk already: resources/models/{path.name}\n"
        assert len(mirror.paths) == len(files)


def test_no_home_folder(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, NAME]
    variables = {**os.environ, "SEQMILL_MODELS": "~nobody-of-this-name"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("set SEQMILL_MODELS to a folder of yours")


def test_the_facts_of_the_package() -> None:
    releases = read_releases()
    assert list(releases) == NAMES
    for name, release in releases.items():
        for source in release.sources:
            assert (source.url is None) != (source.repository is None)
            assert source.url is None or source.url.startswith("https://")
            assert source.repository is None or re.fullmatch("[0-9a-f]{40}", source.commit)
            for found in source.files.values():
                for digest, length in ((found.sha256, 64), (found.git_sha1, 40), (found.md5, 32)):
                    assert re.fullmatch(f"([0-9a-f]{{{length}}})?", digest)
        files = list(release.files)
        assert (files == [f"{name}.pt"]) == (name in ESM2_MODELS)
        assert not any(file.endswith(".index.json") for file in files[:-1])  # it is renamed last
        unpinned = [file for file, found in release.files.items() if not found.is_pinned]
        expected = {"prott5_xl_u50": ["config.json"], "prostt5": ["config.json", "pytorch_model.bin"]}
        assert unpinned == expected.get(name, [])
    tested = [name for name, release in releases.items() if release.published]
    assert tested == [NAME, "esm2_t36_3B_UR50D", "esmc_300m", "esmc_600m", "esmc_6b", "prott5_xl_u50", "dnabert_s"]
    (case,) = releases[NAME].published.cases
    assert len(case.tokens) == len(case.sequence) + 2
