"""Disks that boot: written from one small tree in every way, booted, and read back with other tools.

The tree is a minimal Debian without an init system. Its first process is a script that mounts what fstab
says, prints what it sees, each line marked, and turns the machine off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import FakeCommand
from vdibuild import machine, process
from vdibuild.disk import bootloader, layout, shrink, write
from vdibuild.disk.layout import Layout, Partition
from vdibuild.errors import HostError, VdibuildError
from vdibuild.families import BootFiles, Kernel
from vdibuild.recipe import Storage, Volume, VolumeGroup
from vdibuild.tree import Tree, host_command, remove

BOOT_SECONDS = 300
PACKAGES = [
    *("linux-image-cloud-amd64", "initramfs-tools", "busybox", "zstd", "lvm2", "btrfs-progs"),
    *("grub-pc-bin", "grub-efi-amd64-bin", "grub-efi-amd64-signed", "shim-signed"),
]
# The initramfs holds what boots these disks and no more: unpacking it is most of an emulated boot.
MODULES = ["virtio_pci", "virtio_blk", "ext4", "xfs", "btrfs", "dm_mod", "vfat", "nls_cp437", "nls_ascii"]
PROOF = """\
#!/bin/sh
exec >/dev/console 2>&1
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -o remount,rw /
vgchange --activate y --noudevsync --quiet
mount --all && swapon --all || echo "SEEN failure"
findmnt --real --noheadings --list --output TARGET,SOURCE,FSTYPE | sed 's/^/SEEN mount /'
sed -n 's/^/SEEN swap /;2,$p' /proc/swaps
stat --format 'SEEN owner %n %u:%g %a' /home/guest /home/guest/file /home/guest/link
cd / && getfattr --dump --match - home/guest home/guest/file | sed 's/^/SEEN attribute /'
echo "SEEN marks $(cat /boot/mark) $(cat /home/guest/file) $(cat /mark)"
grep -q ' / .*\\<ro\\>' /proc/mounts && echo "SEEN read-only root"
echo "SEEN end"
umount --all --types nodevtmpfs,noproc,nosysfs
sync
busybox poweroff -f
"""

BIOS_BOOT = Volume("biosboot", "biosboot", 1, 1)
ESP = Volume("/boot/efi", "vfat", 64, 2)
BOOT = Volume("/boot", "ext4", 200, 3)
SWAP = Volume("swap", "swap", 16, 4, label="swap")
SIGNED = {
    "EFI/BOOT/BOOTX64.EFI": "/usr/lib/shim/shimx64.efi.signed",
    "EFI/BOOT/grubx64.efi": "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
    "EFI/debian/grubx64.efi": "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
}


def root(filesystem: str) -> Volume:
    return Volume("/", filesystem, 700, 5, grow=True, label="root")


@dataclass(frozen=True)
class Case:
    firmware: str
    table: str
    storage: Storage
    mounts: dict[str, str]
    swap: bool
    signed: bool = False


CASES = {
    "bios-msdos-ext4-swap": Case("bios", "msdos", Storage((SWAP, root("ext4"))), {"/": "ext4"}, swap=True),
    "bios-gpt-btrfs-boot-home": Case(
        "bios",
        "gpt",
        Storage((BIOS_BOOT, BOOT, Volume("/home", "ext4", 64, 6), root("btrfs"))),
        {"/": "btrfs", "/boot": "ext4", "/home": "ext4"},
        swap=False,
    ),
    "uefi-gpt-ext4-boot-signed": Case(
        "uefi",
        "gpt",
        Storage((ESP, BOOT, root("ext4"))),
        {"/": "ext4", "/boot": "ext4", "/boot/efi": "vfat"},
        swap=False,
        signed=True,
    ),
    "uefi-msdos-btrfs-swap": Case(
        "uefi",
        "msdos",
        Storage((ESP, SWAP, root("btrfs"))),
        {"/": "btrfs", "/boot/efi": "vfat"},
        swap=True,
    ),
    "bios-msdos-lvm-xfs-ext4-swap": Case(
        "bios",
        "msdos",
        Storage(
            (Volume("pv.1", "lvmpv", 500, 1), Volume("pv.2", "lvmpv", 500, 2, grow=True)),
            (VolumeGroup("vg-disk", ("pv.1", "pv.2"), 3),),
            (
                Volume("/", "xfs", 700, 4, grow=True, name="root", group="vg-disk"),
                Volume("/home", "ext4", 64, 5, name="home", group="vg-disk"),
                Volume("swap", "swap", 16, 6, name="swap", group="vg-disk"),
            ),
        ),
        {"/": "xfs", "/home": "ext4"},
        swap=True,
    ),
    "uefi-gpt-xfs": Case(
        "uefi", "gpt", Storage((ESP, root("xfs"))), {"/": "xfs", "/boot/efi": "vfat"}, swap=False
    ),
}


@pytest.fixture(scope="module")
def bootstrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tree, as mmdebstrap made it."""
    directory = tmp_path_factory.mktemp("disk") / "tree"
    modules = "\\n".join(MODULES)
    listed = '"$1/usr/share/initramfs-tools/modules.d/disk"'
    hooks = [
        'mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"',
        'echo MODULES=list >"$1/etc/initramfs-tools/conf.d/disk"',
        f"printf '{modules}\\n' >{listed}",
    ]
    argv = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join([*PACKAGES, 'attr'])}"]
    argv += [f"--essential-hook={hook}" for hook in hooks]
    # A smaller tree is written and copied faster, and nobody reads these.
    argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "i18n")]
    process.run([*argv, "trixie", str(directory)])
    return directory


@pytest.fixture
def tree(bootstrapped: Path, tmp_path: Path) -> Iterator[Tree]:
    """A copy of the tree with the proof in it, and with files that are easily copied wrongly."""
    copy = tmp_path / "tree"
    subprocess.run(["cp", "--archive", "--reflink=auto", bootstrapped, copy], check=True)
    made = Tree(copy)
    made.write("/usr/local/sbin/proof", PROOF, mode=0o755)
    made.write("/mark", "root-file-system")
    made.write("/boot/mark", "boot-file-system")
    made.write("/home/guest/file", "home-file-system", mode=0o4750)
    made.link("/home/guest/link", "/no/such/place")
    for name in ("guest", "guest/file", "guest/link"):
        os.chown(copy / "home" / name, 1234, 5678, follow_symlinks=False)
    (copy / "home/guest/file").chmod(0o4750)
    os.setxattr(copy / "home/guest/file", "user.mark", b"extended")
    os.setxattr(copy / "home/guest/file", "security.selinux", b"system_u:object_r:user_home_t:s0\0")
    subprocess.run(["setcap", "cap_net_raw+ep", copy / "home/guest/file"], check=True)
    subprocess.run(["setfacl", "-n", "-m", "u:4321:r,m::rx", copy / "home/guest"], check=True)
    yield made
    subprocess.run(["rm", "-rf", copy], check=True)


def prepared(tree: Tree, case: Case, size: int = 1400) -> tuple[Layout, BootFiles]:
    """The layout of a case, with all that belongs to it in the tree."""
    found = layout.plan(case.storage, case.firmware, size, case.table, "seed", Path("disk.ks"))
    boot = BootFiles(
        "/boot/grub", "/usr/lib/grub/i386-pc", "/usr/lib/grub/x86_64-efi", SIGNED if case.signed else {}
    )
    kernels = [
        Kernel(image.removeprefix("/boot/vmlinuz-"), image, image.replace("vmlinuz", "initrd.img"))
        for image in tree.glob("/boot/vmlinuz-*")
    ]
    tree.write("/etc/fstab", layout.fstab(found))
    menu = bootloader.menu(
        found, kernels, "console=ttyS0 panic=-1 init=/usr/local/sbin/proof", "Disk", 0, Path()
    )
    tree.write("/boot/grub/grub.cfg", menu)
    for _, fs in found.mounts:
        tree.make_directory(fs.mountpoint)
    bootloader.prepare(tree, found, boot)
    return found, boot


@pytest.mark.parametrize("name", CASES)
def test_disk_boots_and_is_what_was_planned(name: str, tree: Tree, tmp_path: Path) -> None:
    case = CASES[name]
    found, boot = prepared(tree, case)
    raw, compressed = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    write.write(tree, found, boot, raw, "tcg")
    assert list(tmp_path.glob(".disk*")) == [], "no temporary file is left"
    check_table(found, raw)
    check_partitions(found, raw, tmp_path)
    if found.groups:
        check_groups(found, raw)
    write.compress(raw, compressed)
    assert compressed.stat().st_size < raw.stat().st_blocks * 512
    seen = boots(compressed, case.firmware, tmp_path)
    mounts = {line.split()[1]: line.split()[2:] for line in seen if line.startswith("mount ")}
    assert {mountpoint: kind for mountpoint, (_, kind) in mounts.items()} == case.mounts
    assert any(line.startswith("swap ") for line in seen) == case.swap
    if found.logical:
        assert mounts["/"][0] == layout.kernel_root(found)
    assert "owner /home/guest 1234:5678 755" in seen
    assert "owner /home/guest/file 1234:5678 4750" in seen
    assert "owner /home/guest/link 1234:5678 777" in seen
    # XFS shows ACLs a second time, in a form of its own.
    seen_attributes = [line for line in seen if line.startswith("attribute ")]
    assert [line for line in seen_attributes if "trusted.SGI_ACL" not in line] == attributes(tree)
    assert "marks boot-file-system home-file-system root-file-system" in seen
    assert not {"failure", "read-only root"} & set(seen)


@pytest.mark.parametrize("name", ["bios-msdos-lvm-xfs-ext4-swap", "bios-gpt-btrfs-boot-home"])
def test_shrunk_disk_boots_and_has_what_it_had(name: str, tree: Tree, tmp_path: Path) -> None:
    case = CASES[name]
    found, boot = prepared(tree, case, 3000)
    raw, small = tmp_path / "disk.raw", tmp_path / "small.qcow2"
    write.write(tree, found, boot, raw, "tcg")
    done = shrink.shrink(raw, small, headroom=40, accelerator="tcg", boot_seconds=None)
    assert done.found.layout == found
    assert done.after < 1300 << 20
    seen = boots(small, case.firmware, tmp_path)
    mounts = {line.split()[1]: line.split()[3] for line in seen if line.startswith("mount ")}
    assert mounts == case.mounts
    assert any(line.startswith("swap ") for line in seen) == case.swap
    assert "marks boot-file-system home-file-system root-file-system" in seen
    assert "failure" not in seen


def boots(disk: Path, firmware: str, directory: Path) -> list[str]:
    """Boot a disk, without changing it, until it turns itself off; returns what it says it has seen."""
    argv = [machine.emulator(), "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-m", "768"]
    argv += ["-nodefaults", "-display", "none", "-vga", "std", "-serial", "stdio", "-no-reboot"]
    argv += ["-drive", f"file={disk},if=virtio,format=qcow2,snapshot=on"]
    if firmware == "uefi":
        code, variables = machine.uefi_firmware().code, machine.uefi_firmware().variables
        argv += ["-drive", f"if=pflash,format=raw,readonly=on,file={code}"]
        argv += ["-drive", f"if=pflash,format=raw,snapshot=on,file={variables}"]
    console = directory / "console"
    with console.open("wb") as output:
        guest = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            guest.wait(BOOT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            guest.kill()
            guest.wait()
    text = console.read_text(errors="replace").replace("\r", "")
    seen = [line.partition("SEEN ")[2].strip() for line in text.splitlines() if "SEEN " in line]
    assert "end" in seen, text[-3000:]
    return seen


def attributes(tree: Tree) -> list[str]:
    """The extended attributes of the tree's test files, in the words of the proof."""
    argv = ["getfattr", "--dump", "--match", "-", "home/guest", "home/guest/file"]
    done = subprocess.run(argv, cwd=tree.root, check=True, capture_output=True, text=True)
    return [f"attribute {line}" for line in done.stdout.splitlines() if line]


def check_table(found: Layout, raw: Path) -> None:
    """parted (sfdisk wrote the table) finds every partition in its place, and sgdisk nothing wrong."""
    argv = ["parted", "--script", "--machine", str(raw), "unit", "s", "print"]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[1].split(":")[5] == found.table
    assert [line.split(":")[:3] for line in lines[2:]] == [
        [f"{part.number}", f"{part.start * 2048}s", f"{(part.start + part.size) * 2048 - 1}s"]
        for part in found.partitions
    ]
    if found.table == "gpt":
        verified = subprocess.run(["sgdisk", "-v", raw], check=True, capture_output=True, text=True).stdout
        assert "No problems found" in verified


def check_partitions(found: Layout, raw: Path, directory: Path) -> None:
    """Every file system on a partition has its UUID and label, and its own checker finds nothing wrong."""
    checkers = {
        "ext4": ["e2fsck", "-f", "-n"],
        "btrfs": ["btrfs", "check", "--readonly"],
        "xfs": ["xfs_repair", "-n", "-f"],
        "vfat": ["fsck.vfat", "-n"],
    }
    for place, fs in found.volumes:
        if not isinstance(place, Partition):
            continue
        copy = cut(raw, place, directory)
        argv = ["blkid", "--probe", "--output", "export", str(copy)]
        lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
        assert f"UUID={fs.uuid}" in lines
        assert f"TYPE={fs.kind}" in lines
        assert not fs.label or f"LABEL={fs.label}" in lines
        if fs.kind in checkers:
            checked = subprocess.run([*checkers[fs.kind], str(copy)], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout + checked.stderr
        copy.unlink()


def check_groups(found: Layout, raw: Path) -> None:
    """libguestfs recognises the system on the logical volumes, whose UUIDs are the planned ones."""
    script = "run\nlvs-full\nvgs-full\npvs-full\ninspect-os\n"
    argv = ["guestfish", "--ro", "--format=raw", "--add", str(raw)]
    env = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    done = subprocess.run(argv, input=script, check=True, capture_output=True, text=True, env=env)
    planned = [*(volume.uuid for volume in found.logical), *(group.uuid for group in found.groups)]
    planned += [part.physical_uuid for part in found.partitions]
    for uuid in planned:
        assert uuid.replace("-", "") in done.stdout
    assert done.stdout.splitlines()[-1] == f"/dev/{found.logical[0].group}/{found.logical[0].name}"


def cut(raw: Path, part: Partition, directory: Path) -> Path:
    """A partition as a sparse file of its own."""
    copy = directory / f"cut-{part.number}"
    argv = [
        "dd",
        f"if={raw}",
        f"of={copy}",
        "bs=1M",
        f"skip={part.start}",
        f"count={part.size}",
        "conv=sparse",
    ]
    subprocess.run([*argv, "status=none"], check=True)
    # dd leaves out a hole at the end
    os.truncate(copy, part.size << 20)
    return copy


def small_tree(directory: Path) -> Tree:
    """A tree of a few files, for what needs no boot."""
    directory.mkdir()
    made = Tree(directory)
    made.write("/etc/hostname", "small")
    made.write("/boot/kernel", "k" * 100_000)
    made.write("/boot/efi/program", "e" * 1000)
    return made


def small_layout(size: int = 64) -> Layout:
    boot = Volume("/boot", "ext4", 16, 1)
    efi = Volume("/boot/efi", "vfat", 8, 2)
    return layout.plan(
        Storage((boot, efi, Volume("/", "ext4", 16, 3, grow=True))),
        "bios",
        size,
        "msdos",
        "seed",
        Path("x.ks"),
    )


def debugfs(raw: Path, part: Partition, request: str) -> str:
    argv = ["debugfs", "-R", request, f"{raw}?offset={part.start << 20}"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_each_file_is_on_the_file_system_it_belongs_to_and_on_no_other(tmp_path: Path) -> None:
    made = small_tree(tmp_path / "tree")
    made.path("/boot").chmod(0o1700)
    os.chown(made.path("/boot"), 11, 22)
    found, raw = small_layout(), tmp_path / "disk"
    write.write(made, found, None, raw, "tcg")
    boot, efi, top = found.partitions
    assert names(debugfs(raw, top, "ls -p /")) == {"boot", "etc", "lost+found"}
    assert names(debugfs(raw, top, "ls -p /boot")) == set()
    assert names(debugfs(raw, boot, "ls -p /")) == {"efi", "kernel", "lost+found"}
    assert names(debugfs(raw, boot, "ls -p /efi")) == set()
    for part, path in ((boot, "/"), (top, "/boot")):
        seen = debugfs(raw, part, f"stat {path}")
        assert "Mode:  01700" in seen
    assert "User:    11   Group:    22" in debugfs(raw, boot, "stat /")
    listed = subprocess.run(
        ["mdir", "-b", "-i", f"{raw}@@{efi.start << 20}", "::"], check=True, capture_output=True, text=True
    )
    assert listed.stdout.split() == ["::/program"]


def names(listing: str) -> set[str]:
    return {line.split("/")[5] for line in listing.splitlines() if line} - {".", ".."}


def test_same_files_and_date_give_the_same_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("one", "two"):
        made = small_tree(tmp_path / f"tree-{name}")
        for path in (made.root, *made.root.rglob("*")):
            os.utime(path, (1_600_000_000, 1_600_000_000))
        time.sleep(1.1)  # the times that cannot be set differ
        write.write(made, small_layout(), None, tmp_path / name, "tcg")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tree_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    made = small_tree(tmp_path / "tree")
    made.path("/large").write_bytes(os.urandom(60 << 20))
    with pytest.raises(VdibuildError, match=r"what belongs on / does not fit into its 39 MiB"):
        write.write(made, small_layout(), None, tmp_path / "disk", "tcg")
    assert not (tmp_path / "disk").exists()


def test_link_on_the_efi_system_partition_is_refused(tmp_path: Path) -> None:
    made = small_tree(tmp_path / "tree")
    made.link("/boot/efi/shadow", "/etc/shadow")
    with pytest.raises(VdibuildError, match="symbolic link"):
        write.write(made, small_layout(), None, tmp_path / "disk", "tcg")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with only 4 MiB of space."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_full_disk_is_the_hosts_fault_and_leaves_nothing(tmp_path: Path, full_disk: Path) -> None:
    made = small_tree(tmp_path / "tree")
    made.path("/large").write_bytes(os.urandom(20 << 20))
    with pytest.raises(HostError, match="no space left"):
        write.write(made, small_layout(128), None, full_disk / "disk", "tcg")
    assert list(full_disk.iterdir()) == []
    write.write(made, small_layout(128), None, tmp_path / "disk", "tcg")
    with pytest.raises(HostError, match="no space left"):
        write.compress(tmp_path / "disk", full_disk / "compressed")
    assert list(full_disk.iterdir()) == []


def test_appliance_that_does_not_start_is_the_hosts_fault_and_leaves_nothing(
    tmp_path: Path, fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = fake_command("broken-qemu", "echo broken >&2; exit 1")
    monkeypatch.setenv("LIBGUESTFS_HV", str(tmp_path / "fake-bin/broken-qemu"))
    made = small_tree(tmp_path / "tree")
    storage = Storage((Volume("/", "xfs", 300, 1, grow=True),))
    found = layout.plan(storage, "bios", 400, "msdos", "seed", Path("x.ks"))
    assert write.choose(found)[0] == "appliance"
    with pytest.raises(HostError, match="appliance does not start"):
        write.write(made, found, None, tmp_path / "disk", "tcg")
    assert record.exists(), "libguestfs did try"
    assert not list(tmp_path.glob("*disk*"))


def everybodys_layout() -> Layout:
    volumes = (
        Volume("/boot/efi", "vfat", 8, 1),
        Volume("/", "ext4", 16, 2, grow=True),
        Volume("/home", "btrfs", 128, 3),
    )
    return layout.plan(Storage(volumes), "bios", 256, "msdos", "seed", Path("x.ks"))


def write_everybodys_disk(directory: Path) -> None:
    """Make a tree whose files belong to several users, and a disk of it; run by an ordinary user."""
    (directory / "tree").mkdir()
    made = Tree(directory / "tree")
    made.write("/boot/efi/program", "efi")
    made.write("/srv/file", "secret", 0o600)
    made.write("/home/guest/file", "mine", 0o600)
    for name in ("/srv/file", "/home/guest"):
        process.run(host_command(["chown", "-R", "33:1234", str(made.path(name))]))
    process.run(host_command(["chmod", "0700", str(made.path("/home/guest"))]))
    write.write(made, everybodys_layout(), None, directory / "disk", "tcg")
    remove(made.root)


@pytest.fixture
def ordinary_user() -> Iterator[str]:
    """An ordinary user with subordinate ids."""
    name = "vdibuild-disk-test"
    subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)
    subprocess.run(["useradd", "--create-home", name], check=True)
    yield name
    subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


def test_ordinary_user_writes_a_disk_with_everybodys_files(ordinary_user: str, tmp_path: Path) -> None:
    home = Path(f"~{ordinary_user}").expanduser()
    project = Path(__file__).parent.parent.parent
    script = "import sys, pathlib; from tests.guest.test_disk import write_everybodys_disk as write\n"
    script += "write(pathlib.Path(sys.argv[1]))"
    argv = ["runuser", "-u", ordinary_user, "--", "env", "--chdir=/", f"HOME={home}", f"PYTHONPATH={project}"]
    argv += [sys.executable, "-c", script, str(home)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    _, top, users = everybodys_layout().partitions
    assert "User:     0   Group:     0" in debugfs(home / "disk", top, "stat /boot")
    assert "User:    33   Group:  1234" in debugfs(home / "disk", top, "stat /srv/file")
    image = cut(home / "disk", users, tmp_path)
    argv = ["btrfs", "inspect-internal", "dump-tree", "-t", "5", str(image)]
    dump = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert dump.count("uid 33 gid 1234") == 2
