"""Real installations with virt-install of an installer of a megabyte: how they end, and what they leave."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from rich.console import Console

from tests.guest import installer, libvirtd
from tests.guest.installer import TinyInstaller
from tests.guest.libvirtd import Libvirt
from tests.waiting import until
from vdibuild import host, install, progress
from vdibuild.errors import CommandError, HostError, InstallationError
from vdibuild.install import ExtraDisk, Job, Media
from vdibuild.install.command import LOG_PORT, Guest, command
from vdibuild.machine import Hardware
from vdibuild.settings.images import Install, Network

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

SCRATCH = Path("/var/lib/libvirt/boot")
FAR = 240
"""Seconds that nothing here comes near to, even on a busy host."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyInstaller:
    return installer.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def libvirt_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    with libvirtd.system(tmp_path_factory.mktemp("libvirt")) as running:
        yield running


@dataclass
class Place:
    """A site's directories, a job to change, and what a run leaves there and in libvirt."""

    path: Path
    libvirt: Libvirt
    job: Job

    def play(self, case: str, **settings: object) -> Job:
        """The job of an installer that plays a case."""
        arguments = [*self.job.settings.arguments, f"play={case}"]
        changed = self.job.settings.model_copy(update={"arguments": arguments, **settings})
        return replace(self.job, settings=changed)

    def leftovers(self) -> list[str]:
        found = self.libvirt.leftovers()
        found += [str(path) for path in (self.path / "work").iterdir()]
        found += [str(path) for path in (self.path / "state").glob("*.json")]
        # Beside ours are those of the tests that run at the same time.
        return found + [str(path) for path in SCRATCH.glob(f"virtinst-*-{self.job.owner}-*")]


@pytest.fixture
def place(tmp_path: Path, tiny: TinyInstaller, libvirt_host: Libvirt) -> Iterator[Place]:
    libvirtd.let_in(tmp_path)
    for name in ("state", "output", "pool"):
        (tmp_path / name).mkdir()
    (tmp_path / "work").mkdir(mode=0o700)
    settings = Install(
        kernel=str(tiny.kernel),
        initrd=str(tiny.initramfs),
        silence_seconds=FAR,
        deadline_seconds=2 * FAR,
    )
    job = Job(
        name="tiny",
        uri=libvirt_host.uri,
        kickstart="text\npoweroff\n",
        media=Media(kernel=str(tiny.kernel), initrd=str(tiny.initramfs)),
        size=16,
        hardware=Hardware("bios", 256, host.accelerator().name),
        settings=settings,
        state=tmp_path / "state",
        work=tmp_path / "work",
        output=tmp_path / "output",
    )
    made = Place(tmp_path, libvirt_host, job)
    assert made.leftovers() == []
    yield made
    with libvirt_host.connection() as connection:
        for domain in connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            if domain.isPersistent():
                domain.undefine()
        for pool in connection.listAllStoragePools():
            persistent = pool.isPersistent()
            pool.destroy()
            if persistent:
                pool.undefine()


@pytest.fixture
def pool(place: Place) -> str:
    """A dir pool of the site's."""
    with place.libvirt.connection() as connection:
        xml = f"<pool type='dir'><name>images</name><target><path>{place.path}/pool</path></target></pool>"
        connection.storagePoolDefineXML(xml).create()
    return "images"


def test_a_good_installation(place: Place) -> None:
    extra = place.path / "bundle.img"
    extra.write_bytes(b"hello bundle".ljust(1 << 20, b"\0"))
    job = replace(place.play("success"), disks=[ExtraDisk(extra, "bundle")])
    log = place.path / "build.log"
    with (
        progress.reporting(Console(file=sys.stderr)),
        progress.logging_to(log),
        progress.step("whole") as whole,
        install.run(job) as installed,
    ):
        assert installed.disk.stat().st_size == 16 << 20
        assert installed.disk.read_bytes()[:32].decode() == installed.nonce
        with place.libvirt.connection() as connection:
            assert connection.listAllDomains() == []
    assert not installed.disk.exists()
    assert place.leftovers() == []
    assert [step.name for step in whole.steps] == ["virt-install", "start the installer", "storage", "write"]
    text = log.read_text()
    assert "tiny console| tiny installer: success" in text
    assert "tiny log| 12:00:00,000 INF vdibuild: extra disk bundle: hello bundle" in text


def test_a_restart_is_an_end_too(place: Place) -> None:
    with install.run(place.play("reboot")):
        pass
    assert place.leftovers() == []


def test_an_iso_and_a_machine_that_is_kept(place: Place, pool: str, tiny: TinyInstaller) -> None:
    iso = place.path / "tiny.iso"
    grafts = [f"/kernel={tiny.kernel}", f"/initrd={tiny.initramfs}"]
    subprocess.run(["xorrisofs", "-quiet", "-o", iso, "-graft-points", *grafts], check=True)
    job = replace(
        place.play("success", pool=pool, keep=True, autostart=True),
        media=Media(location=str(iso), kernel="kernel", initrd="initrd"),
    )
    with install.run(job) as installed:
        assert installed.disk == place.path / "pool" / "vdibuild-tiny.raw"
    first = installed.nonce
    with place.libvirt.connection() as connection:
        machine = connection.lookupByName("tiny")
        text = machine.XMLDesc(2)
        assert (machine.isActive(), machine.autostart()) == (0, 1)
    assert "cdrom" not in text and "<kernel>" not in text
    assert LOG_PORT not in text
    assert f"<source file='{installed.disk}'/>" in text
    assert installed.disk.read_bytes()[:32].decode() == first
    # The next run of that name replaces it.
    with install.run(place.play("success", pool=pool)) as installed:
        assert installed.disk.read_bytes()[:32].decode() == installed.nonce != first
    assert place.leftovers() == ["pool images"]
    assert list((place.path / "pool").iterdir()) == []


@pytest.mark.parametrize(
    ("case", "kind", "said"),
    [
        ("failure", "log", "failed: package no-such-package does not exist"),
        ("panic", "panic", "the kernel panicked"),
        (
            "prompt",
            "prompt",
            "the installer asks for what the kickstart leaves open: Please make a selection",
        ),
        ("silent", "silence", "the installer has said nothing for 20 s"),
        ("deadline", "deadline", "the installation did not end within 25 s"),
        ("unfinished", "gone", "the installer ended before it was done"),
    ],
)
def test_what_fails_ends_at_once_and_leaves_nothing(place: Place, case: str, kind: str, said: str) -> None:
    settings = {"silent": {"silence_seconds": 20}, "deadline": {"deadline_seconds": 25}}.get(case, {})
    began = time.monotonic()
    with pytest.raises(InstallationError) as caught, install.run(place.play(case, **settings)):
        raise AssertionError
    error = caught.value
    assert (error.kind, said in error.message) == (kind, True), error
    last = {"panic": "Kernel panic"}.get(case, "tiny installer")
    assert any(last in line for line in error.tail)
    assert place.leftovers() == []
    picture = place.path / "output" / install.SCREENSHOT
    if kind != "gone":
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert str(picture) in error.hint
    if case == "failure":
        assert "correct its name in the kickstart" in error.hint
    # At no deadline of the driver's.
    assert time.monotonic() - began < FAR


def test_a_guest_whose_qemu_is_killed(place: Place) -> None:
    with Runner(place, "silent") as runner:
        runner.wait_for("stage storage")
        for pid in place.libvirt.guests():
            os.kill(pid, signal.SIGKILL)
        said = runner.end()
    assert "the guest is gone: QEMU ended unexpectedly" in said or "the guest is gone: it crashed" in said
    assert place.leftovers() == []


def test_ctrl_c(place: Place) -> None:
    with Runner(place, "silent") as runner:
        runner.wait_for("stage storage")
        os.kill(runner.process.pid, signal.SIGINT)
        said = runner.end()
    assert "KeyboardInterrupt" in said
    assert place.leftovers() == []
    assert (place.path / "output" / install.SCREENSHOT).exists()


def test_a_run_that_was_killed_is_tidied_by_the_next(place: Place, pool: str) -> None:
    with Runner(place, "silent", pool=pool) as runner:
        runner.wait_for("stage storage")
        runner.process.kill()
        runner.end()
    assert "domain tiny" in place.libvirt.leftovers()
    assert [path.name for path in (place.path / "pool").iterdir()] == ["vdibuild-tiny.raw"]
    # What another site's run has there, which may be under way.
    others = SCRATCH / "virtinst-12345678-vdibuild-tiny-0123456789abcdef-kernel"
    others.touch()
    try:
        with install.run(place.play("success", pool=pool)):
            assert len(place.libvirt.guests()) == 0
        assert others.exists()
    finally:
        others.unlink()
    # The work directory of the killed run is in its step's, which goes with that.
    assert [one for one in place.leftovers() if "/work/" not in one] == ["pool images"]


def test_a_machine_that_is_not_ours_stays(place: Place) -> None:
    with place.libvirt.connection() as connection:
        connection.defineXML(
            "<domain type='qemu'><name>tiny</name><memory>1024</memory><os><type>hvm</type></os></domain>"
        )
        with pytest.raises(HostError, match="it is not vdibuild's"), install.run(place.play("success")):
            raise AssertionError
        assert [one.name() for one in connection.listAllDomains()] == ["tiny"]


def test_what_virt_install_refuses(place: Place) -> None:
    job = place.play("success", osinfo="no-such-system")
    with pytest.raises(CommandError, match=r"virt-install did not start .*no-such-system"), install.run(job):
        raise AssertionError
    job = place.play("success", network=Network(kind="nat", name="no-such-network"))
    with pytest.raises(CommandError, match=r"virt-install did not start .*no-such-net"), install.run(job):
        raise AssertionError
    assert place.leftovers() == []


def test_a_place_that_qemu_cannot_reach(place: Place) -> None:
    place.path.chmod(0o700)
    with pytest.raises(HostError, match="which cannot reach") as caught, install.run(place.play("success")):
        raise AssertionError
    assert f"setfacl -m u:libvirt-qemu:x {place.path}" in caught.value.hint
    assert place.leftovers() == []


_AS_USER = """
import pickle, sys
from pathlib import Path
from vdibuild import install
with install.run(pickle.loads(Path(sys.argv[1]).read_bytes())) as installed:
    assert installed.disk.read_bytes()[:32].decode() == installed.nonce
left = [str(path) for path in Path("~/.cache/virt-manager/boot").expanduser().glob("*")]
with install.events.connected("qemu:///session") as connection:
    left += [one.name() for one in (*connection.listAllDomains(), *connection.listAllStoragePools())]
print("left:", left)
"""


def test_an_ordinary_user_with_a_session(place: Place, tiny: TinyInstaller) -> None:
    """libvirt's session daemon is started by libvirt, and ends with the PID namespace."""
    name = "vdibuild-test"
    subprocess.run(["useradd", "--create-home", name], check=True)
    try:
        initrd = shutil.copy(tiny.initramfs, place.path)
        media = Media(kernel=str(tiny.kernel), initrd=str(initrd))
        job = place.path / "job"
        job.write_bytes(pickle.dumps(replace(place.play("success"), uri="qemu:///session", media=media)))
        runtime = place.path / "runtime"
        runtime.mkdir(mode=0o700)
        subprocess.run(["chown", "--recursive", f"{name}:", place.path], check=True)
        # The first process of the namespace has to bury orphans, such as ended guests.
        inside = f"{libvirtd.without_kvm(place.path)}; "
        inside += f'setpriv --reuid={name} --regid={name} --init-groups -- "$@" & wait $!'
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        ended = subprocess.run(
            [*namespaces, "sh", "-c", inside, "sh", sys.executable, "-c", _AS_USER, str(job)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HOME": f"/home/{name}", "XDG_RUNTIME_DIR": str(runtime)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)
    assert ended.stdout == "left: []\n", ended.stderr
    assert [one for one in place.leftovers() if "/runtime/" not in one] == []


XML_CASES = {
    "bios-user": (Hardware("bios", 1024, "tcg", 1), Network(), ()),
    "uefi-nat": (
        Hardware("uefi", 3072, "tcg", 2),
        Network(kind="nat", address=IPv4Address("192.168.122.4")),
        (),
    ),
    "bios-bridge": (
        Hardware("bios", 3072, "tcg", 2),
        Network(kind="bridge", name="br0", mac="52:54:00:00:00:01"),
        ("bundle",),
    ),
}


@pytest.mark.parametrize("name", XML_CASES)
def test_the_xml_that_virt_install_makes(place: Place, pool: str, name: str) -> None:
    """Golden files, of the guest while it installs; @WORD@ stands for what differs between runs and hosts."""
    hardware, network, serials = XML_CASES[name]
    with place.libvirt.connection() as connection:
        xml = "<volume><name>vdibuild-tiny.raw</name><capacity>1048576</capacity></volume>"
        connection.storagePoolLookupByName(pool).createXML(xml)
        if network.kind == "nat":
            bridge = "<bridge name='virbr9'/><ip address='192.168.122.1' netmask='255.255.255.0'/>"
            connection.networkDefineXML(f"<network><name>{network.name}</name><forward/>{bridge}</network>")
    kickstart = place.path / "tiny.ks"
    kickstart.write_text("text\n")
    guest = Guest(
        name="tiny",
        owner=place.job.owner,
        media=place.job.media,
        kickstart=kickstart,
        volume=f"{pool}/vdibuild-tiny.raw",
        hardware=hardware,
        network=network,
        # A disk of the pool: virt-install would make a pool for the directory of another one.
        disks=[ExtraDisk(place.path / "pool" / "vdibuild-tiny.raw", serial) for serial in serials],
    )
    argv = [*command(guest, place.libvirt.uri), "--print-xml", "1"]
    made = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    for pattern, word in (
        (r"<uuid>.*</uuid>", "<uuid>@UUID@</uuid>"),
        (r"/\S+/virtinst-[^<-]*-", "@SCRATCH@/"),
        (re.escape(str(place.path)), "@PLACE@"),
        (place.job.owner, "@OWNER@"),
        (r"(?<=<kernel>@SCRATCH@/)[^<]*", "kernel"),
        (r'(<mac address=")[^"]*(?="/>\n\s*<model type="virtio"/>\n\s*</interface>)', r"\1@MAC@")
        if not network.hardware_address
        else (r"^$", ""),
        (r"(<loader [^>]*>)[^<]*", r"\1@FIRMWARE@"),
        (r"(?<=<emulator>)[^<]*", "@EMULATOR@"),
        (r'(?<=<nvram template=")[^"]*', "@VARIABLES@"),
    ):
        made = re.sub(pattern, word, made)
    golden = Path(__file__).parents[1] / "unit" / "golden" / "install" / f"{name}.xml"
    assert made == golden.read_text()


class Runner:
    """The driver in a process of its own, to be ended from outside."""

    _PROGRAM = """
import pickle, sys
from pathlib import Path
from vdibuild import install, progress
job, log = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
with progress.logging_to(log), install.run(job):
    pass
"""

    def __init__(self, place: Place, case: str, **settings: object) -> None:
        self._log = place.path / "runner.log"
        job = place.path / "job"
        job.write_bytes(pickle.dumps(place.play(case, **settings)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM, job, self._log],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, text: str, seconds: float = FAR) -> None:
        """Wait until that is in the log."""
        until(lambda: self._log.exists() and text in self._log.read_text(), seconds)

    def end(self) -> str:
        """Wait for the process. Returns what it said."""
        return self.process.communicate(timeout=60)[1]
