"""Receiving a file over https with huggingface_hub: resumed where it broke, given up where it is too slow."""

from __future__ import annotations

import ipaddress
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars

from seqmill.errors import SeqmillError

TRIES = 3  # of a server in trouble; broken connections the library resumes by itself, five times without progress
PROGRESS_SECONDS = 10.0

log = logging.getLogger(__name__)


class Unreachable(SeqmillError):
    """A server that can't be reached, lacks the file, or is too slow: another one may have it."""


@dataclass(frozen=True)
class Pace:
    """The rate below which a connection is given up, so that one that drips does not hold a run up for days.

    Attributes:
        bytes_per_second: the least.
        seconds: over which it is measured, and how long a server may take to begin its answer.
    """

    bytes_per_second: float = 10_000
    seconds: float = 60.0


def download(url: str, part: Path, size: int | None, pace: Pace) -> None:
    """Receive a file, going on from what `part` has already.

    Only https is spoken, but for servers of this machine. What is received is not judged here.

    Args:
        url: of the file.
        part: to write to; what was received stays there whatever happens.
        size: of the whole file in bytes, if known.
        pace: when to give a connection up.

    Raises:
        Unreachable: no network, not on the server, or too slow.
        SeqmillError: another scheme than https, another size than expected; `part` can't be written.
    """
    disable_progress_bars()
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").handlers.clear()  # its warnings go to our log as well
    set_client_factory(partial(_client, pace))
    for attempt in range(1, TRIES + 1):
        try:
            have = part.stat().st_size if part.exists() else 0
            if size is not None and have > size:
                part.unlink()  # of another file
                have = 0
            with part.open("ab") as file, _alarm():
                http_get(url, file, resume_size=have, expected_size=size)
            return
        except HfHubHTTPError as error:
            status = error.response.status_code
            reason = f"the server answers {status} {error.response.reason_phrase}"
            if status == 416:  # what is there is as long as the file, or longer
                if error.response.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return
                part.unlink()
            elif status < 500:
                break
        except OSError as error:
            if error.errno is not None:  # not the network's fault: most likely the disk is full
                raise SeqmillError(f"{part}: cannot be written: {error.strerror}") from error
            if size is not None:
                came = part.stat().st_size
                part.unlink()
                reason = f"what came has {came:,} bytes, not {size:,} as published"
                raise SeqmillError(f"{url}: {reason}; it was removed") from error
            reason = "the connection ended early"
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            break
        except httpx2.InvalidURL as error:
            reason = str(error)
            break
        log.warning("attempt %d of %d: %s: %s", attempt, TRIES, url, reason)
        time.sleep(attempt / 2)
    if part.exists() and not part.stat().st_size:
        part.unlink()
    raise Unreachable(f"cannot fetch {url}: {reason}")


def _client(pace: Pace) -> httpx2.Client:
    hooks = {
        "request": [_require_https, partial(_set_alarm, pace.seconds)],
        "response": [partial(_set_alarm, 0.0), _refuse_downgrade, partial(_set_pace, pace)],
    }
    return httpx2.Client(follow_redirects=True, event_hooks=hooks)


@contextmanager
def _alarm() -> Iterator[None]:
    """Let `_set_alarm` end what this thread waits for: the library's own timeouts begin anew with each byte."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there Python handles signals
        return
    before = signal.signal(signal.SIGALRM, _too_late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_late(*_: object) -> None:
    raise httpx2.ReadTimeout("the server took too long to begin its answer")


def _set_alarm(seconds: float, _: object) -> None:
    if signal.getsignal(signal.SIGALRM) is _too_late:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _require_https(request: httpx2.Request) -> None:
    if request.url.scheme == "http" and not _is_loopback(request.url.host):
        raise SeqmillError(f"{request.url}: weights are fetched over https only; give an address that begins so")


def _refuse_downgrade(response: httpx2.Response) -> None:
    target = response.headers.get("Location", "")
    if response.is_redirect and response.url.scheme == "https" and target.lower().startswith("http:"):
        raise SeqmillError(f"{response.url}: redirects to {target}, which is not https; it was not followed")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _set_pace(pace: Pace, response: httpx2.Response) -> None:
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _PacedStream(response.stream, pace)


class _PacedStream(httpx2.SyncByteStream):
    """A body that ends with a timeout when fewer bytes come than `pace` says."""

    def __init__(self, stream: httpx2.SyncByteStream, pace: Pace) -> None:
        self._stream, self._pace = stream, pace

    def __iter__(self) -> Iterator[bytes]:
        begun = said = time.monotonic()
        recent = total = 0
        for chunk in self._stream:
            recent, total = recent + len(chunk), total + len(chunk)
            now = time.monotonic()
            if now - begun >= self._pace.seconds:
                rate = recent / (now - begun)
                if rate < self._pace.bytes_per_second:
                    raise httpx2.ReadTimeout(
                        f"only {rate:,.0f} bytes a second came, and less than {self._pace.bytes_per_second:,.0f} is "
                        "given up"
                    )
                begun, recent = now, 0
            if now - said > PROGRESS_SECONDS:
                said = now
                log.info("%d bytes received", total)
            yield chunk

    def close(self) -> None:
        self._stream.close()
