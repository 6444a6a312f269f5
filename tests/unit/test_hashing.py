from __future__ import annotations

from pathlib import Path

import pytest

from vdibuild import hashing


def test_a_tree_is_its_names_modes_links_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    digests = [hashing.of_tree(tmp_path)]
    (tmp_path / "a").write_text("2")
    digests.append(hashing.of_tree(tmp_path))
    (tmp_path / "a").chmod(0o755)
    digests.append(hashing.of_tree(tmp_path))
    (tmp_path / "link").symlink_to("a")
    digests.append(hashing.of_tree(tmp_path))
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("b")
    digests.append(hashing.of_tree(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    digests.append(hashing.of_tree(tmp_path))
    assert len(set(digests)) == len(digests)


def test_times_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = hashing.of_tree(tmp_path)
    (tmp_path / "a").write_text("1")
    assert hashing.of_tree(tmp_path) == before


def test_a_modules_code_is_that_of_all_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = hashing.of_file

    def recorded(path: Path) -> str:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(hashing, "of_file", recorded)
    before = hashing.of_code("disk.write")
    assert {"write.py", "native.py", "mkfs.py", "appliance.py", "lvm.py", "tree.py"} <= set(seen)
    assert "store.py" not in seen
    assert "golden.py" not in seen
    monkeypatch.setattr(hashing, "of_file", lambda path: "x" if path.name == "mkfs.py" else real(path))
    assert hashing.of_code("disk.write") != before


def test_what_a_site_says_of_its_pools_is_no_input_of_its_images() -> None:
    """A vdibuild that differs there only takes their finished steps over."""
    code = hashing.code("rootfs", "disk.seal", "disk.write", "verify", "bundle", "families.debian")
    assert "settings.images" in code
    assert not {"site", "settings.pools", "settings.machines", "settings.hypervisor"} & set(code)
