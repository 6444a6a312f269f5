"""A mirror on loopback that keeps what it fetched and counts what it hands out.

Every builder that is measured gets its packages from here, so that none depends on how fast the real
mirror happened to answer, and all see the same state of the archives.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_STATE_SECONDS = 12 * 3600
"""How long an archive's indices are kept; its packages never change."""

_TIMEOUT = 60


@dataclass
class Traffic:
    """What was handed out since the last reset, in bytes: packages, and indices and the like.

    fetched: requests that had to go to the real mirror.
    """

    requests: int = 0
    packages: int = 0
    indices: int = 0
    fetched: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: str, size: int) -> None:
        """An answer to a request for `path` with `size` bytes of content."""
        with self._lock:
            self.requests += 1
            if "/pool/" in path:
                self.packages += size
            else:
                self.indices += size

    def missed(self) -> None:
        """A request that was not kept yet."""
        with self._lock:
            self.fetched += 1

    def reset(self) -> None:
        """Count from nothing again."""
        with self._lock:
            self.requests = self.packages = self.indices = self.fetched = 0


@dataclass(frozen=True)
class Mirror:
    """A running mirror. urls: for each name of an archive, where it is here."""

    urls: dict[str, str]
    traffic: Traffic


@contextlib.contextmanager
def serving(archives: Mapping[str, str], store: Path) -> Iterator[Mirror]:
    """Serve archives for as long as the block runs.

    archives: URLs of the real ones, by a name of one path component. store: a directory that keeps what
    was fetched between runs.
    """
    traffic = Traffic()

    class Handler(_Handler):
        pass

    Handler.archives = {name: url.rstrip("/") for name, url in archives.items()}
    Handler.store = store
    Handler.traffic = traffic
    Handler.absent = set()
    _forget_states(store)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        yield Mirror({name: f"{base}/{name}" for name in archives}, traffic)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _forget_states(store: Path) -> None:
    """Indices that have become old are fetched anew, all of an archive's at once: they belong together."""
    for directory in store.glob("*/dists/*"):
        if time.time() - directory.stat().st_mtime > _STATE_SECONDS:
            shutil.rmtree(directory)


class _Handler(BaseHTTPRequestHandler):
    archives: dict[str, str]
    store: Path
    traffic: Traffic
    absent: set[str]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(content=True)

    def do_HEAD(self) -> None:
        self._answer(content=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is shown."""

    def _answer(self, content: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        unknown = parts[0] not in self.archives or any(part in ("", ".", "..") for part in parts)
        if unknown or path in self.absent:
            self._empty(HTTPStatus.NOT_FOUND)
            return
        kept = self.store.joinpath(*parts)
        if not kept.is_file():
            self.traffic.missed()
            status = self._fetch(f"{self.archives[parts[0]]}/{'/'.join(parts[1:])}", kept)
            if status != HTTPStatus.OK:
                if status == HTTPStatus.NOT_FOUND:
                    self.absent.add(path)
                self._empty(status)
                return
        modified = self.date_time_string(int(kept.stat().st_mtime))
        if self.headers.get("If-Modified-Since") == modified:
            self._empty(HTTPStatus.NOT_MODIFIED)
            return
        with kept.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Length", str(size))
            self.send_header("Last-Modified", modified)
            self.end_headers()
            if content:
                self.wfile.flush()
                self.connection.sendfile(file)
                self.traffic.add(self.path, size)

    def _empty(self, status: int) -> None:
        self.traffic.add(self.path, 0)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _fetch(self, url: str, kept: Path) -> int:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                urllib.request.urlopen(url, timeout=_TIMEOUT) as source,  # noqa: S310 (the archive's URL)
                tempfile.NamedTemporaryFile(dir=kept.parent, prefix=".fetch-") as target,
            ):
                shutil.copyfileobj(source, target)
                target.flush()
                if changed := source.headers.get("Last-Modified"):
                    when = email.utils.parsedate_to_datetime(changed).timestamp()
                    os.utime(target.name, (when, when))
                with contextlib.suppress(FileExistsError):  # another request was quicker
                    os.link(target.name, kept)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return HTTPStatus.BAD_GATEWAY
        return HTTPStatus.OK
