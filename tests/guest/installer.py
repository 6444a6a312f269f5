"""An installer of a megabyte: this host's kernel, and an initramfs with busybox that plays what it is told.

The word `play=CASE` on its kernel's command line says what. It reads the kickstart that virt-install put into
its initramfs, and writes the marker's nonce to the disk, as the kickstart's last script would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.guest import initramfs

_MODULES = ("virtio_pci", "virtio_console", "virtio_blk")

_INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do insmod "$module"; done
for word in $(cat /proc/cmdline); do
    case $word in
        play=*) play=${word#play=} ;;
        inst.ks=file:*) kickstart=${word#inst.ks=file:} ;;
    esac
done
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = org.fedoraproject.anaconda.log.0 ] && log=/dev/${port##*/}
done
say() { echo "12:00:00,000 INF vdibuild: $1" >"$log"; }
cry() { echo "12:00:00,000 CRT vdibuild: $1" >"$log"; }
off() { sync; poweroff -f; }

echo "tiny installer: $play"
say "stage storage"
case $play in
    success)
        [ -b /dev/disk/by-id ] || serial=$(cat /sys/block/vdb/serial 2>/dev/null)
        if [ "$serial" ]; then say "extra disk $serial: $(head -c 12 /dev/vdb)"; fi
        say "stage write"
        sed -n "s/^printf '%s.n' \([0-9a-f]*\) >.*/\1/p" "$kickstart" >/dev/vda
        say "done"
        off ;;
    panic) echo c >/proc/sysrq-trigger ;;
    silent | deadline) while :; do sleep 1; [ "$play" = deadline ] && say "still here"; done ;;
    failure)
        cry "failed: package no-such-package does not exist"
        cry "hint: correct its name in the kickstart"
        sleep 1000 ;;
    prompt) printf "Please make a selection from the above ['c' to continue, 'q' to quit]: "; sleep 1000 ;;
    unfinished) off ;;
    reboot) say "done"; reboot -f ;;
    *) echo "unknown: $play"; off ;;
esac
"""


@dataclass(frozen=True)
class TinyInstaller:
    """The installer. kernel, initramfs: its files."""

    kernel: Path
    initramfs: Path


def make(directory: Path) -> TinyInstaller:
    """Make the installer in an empty directory."""
    return TinyInstaller(initramfs.kernel(), initramfs.make(directory, _INIT, _MODULES))
