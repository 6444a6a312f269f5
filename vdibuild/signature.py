"""Signs files and checks signatures with `ssh-keygen -Y`, in OpenSSH's format (PROTOCOL.sshsig)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vdibuild import process, progress
from vdibuild.errors import CommandError, HostError, StoreError
from vdibuild.settings.keys import Keys

NAMESPACE = "vdibuild"
"""What our signatures are for; one made for another purpose (a git commit, a mail) does not count here."""


def sign(text: str, keys: Keys) -> str:
    """The armored signature of a text; the signing key is made when there is none yet.

    Raises StoreError when the key cannot be used, HostError when it cannot be made.
    """
    key = _signing_key(keys)
    public_key(key)  # says clearly what is wrong with a key, and never asks for a passphrase
    return process.run(
        ["ssh-keygen", "-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE], stdin=text, capture=True
    ).stdout


def verify(file: Path, signature: Path, keys: Keys) -> str:
    """Who signed a file: the name under which keys.allowed_signers, or our own key, knows the signer.

    Raises StoreError when the file is unsigned, was changed since, or was signed by nobody we know.
    """
    try:
        text = file.read_bytes().decode("ascii")
    except FileNotFoundError:
        raise StoreError(f"{file} is missing") from None
    except UnicodeDecodeError:
        raise StoreError(f"{file} is damaged: it is not ASCII text") from None
    if not signature.is_file():
        raise StoreError(f"{file} is not signed: {signature.name} is missing")
    with _allowed_signers(keys) as allowed:
        try:
            found = process.run(
                ["ssh-keygen", "-Y", "find-principals", "-f", allowed, "-s", str(signature)], capture=True
            )
            signer = found.stdout.splitlines()[0]
            check = ["ssh-keygen", "-Y", "verify", "-n", NAMESPACE, "-s", str(signature)]
            process.run([*check, "-f", allowed, "-I", signer], stdin=text)
        except CommandError as error:
            key = _made_by(text, file, signature)
            # find-principals names each line of the allowed signers that it could not use.
            reasons = [line.partition(allowed)[2] for line in error.tail if line.startswith(allowed)]
            what = next((reason for reason in reasons if "expired" in reason), "".join(reasons[:1]))
            raise StoreError(
                f"{file} is signed by {key}, which is not allowed to sign"
                + (f" (allowed signer {what.lstrip(':')})" if what else ""),
                "if you trust it, add `NAME KEYTYPE KEY` to keys.allowed_signers in the site file",
            ) from None
    return signer


def public_key(private: Path) -> str:
    """The public half of a private key: `KEYTYPE KEY`.

    Raises StoreError when the key cannot be read, has a passphrase, or is open to others.
    """
    try:
        # An empty passphrase on the command line keeps ssh-keygen from asking the terminal for one.
        line = process.run(["ssh-keygen", "-y", "-P", "", "-f", str(private)], capture=True).stdout
    except CommandError as error:
        reason = error.tail[-1].removeprefix(f'Load key "{private}": ') if error.tail else str(error)
        hint = "give a key that has no passphrase and mode 0600 in keys.signing of the site file"
        raise StoreError(f"the signing key {private} cannot be used: {reason}", hint) from None
    return " ".join(line.split()[:2])


def _signing_key(keys: Keys) -> Path:
    path = keys.signing.expanduser()
    if path.exists():
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            if not path.exists():
                _make(path, keys.identity)
    except OSError as error:
        raise HostError(
            f"cannot make the signing key {path}: {error.strerror}", "set keys.signing in the site file"
        ) from None
    return path


def _make(path: Path, identity: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new_public = new.with_name(f"{new.name}.pub")
    for leftover in (new, new_public):
        leftover.unlink(missing_ok=True)
    process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", identity, "-f", str(new)])
    new_public.rename(path.with_name(f"{path.name}.pub"))
    new.rename(path)
    progress.warn(f"made the signing key {path}: keep a copy, and give its .pub to those who check images")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _made_by(text: str, file: Path, signature: Path) -> str:
    """The fingerprint of the key that made the signature, whoever that is.

    Raises StoreError when the text or the signature was changed.
    """
    try:
        said = process.run(
            ["ssh-keygen", "-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature)],
            stdin=text,
            capture=True,
        ).stdout
    except CommandError as error:
        reason = error.tail[0] if error.tail else str(error)
        raise StoreError(
            f"the signature of {file} is not valid: {reason}", "it was changed; build it again"
        ) from None
    return said.strip().rpartition(" with ")[2]


@contextlib.contextmanager
def _allowed_signers(keys: Keys) -> Iterator[str]:
    """The path of a file of allowed signers (ssh-keygen(1), ALLOWED SIGNERS) that dies with this process."""
    lines = []
    private = keys.signing.expanduser()
    if private.exists():
        if not re.fullmatch(r"[\w.@+-]+", keys.identity):
            raise StoreError(
                f"keys.identity: {keys.identity!r} is no name for a signer",
                "letters, digits and any of . _ @ + - only",
            )
        lines.append(f'{keys.identity} namespaces="{NAMESPACE}" {public_key(private)}')
    for line in keys.allowed_signers:
        if len(line.split()) < 3 or "\n" in line:
            raise StoreError(
                f"keys.allowed_signers: {line!r} is not of the form NAME KEYTYPE KEY",
                "see ALLOWED SIGNERS in ssh-keygen(1)",
            )
        lines.append(line)
    if not lines:
        raise StoreError(
            "no signature can be checked: no allowed signers and no own key",
            "add the signer's `NAME KEYTYPE KEY` to keys.allowed_signers in the site file",
        )
    with os.fdopen(os.memfd_create("allowed_signers"), "w+") as memory:
        memory.write("".join(f"{line}\n" for line in lines))
        memory.flush()
        yield f"/proc/{os.getpid()}/fd/{memory.fileno()}"
