"""Kickstarts for Anaconda: what the release's own parser says, and that nobody has to sit beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tuned
from hypothesis import strategies as st
from pykickstart import version

from vdibuild import golden, kickstart, progress, recipe, resources, site
from vdibuild.errors import InputError, VdibuildError
from vdibuild.kickstart import anaconda
from vdibuild.settings.images import Image

GOLDEN = Path(__file__).parent / "kickstart"
SOURCE = Path("kickstarts/some.ks.j2")
NEWEST_FEDORA = f"fedora{version.DEVEL // 1000}"
MIRRORS = {
    "main": "https://mirrors.example.org/metalink?repo=main&arch=x86_64",
    "main_kind": "metalink",
    "updates": "https://mirrors.example.org/metalink?repo=updates&arch=x86_64",
    "updates_kind": "metalink",
    "appstream": "https://mirrors.example.org/AppStream",
    "appstream_kind": "baseurl",
}
LEAST = """lang en_US.UTF-8
keyboard us
timezone Etc/UTC --utc
rootpw --lock
zerombr
clearpart --all --initlabel
autopart
bootloader --location=mbr
poweroff
%packages
@core
%end
"""


def image(release: str = "el10", **settings: Any) -> Image:
    values = {"family": "redhat", "release": release, "method": "install", "kickstart": "some.ks.j2"}
    medium = {"location": "https://example.org/tree"}
    return Image.model_validate({**values, "install": medium, **settings})


def check(text: str, release: str = "el10") -> anaconda.Installation:
    return anaconda.check(text, SOURCE, image(release))


def refuse(text: str, release: str = "el10") -> InputError:
    with pytest.raises(InputError) as caught:
        check(text, release)
    assert caught.value.source == SOURCE
    assert "\n" not in caught.value.message
    return caught.value


# The recipes that come with vdibuild


def render(name: str, settings: Image) -> str:
    path = resources.packaged() / "kickstarts" / name
    return kickstart.render(path, settings, "some-image", MIRRORS, resources.packaged())


@pytest.mark.parametrize(
    ("name", "release", "layout"),
    [
        ("install-fedora", NEWEST_FEDORA, "plain-ext4"),
        ("install-el", "el9", "plain-xfs"),
        ("install-el", "el10", "lvm-xfs"),
    ],
)
def test_a_packaged_recipe_renders_as_the_golden_file_says(name: str, release: str, layout: str) -> None:
    settings = image(
        release,
        disk={"layout": layout},
        packages=["vim-enhanced"],
        authorized_keys=["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJZ someone@example.org"],
    )
    text = render(f"{name}.ks.j2", settings)
    # The newest Fedora is another one with each pykickstart.
    golden = (GOLDEN / f"{name}-{layout}.ks").read_text()
    assert text == golden.replace("FEDORA", NEWEST_FEDORA)


@pytest.mark.parametrize("layout", ["plain-ext4", "plain-xfs", "lvm-xfs", "lvm-ext4", "boot-ext4"])
@pytest.mark.parametrize("firmware", ["bios", "uefi"])
@pytest.mark.parametrize("source", ["network", "medium"])
@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("install-fedora.ks.j2", "fedora43"),
        ("install-fedora.ks.j2", NEWEST_FEDORA),
        ("install-el.ks.j2", "el9"),
        ("install-el.ks.j2", "el10"),
    ],
)
def test_every_packaged_recipe_is_valid_for_its_release(
    name: str, release: str, source: str, firmware: str, layout: str
) -> None:
    settings = image(
        release,
        firmware=firmware,
        disk={"layout": layout, "size": "8GiB"},
        variables={"installation_source": source, "language": "nl_NL.UTF-8", "keyboard": "nl"},
    )
    text = render(name, settings)
    result = anaconda.check(text, SOURCE, settings)
    assert (result.text, result.live_image) == (text, None)
    assert ("part /boot/efi" in text) == (firmware == "uefi")
    assert ("\ncdrom\n" in text) == (source == "medium")
    boot = "1024" if release.startswith("el") else "512"
    assert (f"part /boot --fstype={layout.split('-')[1]} --size={boot}\n" in text) == (
        not layout.startswith("plain")
    )


def test_the_recipe_of_an_image_is_read_as_anaconda_does(tmp_path: Path) -> None:
    path = tmp_path / "vdibuild.yaml"
    path.write_text(
        "images:\n  small:\n    family: redhat\n    release: el10\n    method: install\n"
        "    install: {location: https://example.org/tree}\n"
        "    kickstart: install-el.ks.j2\n    mirror: https://mirror.example.org/el10\n"
    )
    loaded = site.load(path)
    name, settings = loaded.image(None)
    assert anaconda.executes(settings)
    assert "cmdline\nurl --url=https://mirror.example.org/el10/" in anaconda.read(loaded, name, settings).text
    assert [step.title for step in golden.plan(loaded).steps][:2] == ["installation", "system"]


# What Anaconda knows


def test_commands_that_only_an_installer_has_are_legal() -> None:
    check(f"{LEAST}text\nfirstboot --disable\neula --agreed\nignoredisk --only-use=vda\nmediacheck\nskipx\n")
    check(
        f"{LEAST}%pre\nlsblk >/tmp/disks\n%end\n%include /tmp/disks\n"
        "%addon com_redhat_kdump --disable\n%end\n"
    )
    check(f"%pre-install\nx\n%end\n%onerror\nx\n%end\n{LEAST}%post --nochroot\necho 'it\n%end\n")


@pytest.mark.parametrize(
    ("line", "release", "said"),
    [
        ("timezon Etc/UTC", "el10", "timezon"),
        ("install", "el10", "removed"),
        ("authconfig --enableshadow", "el10", "authconfig"),
        ("btrfs / --label=x pv.1", "el9", "btrfs"),
        ("vnc", "el10", "vnc"),
        ("module --name=nodejs", NEWEST_FEDORA, "module"),
        ("nvdimm use --namespace=x", "el10", "nvdimm"),
        ("part / --nonsense", "el9", "--nonsense"),
        ("timezone Etc/UTC --isUtc --ntpservers=x", "el10", "--isUtc"),
        ("logvol / --vgname=vg --name=root --size=1 --fstype", "el10", "--fstype"),
        ("lang 'C", "el10", "quotation"),
        ("'' x", "el10", "empty word"),
        ("user --name=ann --password=a#b", "el10", "begins a comment"),
        ("lang C\x0bx", "el10", "character"),
        ("%nonsense\n%end", "el10", "nonsense"),
        ("%packages --instLangs=en\n%end", NEWEST_FEDORA, "instLangs"),
        ("liveimg --url=nowhere", "el10", "no URL"),
        ("liveimg --url=https://example.org/x.tar --checksum=abc", "el10", "no SHA-256"),
    ],
)
def test_what_the_release_does_not_know_names_its_line(line: str, release: str, said: str) -> None:
    error = refuse(f"# first\n{line}\n{LEAST}", release)
    assert said in error.message
    assert error.line == 2
    assert "of the rendered kickstart" in error.hint


def test_a_section_that_is_not_closed_is_named() -> None:
    assert "%post" in refuse(f"{LEAST}%post\nx\n").message


def test_a_release_that_pykickstart_does_not_know() -> None:
    assert "'fedora99'" in refuse(LEAST, "fedora99").message


# Nobody is asked


@pytest.mark.parametrize(
    "line",
    ["lang", "keyboard", "timezone", "rootpw", "zerombr", "clearpart", "autopart", "bootloader", "poweroff"],
)
def test_what_anaconda_would_ask_for_is_missed(line: str) -> None:
    text = "".join(one for one in LEAST.splitlines(True) if not one.startswith(line))
    error = refuse(text)
    assert "would wait for a person" in error.message
    assert "disk's layout" in error.message if line == "autopart" else line in error.message
    check(LEAST)


def test_all_that_is_missing_is_said_at_once() -> None:
    message = refuse("text\n").message
    for what in ("lang", "timezone", "bootloader", "poweroff", "%packages or liveimg", "rootpw"):
        assert what in message


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("user --name=ann --groups=wheel --password=x --plaintext", True),
        ("user --name=ann --password=x --plaintext", False),
        ("user --name=ann --groups=wheel --lock", False),
    ],
)
def test_somebody_has_to_be_able_to_administer_it(line: str, allowed: bool) -> None:
    text = LEAST.replace("rootpw --lock", line)
    if allowed:
        check(text)
    else:
        assert "administrator" in refuse(text).message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("reboot", "use poweroff"),
        ("halt", "use poweroff"),
        ("firstboot --enable", "firstboot --disable"),
        ("firstboot --reconfig", "firstboot --disable"),
    ],
)
def test_what_waits_or_goes_on_is_refused(line: str, said: str) -> None:
    error = refuse(f"{line}\n{LEAST}")
    assert said in error.hint
    assert error.line == 1


def test_a_prepared_image_takes_the_place_of_packages() -> None:
    text = LEAST.partition("%packages")[0]
    checksum = "A" * 64
    made = check(
        f"liveimg --url=https://example.org/x.tar --checksum={checksum} --proxy=http://proxy:3128 "
        f"--noverifyssl\n{text}"
    )
    assert made.live_image == recipe.LiveImage(
        "https://example.org/x.tar", "a" * 64, 1, "http://proxy:3128", verify=False
    )


def test_a_plain_password_is_warned_of_and_not_shown(tmp_path: Path) -> None:
    with progress.logging_to(tmp_path / "log"):
        check(LEAST.replace("rootpw --lock", "rootpw --plaintext s3cret"))
        check(LEAST.replace("rootpw --lock", "rootpw --iscrypted $6$salt$hash"))
    log = (tmp_path / "log").read_text()
    assert log.count("warning: the kickstart has root's password in plain text (line 4)") == 1
    assert "s3cret" not in log


WORDS = st.one_of(
    st.sampled_from(sorted(version.returnClassForVersion("RHEL10")().commands)),
    st.sampled_from(
        ["%packages", "%post", "%end", "%include", "%addon", "%", "--name", "--size=1", "/", "swap"]
    ),
    st.text(max_size=8),
    st.from_regex(r"\A--[a-z-]{1,8}=[ -~]{0,6}\Z"),
)


@tuned(deadline=None, max_examples=150)
@given(st.lists(st.lists(WORDS, max_size=5).map(" ".join), max_size=4))
def test_nothing_but_our_own_errors_comes_of_any_text(lines: list[str]) -> None:
    with contextlib.suppress(VdibuildError):
        check("\n".join(lines))
