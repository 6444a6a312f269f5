"""The golden pipeline as a user meets it: the command, real packages, a real disk that boots."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import SITE, Built, SiteDirectory

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: run as root")


def test_an_image_is_built_verified_signed_and_promoted(built: Built) -> None:
    site, output = built.site, built.output
    (version,) = site.versions()
    place = site.path / "artifacts" / "small" / version
    assert (site.path / "artifacts" / "small" / "current").resolve() == place
    assert f"small is built: version {version}" in output
    assert {path.name for path in place.iterdir()} == {
        *("disk.qcow2", "bundle.tar.zst", "manifest.json", "sbom.spdx.json", "boot.png", "build.log"),
        *("SHA256SUMS", "SHA256SUMS.sig"),
    }
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["verification"]["failed_units"] == []
    assert {"systemd", "openssh-server"} <= {package["name"] for package in manifest["packages"]}
    # Other tools than those that wrote them.
    assert (place / "boot.png").read_bytes().startswith(b"\x89PNG")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=place, check=True)
    names = subprocess.run(
        ["tar", "--use-compress-program=zstd", "-tf", place / "bundle.tar.zst"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "./etc/motd" in names
    assert "ssh_host_" not in names
    assert "./usr/share/locale/de/" not in names
    assert site.wait_until_clean() == []

    status, output = site.run("images")
    assert status == 0
    assert re.search(rf"small +{version} +current", output)
    status, output = site.run("images.verify")
    assert status == 0, output
    assert "intact, signed by" in output

    # Nothing changed: nothing is done, and nothing is published.
    assert "small is unchanged" in site.build()
    assert site.versions() == [version]


def test_only_what_changed_is_done_again_and_a_version_can_be_taken_back(
    site: SiteDirectory, built: Built
) -> None:
    site.take_versions(built.site)
    (first,) = site.versions()
    # A run that was killed before the version that it published became the current one.
    current = site.path / "artifacts" / "small" / "current"
    current.unlink()
    assert "it is not the current version" in site.build("--no-promote")
    assert "it is not" not in site.build()
    assert current.resolve().name == first
    site.overlay("etc/motd", f"changed in {site.path}\n")
    status, plan = site.run("build-golden", "--plan")
    assert status == 0, plan
    assert re.search(r"packages +cached", plan)
    assert re.search(r"system +to do", plan)
    assert site.versions() == [first]
    output = site.build("--no-promote")
    assert re.search(r"= packages +cached", output)
    second = site.versions()[-1]
    assert current.resolve().name == first
    assert site.run("images.promote", "--version", second)[0] == 0
    assert current.resolve().name == second
    assert site.run("images.rollback")[0] == 0
    assert current.resolve().name == first


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"SITE": ("disk:", "dsik:")}, ["vdibuild.yaml:9", "images.small.dsik: unknown key", "'disk'"]),
        ({"SITE": ("1GiB", "big")}, ["vdibuild.yaml:9", "disk.size", "'big' is no size"]),
        ({"SITE": ("golden-debian", "no-such")}, ["no-such.ks.j2", "golden-debian.ks.j2"]),
        ({"SITE": ("[golden, mine]", "[goldne]")}, ["overlay 'goldne' not found", "golden"]),
        ({"KS": ("lang C.UTF-8", "lang {{ langauge }}")}, ["own.ks.j2:1", "langauge", "variables:"]),
        ({"KS": ("lang C.UTF-8", "firstboot --disable")}, ["own.ks.j2", "firstboot", "line 1"]),
        ({"KS": ("lang C.UTF-8", "lang C.UTF-8 --frobnicate")}, ["own.ks.j2", "--frobnicate", "line 1"]),
        ({"KS": ("--size=512", "--size=5120")}, ["own.ks.j2", "does not fit"]),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_is_done(
    site: SiteDirectory, change: dict[str, tuple[str, str]], expected: list[str]
) -> None:
    text = SITE
    if "KS" in change:
        text = text.replace("golden-debian", "own")
        write_own_kickstart(site, *change["KS"])
    else:
        text = text.replace(*change["SITE"])
    site.configure(text)
    status, output = site.run("build-golden")
    assert status == 1
    for words in expected:
        assert words in " ".join(output.split()), output
    assert "Traceback" not in output
    assert site.versions() == []
    assert site.wait_until_clean() == []


def write_own_kickstart(site: SiteDirectory, old: str = "", new: str = "") -> None:
    """A recipe of the site's own: a file system of packages that need no configuration."""
    text = (
        "lang C.UTF-8\nurl --url={{ mirror.main }}\nzerombr\nclearpart --all --disklabel=gpt\n"
        "part biosboot --fstype=biosboot --size=1\npart / --fstype=ext4 --size=512 --grow\npoweroff\n"
        "%packages --nocore --exclude-weakdeps\n"
        "linux-image-cloud-amd64\nsystemd-sysv\npasswd\ninitramfs-tools\nzstd\ngrub-pc-bin\n%end\n"
    )
    assert old in text
    directory = site.path / "kickstarts"
    directory.mkdir(exist_ok=True)
    (directory / "own.ks.j2").write_text(text.replace(old, new))


def test_a_package_that_does_not_exist_is_named_with_its_line(site: SiteDirectory) -> None:
    write_own_kickstart(site, "systemd-sysv", "systemd-sysvv")
    site.configure(SITE.replace("golden-debian", "own"))
    status, output = site.run("build-golden")
    assert status == 1
    assert "systemd-sysvv" in output
    assert re.search(r"own\.ks\.j2:10\b", output), output
    assert "the whole log:" in output
    assert site.wait_until_clean() == []


def test_an_unreachable_mirror_is_named(site: SiteDirectory) -> None:
    site.configure(SITE.replace("    family:", "    mirror: http://127.0.0.1:9/debian\n    family:"))
    status, output = site.run("build-golden")
    assert status == 1
    assert "http://127.0.0.1:9/debian" in output
    assert "Traceback" not in output
    assert site.wait_until_clean() == []


@needs_root
def test_a_full_disk_is_said_and_nothing_is_left(site: SiteDirectory) -> None:
    (site.path / "vdibuild.yaml").write_text(SITE)
    # The mount exists in a namespace of its own, and goes with it.
    script = (
        'mkdir -p artifacts && mount -t tmpfs -o size=120m tmpfs artifacts && "$@"; status=$?; '
        "find artifacts -name '.work-*' -o -name '.staging-*' | sed 's/^/left: /'; exit $status"
    )
    status, output = site.run("build-golden", through=["unshare", "--mount", "sh", "-c", script, "sh"])
    assert status == 1, output
    assert "no space left" in output.lower()
    assert "Traceback" not in output
    assert "left: " not in output
    assert site.wait_until_clean() == []


def test_no_permission_is_said(site: SiteDirectory) -> None:
    (site.path / "vdibuild.yaml").write_text(SITE)
    artifacts = site.path / "artifacts"
    artifacts.mkdir(mode=0o555)
    # Root may write everywhere, unless it gives that up.
    through = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    status, output = site.run("build-golden", through=through)
    assert status == 1, output
    assert f"cannot write {artifacts}" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", ["packages", "settings", "write", "bundle", "verification"])
def test_a_run_that_is_ended_leaves_nothing_and_the_next_one_goes_on(
    site: SiteDirectory, built: Built, step: str, number: signal.Signals
) -> None:
    site.take_versions(built.site)
    before = site.versions()
    site.overlay("etc/motd", f"{step} {number.name}\n")
    if step == "packages":
        site.configure(SITE.replace("packages: [", "packages: [less, "))
    run = site.start("build-golden")
    site.wait_for(step)
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
        # What a killed run cannot remove itself, the next one does.
        assert site.wait_until_ended() == []
    else:
        assert run.returncode == 130, output
        assert "interrupted" in output
        assert site.wait_until_clean() == []
    assert site.versions() == before
    status, output = site.run("images.verify")
    assert status == 0, output
    if (step, number) == ("write", signal.SIGKILL):
        output = site.build()
        assert re.search(r"= system +cached", output)
        assert len(site.versions()) == len(before) + 1
        assert site.wait_until_clean() == []


def test_two_builds_of_one_image_at_once(site: SiteDirectory) -> None:
    site.overlay("etc/motd", "two at once\n")
    first = site.start("build-golden")
    site.wait_for("settings")
    status, output = site.run("build-golden")
    assert status == 1
    assert "another run is building small" in output
    assert str(first.pid) in output
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert site.wait_until_clean() == []


def test_a_failing_script_is_named_and_its_system_kept_when_asked(site: SiteDirectory) -> None:
    write_own_kickstart(
        site, "poweroff\n", "poweroff\n%post --erroronfail\necho from the script\nfalse\n%end\n"
    )
    site.configure(SITE.replace("golden-debian", "own"))
    status, output = site.run("build-golden", "--keep")
    assert status == 1
    assert "from the script" in output
    assert re.search(r"own\.ks\.j2:8: %post failed", output), output
    kept = re.search(r"left in (\S+)", output)
    assert kept
    directory = Path(kept[1])
    assert (directory / "tree" / "etc" / "os-release").exists()
    subprocess.run(["rm", "-rf", directory], check=True)
