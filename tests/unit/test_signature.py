"""Signatures, made and checked by the real ssh-keygen."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vdibuild import signature
from vdibuild.errors import HostError, StoreError
from vdibuild.settings.keys import Keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(signing=tmp_path / "config/key", identity="builder@example.org")


def signed(tmp_path: Path, keys: Keys, text: str = "content\n") -> tuple[Path, Path]:
    file, mark = tmp_path / "SUMS", tmp_path / "SUMS.sig"
    file.write_text(text)
    mark.write_text(signature.sign(text, keys))
    return file, mark


def line(keys: Keys, name: str, options: str = "") -> str:
    return f"{name} {options} {signature.public_key(keys.signing)}"


def elsewhere(tmp_path: Path, *allowed: str) -> Keys:
    """The keys of a host that has no signing key of its own."""
    return Keys(signing=tmp_path / "none", allowed_signers=list(allowed))


def test_key_is_made_once_and_private(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    assert signature.verify(file, mark, keys) == "builder@example.org"
    assert keys.signing.stat().st_mode & 0o777 == 0o600
    assert keys.signing.parent.stat().st_mode & 0o777 == 0o700
    before = keys.signing.read_bytes()
    signed(tmp_path, keys)
    assert keys.signing.read_bytes() == before
    assert sorted(path.name for path in keys.signing.parent.iterdir()) == ["key", "key.pub"]


def test_key_made_by_several_at_once_is_one_key(tmp_path: Path, keys: Keys) -> None:
    with ThreadPoolExecutor(4) as pool:
        marks = list(pool.map(lambda number: signature.sign(f"{number}\n", keys), range(4)))
    for number, text in enumerate(marks):
        (tmp_path / "file").write_text(f"{number}\n")
        (tmp_path / "mark").write_text(text)
        signature.verify(tmp_path / "file", tmp_path / "mark", keys)


def test_what_a_killed_run_left_does_not_hinder(tmp_path: Path, keys: Keys) -> None:
    keys.signing.parent.mkdir()
    for name in ("key.new", "key.new.pub"):
        (keys.signing.parent / name).write_text("half")
    signed(tmp_path, keys)
    assert sorted(path.name for path in keys.signing.parent.iterdir()) == ["key", "key.pub"]


def test_ssh_keygen_itself_agrees(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    allowed = tmp_path / "allowed"
    allowed.write_text(line(keys, "me"))
    argv = ["ssh-keygen", "-Y", "verify", "-f", str(allowed), "-I", "me", "-n", "vdibuild", "-s", str(mark)]
    subprocess.run(argv, input=file.read_bytes(), check=True)


def test_allowed_signer_of_the_site(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    assert signature.verify(file, mark, elsewhere(tmp_path, line(keys, "ci@example.org"))) == "ci@example.org"


def test_changed_file(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    file.write_text("other content\n")
    with pytest.raises(StoreError, match="not valid: Signature verification failed"):
        signature.verify(file, mark, keys)


def test_unsigned_file(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    mark.unlink()
    with pytest.raises(StoreError, match="is not signed"):
        signature.verify(file, mark, keys)


@pytest.mark.parametrize("content", ["", "junk\n", "-----BEGIN SSH SIGNATURE-----\nAAAA\n"])
def test_damaged_signature(tmp_path: Path, keys: Keys, content: str) -> None:
    file, mark = signed(tmp_path, keys)
    mark.write_text(content)
    with pytest.raises(StoreError, match="is not valid"):
        signature.verify(file, mark, keys)


def test_file_that_is_no_text(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="not ASCII"):
        signature.verify(file, mark, keys)


def test_unknown_signer(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    other = Keys(signing=tmp_path / "other/key")
    signature.sign("", other)
    with pytest.raises(StoreError, match=r"key SHA256:.* not allowed to sign") as caught:
        signature.verify(file, mark, other)
    assert "keys.allowed_signers" in caught.value.hint


def test_expired_signer(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    expired = line(keys, "ci", 'valid-before="20200101"')
    with pytest.raises(StoreError, match="expired"):
        signature.verify(file, mark, elsewhere(tmp_path, expired))


def test_signer_for_another_purpose(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    with pytest.raises(StoreError, match="not permitted for use in signature namespace"):
        signature.verify(file, mark, elsewhere(tmp_path, line(keys, "ci", 'namespaces="git"')))


def test_signature_for_another_purpose(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    mark.unlink()
    subprocess.run(["ssh-keygen", "-Y", "sign", "-q", "-f", keys.signing, "-n", "git", file], check=True)
    with pytest.raises(StoreError, match="is not valid"):
        signature.verify(file, mark, keys)


def test_nobody_is_allowed(tmp_path: Path, keys: Keys) -> None:
    file, mark = signed(tmp_path, keys)
    with pytest.raises(StoreError, match="no allowed signers and no own key"):
        signature.verify(file, mark, elsewhere(tmp_path))


@pytest.mark.parametrize("bad", ["", "name only", "a ssh-ed25519 AAAA\n* ssh-ed25519 AAAA"])
def test_malformed_allowed_signer(tmp_path: Path, keys: Keys, bad: str) -> None:
    file, mark = signed(tmp_path, keys)
    with pytest.raises(StoreError, match=r"keys\.allowed_signers"):
        signature.verify(file, mark, elsewhere(tmp_path, bad))


def test_identity_that_would_be_a_pattern(tmp_path: Path) -> None:
    keys = Keys(signing=tmp_path / "key", identity="* cert-authority")
    file, mark = signed(tmp_path, keys)
    with pytest.raises(StoreError, match=r"keys\.identity"):
        signature.verify(file, mark, keys)


def test_key_with_passphrase_is_refused_without_asking(keys: Keys) -> None:
    keys.signing.parent.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", keys.signing], check=True)
    with pytest.raises(StoreError, match="incorrect passphrase"):
        signature.sign("", keys)


def test_key_open_to_others_is_refused(keys: Keys) -> None:
    signature.sign("", keys)
    keys.signing.chmod(0o644)
    with pytest.raises(StoreError, match="bad permissions"):
        signature.sign("", keys)


def test_key_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot make the signing key"):
        signature.sign("", Keys(signing=tmp_path / "file/key"))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    signature.sign("", Keys())
    assert (tmp_path / ".config/vdibuild/signing_key").is_file()
