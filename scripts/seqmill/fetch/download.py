"""Downloads a file over https with huggingface_hub: resumes a broken connection, gives up a slow one."""

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
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from seqmill.errors import SeqmillError

TRIES = 3  # when the server fails; the library itself resumes a broken connection, five times without progress
PROGRESS_SECONDS = 10.0

log = logging.getLogger(__name__)


class Unreachable(SeqmillError):
    """The server can't be reached, lacks the file, or is too slow; another server may have it."""


@dataclass(frozen=True)
class Pace:
    """The slowest connection that is accepted."""

    bytes_per_second: float = 10_000
    seconds: float = 60.0  # over which the rate is measured, and how long a server may take to begin its answer


def download(url: str, part: Path, size: int | None, pace: Pace) -> None:
    """Download a file, continuing from the bytes that `part` has already; its content is not checked.

    `part` keeps what was received, also after an error. `size` is that of the whole file in bytes, if known.

    Raises:
        Unreachable: no network, not on the server, or too slow.
        SeqmillError: not https (or http on this machine), not the expected size, or `part` can't be written.
    """
    with _client_of(pace):
        _download(url, part, size)


def _download(url: str, part: Path, size: int | None) -> None:
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
            if status == 416:  # nothing is left to send
                if error.response.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return
                part.unlink()
            elif status < 500:
                break
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the network
                raise SeqmillError(f"{part}: cannot be written: {error.strerror}") from error
            if size is not None:
                came = part.stat().st_size
                part.unlink()
                raise SeqmillError(
                    f"{url}: the download has {came:,} bytes, not {size:,} as published; it was removed"
                ) from error
            reason = "the connection ended early"
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            break
        log.warning("attempt %d of %d: %s: %s", attempt, TRIES, url, reason)
        time.sleep(attempt / 2)
    if part.exists() and not part.stat().st_size:
        part.unlink()
    raise Unreachable(f"cannot fetch {url}: {reason}")


@contextmanager
def _client_of(pace: Pace) -> Iterator[None]:
    """Let huggingface_hub use our client and log; restore its own for other users of the library in this process."""
    with_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").handlers.clear()  # its warnings reach our log anyway
    set_client_factory(partial(_client, pace))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
        if with_bars:
            enable_progress_bars()


def _client(pace: Pace) -> httpx2.Client:
    hooks = {
        "request": [_require_https, partial(_set_alarm, pace.seconds)],
        "response": [partial(_set_alarm, 0.0), _refuse_downgrade, partial(_set_pace, pace)],
    }
    return httpx2.Client(follow_redirects=True, event_hooks=hooks)


@contextmanager
def _alarm() -> Iterator[None]:
    """Let `_set_alarm` interrupt this thread; the library's own timeouts start again with each byte."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
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
    host = request.url.host
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if request.url.scheme == "http" and not is_local:
        raise SeqmillError(f"{request.url}: weights are fetched over https only; use an https address")


def _refuse_downgrade(response: httpx2.Response) -> None:
    target = response.headers.get("Location", "")
    if response.is_redirect and response.url.scheme == "https" and target.lower().startswith("http:"):
        raise SeqmillError(f"{response.url}: redirects to {target}, which is not https; it was not followed")


def _set_pace(pace: Pace, response: httpx2.Response) -> None:
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _PacedStream(response.stream, pace)


class _PacedStream(httpx2.SyncByteStream):
    """The body of an answer; raises a timeout when it is slower than `pace`."""

    def __init__(self, stream: httpx2.SyncByteStream, pace: Pace) -> None:
        self._stream, self._pace = stream, pace

    def __iter__(self) -> Iterator[bytes]:
        measured = logged = time.monotonic()
        recent = total = 0
        for chunk in self._stream:
            recent, total = recent + len(chunk), total + len(chunk)
            now = time.monotonic()
            if now - measured >= self._pace.seconds:
                rate, least = recent / (now - measured), self._pace.bytes_per_second
                if rate < least:
                    raise httpx2.ReadTimeout(
                        f"only {rate:,.0f} bytes per second came; at least {least:,.0f} are needed"
                    )
                measured, recent = now, 0
            if now - logged > PROGRESS_SECONDS:
                logged = now
                log.info("%d bytes received", total)
            yield chunk

    def close(self) -> None:
        self._stream.close()
