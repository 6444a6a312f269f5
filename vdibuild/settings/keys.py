"""Who signs images, and whose signatures count."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vdibuild.settings.values import Settings


class Keys(Settings):
    """Who signs images, and whose signatures count."""

    signing: Path = Path("~/.config/vdibuild/signing_key")
    """The private key that signs versions; made on first use."""
    identity: str = "vdibuild"
    """The name under which this key signs."""
    allowed_signers: list[str] = Field(default_factory=list)
    """Further keys that count, in ssh-keygen's allowed_signers form: NAME KEYTYPE KEY."""
