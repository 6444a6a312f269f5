"""Clones of a stored image: an overlay on its disk, booted by libvirt as a transient domain.

    DIRECTORY/machines/LEASE/disk.qcow2     the overlay: all that a machine writes
    DIRECTORY/machines/LEASE/variables      the firmware's variables, with UEFI

A transient domain leaves nothing in libvirt when it ends or the host is started anew. Our mark on it, in its
metadata, names the pool and its directory: nothing that does not carry both is ever touched.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import libvirt
import libvirt_qemu

from vdibuild import domain_template, process, store
from vdibuild.errors import HostError, StoreError, VerificationError
from vdibuild.manifest import AdoptedManifest, Devices, LiveManifest, Manifest
from vdibuild.pool.clones import Endpoint, Found
from vdibuild.pool.firewall import interface_name
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import Machine
from vdibuild.store import Store, Version

NAMESPACE = "urn:vdibuild:pool:1"
"""The XML namespace of our mark."""

TEMPLATE = "pool-domain.xml.j2"

TELLER = "/usr/lib/vdibuild/tell"
"""The program of a golden image that shows its argument to whoever uses the machine (overlays/desktop)."""

_MACHINES = "machines"
_DISK = "disk.qcow2"
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 5
_PASSWORD_BYTES = 32  # 43 characters; SPICE allows 60
_SHOWN_SECONDS = 300  # how long Windows shows a message
_MIB = 1 << 20
_OUR_DEVICES = Devices()

# What libvirt says when the agent is not there yet, or hangs.
_NO_AGENT = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED)


@dataclass(frozen=True)
class Hardware:
    """What the machines of a pool are made of. memory: MiB. disk: MiB that a machine may write. network: the
    libvirt network they are in; None: they have none. reserve_memory, reserve_disk: MiB that stay free.
    """

    memory: int
    cores: int
    disk: int
    video: Literal["qxl", "virtio"]
    network: str | None
    accelerator: Literal["kvm", "tcg"]
    boot_seconds: float
    reserve_memory: int
    reserve_disk: int


@dataclass
class _Base:
    """A version that clones are made of, which cannot be removed meanwhile."""

    version: Version
    manifest: Manifest | AdoptedManifest
    holding: contextlib.ExitStack


class OverlayCloner:
    """Makes and destroys the machines of one pool; see clones.Cloner.

    let_in: called when a machine has been started, to let it into its network; None where that is open.
    """

    def __init__(
        self,
        pool: str,
        image: str,
        directory: Path,
        hardware: Hardware,
        images: Store,
        hypervisor: Hypervisor,
        site_directory: Path,
        let_in: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._pool = pool
        self._image = image
        self._directory = directory.resolve()
        self._hardware = hardware
        self._images = images
        self._hypervisor = hypervisor
        self._site_directory = site_directory
        self._let_in = let_in
        self._bases: dict[str, _Base] = {}
        self._checking = asyncio.Lock()

    async def promoted(self) -> str:
        """See clones.Cloner."""
        return self._images.get(self._image).name

    async def keep(self, versions: Set[str]) -> None:
        """See clones.Cloner."""
        for version in self._bases.keys() - versions:
            # QEMU's own locks keep what running clones still need (see Store.gc).
            self._bases.pop(version).holding.close()

    async def room(self) -> int:
        """See clones.Cloner."""
        hardware = self._hardware
        there = list(self._places())
        # A machine that has just begun has not taken its memory yet, nor its space on the disk.
        memory = min(
            _memory("MemAvailable") - hardware.reserve_memory,
            _memory("MemTotal") - hardware.reserve_memory - len(there) * hardware.memory,
        )
        self._directory.mkdir(parents=True, exist_ok=True)
        unwritten = sum(max(0, hardware.disk - _written(place)) for place in there)
        space = shutil.disk_usage(self._directory).free // _MIB - hardware.reserve_disk - unwritten
        return max(0, min(memory // hardware.memory, space // hardware.disk))

    async def make(self, machine: Machine) -> Endpoint:
        """See clones.Cloner. Raises VerificationError when the machine ends or does not answer in time."""
        base = await self._base(machine.version)
        place = self._place(machine.lease)
        await asyncio.to_thread(_create_overlay, base.version.path / store.DISK, place)
        password = secrets.token_urlsafe(_PASSWORD_BYTES)
        devices = base.manifest.devices if isinstance(base.manifest, AdoptedManifest) else _OUR_DEVICES
        xml = self.domain(machine, base.manifest.firmware, password, devices)
        await self._hypervisor.call(lambda connection: _create(connection, xml))
        return await self.finish(machine)

    async def finish(self, machine: Machine) -> Endpoint:
        """See clones.Cloner. Raises VerificationError when the machine ends or does not answer in time."""
        if self._let_in:
            await self._let_in()
        end = time.monotonic() + self._hardware.boot_seconds
        while not await self._hypervisor.call(lambda connection: _answers(connection, machine.lease)):
            if time.monotonic() > end:
                raise VerificationError(
                    f"{machine.name} does not answer after {self._hardware.boot_seconds:.0f} s",
                    "is the guest agent in the image, and started?",
                )
            await asyncio.sleep(_POLL_SECONDS)
        endpoint = await self._hypervisor.call(lambda connection: _endpoint(connection, machine.lease))
        if endpoint is None:
            raise VerificationError(f"{machine.name} ended by itself while it started")
        return endpoint

    async def destroy(self, lease: str) -> None:
        """See clones.Cloner."""
        await self._hypervisor.call(lambda connection: self._destroy(connection, lease))
        await asyncio.to_thread(_remove, self._place(lease))

    async def found(self) -> dict[str, Found]:
        """See clones.Cloner."""
        result = {place.name: Found(None) for place in self._places()}
        running = await self._hypervisor.call(self._running)
        for lease, found in running.items():
            grown = _written(self._place(lease))
            if not found.trouble and grown > self._hardware.disk:
                found = Found(
                    found.endpoint, f"it wrote {grown} MiB, more than its {self._hardware.disk} MiB"
                )
            result[lease] = found
        return result

    async def tell(self, lease: str, text: str) -> None:
        """See clones.Cloner."""
        await self._hypervisor.call(lambda connection: _tell(connection, lease, text))

    def domain(
        self,
        machine: Machine,
        firmware: Literal["bios", "uefi"],
        password: str,
        devices: Devices = _OUR_DEVICES,
    ) -> str:
        """The domain of a machine, as libvirt's XML. devices: what its system has drivers for."""
        hardware = self._hardware
        place = self._place(machine.lease)
        return domain_template.render(
            TEMPLATE,
            self._site_directory,
            accelerator=hardware.accelerator,
            firmware=firmware,
            namespace=NAMESPACE,
            name=machine.name,
            pool=self._pool,
            directory=self._directory,
            lease=machine.lease,
            version=machine.version,
            mac=machine.mac,
            interface=interface_name(self._directory, machine.mac),
            memory=hardware.memory,
            cores=hardware.cores,
            video=hardware.video,
            network=hardware.network,
            devices=devices,
            variables=place / "variables",
            overlay=place / _DISK,
            password=password,
        )

    def close(self) -> None:
        """Let the images go; machines stay."""
        for base in self._bases.values():
            base.holding.close()
        self._bases.clear()

    async def _base(self, version: str) -> _Base:
        """A version to make clones of, checked once: its signature, every byte, and that it stands alone."""
        async with self._checking:
            if version not in self._bases:
                self._bases[version] = await asyncio.to_thread(self._check, version)
            return self._bases[version]

    def _check(self, version: str) -> _Base:
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(self._images.using(self._image, version))
            self._images.verify(self._image, version)
            refuse_chains(found.path / store.DISK)
            stored = found.stored()
            if isinstance(stored, LiveManifest):
                raise StoreError(f"{self._image} {version} is a live system: it has no disk to clone")
            return _Base(found, stored, stack.pop_all())

    def _place(self, lease: str) -> Path:
        return self._directory / _MACHINES / str(uuid.UUID(lease))

    def _places(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError):
            for place in (self._directory / _MACHINES).iterdir():
                if _is_lease(place.name):
                    yield place

    def _running(self, connection: Any) -> dict[str, Found]:
        result = {}
        for domain in connection.listAllDomains():
            with contextlib.suppress(libvirt.libvirtError):  # it ended meanwhile
                if self._marked(domain):
                    trouble = _trouble(domain)
                    result[domain.UUIDString()] = Found(_described(domain), trouble)
        return result

    def _marked(self, domain: Any) -> bool:
        try:
            text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return False
            raise
        mark = ElementTree.fromstring(text)  # noqa: S314 (libvirt wrote it)
        return mark.get("pool") == self._pool and mark.get("directory") == str(self._directory)

    def _destroy(self, connection: Any, lease: str) -> None:
        domain = _domain(connection, lease)
        if domain is None or not self._marked(domain):
            return
        try:
            # At once, by signal: a guest that freezes its QEMU must not be asked.
            domain.destroy()
        except libvirt.libvirtError:
            if _domain(connection, lease) is not None:
                raise


def refuse_chains(disk: Path) -> None:
    """Raise StoreError when an image has snapshots or a backing file."""
    said = process.run(["qemu-img", "info", "-U", "--output=json", str(disk)], capture=True)
    info = json.loads(said.stdout)
    if info.get("snapshots"):
        raise StoreError(
            f"{disk} has snapshots", "clones are made of an image without any: qemu-img snapshot -d"
        )
    if "backing-filename" in info:
        raise StoreError(
            f"{disk} is itself a clone, of {info['backing-filename']}", "flatten it: qemu-img convert"
        )


def _create_overlay(disk: Path, place: Path) -> None:
    try:
        place.mkdir(parents=True)
        place.chmod(0o711)  # QEMU, which is somebody else, has to get through; libvirt gives it the files
    except OSError as error:
        raise HostError(f"{place} cannot be made: {error.strerror}") from None
    process.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            str(disk.resolve()),
            str(place / _DISK),
        ]
    )


def _create(connection: Any, xml: str) -> None:
    connection.createXML(xml, libvirt.VIR_DOMAIN_START_VALIDATE)


def _domain(connection: Any, lease: str) -> Any:
    """The domain of a lease, or None."""
    try:
        return connection.lookupByUUIDString(lease)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _answers(connection: Any, lease: str) -> bool:
    """Whether the guest agent answers. Raises VerificationError when the machine is gone."""
    try:
        _ask(connection, lease, {"execute": "guest-ping"})
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NO_AGENT:
            return False
        if _domain(connection, lease) is None:
            raise VerificationError(
                f"the machine of lease {lease} ended by itself while it started"
            ) from None
        raise
    return True


def _ask(connection: Any, lease: str, command: dict[str, Any]) -> str:
    domain = _domain(connection, lease)
    if domain is None:
        raise VerificationError(f"the machine of lease {lease} ended by itself")
    return str(libvirt_qemu.qemuAgentCommand(domain, json.dumps(command), _ANSWER_SECONDS, 0))


def _tell(connection: Any, lease: str, text: str) -> None:
    """Have the first program that its system has show a message, without a shell in between."""
    ways: list[dict[str, Any]] = [
        {"path": TELLER, "arg": [text]},
        {"path": "wall", "input-data": base64.b64encode(f"{text}\n".encode()).decode()},
        {"path": "msg.exe", "arg": ["*", f"/TIME:{_SHOWN_SECONDS}", text]},
    ]
    for arguments in ways:
        try:
            _ask(connection, lease, {"execute": "guest-exec", "arguments": arguments})
        except libvirt.libvirtError as error:
            if error.get_error_code() in _NO_AGENT:
                raise
            refused = str(error.get_error_message())
        else:
            return
    raise VerificationError(f"the machine of lease {lease} has no program that shows messages: {refused}")


def _endpoint(connection: Any, lease: str) -> Endpoint | None:
    domain = _domain(connection, lease)
    return None if domain is None else _described(domain)


def _described(domain: Any) -> Endpoint | None:
    """Where a running domain shows its screen, by its XML, which names the socket that libvirt chose."""
    root = ElementTree.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))  # noqa: S314 (libvirt wrote it)
    graphics = root.find("./devices/graphics[@type='spice']")
    listen = None if graphics is None else graphics.find("listen[@type='socket']")
    if graphics is None or listen is None or not listen.get("socket"):
        return None
    return Endpoint(Path(listen.get("socket", "")), graphics.get("passwd", ""))


def _trouble(domain: Any) -> str:
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
        return "its disk is full, or fails"
    if state in (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_SHUTOFF):
        return "the machine ended by itself"
    return ""


def _remove(place: Path) -> None:
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"{place} cannot be removed: {error.strerror}") from None


def _written(place: Path) -> int:
    """MiB that a machine's overlay takes."""
    try:
        return (place / _DISK).stat().st_blocks * 512 // _MIB
    except FileNotFoundError:
        return 0


def _memory(field: str) -> int:
    """A figure of the host's memory, in MiB (proc_meminfo(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) // 1024
    raise HostError(f"/proc/meminfo has no {field}")


def _is_lease(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
