"""The media cache against a real HTTP server that misbehaves, and the access of QEMU's user."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.waiting import until
from vdibuild import install, media
from vdibuild.errors import HostError, VdibuildError
from vdibuild.install import Media
from vdibuild.media import User
from vdibuild.settings.images import Install

CONTENT = os.urandom(300_000)
OTHER = os.urandom(300_000)
STRANGER = User("stranger", 4242, frozenset({4343}))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Server:
    """A server of one file. limit: bytes after which it hangs up, for each of the next answers. ranges: it
    knows them. shift: it answers with another range than asked for. status: an error for each of the next
    answers. asked: the ranges that it was asked for, "" for the whole.
    """

    url: str = ""
    content: bytes = CONTENT
    limits: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    shift: int = 0
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            state.asked.append(asked)
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            start = int(match[1]) if match and state.ranges else 0
            if start and start >= len(state.content):
                self.send_error(416)
                return
            start += state.shift if start else 0
            body = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/*")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.limits.pop(0)] if state.limits else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/media/small%20one.iso"
        yield state
        http.shutdown()
        thread.join()


def test_it_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    first = media.fetch(server.url, digest(CONTENT), tmp_path)
    assert first.read_bytes() == CONTENT
    assert first.name == "small one.iso"
    assert media.fetch(server.url, digest(CONTENT), tmp_path) == first
    assert server.asked == [""]


def test_it_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.limits = [1000, 100_000]
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=1000-", "bytes=101000-"]


def test_the_next_run_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_FIRST_PAUSE_SECONDS", 0)
    server.limits = [1000] + [0] * 20
    with pytest.raises(VdibuildError, match="broke off after 1000 of 300000 bytes") as caught:
        media.fetch(server.url, digest(CONTENT), tmp_path)
    assert str(tmp_path) in caught.value.hint
    server.limits.clear()
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=1000-"


def test_a_download_that_was_whole_but_not_verified(server: Server, tmp_path: Path) -> None:
    part = tmp_path / digest(CONTENT) / "small one.iso.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT
    assert not part.exists()


@pytest.mark.parametrize("length", [1000, len(CONTENT), len(CONTENT) + 1])
def test_a_file_that_changed_meanwhile_begins_again(server: Server, tmp_path: Path, length: int) -> None:
    part = tmp_path / digest(CONTENT) / "small one.iso.part"
    part.parent.mkdir()
    part.write_bytes((OTHER + OTHER)[:length])
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ""


def test_a_server_that_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.limits = [1000]
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT


def test_a_server_that_sends_another_range(server: Server, tmp_path: Path) -> None:
    server.limits = [1000]
    server.shift = 7
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=1000-", ""]


def test_another_file_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = OTHER
    with pytest.raises(VdibuildError, match="is another file than the site file means") as caught:
        media.fetch(server.url, digest(CONTENT), tmp_path)
    assert digest(OTHER) in caught.value.message
    assert [path.name for path in (tmp_path / digest(CONTENT)).iterdir()] == [".lock"]


def test_a_missing_file_is_said_at_once(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    with pytest.raises(VdibuildError, match="404 Not Found"):
        media.fetch(server.url, digest(CONTENT), tmp_path)
    assert server.asked == [""]


def test_a_server_that_is_down_for_a_moment(server: Server, tmp_path: Path) -> None:
    server.statuses = [503]
    assert media.fetch(server.url, digest(CONTENT), tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_FIRST_PAUSE_SECONDS", 0)
    with pytest.raises(VdibuildError, match=r"cannot be downloaded: .*refused"):
        media.fetch("http://127.0.0.1:1/a.iso", digest(CONTENT), tmp_path)


def test_two_runs_download_it_once(server: Server, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(media.fetch(server.url, digest(CONTENT), tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert server.asked == [""]


def test_what_is_cleared_while_a_run_waits_is_fetched_again(server: Server, tmp_path: Path) -> None:
    place = media.fetch(server.url, digest(CONTENT), tmp_path).parent
    results: list[Path] = []
    run = threading.Thread(target=lambda: results.append(media.fetch(server.url, digest(CONTENT), tmp_path)))
    with (place / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run.start()
        until(lambda: waits_for(place / ".lock"))
        shutil.rmtree(place)
    run.join()
    assert [file.read_bytes() for file in results] == [CONTENT]


def waits_for(lock: Path) -> bool:
    """Whether somebody waits for a lock (proc_locks(5): `->` is one that waits)."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(f":{lock.stat().st_ino} " in line for line in waiting)


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VdibuildError, match="is no http or https URL"):
        media.fetch("file:///etc/passwd", digest(CONTENT), tmp_path)


def test_a_local_medium(tmp_path: Path) -> None:
    file = tmp_path / "a.iso"
    with pytest.raises(VdibuildError, match="there is no medium"):
        media.local(file, None)
    file.write_bytes(CONTENT)
    assert media.local(file, None) == media.local(file, digest(CONTENT)) == file
    with pytest.raises(VdibuildError, match=f"its SHA-256 is {digest(CONTENT)}"):
        media.local(file, digest(OTHER))


def test_what_the_site_file_means(server: Server, tmp_path: Path) -> None:
    for name in ("a.iso", "vmlinuz", "initrd"):
        (tmp_path / name).write_bytes(CONTENT)

    def obtained(**settings: object) -> Media:
        return install.obtain(Install.model_validate(settings), tmp_path, tmp_path / "cache")

    assert obtained(location="a.iso") == Media(f"{tmp_path}/a.iso")
    assert obtained(kernel="vmlinuz", initrd="initrd") == Media(
        "", f"{tmp_path}/vmlinuz", f"{tmp_path}/initrd"
    )
    assert obtained(location="a.iso", kernel="vmlinuz", initrd="initrd").kernel == "vmlinuz"
    tree = f"{server.url}/os/"
    assert obtained(location=tree) == Media(tree)
    assert server.asked == []
    fetched = obtained(location=server.url, sha256=digest(CONTENT))
    assert Path(fetched.location).read_bytes() == CONTENT
    with pytest.raises(VdibuildError, match="there is no medium"):
        obtained(kernel="vmlinuz", initrd="missing")


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A file that a stranger cannot reach, for want of x on one directory only."""
    # pytest's own directories are closed as well.
    directory = tmp_path / "a home" / "inner"
    directory.mkdir(parents=True)
    for place in directory.parents:
        if place.stat().st_uid == os.geteuid() and not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o001)
    (tmp_path / "a home").chmod(0o700)
    file = directory / "a.iso"
    file.touch()
    return file


def test_the_mend_is_the_exact_command(closed: Path) -> None:
    home = closed.parents[1]
    with pytest.raises(HostError, match="runs as stranger, which cannot reach") as caught:
        media.check_access([closed], STRANGER)
    assert caught.value.hint == f"let it pass through: setfacl -m u:stranger:x '{home}'"
    subprocess.run(["setfacl", "-m", f"u:{STRANGER.number}:x", home], check=True)
    media.check_access([closed], STRANGER)


def test_one_user_is_admitted(closed: Path) -> None:
    who = User(str(STRANGER.number), STRANGER.number, STRANGER.groups)
    media.admit(closed.parents[1], who)
    media.check_access([closed], who)
    with pytest.raises(HostError, match="cannot reach"):
        media.check_access([closed], User("another", 4243, frozenset()))


@pytest.mark.parametrize(
    ("access_list", "may"),
    [
        ("u:4242:x", True),
        ("u:4242:r", False),
        ("u:4242:x,m::r", False),
        ("u:4242:-,o::x", True),  # an empty mask: the kernel does not look at the list
        ("u:4242:-,m::r,o::x", False),
        ("g:4343:x", True),
        ("g:4343:r,o::x", False),
        ("u:1:x", False),
        ("o::x", True),
    ],
)
def test_access_lists_are_read_as_the_kernel_does(closed: Path, access_list: str, may: bool) -> None:
    subprocess.run(["setfacl", "-m", access_list, closed.parents[1]], check=True)
    assert media._may_search(closed.parents[1], STRANGER) is may
    if os.geteuid() == 0:
        seen = subprocess.run(
            ["setpriv", "--reuid=4242", "--regid=4343", "--clear-groups", "test", "-e", closed], check=False
        )
        assert (seen.returncode == 0) is may


def test_links_are_followed_to_where_they_lead(closed: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.iso"
    link.symlink_to(closed)
    with pytest.raises(HostError, match="cannot reach"):
        media.check_access([link], STRANGER)


def test_root_and_the_owner_pass(closed: Path) -> None:
    media.check_access([closed], User("root", 0, frozenset()))
    media.check_access([closed], media.user(os.geteuid()))
