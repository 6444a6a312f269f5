"""What this host can do: an accelerator that really works, packages, permissions, room.

`accelerator` decides how guests run; `doctor` looks at everything, and says what mends what is missing.
"""

from __future__ import annotations

import fcntl
import getpass
import importlib.util
import json
import os
import re
import selectors
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vdibuild import machine, process, progress, tree
from vdibuild.errors import HostError, VdibuildError
from vdibuild.output import replace
from vdibuild.site import Site

PACKAGES = Path(__file__).with_name("packages.txt")
"""The table of what vdibuild needs; its columns are those of `Need`."""

KVM = Path("/dev/kvm")
SUBORDINATE_IDS = (Path("/etc/subuid"), Path("/etc/subgid"))
EVERY_BUILD = "every build"
"""The purpose, in the table, of what no image can be built without."""

_PROBE_SECONDS = 15.0  # a kernel that works under KVM panics within two; on a busy host it may take longer
_FREE_GIB = 4
_KERNELS = ((Path("/boot"), "vmlinuz-*"), (Path("/usr/lib/modules"), "*/vmlinuz"))


@dataclass(frozen=True)
class Accelerator:
    """How guests run on this host: with KVM, or emulated (TCG); and why so."""

    name: Literal["kvm", "tcg"]
    reason: str


@dataclass(frozen=True)
class Check:
    """Something that was looked at. ok: it is as it should be. detail: what was found. mend: the command
    that mends it, empty where it is ok. required: no image can be built without it.
    """

    name: str
    ok: bool
    detail: str
    mend: str = ""
    required: bool = False


@dataclass(frozen=True)
class Need:
    """A line of packages.txt. probe: a command, a path with wildcards, or python:MODULE. debian, fedora: the
    packages that have it, empty where there is none to install. purpose: what needs it.
    """

    probe: str
    debian: str
    fedora: str
    purpose: str

    def present(self) -> bool:
        """Whether this host has it."""
        if self.probe.startswith("python:"):
            return importlib.util.find_spec(self.probe.removeprefix("python:")) is not None
        if self.probe.startswith("/"):
            return any(Path("/").glob(self.probe.removeprefix("/")))
        return process.find(self.probe) is not None


def accelerator(kernel: Path | None = None, *, cache: Path | None = None, fresh: bool = False) -> Accelerator:
    """KVM where a kernel boots under it on this host, else TCG.

    That /dev/kvm can be opened proves nothing: under broken nested virtualisation a guest hangs. So a kernel
    is booted, without an initramfs: it panics, and QEMU ends, in a second or two where KVM works.
    kernel: the kernel to try with; by default one of this host's. cache: the directory that remembers the
    answer until the next boot of this host or another QEMU; by default ~/.cache/vdibuild. fresh: try again
    whatever is remembered. Raises HostError when QEMU is missing.
    """
    emulator = machine.emulator()
    if not KVM.exists():
        return Accelerator("tcg", f"there is no {KVM}")
    if not os.access(KVM, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"no permission for {KVM}")
    kernel = kernel or readable_kernel()
    if kernel is None:
        return Accelerator("tcg", "no kernel can be read to try KVM with")
    circumstances = {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "qemu": process.run([emulator, "--version"], capture=True).stdout.splitlines()[0],
        "user": os.geteuid(),
    }
    directory = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdibuild"
    memory = directory / "accelerator.json"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "accelerator.lock").open("w") as lock:
        # A second run waits for the first one's answer instead of trying too.
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = None if fresh else _recall(memory, circumstances)
        if known is None:
            with progress.step("try KVM") as step:
                known = _try(emulator, kernel)
                step.note(known.reason)
            replace(memory, json.dumps(circumstances | asdict(known)))
    return known


def readable_kernel() -> Path | None:
    """The newest kernel of this host that this user can read, or None."""
    found = [path for directory, pattern in _KERNELS for path in directory.glob(pattern)]
    readable = [path for path in found if path.is_file() and os.access(path, os.R_OK)]
    return max(readable, key=lambda path: path.stat().st_mtime, default=None)


def needs() -> list[Need]:
    """The table of what vdibuild needs on a host."""
    result = []
    for line in PACKAGES.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            probe, *names, purpose = line.split("\t")
            debian, fedora = ("" if name == "-" else name for name in names)
            result.append(Need(probe, debian, fedora, purpose))
    return result


def doctor(site: Site) -> list[Check]:
    """Look at everything that building and running images needs; changes nothing but the memory of
    `accelerator`, which tries again.
    """
    return [
        _accelerator(),
        *_packages(),
        _namespaces(),
        *_subordinate_ids(),
        _space(site.artifacts_directory),
        _clock(),
        _firmware(site),
        _appliance_kernel(),
        _libvirt(site.libvirt),
        _spice(),
    ]


def _recall(memory: Path, circumstances: dict[str, object]) -> Accelerator | None:
    try:
        known = json.loads(memory.read_text())
        if all(known[key] == value for key, value in circumstances.items()):
            return Accelerator(known["name"], known["reason"])
    except (OSError, ValueError, KeyError):
        pass  # there is none, or it is damaged: it will be written again
    return None


def _try(emulator: str, kernel: Path) -> Accelerator:
    """Boot a kernel under KVM."""
    argv = [emulator, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none"]
    argv += ["-machine", "q35", "-accel", "kvm", "-cpu", "max", "-m", "512M", "-serial", "stdio"]
    argv += ["-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    printed = b""
    qemu = process.start(argv)
    try:
        assert qemu.stdout is not None  # noqa: S101 (a pipe, by process.start's default)
        end = time.monotonic() + _PROBE_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(qemu.stdout, selectors.EVENT_READ)
            # QEMU stops the guest, and stays, after an internal error of KVM.
            while b"KVM internal error" not in printed:
                if not selector.select(max(0.0, end - time.monotonic())):
                    reason = f"a kernel does not come up under KVM within {_PROBE_SECONDS:.0f} s"
                    return Accelerator("tcg", reason)
                data = os.read(qemu.stdout.fileno(), 65536)
                if not data:
                    break
                printed += data
    finally:
        process.stop(qemu)
    if qemu.returncode == 0 and b"Kernel panic" in printed:
        return Accelerator("kvm", "a kernel booted under KVM")
    lines = [line for line in printed.decode(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "KVM" in line or "qemu" in line), "")
    return Accelerator("tcg", f"a kernel does not boot under KVM: {said.strip() or 'QEMU failed'}")


def _accelerator() -> Check:
    name = "accelerator"
    try:
        found = accelerator(fresh=True)
    except VdibuildError as error:
        return Check(name, False, error.message, error.hint)
    if found.name == "kvm":
        return Check(name, True, found.reason)
    if not KVM.exists():
        mend = "sudo modprobe --all kvm_intel kvm_amd (virtualisation must be on in the firmware's setup)"
    elif not os.access(KVM, os.R_OK | os.W_OK):
        mend = f"sudo usermod --append --groups kvm {getpass.getuser()}, and log in again"
    elif readable_kernel() is None:
        mend = _readable_command()
    else:
        mend = (
            "on a virtual machine: turn nested virtualisation on at its host; guests are emulated until then"
        )
    return Check(name, False, f"emulation only, which is slow: {found.reason}", mend)


def _packages() -> list[Check]:
    missing = []
    table = needs()
    debian = process.find("apt-get") is not None
    for need in table:
        package = need.debian if debian else need.fedora
        if package and not need.present():
            install = "apt-get install" if debian else "dnf install"
            detail = f"{need.probe} is missing, for {need.purpose}"
            required = need.purpose == EVERY_BUILD
            missing.append(Check(f"package {package}", False, detail, f"sudo {install} {package}", required))
    return missing or [Check("packages", True, f"all {len(table)} needs are met", required=True)]


def _namespaces() -> Check:
    name = "sandbox"
    try:
        process.run(tree.host_command(["bwrap", "--unshare-net", "--ro-bind", "/", "/", "true"]))
    except VdibuildError:
        if os.geteuid() == 0:
            mend = "run in a container that may make namespaces (docker run --privileged), or outside of one"
        elif Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
            mend = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        else:
            mend = "sudo sysctl -w user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1"
        return Check(name, False, "programs of an image cannot be run in namespaces", mend, required=True)
    how = "as root" if os.geteuid() == 0 else "without root, in a user namespace"
    return Check(name, True, f"programs of an image run in namespaces, {how}", required=True)


def _subordinate_ids() -> list[Check]:
    """Whether an ordinary user has ids for the other users of an image (subuid(5)); root needs none."""
    if os.geteuid() == 0:
        return []
    user = getpass.getuser()
    owner = re.compile(rf"^(?:{re.escape(user)}|{os.geteuid()}):\d+:(\d+)$", re.MULTILINE)
    missing = [
        file
        for file in SUBORDINATE_IDS
        if not file.exists() or sum(map(int, owner.findall(file.read_text()))) < 65536
    ]
    if missing:
        mend = f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
        detail = f"{' and '.join(map(str, missing))} give {user} fewer than 65536 ids"
        return [Check("subordinate ids", False, detail, mend, required=True)]
    return [Check("subordinate ids", True, f"{user} has them", required=True)]


def _space(directory: Path) -> Check:
    existing = next(path for path in (directory, *directory.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free >> 30
    detail = f"{free} GiB free in {existing}"
    if not os.access(existing, os.W_OK):
        mend = "choose another directory for artifacts in the site file"
        return Check("space", False, f"{existing} is not writable", mend, required=True)
    if free < _FREE_GIB:
        return Check("space", False, f"{detail}; a build wants {_FREE_GIB}", "./inv images.gc", required=True)
    return Check("space", True, detail, required=True)


def _clock() -> Check:
    """A clock that is behind makes repositories look signed in the future, and caches newer than they are."""
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    if time.time() < newest:
        return Check(
            "clock", False, "it is earlier than vdibuild's own files", "sudo timedatectl set-ntp true"
        )
    return Check("clock", True, time.strftime("%Y-%m-%d %H:%M %Z"))


def _firmware(site: Site) -> Check:
    wanted = any(image.firmware == "uefi" for image in site.images.values())
    try:
        return Check("UEFI", True, str(machine.uefi_firmware().code))
    except HostError as error:
        return Check("UEFI", False, error.message, error.hint, required=wanted)


def _appliance_kernel() -> Check:
    """libguestfs boots its appliance with a kernel of this host (supermin(1)): LVM and XFS need that."""
    name = "kernel for libguestfs"
    kernel = readable_kernel()
    if kernel:
        return Check(name, True, str(kernel))
    return Check(name, False, "no kernel of this host can be read", _readable_command())


def _readable_command() -> str:
    if not any(path for directory, pattern in _KERNELS for path in directory.glob(pattern)):
        return "sudo apt-get install linux-image-amd64 (Fedora: sudo dnf install kernel-core)"
    return "sudo chmod 0644 /boot/vmlinuz-*"


def _libvirt(uri: str) -> Check:
    name = "libvirt"
    try:
        process.run(["virsh", "--connect", uri, "version"], deadline=10)
    except VdibuildError:
        mend = "sudo systemctl enable --now libvirtd"
        if uri.endswith("/system") and os.geteuid() != 0:
            mend += f"; sudo usermod --append --groups libvirt {getpass.getuser()}"
        return Check(name, False, f"{uri} does not answer: no machines can be defined", mend)
    return Check(name, True, f"{uri} answers")


def _spice() -> Check:
    """Whether QEMU can show a machine's screen by SPICE; it is a module of its own in most distributions."""
    name = "SPICE"
    try:
        asked = process.run([machine.emulator(), "-spice", "help"], capture=True, check=False)
    except HostError as error:
        return Check(name, False, error.message, error.hint)
    if "spice options" in asked.stdout:
        return Check(name, True, "QEMU has it")
    mend = "sudo apt-get install qemu-system-modules-spice (Fedora: sudo dnf install qemu-ui-spice-core)"
    return Check(name, False, "QEMU has no SPICE: no desktops can be served", mend)
