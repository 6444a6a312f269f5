"""A machine of a few megabytes for pools: a kernel, the guest agent, and a disk that it is not started from.

It is clean within a few seconds under emulation, and what is on its disk can be seen through its agent. Only
the way it is started differs from other machines of a pool: by a template of the site's own.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests.guest import initramfs
from tests.unit.test_store import described
from vdibuild import resources, store
from vdibuild.pool.overlay_clones import TEMPLATE
from vdibuild.settings.keys import Keys
from vdibuild.store import Store, Version

MODULES = ("virtio_pci", "virtio_console", "virtio_blk")
DISK_BYTES = 64 << 20

_AGENT = Path("/usr/sbin/qemu-ga")
_INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do insmod "$module"; done
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = org.qemu.guest_agent.0 ] && agent=/dev/${port##*/}
done
while :; do qemu-ga -m virtio-serial -p "$agent" -t /run -f /run/qemu-ga.pid; done
"""
# No clock to measure, and no console to scroll.
_ARGUMENTS = "quiet tsc=reliable no_timer_check mitigations=off console=null panic=-1"
_ASK_SECONDS = 20


def make(directory: Path, modules: Sequence[str] = MODULES) -> str:
    """Make kernel and initramfs in an empty directory. Returns the template of such machines."""
    kernel = initramfs.unpacked_kernel(directory / "kernel")
    system = initramfs.make(directory, _INIT, modules, (_AGENT,))
    started = f"<kernel>{kernel}</kernel><initrd>{system}</initrd><cmdline>{_ARGUMENTS}</cmdline>"
    template = (resources.packaged() / "templates" / TEMPLATE).read_text()
    assert template.count("<boot dev='hd'/>") == 1
    return template.replace("<boot dev='hd'/>", started)


def add(site: Path, image: str, template: str) -> Version:
    """Put a promoted version, with an empty disk, into the store of a site, and that template into it."""
    (site / "templates").mkdir(exist_ok=True)
    (site / "templates" / TEMPLATE).write_text(template)
    images = Store(site / "artifacts", Keys(signing=site / "key/signing"))
    with images.staging(image) as staging:
        disk = str(staging.path / store.DISK)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(DISK_BYTES)], check=True)
        (staging.path / store.BUNDLE).write_bytes(b"bundle")
        (staging.path / store.LOG).write_text("log\n")
        version = images.publish(staging, described(staging, virtual_size=DISK_BYTES))
    images.promote(image, version.name)
    return version


class Inside:
    """What is in a running machine, through its agent. Every call raises libvirtError when it is gone."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def read(self, path: str, size: int) -> bytes:
        """The beginning of a file."""
        handle = self._ask("guest-file-open", path=path, mode="r")
        try:
            return base64.b64decode(self._ask("guest-file-read", handle=handle, count=size)["buf-b64"])
        finally:
            self._ask("guest-file-close", handle=handle)

    def write(self, path: str, data: bytes, mode: str = "w") -> None:
        """Write to a file or a device; it is there when this returns."""
        handle = self._ask("guest-file-open", path=path, mode=mode)
        try:
            self._ask("guest-file-write", handle=handle, **{"buf-b64": base64.b64encode(data).decode()})
            self._ask("guest-file-flush", handle=handle)
        finally:
            self._ask("guest-file-close", handle=handle)

    def start(self, program: str, *arguments: str) -> None:
        """Start a command, and leave it alone."""
        self._ask("guest-exec", path=program, arg=list(arguments))

    def _ask(self, command: str, **arguments: object) -> Any:
        asked = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(self._domain, asked, _ASK_SECONDS, 0))["return"]


def domain(connection: libvirt.virConnect, lease: str) -> Any:
    """A lease's domain, or None."""
    try:
        return connection.lookupByUUIDString(lease)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None
