"""Shrunk disks that boot: those with UEFI, and one of the Red Hat family. The others are in tests/guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import rpmrepo
from tests.guest import test_disk, test_redhat
from tests.guest.test_disk import bootstrapped, tree
from tests.guest.test_redhat import image, key
from vdibuild.disk import shrink
from vdibuild.settings.images import Image
from vdibuild.tree import Tree

__all__ = ["bootstrapped", "image", "key", "tree"]  # fixtures


@pytest.mark.parametrize("name", [name for name in test_disk.CASES if name.startswith("uefi")])
def test_uefi(name: str, tree: Tree, tmp_path: Path) -> None:
    test_disk.test_shrunk_disk_boots_and_has_what_it_had(name, tree, tmp_path)


def test_red_hat(key: rpmrepo.Key, image: Image, tmp_path: Path) -> None:
    raw, planned = test_redhat.disk_of_packages(key, image, tmp_path, 900)
    small = tmp_path / "small.qcow2"
    done = shrink.shrink(raw, small, headroom=20, accelerator="tcg", boot_seconds=None)
    assert done.found.family == "redhat"
    assert done.after < 300 << 20
    test_redhat.boots(small, "qcow2", planned)
