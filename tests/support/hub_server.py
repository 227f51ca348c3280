"""A server on this machine that speaks the part of the Hugging Face Hub's API by which models are downloaded."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from urllib.parse import urlsplit

COMMIT = "0123456789" * 4
# What the Hub answers for a model that it does not show: status, and the code in its header.
GATED, FORBIDDEN, MISSING = (401, "GatedRepo"), (403, "GatedRepo"), (404, "RepoNotFound")


class HubServer(ThreadingHTTPServer):
    """Serves models by owner/name.

    Attributes:
        models: each model's files, name to bytes.
        refusals: models that are refused, with their status and error code. A gated model's files are listed, but not
            sent, as by the Hub.
        troubles: HTTP statuses for the next requests about models.
        cuts: the number of files whose sending ends in the middle.
        stated: digests that are stated instead of a file's own, by its name.
        ranges: the Range header of each request for a file's bytes, empty if it has none.
        asked: the method and path of every request.
        url: for HF_ENDPOINT.
    """

    daemon_threads = True

    def __init__(self, models: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.models = {name: dict(files) for name, files in models.items()}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.troubles: list[int] = []
        self.cuts = 0
        self.stated: dict[str, str] = {}
        self.ranges: list[str] = []
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def sent(self) -> list[str]:
        """The files whose bytes were asked for, sorted."""
        return sorted(path.rpartition(f"/resolve/{COMMIT}/")[2] for path in self.asked if path.startswith("GET /o"))


class _Answer(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.asked.append(f"{self.command} {path}")
        if hub.troubles and path.startswith("/api/models/"):
            self.reply(hub.troubles.pop(0), b"", {})
            return
        is_listing = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/").removeprefix("/").split("/")
        model = f"{owner}/{name}"
        files = hub.models.get(model)
        status, code = hub.refusals.get(model, (200, ""))
        if files is None:
            status, code = MISSING
        if status == 404 or (code and not is_listing):
            self.reply(status, b"", {"X-Error-Code": code})
        elif not is_listing:
            self.send_file("/".join(rest[2:]), files)
        elif "tree" in rest:
            listed = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            self.reply(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        else:
            siblings = [{"rfilename": file} for file in files]
            information = {"_id": "1", "id": model, "modelId": model, "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(information).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, files: Mapping[str, bytes]) -> None:
        if name not in files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = files[name]
        digest = self.server.stated.get(name, hashlib.sha256(content).hexdigest())
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        hub, wanted, total = self.server, self.headers.get("Range", ""), len(content)
        if self.command == "HEAD":
            self.reply(200, content, headers)
            return
        hub.ranges.append(wanted)
        if first := int(wanted.removeprefix("bytes=").removesuffix("-") or 0):
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        if hub.cuts:
            hub.cuts -= 1
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(total - first))
            self.end_headers()
            self.wfile.write(content[first : (first + total) // 2])
            self.close_connection = True
            return
        self.reply(206 if first else 200, content[first:], headers)

    def reply(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served_models(models: Mapping[str, Mapping[str, bytes]]) -> Iterator[HubServer]:
    """Serve models until the block ends."""
    with HubServer(models) as server, running(server):
        yield server


@contextmanager
def running(server: BaseServer) -> Iterator[None]:
    """Let a server answer in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
