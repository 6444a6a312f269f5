"""The processor of a guest: the host's own with KVM; emulated, what QEMU knows but the slow parts."""

from __future__ import annotations

from typing import Literal

Accelerator = Literal["kvm", "tcg"]

WITHOUT = {
    "erms": "erms",
    "fsrm": "fsrm",
    "la57": "la57",
    "smap": "smap",
    "svm": "svm",
    "aes": "aes",
    "pclmulqdq": "pclmuldq",
}
"""What an emulated processor does not offer, by QEMU's and by libvirt's name: what TCG does slowly, and
guests do where it is offered. Pages cleared byte by byte by the `rep stosb` that real processors are fast at,
a fifth level of page tables at each miss of the emulated TLB, modules for virtualisation and ciphers.
"""


def qemu(accelerator: Accelerator) -> str:
    """The value of QEMU's option -cpu."""
    without = () if accelerator == "kvm" else WITHOUT
    return ",".join(["max", *(f"{name}=off" for name in without)])


def virt_install(accelerator: Accelerator) -> list[str]:
    """virt-install's options. Its own choice for KVM is the host's processor."""
    if accelerator == "kvm":
        return []
    return ["--cpu", ",".join(["mode=maximum", *(f"disable={name}" for name in WITHOUT.values())])]
