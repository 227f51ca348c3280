"""Fetching weights: resumed where a download broke, checked before they get their name."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from seqpack.errors import SeqpackError
from seqpack.files import fsync
from seqpack.models.registry import (
    DNABERT_MODELS,
    DNABERT_S,
    MODELS,
    NAMES,
    PICKLED_WEIGHTS,
    RELEASED_FILES,
    ModelSource,
)

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/fair-esm/models"
FOLDER_URLS = {
    "dnabert_s": "https://huggingface.co/zhihan1996/DNABERT-S/resolve/main",
    "dnabert_2": "https://huggingface.co/zhihan1996/DNABERT-2-117M/resolve/main",
}
URL_VARIABLE = "SEQPACK_WEIGHTS_URL"  # a mirror, for sites without internet
TIMEOUT_SECONDS = 60
TRIES = 5
READ_BYTES = 1 << 20
PROGRESS_SECONDS = 10.0

log = logging.getLogger(__name__)


def fetch_weights(name: str, output: Path) -> None:
    """Fetch a released model's weights, unless they are there already: ESM-2's file, or DNABERT's folder of files.

    What has been received is kept as OUTPUT.part, and the next call goes on from there. It is checked
    (length, the archive's CRCs, that it loads as the named model) before it is renamed.

    Args:
        name: a name of the registry.
        output: the .pt file to write, or the folder for the files.

    Raises:
        SeqpackError: unknown name, no network, not on the server, or not what was expected.
    """
    if name not in NAMES:
        raise SeqpackError(f"model {name!r} is not one that can be fetched; there are {', '.join(NAMES)}")
    mirror = os.environ.get(URL_VARIABLE)
    part = output.with_name(output.name + ".part")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(output.with_name(f".{output.name}.lock")):
        if name in MODELS:
            url = WEIGHTS_URL if mirror is None else mirror
            _fetch_file(name, f"{url.rstrip('/')}/{name}.pt", part, output)
        else:
            url = FOLDER_URLS[name] if mirror is None else f"{mirror.rstrip('/')}/{name}"
            _fetch_folder(name, url, part, output)


def _fetch_file(name: str, url: str, part: Path, output: Path) -> None:
    if output.exists():
        log.info("%s is there already", output)
        return
    log.info("fetching %s", url)
    _download(url, part, output)
    try:
        _check_archive(part)
        _check_model(ModelSource(name, "released", MODELS[name], part))
    except SeqpackError:
        part.unlink()  # going on from a bad file would only make a longer bad one
        raise
    _move(part, output)


def _fetch_folder(name: str, url: str, part: Path, output: Path) -> None:
    """Fetch files into the folder `part`; those that `output` has already count as they are."""
    there = [file for file in RELEASED_FILES if (output / file).exists()]
    if len(there) == len(RELEASED_FILES):
        log.info("%s is there already", output)
        return
    part.mkdir(exist_ok=True)
    for file in there:
        (part / file).unlink(missing_ok=True)
        (part / file).symlink_to((output / file).resolve())  # that the check sees a whole model
    for file in RELEASED_FILES:
        if not (part / file).exists():
            _fetch_member(f"{url}/{file}", part / f"{file}.part", output / file)
            (part / f"{file}.part").replace(part / file)
    try:
        _check_model(ModelSource(name, "released", DNABERT_MODELS[name], part, DNABERT_S))
    except SeqpackError:
        shutil.rmtree(part)
        raise
    output.mkdir(exist_ok=True)
    for file in RELEASED_FILES:
        if file not in there:
            _move(part / file, output / file)
    shutil.rmtree(part)


def _fetch_member(url: str, part: Path, output: Path) -> None:
    log.info("fetching %s", url)
    _download(url, part, output)
    try:
        if part.stem == PICKLED_WEIGHTS:
            _check_archive(part)
        else:
            _check_json(part)
    except SeqpackError:
        part.unlink()
        raise


def _move(part: Path, output: Path) -> None:
    fsync(part)
    part.replace(output)
    fsync(output.parent)
    log.info("%s: %d bytes, checked", output, output.stat().st_size)


def _download(url: str, part: Path, output: Path) -> None:
    """Receive until the length that the server has announced, over several connections if need be."""
    for attempt in range(1, TRIES + 1):
        try:
            if _receive(url, part):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise SeqpackError(f"{url}: the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:  # ValueError: no URL at all
            reason = str(getattr(error, "reason", error))
            if not part.exists():
                break  # nothing was ever received: no network, most likely
        log.warning("attempt %d of %d: %s; %d bytes so far", attempt, TRIES, reason, _size(part))
        if attempt < TRIES:
            time.sleep(min(2**attempt, 30) * 0.1)
    raise SeqpackError(
        f"cannot fetch {url}: {reason}. Run `snakemake fetch_models` where there is internet, "
        f"or put the file at {output}, or set {URL_VARIABLE} to a mirror"
    )


def _receive(url: str, part: Path) -> bool:
    """Append to `part` what the server still has; return whether that is all."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the range is empty: all was received, or too much
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return True
            part.unlink()
            return False
        raise
    with response:
        if have and response.status != 206:
            have = 0  # the server does not resume
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        said = time.monotonic()
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(READ_BYTES):
                try:
                    file.write(chunk)
                except OSError as error:  # not the network's fault: most likely the disk is full
                    raise SeqpackError(f"{part}: cannot be written: {error.strerror}") from error
                have += len(chunk)
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("%d of %s bytes", have, total if total is not None else "unknown")
    return total is None or have == total


def _check_archive(part: Path) -> None:
    if not zipfile.is_zipfile(part):
        return  # the older form of torch.save, or no weights at all: loading them will tell
    try:
        with zipfile.ZipFile(part) as archive:
            member = archive.testzip()
        damage = f"{member} fails its CRC" if member else ""
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, struct.error, zlib.error) as error:
        damage = str(error)  # the archive's directory itself
    if damage:
        raise SeqpackError(f"{part}: damaged on the way ({damage}); it was removed, fetch it again")


def _check_json(part: Path) -> None:
    try:
        json.loads(part.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SeqpackError(f"{part}: what was fetched is no JSON and was removed: {error}") from error


def _check_model(source: ModelSource) -> None:
    from seqpack.models.weights import open_weights

    try:
        architecture, _ = open_weights(source)
        if source.tokenizer:
            from seqpack.bpe import BpeTokenizer

            BpeTokenizer.from_file(source.tokenizer, architecture.vocabulary)
    except SeqpackError as error:
        raise SeqpackError(f"what was fetched is not {source.name} and was removed: {error}") from error


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Wait until no other process fetches the same file."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
