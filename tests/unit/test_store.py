"""The store, with real ssh-keygen and qemu-img, and real processes killed at every point of a publication."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vdibuild import manifest, process, signature, store
from vdibuild.disk.layout import FileSystem, Layout, Partition
from vdibuild.errors import BusyError, HostError, StoreError
from vdibuild.families import InstalledPackage, Kernel, RepositoryState
from vdibuild.manifest import Manifest
from vdibuild.settings.keys import Keys
from vdibuild.store import Staging, Store, Version
from vdibuild.verify import Verification

IMAGE = "debian-13"
DISK_SIZE = 1 << 20


def described(staging: Staging, **changes: object) -> Manifest:
    """The manifest of a version that a test makes."""
    root = FileSystem("ext4", "5e9f4c6e-0f5c-4b8e-9a3c-1d2e3f405162", "/")
    partition = Partition(1, 1, 1023, "83", "4f3a2b1c-01", root)
    values: dict[str, object] = {
        "image": staging.image,
        "version": staging.version,
        "created": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "vdibuild": "0.1.0",
        "source_date_epoch": 1_700_000_000,
        "family": "debian",
        "release": "trixie",
        "architecture": "amd64",
        "firmware": "bios",
        "method": "bootstrap",
        "recipe": "0" * 64,
        "inputs": {"overlays/golden": "1" * 64},
        "repositories": (RepositoryState("https://deb.example.org", "2" * 64, 1_700_000_000),),
        "packages": (InstalledPackage("bash", "5.2", "amd64", "bash"),),
        "kernel": Kernel("6.12", "/boot/vmlinuz-6.12", "/boot/initrd.img-6.12"),
        "layout": Layout("msdos", "bios", 1024, "0x4f3a2b1c", (partition,)),
        "virtual_size": DISK_SIZE,
        "timings": {"bootstrap": 21.5, "bootstrap/download": 4.0},
        "verification": Verification(
            accelerator="tcg",
            firmware="bios",
            os="Debian GNU/Linux 13 (trixie)",
            os_id="debian",
            os_version="13",
            kernel="6.12",
            host_name="golden",
            agent_seconds=18.0,
            running_seconds=19.5,
            failed_units=(),
            startup={"kernel": 2.5, "userspace": 16.5},
            session="",
            differing=("/etc/machine-id",),
        ),
    }
    return Manifest.model_validate(values | changes)


def create_disk(path: Path, *options: str) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(DISK_SIZE)], check=True
    )


def fill(staging: Staging) -> None:
    create_disk(staging.path / store.DISK)
    (staging.path / store.BUNDLE).write_bytes(b"bundle")
    (staging.path / store.LOG).write_text(f"log of {staging.version}\n")


def add(there: Store, **changes: object) -> Version:
    with there.staging(IMAGE) as staging:
        fill(staging)
        return there.publish(staging, described(staging, **changes))


@pytest.fixture
def there(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts", Keys(signing=tmp_path / "keys/key"))


def hidden(there: Store) -> list[str]:
    """What is in the image's directory besides versions, locks and the history."""
    expected = {".build.lock", ".lock", ".promotions.json", "current"}
    names = {path.name for path in (there.artifacts / IMAGE).iterdir()} - expected
    return sorted(name for name in names if not re.fullmatch(r"\d{8}\.\d+", name))


def today() -> str:
    return datetime.now(UTC).strftime("%Y%m%d")


# Publishing


def test_publish(there: Store) -> None:
    version = add(there)
    assert version.name == f"{today()}.1"
    assert version.path == there.artifacts / IMAGE / version.name
    assert not version.promoted
    modes = {path.name: path.stat().st_mode & 0o777 for path in version.path.iterdir()}
    files = (store.DISK, store.BUNDLE, store.LOG, manifest.NAME, store.SUMS, store.SIGNATURE)
    assert modes == dict.fromkeys(files, 0o444)
    assert hidden(there) == []
    subprocess.run(["sha256sum", "--quiet", "--check", store.SUMS], cwd=version.path, check=True)


def test_manifest_is_read_back_as_it_was(there: Store) -> None:
    with there.staging(IMAGE) as staging:
        fill(staging)
        original = described(staging)
        version = there.publish(staging, original)
    found = version.manifest()
    assert found.model_copy(update={"files": {}}) == original
    assert found.files[store.BUNDLE].size == len(b"bundle")
    assert sorted(found.files) == [store.LOG, store.BUNDLE, store.DISK]
    on_disk = json.loads((version.path / manifest.NAME).read_text())
    assert on_disk["created"] == "2026-01-02T03:04:05Z"
    assert on_disk["layout"]["partitions"][0]["holds"]["kind"] == "ext4"


def test_failure_leaves_nothing(there: Store) -> None:
    with pytest.raises(KeyboardInterrupt), there.staging(IMAGE) as staging:
        fill(staging)
        raise KeyboardInterrupt
    assert hidden(there) == []
    assert there.versions(IMAGE) == []


def test_unpublished_staging_is_removed(there: Store) -> None:
    with there.staging(IMAGE) as staging:
        fill(staging)
    assert hidden(there) == []


def test_manifest_of_another_version_is_refused(there: Store) -> None:
    with pytest.raises(StoreError, match="names another version"):
        add(there, version="20200101.1")
    assert there.versions(IMAGE) == []


def test_only_regular_files_are_published(there: Store) -> None:
    with pytest.raises(StoreError, match="not a regular file"), there.staging(IMAGE) as staging:
        (staging.path / "link").symlink_to("/etc/passwd")
        there.publish(staging, described(staging))


def test_versions_count_up_and_sort(there: Store) -> None:
    date = today()
    for name in (f"{date}.2", f"{date}.10", "20200101.11"):
        (there.artifacts / IMAGE / name).mkdir(parents=True)
    assert [version.name for version in there.versions(IMAGE)] == ["20200101.11", f"{date}.2", f"{date}.10"]
    assert there.next_version(IMAGE) == f"{date}.11"


def test_clock_set_back(there: Store) -> None:
    (there.artifacts / IMAGE / "29991231.9").mkdir(parents=True)
    assert there.next_version(IMAGE) == "29991231.10"


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "Debian", ".hidden", "a\n"])
def test_names_that_are_none(there: Store, name: str) -> None:
    with pytest.raises(StoreError, match="no name of an image"):
        there.versions(name)


@pytest.mark.parametrize("name", ["..", "../other/20260101.1", "current", "20260101.1/../..", "20260101.01"])
def test_versions_that_are_none(there: Store, name: str) -> None:
    add(there)
    with pytest.raises(StoreError, match="has no version"):
        there.get(IMAGE, name)


def test_two_builds_at_once(there: Store) -> None:
    with there.staging(IMAGE), pytest.raises(BusyError, match=f"process {os.getpid()}"), there.staging(IMAGE):
        raise AssertionError("two builds at once")
    with there.staging(IMAGE), there.staging("other"):
        pass


def test_promotion_does_not_wait_for_a_build(there: Store) -> None:
    version = add(there)
    with there.staging(IMAGE):
        assert there.promote(IMAGE, version.name).promoted


def test_full_disk(there: Store) -> None:
    with pytest.raises(HostError, match=r"no space left in .*MiB free") as caught, there.staging(IMAGE):
        Path("/dev/full").write_text("x")
    assert "images.gc" in caught.value.hint
    assert hidden(there) == []


def test_command_that_met_a_full_disk(there: Store) -> None:
    script = "echo 'write failed: No space left on device' >&2; exit 1"
    with pytest.raises(HostError, match=r"sh found no space left; .*MiB free"), there.staging(IMAGE):
        process.run(["sh", "-c", script])


def test_store_that_cannot_be_written() -> None:
    # Not even root may make directories in /sys.
    nowhere = Store(Path("/sys/vdibuild"), Keys())
    with pytest.raises(HostError, match="cannot write /sys/vdibuild: "), nowhere.staging(IMAGE):
        raise AssertionError("it was written")


# A run killed by SIGKILL

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_store import IMAGE, described, fill
from vdibuild import signature, store
from vdibuild.settings.keys import Keys

point, artifacts, key = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

def killed(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)

there = store.Store(artifacts, Keys(signing=key))
with there.staging(IMAGE) as staging:
    fill(staging)
    if point == "filled":
        killed()
    elif point == "signing":
        signature.sign = killed
    elif point == "syncing":
        store.sync = killed
    elif point == "renaming":
        there._changing = killed
    version = there.publish(staging, described(staging))
    if point == "published":
        killed()
if point == "remembered":
    there._point = killed
elif point == "pointing":
    os.rename = killed
    Path.rename = lambda self, to: killed() if to.name == "current" else os.replace(self, to)
there.promote(IMAGE, version.name)
killed()
"""


@pytest.mark.parametrize(
    ("point", "visible", "promoted"),
    [
        ("filled", False, False),
        ("signing", False, False),
        ("syncing", False, False),
        ("renaming", False, False),
        ("published", True, False),
        ("remembered", True, False),
        ("pointing", True, False),
        ("promoted", True, True),
    ],
)
def test_killed_run(there: Store, point: str, visible: bool, promoted: bool) -> None:
    first = add(there)
    there.promote(IMAGE, first.name)
    argv = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        point,
        str(there.artifacts),
        str(there.keys.signing),
    ]
    project = Path(__file__).parent.parent.parent
    assert subprocess.run(argv, cwd=project).returncode == -signal.SIGKILL

    names = [version.name for version in there.versions(IMAGE)]
    assert names == ([first.name, f"{today()}.2"] if visible else [first.name])
    for name in names:
        there.verify(IMAGE, name)
    assert there.get(IMAGE).name == (names[-1] if promoted else first.name)
    assert removed(there, keep=3) == ([] if visible else [f".staging-{today()}.2"])
    last = add(there)
    there.promote(IMAGE, last.name)
    assert there.rollback(IMAGE).name == (names[-1] if promoted else first.name)
    assert hidden(there) == []


def test_next_build_removes_what_a_killed_one_left(there: Store) -> None:
    leftover = there.artifacts / IMAGE / ".staging-20200101.1"
    leftover.mkdir(parents=True)
    (leftover / "disk.qcow2").write_text("half")
    add(there)
    assert hidden(there) == []


# Verification


def damage_disk(path: Path) -> None:
    disk = path / store.DISK
    disk.chmod(0o644)
    content = bytearray(disk.read_bytes())
    content[-1] ^= 1
    disk.write_bytes(content)


def damage_manifest(path: Path) -> None:
    (path / manifest.NAME).chmod(0o644)
    text = (path / manifest.NAME).read_text()
    (path / manifest.NAME).write_text(text.replace("5.2", "5.3"))


def damage_sums(path: Path) -> None:
    (path / store.SUMS).chmod(0o644)
    text = (path / store.SUMS).read_text()
    (path / store.SUMS).write_text("".join(text.splitlines(keepends=True)[1:]))


def replace_by_link(path: Path) -> None:
    (path / store.LOG).unlink()
    (path / store.LOG).symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage_disk, r"is damaged: disk\.qcow2"),
        (damage_manifest, r"is damaged: manifest\.json"),
        (damage_sums, "is not valid"),
        (replace_by_link, r"build\.log is not a regular file"),
        (lambda path: (path / store.BUNDLE).unlink(), r"bundle\.tar\.zst is missing"),
        (lambda path: (path / "extra").write_text(""), "extra does not belong there"),
        (lambda path: (path / store.SIGNATURE).unlink(), "is not signed"),
        (lambda path: (path / store.SUMS).unlink(), "SHA256SUMS is missing"),
    ],
)
def test_damage_is_found(there: Store, harm: object, said: str) -> None:
    version = add(there)
    assert callable(harm)
    harm(version.path)
    with pytest.raises(StoreError, match=said):
        there.verify(IMAGE, version.name)


def test_verify_says_who_signed(there: Store) -> None:
    version = add(there)
    verified = there.verify(IMAGE, version.name)
    assert verified.signer == "vdibuild"
    assert verified.size == sum(path.stat().st_size for path in version.path.iterdir())


def test_old_version_in_a_newer_ones_place(there: Store) -> None:
    version = add(there)
    place = version.path.with_name("29991231.1")
    version.path.rename(place)
    with pytest.raises(StoreError, match=f"holds {IMAGE} {version.name}"):
        there.verify(IMAGE, place.name)


def test_disk_that_refers_to_another_file_is_refused(there: Store) -> None:
    with there.staging(IMAGE) as staging:
        fill(staging)
        (staging.path / store.DISK).unlink()
        create_disk(staging.path / store.DISK, "-F", "raw", "-b", "/etc/passwd")
        version = there.publish(staging, described(staging))
    with pytest.raises(StoreError, match="refers to another file"):
        there.verify(IMAGE, version.name)


def test_damaged_qcow2_that_was_signed(there: Store) -> None:
    with there.staging(IMAGE) as staging:
        fill(staging)
        with (staging.path / store.DISK).open("r+b") as file:
            file.seek(1 << 16)  # the refcount table
            file.write(b"\0" * 512)
        version = there.publish(staging, described(staging))
    with pytest.raises(StoreError, match="is damaged"):
        there.verify(IMAGE, version.name)


def test_disk_of_another_size(there: Store) -> None:
    version = add(there, virtual_size=2 * DISK_SIZE)
    with pytest.raises(StoreError, match="its manifest says 2097152"):
        there.verify(IMAGE, version.name)


def test_manifest_of_another_format(there: Store) -> None:
    version = add(there)
    path = version.path / manifest.NAME
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(StoreError, match="schema_version"):
        version.manifest()


# Promotion


@pytest.fixture
def three(there: Store) -> Iterator[list[str]]:
    names = [add(there).name for _ in range(3)]
    for name in names:
        there.promote(IMAGE, name)
    yield names


def test_promoted_version_is_current(there: Store, three: list[str]) -> None:
    assert (there.artifacts / IMAGE / "current").readlink() == Path(three[-1])
    assert there.get(IMAGE).name == three[-1]
    assert [version.promoted for version in there.versions(IMAGE)] == [False, False, True]


def test_rollback_goes_back_step_by_step(there: Store, three: list[str]) -> None:
    assert there.rollback(IMAGE).name == three[1]
    assert there.rollback(IMAGE).name == three[0]
    with pytest.raises(StoreError, match="no earlier promoted version"):
        there.rollback(IMAGE)
    assert there.get(IMAGE).name == three[0]


def test_promotion_after_a_rollback(there: Store, three: list[str]) -> None:
    there.rollback(IMAGE)
    there.promote(IMAGE, three[0])
    assert there.rollback(IMAGE).name == three[1]


def test_promoting_twice_is_once(there: Store, three: list[str]) -> None:
    there.promote(IMAGE, three[2])
    assert there.rollback(IMAGE).name == three[1]


def test_damaged_version_is_not_promoted(there: Store, three: list[str]) -> None:
    there.rollback(IMAGE)
    (there.get(IMAGE, three[2]).path / store.DISK).unlink()
    with pytest.raises(StoreError, match="is missing"):
        there.promote(IMAGE, three[2])
    assert there.get(IMAGE).name == three[1]


def test_nothing_is_promoted(there: Store) -> None:
    with pytest.raises(StoreError, match="no version of debian-13 is promoted") as caught:
        there.get(IMAGE)
    assert "build-golden" in caught.value.hint
    version = add(there)
    with pytest.raises(StoreError) as caught:
        there.get(IMAGE)
    assert version.name in caught.value.hint


def test_current_that_leads_astray(there: Store) -> None:
    add(there)
    (there.artifacts / IMAGE / "current").symlink_to("../../etc")
    with pytest.raises(StoreError, match="is no version"):
        there.get(IMAGE)


# Garbage collection


def removed(there: Store, keep: int) -> list[str]:
    return [entry.name for entry in there.gc(IMAGE, keep=keep) if entry.removed]


def test_gc_keeps_the_newest_the_promoted_and_the_one_before(there: Store) -> None:
    names = [add(there).name for _ in range(5)]
    there.promote(IMAGE, names[0])
    there.promote(IMAGE, names[1])
    assert {entry.name: entry.reason for entry in there.gc(IMAGE, keep=1)} == {
        names[0]: "for a rollback",
        names[1]: "promoted",
        names[2]: "old",
        names[3]: "old",
        names[4]: "new",
    }
    assert [version.name for version in there.versions(IMAGE)] == [names[0], names[1], names[4]]
    assert there.rollback(IMAGE).name == names[0]


def test_gc_keeps_what_is_in_use(there: Store) -> None:
    names = [add(there).name for _ in range(3)]
    with there.using(IMAGE, names[0]):
        assert removed(there, keep=1) == [names[1]]
    assert removed(there, keep=1) == [names[0]]


def test_gc_keeps_the_backing_file_of_a_running_machine(there: Store, tmp_path: Path) -> None:
    first = add(there)
    add(there)
    overlay, ready = tmp_path / "overlay.qcow2", tmp_path / "ready"
    create_disk(overlay, "-F", "qcow2", "-b", str(first.path / store.DISK))
    # It opens images as QEMU does.
    qemu = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=file,filename={overlay}"),
            *("--blockdev", "driver=qcow2,node-name=disk,file=file"),
            *("--pidfile", ready),
        ]
    )
    try:
        while not ready.exists():
            assert qemu.poll() is None
        assert removed(there, keep=1) == []
        assert there.gc(IMAGE, keep=1)[0].reason == "in use by a machine"
    finally:
        qemu.terminate()
        qemu.wait()
    assert removed(there, keep=1) == [first.name]


def test_gc_goes_on_with_what_a_killed_one_left(there: Store) -> None:
    add(there)
    (there.artifacts / IMAGE / ".removing-20200101.1").mkdir()
    assert removed(there, keep=1) == [".removing-20200101.1"]


def test_gc_leaves_a_running_build_alone(there: Store) -> None:
    with there.staging(IMAGE) as staging:
        fill(staging)
        there.gc()
        there.publish(staging, described(staging))
    there.verify(IMAGE, staging.version)


def test_gc_touches_nothing_without_our_mark(there: Store) -> None:
    add(there)
    for name in ("notes", ".git", "20200101.1-mine"):
        (there.artifacts / IMAGE / name).mkdir()
    there.gc(IMAGE, keep=1)
    assert hidden(there) == [".git", "20200101.1-mine", "notes"]


def test_gc_of_everything(there: Store) -> None:
    assert there.gc() == []
    names = [add(there).name for _ in range(2)]
    (there.artifacts / ".cache").mkdir()
    assert [entry.name for entry in there.gc(keep=1) if entry.removed] == [names[0]]
    assert there.images() == [IMAGE]


def test_version_used_after_removal(there: Store) -> None:
    first = add(there)
    add(there)
    there.gc(IMAGE, keep=1)
    with pytest.raises(StoreError, match="was just removed"), store._shared(first):
        pass


def test_own_key_is_not_needed_to_verify(there: Store, tmp_path: Path) -> None:
    version = add(there)
    line = f"ci {signature.public_key(there.keys.signing)}"
    hypervisor = Store(there.artifacts, Keys(signing=tmp_path / "none", allowed_signers=[line]))
    assert hypervisor.verify(IMAGE, version.name).signer == "ci"
