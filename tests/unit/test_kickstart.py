"""Kickstarts: what renders, what parses into which recipe, and that nothing in one is ever ignored."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vdibuild import kickstart, progress, recipe, resources
from vdibuild.errors import InputError, VdibuildError
from vdibuild.kickstart.syntax import HONOURED, HONOURED_SECTIONS
from vdibuild.settings.images import Image
from vdibuild.settings.live_systems import Installer, Kiosk, LiveSystem

GOLDEN = Path(__file__).parent / "kickstart"
SOURCE = Path("kickstarts/some.ks.j2")
DEBIAN_MIRRORS = {
    "main": "http://deb.example.org/debian",
    "security": "http://deb.example.org/debian-security",
}
REDHAT_MIRRORS = {
    "main": "https://mirrors.example.org/metalink?repo=fedora-43&arch=x86_64",
    "main_kind": "metalink",
    "updates": "https://mirrors.example.org/metalink?repo=updates-43&arch=x86_64",
    "updates_kind": "metalink",
    "appstream": "https://mirrors.example.org/AppStream",
    "appstream_kind": "baseurl",
}
STORAGE = """part biosboot --fstype=biosboot --size=1
part / --fstype=ext4 --size=512 --grow
"""


def image(family: str = "debian", **settings: Any) -> Image:
    release = "trixie" if family == "debian" else "fedora43"
    values = {"family": family, "release": release, "kickstart": "some.ks.j2", **settings}
    return Image.model_validate(values)


def parse(lines: str, settings: Image | None = None, storage: str = STORAGE) -> recipe.Recipe:
    """Parse these lines, which begin at line 1, with a url and a disk below them."""
    text = f"{lines}\n{storage}url --url=http://deb.example.org/debian\n"
    return kickstart.parse(text, SOURCE, settings or image())


def refuse(lines: str, settings: Image | None = None, storage: str = STORAGE) -> InputError:
    with pytest.raises(InputError) as caught:
        parse(lines, settings, storage)
    assert caught.value.source == SOURCE
    return caught.value


# The recipes that come with vdibuild


def render(name: str, family: str = "debian", **values: Any) -> str:
    path = resources.packaged() / "kickstarts" / name
    mirrors = DEBIAN_MIRRORS if family == "debian" else REDHAT_MIRRORS
    return kickstart.render(path, image(family, **values), "some-image", mirrors, resources.packaged())


@pytest.mark.parametrize(
    ("name", "family", "golden"),
    [
        ("golden-debian.ks.j2", "debian", "golden-debian.ks"),
        ("golden-fedora.ks.j2", "redhat", "golden-fedora.ks"),
    ],
)
def test_a_packaged_recipe_renders_as_the_golden_file_says(name: str, family: str, golden: str) -> None:
    assert render(name, family) == (GOLDEN / golden).read_text()


def live(**settings: Any) -> LiveSystem:
    return LiveSystem(family="debian", release="trixie", kickstart="some.ks.j2", **settings)


def test_the_installers_recipe_is_one_of_a_live_system() -> None:
    path = resources.packaged() / "kickstarts" / Installer().kickstart
    text = kickstart.render(path, Installer(), "installer", DEBIAN_MIRRORS, resources.packaged())
    assert text == (GOLDEN / "installer-debian.ks").read_text()
    result = kickstart.parse(text, SOURCE, Installer())
    assert result.storage == recipe.Storage()
    assert {"dracut", "dracut-live", "linux-image-cloud-amd64"} <= set(result.packages.names)


def test_the_kiosks_recipe_is_one_of_a_live_system() -> None:
    path = resources.packaged() / "kickstarts" / Kiosk().kickstart
    text = kickstart.render(path, Kiosk(), "kiosk", DEBIAN_MIRRORS, resources.packaged())
    assert text == (GOLDEN / "kiosk-debian.ks").read_text()
    result = kickstart.parse(text, SOURCE, Kiosk())
    assert result.storage == recipe.Storage()
    assert {"station", "nftables"} <= set(result.services_enabled)
    assert result.interfaces[0].address is None


def test_fedoras_kiosk_is_the_same_station_of_other_packages() -> None:
    """pykickstart knows all of it, and so do we; what is not about packages is as in Debian's."""
    family = Kiosk(family="redhat", release="fedora43", kickstart="kiosk-fedora.ks.j2")
    made = {}
    for live, mirrors in ((Kiosk(), DEBIAN_MIRRORS), (family, REDHAT_MIRRORS)):
        path = resources.packaged() / "kickstarts" / live.kickstart
        text = kickstart.render(path, live, "kiosk", mirrors, resources.packaged())
        made[live.family] = kickstart.parse(text, SOURCE, live)
    debian, fedora = made["debian"], made["redhat"]
    assert {"dracut-live", "grub2-efi-x64-cdboot", "shim-x64", "kernel-core"} <= set(fedora.packages.names)
    for name in ("users", "root_password", "services_enabled", "services_disabled", "storage", "hostname"):
        same = [
            [replace(one, line=0) for one in value] if name == "users" else value
            for value in (getattr(debian, name), getattr(fedora, name))
        ]
        assert same[0] == same[1], name
    assert fedora.bootloader.append == debian.bootloader.append.removesuffix(" lsm=yama,apparmor")
    assert fedora.scripts[0].text.startswith(debian.scripts[0].text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("zerombr", "zerombr: a live system has no disk"),
        ("clearpart --all", "clearpart: a live system has no disk"),
        ("part / --fstype=ext4 --size=512", "part: a live system has no disk"),
        ("volgroup vg pv.0", "volgroup: a live system has no disk"),
        ("logvol / --vgname=vg --name=root --fstype=ext4 --size=9", "logvol: a live system has no disk"),
        ("bootloader --location=none", "a live system does not start without a boot loader"),
    ],
)
def test_what_makes_no_sense_for_a_live_system_names_its_line(line: str, said: str) -> None:
    text = f"\n{line}\nurl --url=http://deb.example.org/debian\n"
    with pytest.raises(InputError, match=f":2: {said}"):
        kickstart.parse(text, SOURCE, live())


LAYOUTS = sorted(
    path.name.removesuffix(".ks.j2") for path in (resources.packaged() / "kickstarts/layouts").iterdir()
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("firmware", ["bios", "uefi"])
@pytest.mark.parametrize("table", ["gpt", "msdos"])
@pytest.mark.parametrize(
    ("name", "family", "release"),
    [
        ("golden-debian.ks.j2", "debian", "trixie"),
        ("desktop-debian.ks.j2", "debian", "trixie"),
        ("golden-fedora.ks.j2", "redhat", "fedora43"),
        ("golden-el.ks.j2", "redhat", "el9"),
        ("golden-el.ks.j2", "redhat", "el10"),
    ],
)
def test_every_packaged_recipe_parses_with_every_layout(
    name: str, family: str, release: str, layout: str, firmware: str, table: str
) -> None:
    values: dict[str, Any] = {
        "release": release,
        "firmware": firmware,
        "disk": {"layout": layout, "table": table, "size": "4GiB"},
    }
    text = render(name, family, **values)
    if "btrfs" in layout and release.startswith("el"):
        with pytest.raises(InputError, match="trfs"):
            kickstart.parse(text, SOURCE, image(family, **values))
        return
    result = kickstart.parse(text, SOURCE, image(family, **values))
    volumes = [*result.storage.partitions, *result.storage.logical]
    assert {volume.filesystem for volume in volumes if volume.mountpoint == "/"} == {layout.split("-")[1]}
    assert ("vfat" in {volume.filesystem for volume in volumes}) == (firmware == "uefi")
    assert result.root_password == recipe.Password("", locked=True)
    assert result.packages.names


# Templates


def template(directory: Path, text: str, name: str = "some.ks.j2") -> Path:
    path = directory / "kickstarts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def failing(tmp_path: Path, text: str, **settings: Any) -> InputError:
    path = template(tmp_path, text)
    with pytest.raises(InputError) as caught:
        kickstart.render(path, image(**settings), "some-image", DEBIAN_MIRRORS, tmp_path)
    return caught.value


def test_a_template_gets_the_image_its_variables_and_the_mirrors(tmp_path: Path) -> None:
    path = template(
        tmp_path,
        "{{ name }} {{ release }} {{ mirror.main }} {{ image.disk.size }} {{ colour }} {{ sizes[1] }} <&>\n",
    )
    settings = image(variables={"colour": "red & blue", "sizes": ["a", "b"]}, disk={"size": "3GiB"})
    text = kickstart.render(path, settings, "box", DEBIAN_MIRRORS, tmp_path)
    assert text == "box trixie http://deb.example.org/debian 3072 red & blue b <&>\n"


def test_what_a_template_includes_comes_from_the_site_first(tmp_path: Path) -> None:
    path = template(tmp_path, '{% include "common/system.ks.j2" %}{% include "layouts/plain-xfs.ks.j2" %}')
    template(tmp_path, "lang de_DE.UTF-8\n", "common/system.ks.j2")
    text = kickstart.render(path, image(), "box", {}, tmp_path)
    assert text.startswith("lang de_DE.UTF-8\n")
    assert "part / --fstype=xfs" in text


def test_an_undefined_variable_names_its_line_and_the_nearest(tmp_path: Path) -> None:
    error = failing(tmp_path, "lang C\nkeyboard {{ laguage }}\n", variables={"language": "C"})
    assert error.line == 2
    assert "did you mean language" in error.hint
    assert "images: some-image: variables: laguage" in error.hint


def test_an_undefined_variable_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    template(tmp_path, "\n\n{{ nowhere }}\n", "part.ks.j2")
    error = failing(tmp_path, '{% include "part.ks.j2" %}')
    assert (error.source, error.line) == (tmp_path / "kickstarts/part.ks.j2", 3)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n{% if %}\n", 2, "xpected"),
        ("\n\n{{ image.disk.layuot }}\n", 3, "did you mean layout"),
        ('\n{% include "layouts/plain-ext3.ks.j2" %}\n', 2, "did you mean layouts/plain-ext4.ks.j2"),
        ("\n{{ 1 / 0 }}\n", 2, "ZeroDivisionError"),
        ('{% include "some.ks.j2" %}', None, "RecursionError"),
    ],
)
def test_an_error_in_a_template_names_its_line(
    tmp_path: Path, text: str, line: int | None, said: str
) -> None:
    error = failing(tmp_path, text)
    assert said in str(error)
    if line:
        assert error.line == line


def test_a_variable_cannot_hide_what_every_kickstart_gets(tmp_path: Path) -> None:
    assert "'mirror'" in failing(tmp_path, "", variables={"mirror": "x"}).message


def test_a_template_that_is_not_text_is_one_error(tmp_path: Path) -> None:
    path = template(tmp_path, "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        kickstart.render(path, image(), "box", {}, tmp_path)


# What each command becomes


def test_what_the_system_says_about_itself() -> None:
    result = parse(
        """lang nl_NL.UTF-8
keyboard --vckeymap=us
timezone Europe/Amsterdam --utc
network --hostname=box.example.org
services --enabled=ssh,getty@tty1 --disabled=cron
services --enabled=systemd-networkd
selinux --disabled
poweroff"""
    )
    assert result.language == "nl_NL.UTF-8"
    assert result.keyboard == "us"
    assert (result.timezone, result.utc) == ("Europe/Amsterdam", True)
    assert result.hostname == "box.example.org"
    assert result.interfaces == ()
    assert result.services_enabled == ("ssh", "getty@tty1", "systemd-networkd")
    assert result.services_disabled == ("cron",)
    assert result.selinux == "disabled"
    assert not parse("timezone Etc/UTC").utc


def test_repositories() -> None:
    result = parse("repo --name=trixie-updates --baseurl=http://deb.example.org/debian")
    assert result.url == recipe.Repository("trixie", "http://deb.example.org/debian", 4)
    assert result.repositories == (recipe.Repository("trixie-updates", "http://deb.example.org/debian", 1),)
    text = f"{STORAGE}url --metalink=https://example.org/m?a=1&b=2\nrepo --name=u --mirrorlist=https://example.org/l\n"
    fedora = kickstart.parse(text, SOURCE, image("redhat"))
    assert fedora.url == recipe.Repository("base", "https://example.org/m?a=1&b=2", 3, metalink=True)
    assert fedora.repositories == (recipe.Repository("u", "https://example.org/l", 4, mirrorlist=True),)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJZ someone@example.org"
HASH = "$6$saltsalt$" + "x" * 86


def test_accounts() -> None:
    result = parse(
        f"""rootpw --iscrypted {HASH}
group --name=staff2 --gid=1500
user --name=ann --groups=staff2,sudo --gecos="Ann #1" --homedir=/srv/ann --shell=/bin/sh --uid=1500 --gid=1500
user --name=bob --password={HASH} --iscrypted --lock
sshkey --username=ann "{KEY}"
sshkey --username=root "{KEY}\""""
    )
    assert result.root_password == recipe.Password(HASH, locked=False)
    assert result.groups == (recipe.Group("staff2", 2, 1500),)
    ann, bob = result.users
    assert ann == recipe.User(
        "ann",
        recipe.Password("", locked=True),
        3,
        ("staff2", "sudo"),
        "Ann #1",
        "/srv/ann",
        "/bin/sh",
        1500,
        1500,
    )
    assert bob.password == recipe.Password(HASH, locked=True)
    assert result.ssh_keys == (recipe.SshKey("ann", KEY, 5), recipe.SshKey("root", KEY, 6))


def test_a_plain_password_is_hashed_with_a_warning_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A stand-in that records its arguments, and the password as it came through standard input.
    fake = tmp_path / "openssl"
    fake.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/argv\ncat >{tmp_path}/stdin\necho "$6$salt$hash"\n')
    fake.write_text(fake.read_text().replace("$6$salt$hash", r"\$6\$salt\$hash"))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with progress.logging_to(tmp_path / "log"):
        result = parse("rootpw --plaintext s3cret")
    assert result.root_password == recipe.Password("$6$salt$hash", locked=False)
    assert (tmp_path / "argv").read_text() == "passwd -6 -stdin\n"
    assert (tmp_path / "stdin").read_text() == "s3cret\n"
    log = (tmp_path / "log").read_text()
    assert "warning: the kickstart has root's password in plain text (line 1)" in log
    assert "s3cret" not in log


def test_the_real_openssl_hashes_a_password() -> None:
    hashed = parse("user --name=ann --password=s3cret").users[0].password.hashed
    assert re.fullmatch(r"\$6\$\S{8,16}\$\S{86}", hashed)


def test_network() -> None:
    result = parse(
        """network --bootproto=dhcp --device=link --hostname=box --onboot=yes --activate
network --bootproto=static --device=52:54:00:AA:00:01 --ip=192.0.2.10 --netmask=255.255.255.192 \
--gateway=192.0.2.1 --nameserver=192.0.2.2,2001:db8::1 --noipv6 --mtu=1400"""
    )
    assert result.hostname == "box"
    assert result.interfaces == (
        recipe.NetworkInterface("link", 1),
        recipe.NetworkInterface(
            "52:54:00:aa:00:01", 2, "192.0.2.10", 26, "192.0.2.1", ("192.0.2.2", "2001:db8::1"), False, 1400
        ),
    )


def test_boot_and_disk_with_lvm_as_the_seed_writes_it() -> None:
    result = parse(
        """zerombr
bootloader --append=" crashkernel=auto" --location=mbr --boot-drive=vda --timeout=5
clearpart --drives=vda --all --initlabel --disklabel=msdos
part /boot --fstype="xfs" --ondisk=vda --size=512 --label=boot --fsoptions=noatime
part pv.157 --fstype="lvmpv" --ondisk=vda --size=1 --grow --maxsize=9000
volgroup vg0 --pesize=8192 pv.157
logvol swap --fstype="swap" --size=511 --name=swap --vgname=vg0
logvol / --fstype="xfs" --size=1 --grow --name=root --vgname=vg0""",
        image(disk={"table": "msdos", "size": "8GiB"}),
        storage="",
    )
    assert result.bootloader == recipe.Bootloader("crashkernel=auto", 5, True, 2)
    assert result.storage == recipe.Storage(
        partitions=(
            recipe.Volume("/boot", "xfs", 512, 4, label="boot", options="noatime"),
            recipe.Volume("pv.157", "lvmpv", 1, 5, grow=True, maximum=9000),
        ),
        groups=(recipe.VolumeGroup("vg0", ("pv.157",), 6, extent=8),),
        logical=(
            recipe.Volume("swap", "swap", 511, 7, name="swap", group="vg0"),
            recipe.Volume("/", "xfs", 1, 8, grow=True, name="root", group="vg0"),
        ),
        table="msdos",
    )
    assert not parse("bootloader --location=none").bootloader.install


def test_packages() -> None:
    result = parse("%packages\nvim # the editor\nnano\n@web-server\n-ed*\n%end").packages
    assert result == recipe.Packages(
        names=("nano", "vim"),
        groups=("web-server",),
        excluded_names=("ed*",),
        weak_dependencies=True,
        core=True,
        line=1,
    )
    text = "%packages --nocore --excludedocs --exclude-weakdeps --inst-langs=C,nl_NL\n"
    text += "@^server environment\n@Sound and Video\n-@x\nvim*\n%end"
    result = parse(text, image("redhat")).packages
    assert result == recipe.Packages(
        names=("vim*",),
        groups=("Sound and Video",),
        environment="server environment",
        excluded_groups=("x",),
        weak_dependencies=False,
        documentation=False,
        translations=("nl_NL",),
        core=False,
        line=1,
    )
    assert result.catalogues == ["nl", "nl_NL"]


def test_scripts() -> None:
    first, second = parse(
        """%post --interpreter=/usr/bin/python3 --log=/root/post.log --erroronfail
# a comment stays
print("%packages")
  %other
%end
%post --nochroot
%end # nothing to do
%post --nochroot
cp x $ROOT/
%end"""
    ).scripts
    assert first == recipe.Script(
        '# a comment stays\nprint("%packages")\n  %other\n',
        1,
        True,
        "/usr/bin/python3",
        "/root/post.log",
        True,
    )
    assert second == recipe.Script("cp x $ROOT/\n", 8, chroot=False)


# Nothing is ignored


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("autopart", "autopart is not honoured"),
        ("reboot", "use poweroff"),
        ("text", "remove it"),
        ("firstboot --disable", "firstboot"),
        ("liveimg --url=http://example.org/x", "liveimg is not honoured without an installation"),
        ("timezon Etc/UTC", "did you mean timezone?"),
        ("%include /tmp/x", "Jinja"),
        ("%ksappend http://example.org/x", "Jinja"),
        ("%pre\n%end", "%pre is not honoured"),
        ("%pre-install\n%end", "%pre-install"),
        ("%onerror\n%end", "%onerror"),
        ("%traceback\n%end", "%traceback"),
        ("%addon com_redhat_kdump --enable\n%end", "%addon"),
        ("%anaconda\n%end", "%anaconda"),
        ("%certificate --dir=/x --filename=y\n%end", "%certificate"),
        ("%nonsense\n%end", "%nonsense"),
        ("%packages --ignoremissing\n%end", "%packages --ignoremissing"),
        ("%packages --default\n%end", "--default"),
        ("%packages --inst-langs=../x\n%end", "'../x' is no language"),
        ("%post --nochrot\n%end", "did you mean %post --nochroot"),
        ("part /x --fstype=ext4 --size=1 --encrypted", "part --encrypted"),
        ("part /x --fstype=ext4 --siz=1", "part --siz"),
        ("timezone Etc/UTC --ntpservers=x", "timezone --ntpservers"),
        ("timezone Etc/UTC --isUtc", "deprecated"),
        ("rootpw --lock --allow-ssh", "--allow-ssh"),
        ("network --device=link --onboot=no", "--onboot=no"),
        ("repo --name=a --baseurl=http://example.org/x --install", "--install"),
        ("lang C\nlang C", "first in line 1"),
        ("%packages\n%end\n%packages\n%end", "first in line 1"),
        ("network --hostname=a\nnetwork --hostname=b", "line 1"),
        ("bootloader --timeout=1 --timeout=2", "--timeout is given twice"),
        ("user --name=ann --password=abc#def", "begins a comment"),
        ("poweroff now", "now"),
        ("lang C extra", "extra"),
        ("keyboard us --vckeymap=de", "two layouts"),
        ("part /x --fstype=ext4 --size=1 --maxsize=5", "--maxsize"),
        ("part pv.1 --size=1 --label=x", "--label"),
    ],
)
def test_what_is_not_honoured_is_an_error_that_names_it(line: str, said: str) -> None:
    error = refuse(f"# first\n{line}".replace("first in line 1", "first in line 2"))
    assert said.replace("line 1", "line 2") in str(error)
    assert error.line == 2 + (line.count("\n") if "line 1" in said else 0) - (
        1 if line.startswith("%packages\n%end\n") else 0
    )
    assert "of the rendered kickstart" in error.hint


def test_an_include_is_refused_in_a_script_too() -> None:
    assert refuse("%post\n%include /etc/passwd\n%end").line == 2


OPTIONS = st.from_regex(r"--[a-z][a-z-]{0,12}", fullmatch=True)


@given(st.sampled_from(sorted(HONOURED)), OPTIONS, st.booleans())
def test_an_unknown_option_of_any_command_names_its_line(command: str, option: str, value: bool) -> None:
    if option not in HONOURED[command]:
        error = refuse(f"\n\n{command} {option}{'=1' if value else ''}")
        assert error.line == 3
        assert f"{command} {option}" in error.message


@given(st.sampled_from(sorted(HONOURED_SECTIONS)), OPTIONS)
def test_an_unknown_option_of_any_section_names_its_line(section: str, option: str) -> None:
    if option not in HONOURED_SECTIONS[section]:
        error = refuse(f"\n{section} {option}\n%end")
        assert (error.line, f"{section} {option}" in error.message) == (2, True)


WORDS = st.one_of(
    st.sampled_from(sorted({*HONOURED, *HONOURED_SECTIONS, "%end", "%include", "swap", "/", "pv.1", "vg"})),
    st.sampled_from(sorted({option for options in HONOURED.values() for option in options})),
    st.text(max_size=8),
    st.from_regex(r"\A[a-z-]{1,8}=[ -~]{0,6}\Z"),
    st.integers().map(str),
)


def _assignments(words: list[str]) -> str:
    """The words as a line, an option now and then joined with the word after it."""
    return " ".join(words).replace("-- ", "--").replace(" =", "=")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(WORDS, max_size=5).map(_assignments), max_size=4), st.sampled_from(["debian", "redhat"])
)
@example(["\xa0"], "debian")
def test_nothing_but_our_own_errors_comes_of_any_text(lines: list[str], family: str) -> None:
    with contextlib.suppress(VdibuildError):
        parse("\n".join(lines), image(family))


VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(command, option) for command, options in HONOURED.items() for option in options]),
    st.lists(VALUES, max_size=2),
    VALUES,
)
def test_nothing_but_our_own_errors_comes_of_any_value(
    option: tuple[str, str], positional: list[str], value: str
) -> None:
    line = " ".join([option[0], *(f"'{one}'" for one in positional), f'{option[1]}="{value}"'])
    for family in ("debian", "redhat"):
        with contextlib.suppress(VdibuildError):
            parse(line, image(family))


# A prepared image in place of packages

PREPARED = "liveimg --url=https://example.org/debian.tar.zst"


def prepared(lines: str, **settings: Any) -> recipe.Recipe:
    return kickstart.parse(f"{lines}\n{STORAGE}", SOURCE, image(method="install", **settings))


def test_a_prepared_image_takes_the_place_of_packages() -> None:
    result = prepared(
        f"{PREPARED} --checksum={'AB' * 32} --proxy=http://proxy.example.org:3128 --noverifyssl"
    )
    assert result.live_image == recipe.LiveImage(
        "https://example.org/debian.tar.zst",
        "ab" * 32,
        1,
        "http://proxy.example.org:3128",
        verify=False,
    )
    assert (result.url, result.packages.names) == (None, ())
    assert prepared(PREPARED.replace("https://example.org", "file:///run")).live_image == recipe.LiveImage(
        "file:///run/debian.tar.zst", "", 1
    )


@pytest.mark.parametrize(
    ("lines", "settings", "line", "said"),
    [
        (f"{PREPARED}\nurl --url=http://example.org/", {}, 2, "url has no meaning with liveimg, in line 1"),
        (f"\n{PREPARED}\nrepo --name=a --baseurl=http://example.org/", {}, 3, "in line 2"),
        (f"{PREPARED}\n%packages\nvim\n%end", {}, 2, "%packages beside liveimg"),
        (PREPARED, {"packages": ["vim"]}, 1, "`packages:`"),
        (f"{PREPARED} --checksum=abc", {}, 1, "no SHA-256"),
        ("liveimg --url=/srv/x.tar", {}, 1, "no URL"),
        ("liveimg --url=file://x.tar", {}, 1, "no URL"),
        ("liveimg --url='http://[x'", {}, 1, "no URL"),
        (f"{PREPARED} --proxy=proxy", {}, 1, "no URL"),
        ("liveimg", {}, 1, "--url"),
        (f"{PREPARED}\n{PREPARED}", {}, 2, "given twice"),
        (f"{PREPARED}\nreboot", {}, 2, "use poweroff"),
    ],
)
def test_what_goes_wrong_with_a_prepared_image_names_its_line(
    lines: str, settings: dict[str, Any], line: int, said: str
) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        prepared(lines, **settings)
    assert caught.value.line == line


# What cannot be


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lang german", "locale"),
        ("keyboard ''", "keyboard"),
        ("timezone Europe/Amsterdan --utc", "did you mean Europe/Amsterdam"),
        ("timezone ../etc --utc", "no time zone"),
        ("selinux --enforcing", "no SELinux"),
        ("selinux", "needs one of"),
        ("services --enabled=a --disabled=a", "enabled in line 1"),
        ("services --enabled=-x", "name of a service"),
        ("repo --name=Big --baseurl=http://example.org/", "suite"),
        ("repo --name=a --baseurl=example.org", "no URL"),
        ("repo --name=a --baseurl='http://[x'", "no URL"),
        ("repo --name=a --mirrorlist=http://example.org/", "no mirrorlist"),
        ("rootpw", "rgument"),
        ("rootpw ''", "rgument"),
        ("user --name=ann --password=''", "empty"),
        ("rootpw --iscrypted hello", "crypt(5)"),
        ("rootpw --iscrypted --plaintext hello", "not both"),
        ("user --name=root", "root is always there"),
        ("user --name=Ann", "name of a user"),
        ("user --name=ann --uid=0", "cannot be the number"),
        ("user --name=ann --gecos=a:b", "colon"),
        ("user --name=ann --shell=sh", "absolute path"),
        ("user --name=ann --groups='a b'", "name of a group"),
        ("group --name=1", "name of a group"),
        ("sshkey --username=ann 'ssh-ed25519 AAAA'", "no user 'ann'"),
        ("sshkey --username=root 'AAAA'", "public key"),
        ("network --hostname=a_b", "host name"),
        (f"network --hostname={'a' * 63}.{'b' * 63}", "longer"),
        ("network --bootproto=static --device=eth0", "needs --ip"),
        ("network --bootproto=static --ip=192.0.2.1", "needs --netmask"),
        ("network --bootproto=static --ip=192.0.2.1 --netmask=255.0.255.0", "no netmask"),
        ("network --bootproto=static --ip=192.0.2.300 --netmask=255.255.255.0", "no IP address"),
        ("network --bootproto=static --ip=2001:db8::1 --netmask=255.255.255.0", "no IPv4"),
        (
            "network --bootproto=static --ip=192.0.2.9 --netmask=255.255.255.0 --gateway=198.51.100.1",
            "not in the network",
        ),
        ("network --ip=192.0.2.1", "no meaning with DHCP"),
        ("network --bootproto=bootp", "use dhcp or static"),
        ("network --device=52:54:00:zz:00:01", "MAC address"),
        ("network --device=bootif", "use link"),
        ("network --device=eth0 --mtu=20", "MTU"),
        ("bootloader --location=partition", "use mbr or none"),
        ("bootloader --append='a$(b)'", "character $"),
        ("bootloader --timeout=-1", "less than 0"),
        ("bootloader --timeout=soon", "soon"),
        ("clearpart --all --disklabel=msdos", "table: gpt"),
        ("part /boot --size=100", "no file system"),
        ("part /boot --fstype=ext2 --size=100", "ext2"),
        ("part /boot/efi --fstype=ext4 --size=100\npart /x", "no file system"),
        ("part /etc --fstype=ext4 --size=100", "/etc cannot be"),
        ("part '/a b' --fstype=ext4 --size=100", "mount point"),
        ("part raid.01 --size=100", "no mount point"),
        ("part swap --fstype=ext4 --size=100", "swap cannot be ext4"),
        ("part /x --fstype=ext4 --size=0", "--size=0"),
        (
            "part /x --fstype=ext4 --size=10 --ondisk=vda\npart /y --fstype=ext4 --size=9 --ondisk=vdb",
            "one disk",
        ),
        ("part /x --fstype=ext4 --size=100000", "does not fit"),
        ("part / --fstype=ext4 --size=100", "twice"),
        ("volgroup vg pv.1", "no physical volume pv.1"),
        ("volgroup vg pv.1 --pesize=3000", "power of two"),
        ("logvol /x --vgname=vg --name=x --fstype=ext4 --size=10", "no volume group vg"),
        ("logvol /x --vgname=vg --name='a b' --fstype=ext4 --size=10", "logical volume"),
        ("%packages\n@^xfce\n%end", "Debian has no environments"),
        ("%packages\nvim nano\n%end", "one to a line"),
        ("%packages\n-\n%end", "no name of a package"),
        ("%post --interpreter=bash\nx\n%end", "absolute path"),
        ("%post\nx", "no %end"),
        ("%post\n%packages\n%end", "no %end before"),
        ("%post\n%end x", "only a comment"),
        ("lang 'C", "quotation"),
        ("lang C\r", "character '\\r'"),
        ("'' x", "empty word"),
    ],
)
def test_bad_input_is_one_error_with_its_line(line: str, said: str) -> None:
    error = refuse(line)
    assert said in str(error)
    assert error.line is not None
    assert "\n" not in error.message


def test_a_group_cannot_have_options() -> None:
    assert "options of a group" in refuse("%packages\n@x --optional\n%end", image("redhat")).message
    assert refuse("%packages\n-@^x\n%end", image("redhat")).line == 2


@pytest.mark.parametrize(
    ("storage", "settings", "said"),
    [
        ("", image(), "no file system for /"),
        ("part / --fstype=ext4 --size=512\n", image(), "BIOS boot partition"),
        ("part / --fstype=ext4 --size=512\n", image(firmware="uefi"), "EFI system partition"),
    ],
)
def test_a_disk_that_could_not_boot_is_refused(storage: str, settings: Image, said: str) -> None:
    assert said in refuse("poweroff", settings, storage).message


def test_a_kickstart_must_say_where_packages_come_from() -> None:
    with pytest.raises(InputError, match="no url command"):
        kickstart.parse(STORAGE, SOURCE, image())


def test_a_release_that_pykickstart_does_not_know() -> None:
    assert "'fedora99'" in refuse("poweroff", image("redhat", release="fedora99")).message
