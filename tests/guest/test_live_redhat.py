"""A live system of the Red Hat family: built by the pipeline from local packages, laid out as lorax does it.

Its dracut is a script that notes what it is told and hands out an initramfs made here; kernel and GRUB are
this host's. What only Fedora's own packages can show is not seen here: its dracut, its shim and
signed GRUB, its SELinux.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rpmrepo
from tests.guest.conftest import SITE, SiteDirectory
from tests.guest.test_redhat import kernel_version, make_initramfs
from vdibuild import process, site
from vdibuild.live import ISO, build, iso, verification
from vdibuild.live.build import Kind
from vdibuild.live.initramfs import Contents
from vdibuild.settings.live_systems import Compression, LiveSystem

SECONDS = 300

KICKSTART = """\
url --url={repository}
lang C.UTF-8
rootpw --lock
bootloader --timeout=0 --append="console=ttyS0 panic=-1"
poweroff
%packages --nocore --excludedocs
busybox
testos-release
shadow-utils
kernel-core
dracut-live
zstd
grub2-pc-modules
grub2-efi-x64-cdboot
shim-x64
init
%end
"""

# In the place of dmsquash-live: the medium by its label, the squashfs on it.
LIVE = """\
#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
for module in $(cat /modules); do insmod /$module; done
for word in $(cat /proc/cmdline); do
    case $word in root=live:CDLABEL=*) label=${word#root=live:CD} ;; esac
done
while ! medium=$(findfs $label); do sleep 1; done
mkdir /medium
mount -t iso9660 -o ro $medium /medium
mount -t squashfs -o ro,loop /medium/LiveOS/squashfs.img /root
exec switch_root /root /usr/sbin/init
"""

INIT = f"""\
#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
echo "with $(cat /proc/cmdline)" >/dev/ttyS0
echo "{verification.UP}" >/dev/ttyS0
sleep 100
"""

DRACUT = """\
#!/bin/sh
for word; do output=$word; done
case $output in
--version) echo "dracut 107-1.fc43" ;;
*) echo "$@" >/usr/lib/dracut/asked; cat /usr/lib/dracut/initramfs >"$output" ;;
esac
"""

LORAX = {
    "/LiveOS/squashfs.img",
    "/images/pxeboot/vmlinuz",
    "/images/pxeboot/initrd.img",
    "/images/eltorito.img",
    "/boot/grub2/grub.cfg",
    "/EFI/BOOT/BOOTX64.EFI",
    "/EFI/BOOT/grubx64.efi",
    "/EFI/BOOT/mmx64.efi",
    "/EFI/BOOT/grub.cfg",
}
"""The ISO of livemedia-creator for x86_64, and of livecd-creator where it uses GRUB, but for what GRUB loads
at run time (boot/grub2/i386-pc, EFI/BOOT/fonts: ours has all in one piece) and what is copied from packages
for people to read (lorax: share/templates.d/99-generic/live/x86.tmpl and efi.tmpl; livecd-tools:
imgcreate/live.py).
"""
OURS = {"/.disk/info", "/LiveOS/SHA256SUMS", "/images/efiboot.img", "/boot/boot.cat"}
"""What it has besides. lorax has the last two, too: appended, and hidden."""

KIND = Kind(
    title="From packages", prefix="RPMS", contents=Contents(modules=("pollcdrom",), drivers=("sr_mod",))
)


def packages(directory: Path) -> list[rpmrepo.Package]:
    version = kernel_version()
    modules = f"/usr/lib/modules/{version}"
    drivers = ("ahci", "sr_mod", "isofs", "loop", "squashfs")
    grub = directory / "gcdx64.efi"
    # As Fedora builds it for media: it looks for its menu beside itself.
    inside = "fat iso9660 part_gpt normal linux search search_label configfile echo serial terminal test"
    argv = ["grub-mkimage", "-O", "x86_64-efi", "-p", "/EFI/BOOT", "-o", str(grub)]
    process.run([*argv, *inside.split()])
    bios = {str(path): path for path in Path("/usr/lib/grub/i386-pc").iterdir() if path.is_file()}
    return [
        *rpmrepo.minimal(),
        rpmrepo.Package(
            "kernel-core",
            files={
                f"{modules}/vmlinuz": Path(f"/boot/vmlinuz-{version}"),
                f"{modules}/modules.dep": "",
            },
        ),
        rpmrepo.Package(
            "dracut-live",
            requires=("/bin/sh",),
            files={
                "/usr/bin/dracut": DRACUT,
                "/usr/lib/dracut/modules.d/90dmsquash-live/module-setup.sh": "",
                "/usr/lib/dracut/initramfs": make_initramfs(directory, LIVE, drivers),
            },
            executables=("/usr/bin/dracut",),
        ),
        rpmrepo.Package("zstd", files={"/usr/bin/zstd": "#!/bin/sh\n"}, executables=("/usr/bin/zstd",)),
        rpmrepo.Package("grub2-pc-modules", files=bios),
        rpmrepo.Package(
            "grub2-efi-x64-cdboot",
            files={"/boot/efi/EFI/fedora/gcdx64.efi": grub, "/boot/efi/EFI/fedora/grubx64.efi": "of disks"},
        ),
        # shim would start the GRUB beside it.
        rpmrepo.Package(
            "shim-x64",
            files={"/boot/efi/EFI/BOOT/BOOTX64.EFI": grub, "/boot/efi/EFI/BOOT/mmx64.efi": "MokManager"},
        ),
        rpmrepo.Package(
            "init", requires=("/bin/sh",), files={"/usr/sbin/init": INIT}, executables=("/usr/sbin/init",)
        ),
        rpmrepo.Package(
            "shadow-utils",
            requires=("/bin/sh",),
            files={"/usr/bin/chpasswd": "#!/bin/sh\ncat >/etc/chpasswd\n", "/usr/bin/sleep": "-> busybox"},
            executables=("/usr/bin/chpasswd",),
        ),
    ]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[SiteDirectory]:
    (tmp_path / "site").mkdir()
    made = SiteDirectory(tmp_path / "site", tmp_path / "cache")
    made.configure(SITE.replace("key/", f"{made.path}/key/"))
    yield made
    made.close()


def names(image: Path) -> set[str]:
    listed = subprocess.run(["isoinfo", "-R", "-f", "-i", image], check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


def read(image: Path, name: str) -> str:
    argv = ["isoinfo", "-R", "-i", str(image), "-x", name]
    return subprocess.run(argv, check=True, capture_output=True, text=True, errors="replace").stdout


def test_the_iso_is_laid_out_as_loraxs_and_starts(directory: SiteDirectory, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="vdi-") as short, rpmrepo.signing_key(Path(short)) as key:
        repository = rpmrepo.build(tmp_path / "rpms", packages(tmp_path), key=key)
        (directory.path / "kickstarts").mkdir(exist_ok=True)
        text = KICKSTART.format(repository=repository.as_uri())
        (directory.path / "kickstarts/rpms.ks.j2").write_text(text)
        system = LiveSystem(
            family="redhat",
            release="fedora43",
            kickstart="rpms.ks.j2",
            keyring=key.public,
            mirror=repository.as_uri(),
            compression=Compression(level=3),
            boot_seconds=SECONDS,
        )
        # That it is built means that it has come up from a CD with either firmware.
        built = build.build(site.load(directory.path / "vdibuild.yaml"), "rpms", system, KIND)
    image = built.version.path / ISO
    version = kernel_version()
    directories = {
        "/boot",
        "/boot/grub2",
        "/images",
        "/images/pxeboot",
        "/EFI",
        "/EFI/BOOT",
        "/LiveOS",
        "/.disk",
    }
    assert names(image) - directories == LORAX | OURS
    menu = read(image, "/boot/grub2/grub.cfg")
    assert re.search(rf"linux /images/pxeboot/vmlinuz root=live:CDLABEL={iso.label(image)} ", menu)
    assert "initrd /images/pxeboot/initrd.img\n" in menu
    # The GRUB on the EFI system partition finds the ISO, and the one menu on it.
    assert re.fullmatch(
        r"search\.fs_label RPMS_\w+ root\nset prefix=\(\$root\)/boot/grub2\nconfigfile \$prefix/grub\.cfg\n",
        read(image, "/EFI/BOOT/grub.cfg"),
    )
    assert read(image, "/EFI/BOOT/grubx64.efi") != "of disks"
    root = tmp_path / "squashfs.img"
    with root.open("wb") as file:
        argv = ["isoinfo", "-R", "-i", str(image), "-x", "/LiveOS/squashfs.img"]
        subprocess.run(argv, check=True, stdout=file)
    argv = ["unsquashfs", "-cat", str(root), "usr/lib/dracut/asked"]
    asked = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    assert f"--kver {version}" in " ".join(asked)
    assert {"--no-hostonly", "dmsquash-live", "pollcdrom", "sr_mod"} <= set(asked)
