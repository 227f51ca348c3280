"""Downloads a file over https with huggingface_hub: resumes a broken connection, gives up a slow one.

The library would try again at once, or after a second. Our client hides transient trouble from it, so that
`fetch.retry` decides.
"""

import ipaddress
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import get_hf_file_metadata, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from seqmill.errors import SeqmillError
from seqmill.fetch.retry import Patience, Transient, seconds_asked

PROGRESS_SECONDS = 10.0
TROUBLES = (Transient, HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL)

log = logging.getLogger(__name__)


class Unreachable(SeqmillError):
    """The server can't be reached, lacks the file, or is too slow; another server may have it."""


@dataclass(frozen=True)
class Pace:
    """The slowest connection that is accepted, and the waits before another try."""

    bytes_per_second: float = 10_000
    seconds: float = 60.0  # over which the rate is measured, and how long a server may take to begin its answer
    patience: Patience = field(default_factory=Patience)


def download(url: str, part: Path, size: int | None, pace: Pace) -> None:
    """Download a file, continuing from the bytes that `part` has already; its content is not checked.

    `part` keeps what was received, also after an error. `size` is that of the whole file in bytes, if known.

    Raises:
        Unreachable: no network, not on the server, or too slow.
        SeqmillError: not https (or http on this machine), not the expected size, or `part` can't be written.
    """
    with _client_of(pace):
        _download(url, part, size, pace.patience)


def stated_on_hub(url: str, pace: Pace) -> tuple[int | None, str]:
    """Return a file's size and digest as Hugging Face states them: SHA-256 of a large file, else SHA-1 of a git blob.

    Raise an Unreachable or a SeqmillError as `download`.
    """
    with _client_of(pace):
        while True:
            try:
                with _alarm():
                    found = get_hf_file_metadata(url)
                return found.size, found.etag or ""
            except TROUBLES as error:
                _wait_or_give_up(url, error, pace.patience)


def _download(url: str, part: Path, size: int | None, patience: Patience) -> None:
    most = _bytes_of(part)
    while True:
        try:
            _receive(url, part, size)
            return
        except TROUBLES as error:
            if isinstance(error, Transient) and _bytes_of(part) > most:
                most = _bytes_of(part)
                patience.renew()
            try:
                _wait_or_give_up(url, error, patience)
            except Unreachable:
                if part.exists() and not part.stat().st_size:
                    part.unlink()
                raise


def _wait_or_give_up(url: str, error: Exception, patience: Patience) -> None:
    """Wait before another try; raise an Unreachable if it would be in vain."""
    if isinstance(error, Transient):
        reason, is_hopeless = str(error), not patience.wait(url, error)
    elif isinstance(error, HfHubHTTPError):
        reason, is_hopeless = _answer(error.response), True
    else:
        reason, is_hopeless = str(error) or type(error).__name__, True
    if is_hopeless:
        raise Unreachable(f"cannot fetch {url}: {reason}")


def _receive(url: str, part: Path, size: int | None) -> None:
    """Append to `part` what is missing; raise a Transient if it is worth another try."""
    have = _bytes_of(part)
    if size is not None and have > size:
        part.unlink()  # of another file
        have = 0
    try:
        with part.open("ab") as file, _alarm():
            http_get(url, file, resume_size=have, expected_size=size)
    except HfHubHTTPError as error:
        if error.response.status_code != 416:  # nothing is left to send
            raise
        if error.response.headers.get("Content-Range", "").rpartition("/")[2] != str(have):
            part.unlink()
            raise Transient(_answer(error.response)) from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the network
            raise SeqmillError(f"{part}: cannot be written: {error.strerror}") from error
        if size is None:
            raise Transient("the connection ended early") from error
        came = _bytes_of(part)
        part.unlink()
        raise SeqmillError(
            f"{url}: the download has {came:,} bytes, not {size:,} as published; it was removed"
        ) from error


def _bytes_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _answer(response: httpx2.Response) -> str:
    return f"the server answers {response.status_code} {response.reason_phrase}"


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
    hooks: dict[str, list[Callable[..., None]]] = {
        "request": [_require_https, partial(_set_alarm, pace.seconds)],
        "response": [partial(_set_alarm, 0.0), _refuse_trouble, _refuse_downgrade, partial(_set_pace, pace)],
    }
    return _Client(follow_redirects=True, event_hooks=hooks)


class _Client(httpx2.Client):
    def send(self, *arguments: Any, **options: Any) -> httpx2.Response:  # noqa: ANN401
        try:
            return super().send(*arguments, **options)
        except httpx2.TransportError as error:
            raise trouble_of(error) from error


def trouble_of(error: httpx2.TransportError) -> Exception:
    """Return an error of the network as a Transient if it may pass, else the error itself."""
    is_transient = isinstance(error, httpx2.TimeoutException | httpx2.NetworkError | httpx2.RemoteProtocolError)
    if not is_transient or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return error
    return Transient(str(error) or type(error).__name__, isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout))


def is_trouble(status: int) -> bool:
    """Return whether a server that answers this HTTP status may answer otherwise later."""
    return status in (408, 429) or status >= 500


def _refuse_trouble(response: httpx2.Response) -> None:
    if is_trouble(response.status_code):
        raise Transient(_answer(response), asked=seconds_asked(response.headers))


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
        try:
            yield from self._paced()
        except httpx2.TransportError as error:
            raise trouble_of(error) from error

    def _paced(self) -> Iterator[bytes]:
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
