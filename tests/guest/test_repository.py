"""Bundles published to nginx as Debian ships it, and fetched from it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdibuild import hashing, packing, repository
from vdibuild.bundle import ARCHIVE, DESCRIPTION
from vdibuild.errors import BundleError, HostError

CONFIGURATION = """\
daemon off;
pid {directory}/pid;
error_log {directory}/errors;
events {{}}
http {{
  access_log {directory}/requests;
  client_body_temp_path {directory}/body;
  client_max_body_size 0;
  server {{
    listen 127.0.0.1:{port};
    root {directory}/files;
    location /bundles/ {{ dav_methods PUT MKCOL; dav_access user:rw group:r all:r; }}
  }}
}}
"""


@dataclass(frozen=True)
class Server:
    url: str
    directory: Path

    def requests(self) -> list[str]:
        return (self.directory / "requests").read_text().splitlines()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    directory = tmp_path / "nginx"
    (directory / "files/bundles").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = directory / "nginx.conf"
    file.write_text(
        "user root;\n" * (os.geteuid() == 0) + CONFIGURATION.format(directory=directory, port=port)
    )
    nginx = subprocess.Popen(["nginx", "-p", directory, "-e", directory / "errors", "-c", file])
    try:
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < end and nginx.poll() is None, (directory / "errors").read_text()
        yield Server(f"http://127.0.0.1:{port}/bundles", directory)
    finally:
        nginx.send_signal(signal.SIGQUIT)
        nginx.wait(10)


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/random").write_bytes(os.urandom(5 << 20))
    packing.pack(tree, tmp_path / "small", accelerator="tcg")
    return tmp_path / "small"


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (ARCHIVE, DESCRIPTION))


@pytest.mark.parametrize("kind", ["web", "directory"])
def test_published_and_fetched(kind: str, server: Server, bundled: Path, tmp_path: Path) -> None:
    place = server.url if kind == "web" else str(tmp_path / "repository")
    with pytest.raises(BundleError, match="there is no bundle small"):
        repository.get(place, "small", tmp_path / "back")
    repository.publish(bundled, place)
    repository.get(place, "small", tmp_path / "back")
    assert same(bundled, tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {ARCHIVE, DESCRIPTION}
    repository.publish(bundled, place)  # it is there: nothing to do
    if kind == "web":
        methods = [line.split('"')[1].split()[0] for line in server.requests()]
        assert methods.count("PUT") == 2
    other = tmp_path / "other"
    packing.pack(tmp_path / "tree/etc", other, accelerator="tcg", name="small")
    with pytest.raises(BundleError, match="another bundle small is in"):
        repository.publish(other, place)


def test_a_download_that_broke_off_goes_on(server: Server, bundled: Path, tmp_path: Path) -> None:
    described = repository.publish(bundled, server.url)
    whole = (bundled / ARCHIVE).read_bytes()
    part = tmp_path / "back/.download" / described.sha256 / f"{ARCHIVE}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[: 3 << 20])
    repository.get(server.url, "small", tmp_path / "back")
    assert same(bundled, tmp_path / "back")
    fetched = [line for line in server.requests() if f"GET /bundles/small/{ARCHIVE}" in line]
    assert f" 206 {len(whole) - (3 << 20)} " in fetched[-1]


def test_a_changed_archive_is_not_published(server: Server, bundled: Path) -> None:
    with (bundled / ARCHIVE).open("r+b") as file:
        file.seek(100)
        file.write(b"changed")
    with pytest.raises(BundleError, match=f"{ARCHIVE} is not what"):
        repository.publish(bundled, server.url)
    assert list((server.directory / "files/bundles").iterdir()) == []


def test_a_server_that_was_changed_is_found_out(server: Server, bundled: Path, tmp_path: Path) -> None:
    described = repository.publish(bundled, server.url)
    stored = server.directory / "files/bundles/small" / ARCHIVE
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="another file") as caught:
        repository.get(server.url, "small", tmp_path / "back")
    assert described.sha256 in str(caught.value)
    assert hashing.of_file(stored) in str(caught.value)


def test_a_server_that_takes_no_files_says_what_to_do(server: Server, bundled: Path) -> None:
    url = server.url.removesuffix("/bundles")
    with pytest.raises(BundleError, match="answers 405") as caught:
        repository.publish(bundled, url)
    assert "dav_methods" in caught.value.hint


def test_no_server_and_no_password_in_the_url(bundled: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(HostError, match="does not answer"):
        repository.publish(bundled, f"http://127.0.0.1:{port}")
    with pytest.raises(BundleError, match="holds a password") as caught:
        repository.publish(bundled, "http://me:secret@127.0.0.1/bundles")
    assert "secret" not in str(caught.value)
