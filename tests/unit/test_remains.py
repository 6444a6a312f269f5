"""What is ours on a libvirt host and what is not: against libvirt's own test driver."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.conftest import FakeCommand
from vdibuild.errors import BusyError, HostError
from vdibuild.install import domain, events, storage
from vdibuild.install.command import LOG_PORT, MARK

US, OTHERS = "0123456789abcdef", "fedcba9876543210"
URI = "test:///private"

NODE = """<node>
  <pool type='dir'><name>images</name><target><path>/images</path></target></pool>
  <pool type='logical'><name>os</name><source><name>os</name></source>
    <target><path>/dev/os</path></target></pool>
  <pool type='disk'><name>raw</name><source><device path='/dev/sdx'/></source>
    <target><path>/dev</path></target></pool>
</node>
"""

DOMAIN = f"""<domain type='test'>
  <name>office</name>
  <metadata>{{mark}}</metadata>
  <memory>65536</memory>
  <os><type>hvm</type></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='raw' cache='unsafe'/>
      <source file='/images/vdibuild-office.raw'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/media/a.iso'/><target dev='sda' bus='sata'/>
      <readonly/></disk>
    <disk type='file' device='disk'><source file='/work/bundle.img'/><target dev='vdb' bus='virtio'/></disk>
    <channel type='unix'><target type='virtio' name='{LOG_PORT}'/></channel>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>
"""


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Any]:
    """A libvirt host of its own: what the test driver knows is in this file."""
    node = tmp_path / "node.xml"
    node.write_text(NODE)
    with events.connected(f"test://{node}") as made:
        yield made


@pytest.fixture
def record(tmp_path: Path) -> Iterator[storage.Record]:
    with storage.recorded(tmp_path / "state", "office", URI) as made:
        yield made


def define(connection: Any, owner: str | None, name: str = "office") -> Any:
    mark = f"<build xmlns='{MARK}' name='{name}' owner='{owner}'/>" if owner else ""
    return connection.defineXML(DOMAIN.format(mark=mark))


def volumes(connection: Any, pool: str) -> list[str]:
    return [one.name() for one in connection.storagePoolLookupByName(pool).listAllVolumes()]


@pytest.mark.parametrize("running", [True, False])
def test_our_domain_is_removed(connection: Any, running: bool) -> None:
    made = define(connection, US)
    if running:
        made.create()
    domain.remove_remains(connection, "office", US)
    assert domain.find(connection, "office") is None


def test_a_running_domain_that_was_not_defined_yet_is_removed(connection: Any) -> None:
    mark = f"<build xmlns='{MARK}' name='office' owner='{US}'/>"
    connection.createXML(DOMAIN.format(mark=mark))
    domain.remove_remains(connection, "office", US)
    assert domain.find(connection, "office") is None


@pytest.mark.parametrize(
    ("owner", "name", "whose"),
    [
        (None, "office", "not vdibuild's"),
        (OTHERS, "office", "another site's"),
        (US, "template", "not vdibuild's"),  # a copy of ours, under another name
    ],
)
def test_a_domain_that_is_not_ours_is_never_touched(
    connection: Any, owner: str | None, name: str, whose: str
) -> None:
    made = define(connection, owner, name)
    made.create()
    before = made.XMLDesc(0)
    with pytest.raises(HostError, match=f"there is a domain office .* it is {whose}"):
        domain.remove_remains(connection, "office", US)
    assert made.isActive()
    assert made.XMLDesc(0) == before


def test_a_machine_that_is_kept_has_its_own_disk_only(connection: Any) -> None:
    made = define(connection, US)
    domain.finish(connection, made, Path("/images/vdibuild-office.raw"), autostart=True)
    text = made.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert text.count("<disk ") == 1
    assert "/images/vdibuild-office.raw" in text
    assert "unsafe" not in text
    assert LOG_PORT not in text
    assert "org.qemu.guest_agent.0" in text
    assert domain.owner(made) == US
    assert made.autostart()


def test_a_volume_comes_and_goes(connection: Any, record: storage.Record) -> None:
    volume = storage.create(connection, record, "images", "office", 100)
    assert (volume.pool, volume.name) == ("images", "vdibuild-office.raw")
    assert volumes(connection, "images") == ["vdibuild-office.raw"]
    made = connection.storageVolLookupByPath(str(volume.path))
    assert made.info()[1] == 100 << 20
    assert record.read() == ("images", "vdibuild-office.raw")
    storage.remove(connection, record, volume)
    assert volumes(connection, "images") == []
    assert record.read() is None


def test_a_logical_volume_that_cannot_be_erased_stays(connection: Any, record: storage.Record) -> None:
    volume = storage.create(connection, record, "os", "office", 100)
    assert volumes(connection, "os") == ["vdibuild-office"]
    # libvirt's test driver makes no device.
    with pytest.raises(HostError, match="/dev/os/vdibuild-office cannot be erased"):
        storage.remove(connection, record, volume)
    assert volumes(connection, "os") == ["vdibuild-office"]
    assert record.read() == ("os", "vdibuild-office")


def test_the_volume_of_an_earlier_run_is_removed(connection: Any, record: storage.Record) -> None:
    storage.create(connection, record, "images", "office", 100)
    storage.remove_remains(connection, record)
    assert volumes(connection, "images") == []
    storage.create(connection, record, "images", "office", 200)


def test_a_volume_that_is_not_recorded_is_never_touched(connection: Any, record: storage.Record) -> None:
    storage.create(connection, record, "images", "office", 100)
    record.forget()
    storage.remove_remains(connection, record)
    with pytest.raises(HostError, match=r"volume vdibuild-office\.raw in the pool images") as caught:
        storage.create(connection, record, "images", "office", 100)
    assert "virsh vol-delete --pool images vdibuild-office.raw" in caught.value.hint
    assert volumes(connection, "images") == ["vdibuild-office.raw"]


def test_the_record_of_another_host_is_not_of_this_one(connection: Any, tmp_path: Path) -> None:
    with storage.recorded(tmp_path, "office", URI) as record:
        record.write("images", "vdibuild-office.raw")
    with storage.recorded(tmp_path, "office", "test:///other") as record:
        assert record.read() is None


@pytest.mark.parametrize(
    ("pool", "size", "said"),
    [
        ("imagse", 100, "there is no storage pool imagse"),
        ("raw", 100, "the storage pool raw is of the type disk"),
        ("os", 1 << 40, "cannot be made in the pool os"),
    ],
)
def test_a_volume_that_cannot_be(
    connection: Any, record: storage.Record, pool: str, size: int, said: str
) -> None:
    with pytest.raises(HostError, match=said):
        storage.create(connection, record, pool, "office", size)
    assert record.read() is None


def test_a_pool_that_is_not_started(connection: Any, record: storage.Record) -> None:
    connection.storagePoolLookupByName("images").destroy()
    with pytest.raises(HostError, match="the storage pool images is not started") as caught:
        storage.create(connection, record, "images", "office", 100)
    assert caught.value.hint == "virsh pool-start images"


def test_our_own_pool_lasts_as_long_as_it_is_needed(connection: Any, tmp_path: Path) -> None:
    with storage.own_pool(connection, "office", tmp_path / "a & b") as pool:
        assert connection.storagePoolLookupByName(pool).isActive()
    assert "vdibuild-office" not in [one.name() for one in connection.listAllStoragePools()]


def test_the_pool_that_a_killed_run_left_is_replaced(connection: Any, tmp_path: Path) -> None:
    left = f"<pool type='dir'><name>vdibuild-office</name><target><path>{tmp_path}/1</path></target></pool>"
    connection.storagePoolCreateXML(left)
    with storage.own_pool(connection, "office", tmp_path / "2") as pool:
        assert f"{tmp_path}/2" in connection.storagePoolLookupByName(pool).XMLDesc()


def test_a_pool_that_is_not_ours_is_never_touched(connection: Any, tmp_path: Path) -> None:
    theirs = f"<pool type='dir'><name>vdibuild-office</name><target><path>{tmp_path}</path></target></pool>"
    connection.storagePoolDefineXML(theirs)
    with (
        pytest.raises(HostError, match="storage pool vdibuild-office"),
        storage.own_pool(connection, "office", tmp_path),
    ):
        raise AssertionError
    assert connection.storagePoolLookupByName("vdibuild-office").isPersistent()


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    with (
        storage.recorded(tmp_path, "office", URI),
        pytest.raises(BusyError, match="another run installs office"),
        storage.recorded(tmp_path, "office", URI),
    ):
        raise AssertionError


def test_a_picture_in_ppm_becomes_a_png(tmp_path: Path) -> None:
    # The first pixels look like white space to whoever looks for the header's end.
    pixels = b"\n \t\xff\x00\x01\x02\x03\x04\x05\x06\x07"
    file = tmp_path / "screen.png"
    file.write_bytes(domain._png(b"P6\n2 2\n255\n" + pixels))
    data = file.read_bytes()
    at = data.index(b"IDAT")
    length = int.from_bytes(data[at - 4 : at])
    rows = zlib.decompress(data[at + 4 : at + 4 + length])
    assert rows == b"\0" + pixels[:6] + b"\0" + pixels[6:]


def test_the_events_of_one_guest(connection: Any) -> None:
    with contextlib.closing(events.Events(connection, "office")) as happening:
        other = connection.defineXML(DOMAIN.format(mark="").replace("<name>office", "<name>other"))
        ours = define(connection, US)
        for one in (other, ours):
            one.create()
        assert happening.next(10) == events.Started()
        other.destroy()
        ours.shutdown()
        assert happening.next(10) == events.Ended(True, "it shut down")
        ours.create()
        ours.destroy()
        assert happening.next(10) == events.Started()
        assert happening.next(10) == events.Ended(False, "somebody switched it off")
        assert happening.next(0) is None


def test_a_command_that_runs_beside(connection: Any, fake_command: FakeCommand) -> None:
    fake_command("virt-install", "echo one; printf 'two\\rthree\\n'; echo four >&2; exit 3")
    with (
        contextlib.closing(events.Events(connection, "office")) as happening,
        happening.running(["virt-install", "--name", "office"]),
    ):
        printed = [happening.next(10) for _ in range(4)]
    assert printed == [
        events.Printed("one"),
        events.Printed("three"),
        events.Printed("four"),
        events.CommandEnded(3),
    ]


def test_a_command_is_stopped_with_its_block(
    connection: Any, fake_command: FakeCommand, tmp_path: Path
) -> None:
    fake_command("virt-install", f"echo $$ >{tmp_path}/pid; echo begun; exec sleep 1000")
    began = time.monotonic()
    with (
        contextlib.closing(events.Events(connection, "office")) as happening,
        happening.running(["virt-install"]),
    ):
        assert happening.next(10) == events.Printed("begun")
    assert time.monotonic() - began < 10
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_connection_that_is_refused() -> None:
    with (
        pytest.raises(HostError, match=r"qemu:///system\?socket=/nowhere cannot be reached"),
        events.connected("qemu:///system?socket=/nowhere"),
    ):
        raise AssertionError
