"""Bundles published to nginx as Debian ships it, and fetched from it again."""

from __future__ import annotations

import os
import shutil
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
from vdibuild.errors import BundleError, HostError, StoreError
from vdibuild.settings.keys import Keys
from vdibuild.store import SIGNATURE, SUMS

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


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(signing=tmp_path / "keys/key")


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (ARCHIVE, DESCRIPTION))


@pytest.mark.parametrize("kind", ["web", "directory"])
def test_published_and_fetched(kind: str, server: Server, bundled: Path, tmp_path: Path, keys: Keys) -> None:
    place = server.url if kind == "web" else str(tmp_path / "repository")
    with pytest.raises(BundleError, match="there is no bundle small"):
        repository.get(place, "small", tmp_path / "back")
    repository.publish(bundled, place, keys)
    repository.get(place, "small", tmp_path / "back")
    assert same(bundled, tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {ARCHIVE, DESCRIPTION, SUMS, SIGNATURE}
    repository.publish(bundled, place, keys)  # it is there: nothing to do
    if kind == "web":
        methods = [line.split('"')[1].split()[0] for line in server.requests()]
        assert methods.count("PUT") == 4
    assert repository.signed(place, "small", keys) == repository.get(place, "small", tmp_path / "again")
    other = tmp_path / "other"
    packing.pack(tmp_path / "tree/etc", other, accelerator="tcg", name="small")
    with pytest.raises(BundleError, match="another bundle small is in"):
        repository.publish(other, place, keys)


def test_a_download_that_broke_off_goes_on(server: Server, bundled: Path, tmp_path: Path, keys: Keys) -> None:
    described = repository.publish(bundled, server.url, keys)
    whole = (bundled / ARCHIVE).read_bytes()
    part = tmp_path / "back/.download" / described.sha256 / f"{ARCHIVE}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[: 3 << 20])
    repository.get(server.url, "small", tmp_path / "back")
    assert same(bundled, tmp_path / "back")
    fetched = [line for line in server.requests() if f"GET /bundles/small/{ARCHIVE}" in line]
    assert f" 206 {len(whole) - (3 << 20)} " in fetched[-1]


def test_a_changed_archive_is_not_published(server: Server, bundled: Path, keys: Keys) -> None:
    with (bundled / ARCHIVE).open("r+b") as file:
        file.seek(100)
        file.write(b"changed")
    with pytest.raises(BundleError, match=f"{ARCHIVE} is not what"):
        repository.publish(bundled, server.url, keys)
    assert list((server.directory / "files/bundles").iterdir()) == []


def test_a_server_that_was_changed_is_found_out(
    server: Server, bundled: Path, tmp_path: Path, keys: Keys
) -> None:
    described = repository.publish(bundled, server.url, keys)
    stored = server.directory / "files/bundles/small" / ARCHIVE
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="another file") as caught:
        repository.get(server.url, "small", tmp_path / "back")
    assert described.sha256 in str(caught.value)
    assert hashing.of_file(stored) in str(caught.value)


def test_a_server_that_takes_no_files_says_what_to_do(server: Server, bundled: Path, keys: Keys) -> None:
    url = server.url.removesuffix("/bundles")
    with pytest.raises(BundleError, match="answers 405") as caught:
        repository.publish(bundled, url, keys)
    assert "dav_methods" in caught.value.hint


def test_no_server_and_no_password_in_the_url(bundled: Path, keys: Keys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(HostError, match="does not answer"):
        repository.publish(bundled, f"http://127.0.0.1:{port}", keys)
    with pytest.raises(BundleError, match="holds a password") as caught:
        repository.publish(bundled, "http://me:secret@127.0.0.1/bundles", keys)
    assert "secret" not in str(caught.value)


def test_what_nobody_vouches_for(bundled: Path, tmp_path: Path, keys: Keys) -> None:
    place = tmp_path / "repository"
    stranger = Keys(signing=tmp_path / "stranger/key")
    repository.publish(bundled, str(place), stranger)
    with pytest.raises(StoreError, match="no signature can be checked"):
        repository.signed(str(place), "small", keys)
    (place / "small" / SIGNATURE).unlink()
    with pytest.raises(BundleError, match=f"is not signed: {SIGNATURE} is missing"):
        repository.signed(str(place), "small", stranger)
    # Published again it is.
    repository.publish(bundled, str(place), stranger)
    described = repository.signed(str(place), "small", stranger)
    shutil.copytree(place / "small", place / "newer")
    with pytest.raises(BundleError, match=r"the bundle newer in [^ ]+ is small"):
        repository.signed(str(place), "newer", stranger)
    file = place / "small" / DESCRIPTION
    file.write_text(file.read_text().replace(described.sha256, "0" * 64))
    with pytest.raises(BundleError, match=rf"{DESCRIPTION} of small in [^ ]+ is not what"):
        repository.signed(str(place), "small", stranger)
