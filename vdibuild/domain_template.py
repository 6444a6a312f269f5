"""Renders libvirt's description of a machine from a template, with what all machines of a host have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vdibuild import config_template, machine, processor


def render(
    template: str,
    site_directory: Path,
    *,
    accelerator: Literal["kvm", "tcg"],
    firmware: Literal["bios", "uefi"],
    **values: object,
) -> str:
    """The domain as libvirt's XML.

    template: its name; site_directory: where templates/ is looked for first. accelerator: see
    host.accelerator. values: the template's own. Raises HostError when UEFI firmware is wanted and missing.
    """
    return config_template.render(
        template,
        site_directory,
        accelerator="kvm" if accelerator == "kvm" else "qemu",
        cpu_mode="host-passthrough" if accelerator == "kvm" else "maximum",
        cpu_without=() if accelerator == "kvm" else processor.WITHOUT.values(),
        firmware=machine.uefi_firmware() if firmware == "uefi" else None,
        **values,
    )
