"""Windows: that its answer files say what the site file says, where Microsoft wants it, and nothing else."""

from __future__ import annotations

import base64
import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import settings as tuned
from hypothesis import strategies as st
from pydantic import ValidationError

from vdibuild import bootstrap, resources, site
from vdibuild.errors import InputError, VdibuildError
from vdibuild.families import windows
from vdibuild.families.windows import answers, command, medium
from vdibuild.machine import Hardware
from vdibuild.settings.images import Image
from vdibuild.settings.windows import TAKEN_ACCOUNTS

GOLDEN = Path(__file__).parent / "golden/windows"
LIBVIRT = Path(__file__).parent / "libvirt"
PASSWORD = "Tea & <biscuits>"
KEY = "ABCDE-12345-FGHIJ-67890-KLMNO"
NAMESPACE = {"u": "urn:schemas-microsoft-com:unattend"}

PASSES = {
    # Microsoft's Unattended Windows Setup Reference, "Valid configuration passes" of each setting that the
    # templates use (learn.microsoft.com/windows-hardware/customize/desktop/unattend).
    "Microsoft-Windows-International-Core-WinPE": {"windowsPE"},
    "Microsoft-Windows-PnpCustomizationsWinPE": {"windowsPE"},
    "Microsoft-Windows-Setup": {"windowsPE"},
    "Microsoft-Windows-International-Core": {"specialize", "oobeSystem"},
    "Microsoft-Windows-Deployment/RunSynchronous": {"specialize", "auditUser"},
    "Microsoft-Windows-PnpSysprep/PersistAllDeviceInstalls": {"generalize"},
    "Microsoft-Windows-Shell-Setup/ComputerName": {"offlineServicing", "specialize"},
    "Microsoft-Windows-Shell-Setup/RegisteredOrganization": {
        *("auditSystem", "generalize", "offlineServicing", "oobeSystem", "specialize")
    },
    "Microsoft-Windows-Shell-Setup/RegisteredOwner": {
        *("auditSystem", "generalize", "offlineServicing", "oobeSystem", "specialize")
    },
    "Microsoft-Windows-Shell-Setup/TimeZone": {"auditSystem", "oobeSystem", "specialize"},
    "Microsoft-Windows-Shell-Setup/OOBE": {"oobeSystem"},
    "Microsoft-Windows-Shell-Setup/UserAccounts": {"auditSystem", "oobeSystem"},
    "Microsoft-Windows-Shell-Setup/AutoLogon": {"auditSystem", "oobeSystem", "specialize"},
    "Microsoft-Windows-Shell-Setup/FirstLogonCommands": {"oobeSystem"},
}
ORDER = [
    "windowsPE",
    "offlineServicing",
    "generalize",
    "specialize",
    "auditSystem",
    "auditUser",
    "oobeSystem",
]


def image(release: str = "win11", firmware: str = "uefi", **windows: Any) -> Image:
    values = {"edition": "Windows 11 Pro", "password": PASSWORD, "virtio": "virtio-win.iso", **windows}
    return Image.model_validate(
        {
            "family": "windows",
            "release": release,
            "method": "install",
            "install": {"location": "windows.iso", "memory": "4GiB"},
            "firmware": firmware,
            "memory": "4GiB",
            "disk": {"size": "64GiB", "table": "gpt" if firmware == "uefi" else "msdos"},
            "windows": values,
        }
    )


def render(settings: Image) -> answers.Answers:
    return answers.render(settings, "office", resources.packaged())


FULL: dict[str, Any] = {
    "product_key": KEY,
    "language": "nl-NL",
    "locale": "nl-BE",
    "keyboard": "0413:00020409",
    "timezone": "Europe/Amsterdam",
    "computer_name": "TEMPLATE-1",
    "organization": 'Cup & "Saucer" <Ltd>',
    "account": "Zoë O'Hara",
    "auto_logon": True,
    "spice_tools": "spice-guest-tools-0.141.exe",
}
GOLDEN_IMAGES = {
    "win11": image(**FULL),
    "win10-bios": image("win10", "bios", edition=6),
}


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
def test_the_answers_are_as_the_golden_files_say(name: str) -> None:
    made = render(GOLDEN_IMAGES[name])
    assert made.setup == (GOLDEN / name / "Autounattend.xml").read_text()
    assert made.clone == (GOLDEN / name / "clone.xml").read_text()
    assert made.script == (GOLDEN / name / "first-logon.cmd").read_bytes().decode()


# Passes


def parts(text: str) -> list[tuple[str, str, ElementTree.Element]]:
    """Each component of an answer file, with its pass and its name."""
    root = ElementTree.fromstring(text)  # noqa: S314 (our own)
    assert root.tag == f"{{{NAMESPACE['u']}}}unattend"
    return [
        (settings.attrib["pass"], component.attrib["name"], component)
        for settings in root.findall("u:settings", NAMESPACE)
        for component in settings.findall("u:component", NAMESPACE)
    ]


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
@pytest.mark.parametrize("file", ["setup", "clone"])
def test_every_component_is_in_a_pass_that_it_belongs_to(name: str, file: str) -> None:
    found = parts(getattr(render(GOLDEN_IMAGES[name]), file))
    for where, component, element in found:
        for setting in element:
            short = setting.tag.partition("}")[2]
            allowed = PASSES.get(component) or PASSES[f"{component}/{short}"]
            assert where in allowed, f"{component} {short}"
        identity = {key: value for key, value in element.attrib.items() if key != "name"}
        assert identity == {
            "processorArchitecture": "amd64",
            "publicKeyToken": "31bf3856ad364e35",
            "language": "neutral",
            "versionScope": "nonSxS",
        }
    places = [(where, component) for where, component, _ in found]
    assert len(places) == len(set(places))
    assert places == sorted(places, key=lambda place: ORDER.index(place[0]))


@pytest.mark.parametrize("file", ["setup", "clone"])
def test_lists_have_orders_that_count_from_one(file: str) -> None:
    root = ElementTree.fromstring(getattr(render(GOLDEN_IMAGES["win11"]), file))  # noqa: S314 (our own)
    for parent in root.iter():
        orders = [order.text for child in parent for order in child.findall("u:Order", NAMESPACE)]
        assert orders == [str(number) for number in range(1, len(orders) + 1)]


# Disks


def setting(text: str, path: str) -> list[str | None]:
    """The texts at that path below any component; steps without their namespace."""
    steps = "/".join(f"u:{step}" for step in path.split("/"))
    root = ElementTree.fromstring(text)  # noqa: S314 (our own)
    return [element.text for element in root.findall(f"u:settings/u:component/{steps}", NAMESPACE)]


DISK = "DiskConfiguration/Disk"


@pytest.mark.parametrize(
    ("name", "types", "formats", "target"),
    [
        ("win11", ["EFI", "MSR", "Primary"], {"1": "FAT32", "3": "NTFS"}, "3"),
        ("win10-bios", ["Primary", "Primary"], {"1": "NTFS", "2": "NTFS"}, "2"),
    ],
)
def test_the_disk_fits_the_firmware(
    name: str, types: list[str], formats: dict[str, str], target: str
) -> None:
    text = render(GOLDEN_IMAGES[name]).setup
    assert setting(text, f"{DISK}/CreatePartitions/CreatePartition/Type") == types
    numbers = setting(text, f"{DISK}/ModifyPartitions/ModifyPartition/PartitionID")
    kinds = setting(text, f"{DISK}/ModifyPartitions/ModifyPartition/Format")
    assert dict(zip(numbers, kinds, strict=True)) == formats
    assert setting(text, "ImageInstall/OSImage/InstallTo/PartitionID") == [target]
    # Only the last partition can grow, or nothing is left for those after it.
    assert len(setting(text, f"{DISK}/CreatePartitions/CreatePartition/Extend")) == 1
    assert len(setting(text, f"{DISK}/CreatePartitions/CreatePartition/Size")) == len(types) - 1
    active = setting(text, f"{DISK}/ModifyPartitions/ModifyPartition/Active")
    assert active == (["true"] if "bios" in name else [])


@pytest.mark.parametrize(("name", "directory"), [("win11", "w11"), ("win10-bios", "w10")])
def test_setup_gets_the_drivers_of_its_release(name: str, directory: str) -> None:
    paths = setting(render(GOLDEN_IMAGES[name]).setup, "DriverPaths/PathAndCredentials/Path")
    for driver in ("viostor", "vioscsi", "NetKVM"):
        assert rf"E:\{driver}\{directory}\amd64" in paths


# Secrets and escaping


def test_the_password_is_encoded_as_microsoft_does() -> None:
    # The example of Microsoft's reference (UserAccounts, AdministratorPassword) is "pw" + the element's name.
    example = "cAB3AEEAZABtAGkAbgBpAHMAdAByAGEAdABvAHIAUABhAHMAcwB3AG8AcgBkAA=="
    assert base64.b64decode(example).decode("utf-16-le") == "pwAdministratorPassword"
    assert base64.b64decode(answers.encoded("pw")).decode("utf-16-le") == "pwPassword"


def test_a_secret_is_never_shown() -> None:
    settings = image(product_key=KEY)
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert PASSWORD not in text
        assert KEY not in text
    made = render(settings)
    assert PASSWORD not in made.setup + made.clone + made.script


@pytest.mark.parametrize("key", ["password", "product_key"])
@pytest.mark.parametrize("value", ["12345678", "[secret-1]", "'tab\\there'", '"tab\\there"'])
def test_a_wrong_secret_is_not_in_the_error(tmp_path: Path, key: str, value: str) -> None:
    other = "" if key == "password" else "password: fine, "
    path = tmp_path / "vdibuild.yaml"
    path.write_text(
        "images:\n  office:\n    family: windows\n    release: win11\n    method: install\n"
        f"    windows: {{edition: 1, virtio: v.iso, {other}{key}: {value}}}\n"
    )
    with pytest.raises(InputError) as caught:
        site.load(path)
    for shown in ("12345678", "secret-1", "here"):
        assert shown not in str(caught.value)


def test_the_password_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("läuft\nsecond line\n", encoding="utf-8")
    made = render(image(password=None, password_file=str(tmp_path / "secret")))
    value = setting(made.setup, "UserAccounts/LocalAccounts/LocalAccount/Password/Value")[0] or ""
    assert base64.b64decode(value).decode("utf-16-le") == "läuftPassword"


@pytest.mark.parametrize("content", [b"", b"\n", b"a\tb\n", b"\xff\xfe\n", b"x" * 128, None])
def test_a_password_file_that_windows_could_not_take_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        render(image(password=None, password_file=str(path)))
    assert str(path) in caught.value.message


def printable(without: str = "") -> st.SearchStrategy[str]:
    """What str.isprintable() takes: all but the categories Other and Separator of Unicode, and the blank."""
    return st.characters(
        codec="utf-8",
        exclude_categories=("C", "Z"),
        include_characters=" ",
        exclude_characters=without,
    )


ACCOUNTS = st.text(printable('"/\\[]:;|=,+*?<>@%'), min_size=1, max_size=20).filter(
    lambda text: text == text.strip(" ") and not text.endswith(".") and text.lower() not in TAKEN_ACCOUNTS
)


@tuned(deadline=None, max_examples=50)
@given(
    edition=st.text(printable(), min_size=1),
    organization=st.text(printable(), max_size=63),
    account=ACCOUNTS,
    password=st.text(printable(), min_size=1, max_size=127),
)
def test_every_setting_comes_back_from_the_xml(
    edition: str, organization: str, account: str, password: str
) -> None:
    made = render(
        image(edition=edition, organization=organization, account=account, password=password, auto_logon=True)
    )
    assert setting(made.setup, "ImageInstall/OSImage/InstallFrom/MetaData/Value") == [edition]
    assert setting(made.setup, "UserData/FullName") == [account]
    for text in (made.setup, made.clone):
        assert setting(text, "RegisteredOrganization") == ([organization] if organization else [])
        assert setting(text, "UserAccounts/LocalAccounts/LocalAccount/Name") == [account]
        assert setting(text, "AutoLogon/Username") == [account]
        for where in ("UserAccounts/LocalAccounts/LocalAccount", "AutoLogon"):
            value = setting(text, f"{where}/Password/Value")[0] or ""
            assert base64.b64decode(value).decode("utf-16-le") == f"{password}Password"


@tuned(deadline=None)
@given(
    st.text(),
    st.sampled_from(["edition", "organization", "account", "computer_name", "password", "timezone"]),
)
def test_any_text_is_refused_or_makes_good_xml(text: str, key: str) -> None:
    try:
        settings = image(**{key: text})
    except ValidationError:
        return
    made = render(settings)
    parts(made.setup)
    parts(made.clone)


# Settings

GOOD = """\
images:
  office:
    family: windows
    release: win11
    method: install
    install: {location: media/windows.iso, memory: 4GiB}
    firmware: uefi
    memory: 4GiB
    disk: {size: 64GiB}
    windows:
      edition: 1
      virtio: media/v.iso
      password_file: secret
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"account": "a/b"}, "character /"),
        ({"account": "a" * 21}, "1 to 20"),
        ({"account": "dot."}, "1 to 20"),
        ({"account": "Administrator"}, "Windows' own"),
        ({"account": "tea", "computer_name": "TEA"}, "the same"),
        ({"computer_name": "1234"}, "no computer name"),
        ({"computer_name": "a_b"}, "no computer name"),
        ({"computer_name": "-x"}, "no computer name"),
        ({"computer_name": "a" * 16}, "no computer name"),
        ({"organization": "a\nb"}, "cannot be printed"),
        ({"organization": "a" * 64}, "63"),
        ({"edition": ""}, "neither"),
        ({"edition": 0}, "neither"),
        ({"language": "english"}, "language tag"),
        ({"keyboard": "0409"}, "no keyboard"),
        ({"timezone": "Europe/Amsterdan"}, "did you mean 'Europe/Amsterdam'"),
        ({"product_key": "ABCDE"}, "no product key"),
        ({"password": ""}, "empty"),
        ({"password": None}, "one of password"),
        ({"password_file": "x"}, "one of password"),
        ({"bypass": True}, "bypass"),
    ],
)
def test_what_windows_forbids_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        image(**settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "bootstrap"}, "method: install"),
        ({"windows": None}, "is missing"),
        ({"kickstart": "x.ks.j2"}, "kickstart: has no meaning"),
        ({"packages": ["vim"]}, "packages: has no meaning"),
        ({"install": {}}, "Windows' ISO"),
        ({"install": {"location": "windows.iso"}}, "and in install:"),
        ({"release": "win7"}, "none of win10, win11"),
        ({"firmware": "bios", "disk": {"size": "64GiB", "table": "msdos"}}, "needs uefi"),
        ({"disk": {"size": "64GiB", "table": "msdos"}}, "table: gpt only"),
        ({"disk": {"size": "20GiB"}}, "65536MiB"),
        ({"memory": "1GiB"}, "4096MiB"),
        ({"family": "debian", "kickstart": "x.ks.j2"}, "no meaning"),
    ],
)
def test_what_cannot_be_installed_is_refused(change: dict[str, Any], said: str) -> None:
    values = {
        "family": "windows",
        "release": "win11",
        "method": "install",
        "install": {"location": "windows.iso", "memory": "4GiB"},
        "firmware": "uefi",
        "memory": "4GiB",
        "disk": {"size": "64GiB"},
        "windows": {"edition": 1, "password": "x", "virtio": "v.iso"},
    }
    with pytest.raises(ValidationError, match=re.escape(said)):
        Image.model_validate({**values, **change})


def test_files_are_relative_to_the_site_file_and_errors_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "vdibuild.yaml"
    path.write_text(GOOD)
    settings = site.load(path).images["office"].windows
    assert settings is not None
    assert settings.virtio == tmp_path / "media/v.iso"
    assert settings.password_file == tmp_path / "secret"
    path.write_text(GOOD.replace("edition", "editon"))
    with pytest.raises(InputError, match="did you mean 'edition'") as caught:
        site.load(path)
    assert caught.value.line == 11


# The medium


DEEP = "Net Card/1/2/3/4/5/6/7/8/9/net-card.v1.inf"  # deeper than ISO 9660 without Joliet goes


def drivers(directory: Path) -> Path:
    (directory / DEEP).parent.mkdir(parents=True)
    (directory / DEEP).write_text("[Version]\n")
    (directory / "Readme").write_bytes(b"x" * 5000)
    return directory


def written(tmp_path: Path, name: str = "answers.iso") -> Path:
    (tmp_path / "tools.msi").write_text("MSI")
    settings = image(spice_tools=str(tmp_path / "tools.msi"), drivers=str(tmp_path / "drivers"))
    assert settings.windows is not None
    medium.write(render(settings), settings.windows, tmp_path / name)
    return tmp_path / name


def test_other_tools_read_the_medium(tmp_path: Path) -> None:
    drivers(tmp_path / "drivers")
    path = written(tmp_path)
    made = render(image(spice_tools="tools.msi"))
    subprocess.run(["7z", "x", "-y", f"-o{tmp_path}/7z", path], check=True, capture_output=True)
    subprocess.run(
        ["xorriso", "-osirrox", "on", "-indev", path, "-extract", "/", tmp_path / "xorriso"],
        check=True,
        capture_output=True,
    )
    for tree in (tmp_path / "7z", tmp_path / "xorriso"):
        files = {str(file.relative_to(tree)): file.read_bytes() for file in tree.rglob("*") if file.is_file()}
        assert files == {
            "Autounattend.xml": made.setup.encode(),
            "clone.xml": made.clone.encode(),
            "first-logon.cmd": made.script.encode(),
            "spice-tools.msi": b"MSI",
            f"$WinPEDriver$/{DEEP}": b"[Version]\n",
            "$WinPEDriver$/Readme": b"x" * 5000,
        }
    shutil.rmtree(tmp_path / "xorriso")
    described = subprocess.run(
        ["isoinfo", "-d", "-i", path], check=True, capture_output=True, text=True
    ).stdout
    assert f"Volume id: {medium.LABEL}" in described
    assert "Joliet with UCS level 3 found" in described


def test_the_same_answers_make_the_same_medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers(tmp_path / "drivers")
    first = written(tmp_path, "first.iso").read_bytes()
    os.utime(tmp_path / "drivers/Readme", (0, 0))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert written(tmp_path, "second.iso").read_bytes() == first
    finally:
        monkeypatch.undo()
        time.tzset()


def test_only_its_owner_reads_the_medium(tmp_path: Path) -> None:
    drivers(tmp_path / "drivers")
    assert stat.S_IMODE(written(tmp_path).stat().st_mode) == 0o600


def test_what_a_cd_cannot_hold_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers" / ("a" * 65)).touch()
    with pytest.raises(InputError, match="more than 64"):
        written(tmp_path)
    shutil.rmtree(tmp_path / "drivers")
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers/link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="link: is neither"):
        written(tmp_path)
    (tmp_path / "drivers/link").unlink()
    (tmp_path / "drivers").rmdir()
    with pytest.raises(InputError, match="no directory"):
        written(tmp_path)
    (tmp_path / "drivers").mkdir()
    for name in ("net-card.inf", "net_card.inf"):
        (tmp_path / "drivers" / name).touch()
    with pytest.raises(VdibuildError, match="the same name"):
        written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drivers", "tools.msi"]


def test_a_medium_is_written_for_an_image_of_a_site(tmp_path: Path) -> None:
    path = tmp_path / "vdibuild.yaml"
    path.write_text(
        GOOD + "  other:\n    family: debian\n    release: trixie\n    kickstart: golden-debian.ks.j2\n"
    )
    (tmp_path / "secret").write_text("tea\n")
    loaded = site.load(path)
    windows.write_medium(loaded, *loaded.image("office"), tmp_path / "office.iso")
    assert (tmp_path / "office.iso").stat().st_size
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        windows.write_medium(loaded, *loaded.image("office"), tmp_path / "missing/office.iso")
    with pytest.raises(VdibuildError, match="'other' is of the family debian"):
        windows.write_medium(loaded, *loaded.image("other"), tmp_path / "other.iso")
    assert not (tmp_path / "other.iso").exists()
    with pytest.raises(VdibuildError, match=r"no kickstart(?s:.)*windows\.answers"):
        bootstrap.read_recipe(loaded, *loaded.image("office"))


def test_tools_that_are_no_installer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no installer"):
        render(image(spice_tools="tools.zip"))
    settings = image(spice_tools=str(tmp_path / "missing.exe"))
    assert settings.windows is not None
    with pytest.raises(InputError, match=r"missing\.exe: there is no installer"):
        medium.write(render(settings), settings.windows, tmp_path / "answers.iso")


# The machine

MACHINES = {
    "win11": Hardware("uefi", 8192, "kvm", 4),
    "win10-bios": Hardware("bios", 2048, "tcg"),
}


def guest(name: str, directory: Path) -> command.Guest:
    return command.Guest(
        name="office",
        release=name.partition("-")[0],
        medium=directory / "windows.iso",
        answers=directory / "answers, new.iso",
        virtio=directory / "virtio-win.iso",
        volume="build/office.raw",
        hardware=MACHINES[name],
        network="network=default",
    )


@pytest.mark.parametrize("name", MACHINES)
def test_the_command_is_as_the_golden_file_says(name: str) -> None:
    made = command.command(guest(name, Path("/srv/media")), "qemu:///system")
    assert made == (GOLDEN / name / "virt-install.txt").read_text().splitlines()


@pytest.mark.parametrize("name", MACHINES)
def test_virt_install_makes_the_machine_of_the_golden_file(name: str, tmp_path: Path) -> None:
    # virt-install's own way to be tested: libvirt's test driver, with the capabilities of a real host.
    uri = (
        f"__virtinst_test__test://{LIBVIRT}/node.xml,predictable,fakeuri=qemu:///system,"
        f"caps={LIBVIRT}/capabilities.xml,domcaps={LIBVIRT}/domain-capabilities.xml"
    )
    made = guest(name, tmp_path)
    for path in (made.medium, made.answers, made.virtio):
        path.touch()
    done = subprocess.run(
        [*command.command(made, uri), "--print-xml", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.replace(str(tmp_path), "/srv/media").strip()
        == (GOLDEN / name / "domain.xml").read_text().strip()
    )


def test_a_key_is_pressed_with_virsh() -> None:
    assert command.press_key("office", "qemu:///system")[-2:] == ["office", "KEY_SPACE"]
