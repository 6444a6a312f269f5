"""Plans of disks: what they hold, that nothing overlaps, and what does not fit or could not boot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdibuild.disk import layout, lvm
from vdibuild.disk.layout import FileSystem, Layout, plan
from vdibuild.errors import InputError
from vdibuild.recipe import Storage, Volume, VolumeGroup

SOURCE = Path("golden.ks")
ROOT = Volume("/", "ext4", 1000, 1, grow=True)
ESP = Volume("/boot/efi", "vfat", 64, 2)
BIOS_BOOT = Volume("biosboot", "biosboot", 1, 3)
BOOT = Volume("/boot", "ext4", 256, 4)
SWAP = Volume("swap", "swap", 128, 5)
LVM = Storage(
    (BOOT, Volume("pv.01", "lvmpv", 500, 6), Volume("pv.02", "lvmpv", 500, 7, grow=True)),
    (VolumeGroup("vg-golden", ("pv.01", "pv.02"), 8),),
    (
        Volume("/", "xfs", 600, 9, grow=True, name="root", group="vg-golden"),
        Volume("/var/log", "xfs", 301, 10, name="var-log", group="vg-golden"),
        Volume("swap", "swap", 64, 11, name="swap", group="vg-golden"),
    ),
)

TOO_MUCH = Volume("/srv", "ext4", 4000, 12, name="srv", group="vg-golden")


def planned(storage: Storage, firmware: str = "bios", size: int = 4096, table: str = "msdos") -> Layout:
    return plan(storage, firmware, size, table, "seed", SOURCE)


def test_mbr_disk_gives_the_rest_to_what_grows() -> None:
    found = planned(Storage((SWAP, ROOT)))
    assert [(part.number, part.start, part.size, part.type) for part in found.partitions] == [
        (1, 1, 128, "82"),
        (2, 129, 4096 - 129, "83"),
    ]
    assert found.boot is found.root
    signature = found.identifier.removeprefix("0x")
    assert found.partitions[1].uuid == f"{signature}-02"


def test_gpt_disk_keeps_room_for_the_second_table_and_names_types_for_discovery() -> None:
    found = planned(Storage((ESP, BIOS_BOOT, BOOT, SWAP, ROOT)), "uefi", table="gpt")
    assert [part.type[:8] for part in found.partitions] == [
        "c12a7328",
        "21686148",
        "bc13c2ff",
        "0657fd6d",
        "4f68bce3",
    ]
    last = found.partitions[-1]
    assert last.start + last.size == 4095
    assert found.esp is not None
    assert found.esp.uuid[4] == "-" and len(found.esp.uuid) == 9
    assert found.bios_boot is found.partitions[1]
    assert found.boot.mountpoint == "/boot"


def test_same_inputs_give_the_same_plan_and_another_seed_other_uuids() -> None:
    assert planned(LVM) == planned(LVM)
    other = plan(LVM, "bios", 4096, "msdos", "other", SOURCE)
    mine = {fs.uuid for _, fs in planned(LVM).volumes}
    assert len(mine) == 4
    assert not mine & {fs.uuid for _, fs in other.volumes}


def test_the_kickstarts_table_wins() -> None:
    assert planned(Storage((BIOS_BOOT, ROOT), table="gpt")).table == "gpt"


def test_growing_volumes_share_in_proportion_up_to_their_maximum() -> None:
    volumes = (
        Volume("/", "ext4", 1000, 1, grow=True),
        Volume("/home", "ext4", 2000, 2, grow=True),
        Volume("/srv", "ext4", 1000, 3, grow=True, maximum=1100),
    )
    sizes = [part.size for part in planned(Storage(volumes), size=7101).partitions]
    assert sum(sizes) == 7100
    assert sizes[2] == 1100
    assert sizes[0] == 2000 and sizes[1] == 4000


def test_logical_volumes_fill_their_group_in_whole_extents() -> None:
    found = planned(LVM)
    sizes = {volume.name: volume.size for volume in found.logical}
    first, second = found.physical(found.groups[0])
    extents = (first.size - 1) // 4 + (second.size - 1) // 4
    assert sizes["var-log"] == 304  # rounded up to extents of 4 MiB
    assert sum(sizes.values()) == extents * 4


def test_fstab_of_plain_partitions() -> None:
    assert without_uuids(planned(Storage((ESP, BOOT, SWAP, ROOT)), "uefi")) == [
        "# <file system> <mount point> <type> <options> <dump> <pass>",
        "UUID=4 / ext4 defaults 0 1",
        "UUID=2 /boot ext4 defaults 0 2",
        "UUID=1 /boot/efi vfat umask=0077 0 2",
        "UUID=3 none swap defaults 0 0",
    ]


def test_fstab_of_logical_volumes_doubles_dashes() -> None:
    assert without_uuids(planned(LVM)) == [
        "# <file system> <mount point> <type> <options> <dump> <pass>",
        "/dev/mapper/vg--golden-root / xfs defaults 0 0",
        "UUID=1 /boot ext4 defaults 0 2",
        "/dev/mapper/vg--golden-var--log /var/log xfs defaults 0 0",
        "/dev/mapper/vg--golden-swap none swap defaults 0 0",
    ]
    assert layout.kernel_root(planned(LVM)) == "/dev/mapper/vg--golden-root"
    assert layout.lvm_arguments(planned(LVM)) == ["rd.lvm.lv=vg-golden/root"]


def without_uuids(found: Layout) -> list[str]:
    """The lines of fstab, blanks made one, each UUID replaced by the number of its partition."""
    text = layout.fstab(found)
    for part in found.partitions:
        if isinstance(part.holds, FileSystem) and part.holds.uuid:
            text = text.replace(part.holds.uuid, str(part.number))
    return [" ".join(line.split()) for line in text.splitlines()]


def test_description_of_a_group_places_a_volume_on_two_disks() -> None:
    found = planned(LVM)
    group = found.groups[0]
    pieces = lvm.segments(found, group)
    root = pieces[found.logical[0]]
    assert [(piece.physical, piece.start) for piece in root] == [(0, 0), (1, root[0].count)]
    assert sum(piece.count for piece in root) == found.logical[0].size // 4
    text = lvm.description(found, group, ["/dev/a", "/dev/b"], 0)
    assert text.count("{") == text.count("}")
    assert f'id = "{found.partitions[1].physical_uuid}"' in text
    assert "segment_count = 2" in text


@pytest.mark.parametrize(
    ("storage", "firmware", "table", "line", "message"),
    [
        (Storage((BOOT,)), "bios", "msdos", 4, "no file system for /"),
        (Storage(()), "bios", "msdos", None, "no file system for /"),
        (Storage((ROOT,)), "bios", "gpt", 1, "BIOS boot partition"),
        (Storage((ROOT,)), "uefi", "gpt", 1, "EFI system partition"),
        (Storage((BIOS_BOOT, ROOT)), "bios", "msdos", 3, "no BIOS boot partition"),
        (Storage((ROOT, BOOT, Volume("/", "ext4", 9, 7))), "bios", "msdos", 7, "twice, first in line 1"),
        (Storage((ROOT, Volume("/home", "ext4", 5000, 8))), "bios", "msdos", 8, "/home does not fit"),
        (Storage((Volume("/", "xfs", 100, 2),)), "bios", "msdos", 2, "too small for xfs"),
        (Storage((Volume("/", "vfat", 100, 2),)), "bios", "msdos", 2, "EFI system partition only"),
        (Storage((Volume("/", "ext4", 0, 2),)), "bios", "msdos", 2, "has no size"),
        (Storage((Volume("/", "xfs", 400, 2, label="thirteen-more"),)), "bios", "msdos", 2, "too long"),
        (Storage((Volume("/", "ext4", 90, 2, maximum=80),)), "bios", "msdos", 2, "--maxsize=80 is less"),
        (Storage((ROOT, SWAP, BOOT, ESP, Volume("/srv", "ext4", 9, 6))), "bios", "msdos", 6, "at most four"),
        (Storage((ROOT, Volume("pv.1", "lvmpv", 9, 6))), "bios", "msdos", 6, "in no volume group"),
        (Storage((ROOT,), (VolumeGroup("vg", ("pv.1",), 6),)), "bios", "msdos", 6, "no physical volume pv.1"),
        (
            Storage((ROOT,), (), (Volume("/srv", "ext4", 9, 6, name="srv", group="vg"),)),
            "bios",
            "msdos",
            6,
            "no volume group vg",
        ),
        (
            Storage(LVM.partitions, LVM.groups, (Volume("/", "xfs", 400, 6, name="a b", group="vg-golden"),)),
            "bios",
            "msdos",
            6,
            "no name for LVM",
        ),
        (
            Storage(LVM.partitions, LVM.groups, (*LVM.logical, TOO_MUCH)),
            "bios",
            "msdos",
            12,
            "volume group vg-golden of",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(
    storage: Storage, firmware: str, table: str, line: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        planned(storage, firmware, table=table)
    assert caught.value.line == line
    assert caught.value.source == SOURCE


sizes = st.integers(8, 3000)
volumes = st.builds(
    lambda size, grow, extra: Volume("", "ext4", size, 1, grow=grow, maximum=extra and size + extra),
    sizes,
    st.booleans(),
    st.none() | st.integers(1, 2000),
)


@given(st.lists(volumes, min_size=1, max_size=8), st.integers(10, 20000), st.booleans())
def test_partitions_never_overlap_nor_leave_the_disk(wanted: list[Volume], size: int, gpt: bool) -> None:
    parts = [
        replace(volume, mountpoint=f"/mnt/{index}" if index else "/", line=index)
        for index, volume in enumerate(wanted)
    ]
    if gpt:
        parts.insert(0, BIOS_BOOT)
    try:
        found = planned(Storage(tuple(parts)), size=size, table="gpt" if gpt else "msdos")
    except InputError:
        assert sum(part.size for part in parts) + (2 if gpt else 1) > size or len(parts) > 4
        return
    end = 1
    for part, volume in zip(found.partitions, parts, strict=True):
        assert part.start == end
        assert part.size >= volume.size
        assert volume.grow or part.size == volume.size
        assert volume.maximum is None or part.size <= volume.maximum
        end = part.start + part.size
    last = size - (1 if gpt else 0)
    assert end <= last
    # Whatever can still grow leaves nothing unused.
    if any(volume.grow and volume.maximum is None for volume in parts):
        assert end == last


@given(
    st.lists(st.integers(8, 900), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(8, 800), st.booleans()), min_size=1, max_size=5),
    st.sampled_from([1, 4, 32]),
)
def test_logical_volumes_lie_within_their_physical_volumes(
    physical: list[int], logical: list[tuple[int, bool]], extent: int
) -> None:
    storage = Storage(
        tuple(Volume(f"pv.{index}", "lvmpv", size, 1) for index, size in enumerate(physical)),
        (VolumeGroup("vg", tuple(f"pv.{index}" for index in range(len(physical))), 2, extent),),
        tuple(
            Volume(f"/mnt/{index}" if index else "/", "ext4", size, 3, grow, name=f"lv{index}", group="vg")
            for index, (size, grow) in enumerate(logical)
        ),
    )
    try:
        found = planned(storage)
    except InputError:
        return
    used: set[tuple[int, int]] = set()
    for volume, pieces in lvm.segments(found, found.groups[0]).items():
        assert sum(piece.count for piece in pieces) * extent == volume.size
        for piece in pieces:
            places = {(piece.physical, piece.physical_start + offset) for offset in range(piece.count)}
            assert not used & places
            used |= places
    for index, offset in used:
        assert (offset + 1) * extent + 1 <= physical[index]
