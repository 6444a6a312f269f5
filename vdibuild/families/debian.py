"""Debian and Ubuntu: what their packages, configuration files and boot differ in from other distributions."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path

from vdibuild import overlay, progress, resources
from vdibuild.disk import bootloader
from vdibuild.disk.layout import Layout, fstab
from vdibuild.errors import InputError, VdibuildError
from vdibuild.families import (
    BootFiles,
    Distribution,
    InstalledPackage,
    Kernel,
    RepositoryState,
    apt,
    mmdebstrap,
    systemd,
    version_order,
)
from vdibuild.recipe import NetworkInterface, Recipe
from vdibuild.settings.images import System
from vdibuild.tree import Files, Tree

_INITRAMFS_STATE = "/var/lib/initramfs-tools/vdibuild-inputs"
"""What the initramfs was made from. It stays: who installs the system elsewhere need not make it again."""

# What mkinitramfs and the hooks of Debian's packages read (mkinitramfs(8), /usr/share/initramfs-tools/hooks).
_INITRAMFS_INPUTS = (
    "/etc/initramfs-tools",
    "/etc/modprobe.d",
    "/etc/modules",
    "/etc/modules-load.d",
    "/etc/udev",
    "/etc/lvm",
    "/etc/mdadm",
    "/etc/crypttab",
    "/etc/cryptsetup-initramfs",
    "/etc/iscsi",
    "/etc/multipath",
    "/etc/plymouth",
    "/etc/console-setup",
    "/usr/share/initramfs-tools",
    "/usr/share/plymouth",
    "/usr/local/share/initramfs-tools",
    "/usr/lib/modprobe.d",
    "/usr/lib/udev/rules.d",
    "/usr/lib/firmware",
    "/usr/lib/modules",
    "/var/lib/dpkg/status",
)

# xkb's names of layouts whose console keymap is called otherwise.
_XKB_LAYOUT = {"uk": "gb", "jp106": "jp", "sv": "se", "dk-latin1": "dk", "pt-latin1": "pt"}


class Debian:
    """See families.Family."""

    name = "debian"

    def mirrors(self, image: System) -> dict[str, str]:
        """See families.Family; raises HostError where the host has no mirror for the release."""
        return apt.mirrors(image)

    def repository_states(self, recipe: Recipe, image: System) -> list[RepositoryState]:
        """See families.Family."""
        return apt.states(recipe, image)

    def bootstrap(self, recipe: Recipe, image: System, root: Path, downloads: Path) -> None:
        """See families.Family. Makes the initramfs too, as far as the packages decide what is in it."""
        mmdebstrap.bootstrap(recipe, image, root, downloads)
        tree = Tree(root)
        # dracut's is made when it is known what it is for.
        if not tree.glob("/boot/vmlinuz-*") or tree.exists("/usr/bin/dracut"):
            return
        if tree.path("/etc/initramfs-tools").is_dir():
            # No copy of an image goes on where another was suspended; `auto` looks at this host's swap.
            tree.write("/etc/initramfs-tools/conf.d/resume", "RESUME=none\n")
        _make_initramfs(tree, [kernel.version for kernel in self.kernels(tree)])
        tree.write(_INITRAMFS_STATE, _initramfs_inputs(tree))

    def configure(self, tree: Tree, recipe: Recipe, image: System) -> None:
        """See families.Family."""
        _set_language(tree, recipe)
        _set_keyboard(tree, recipe)
        systemd.set_timezone(tree, recipe)
        if recipe.timezone and tree.exists("/etc/timezone"):
            tree.write("/etc/timezone", f"{recipe.timezone}\n")
        systemd.set_hostname(tree, recipe)
        systemd.create_accounts(tree, recipe, image.authorized_keys)
        _set_network(tree, recipe)
        _set_selinux(tree, recipe)

    def prepare_boot(self, tree: Tree, recipe: Recipe, layout: Layout, site_directory: Path) -> None:
        """See families.Family."""
        if layout.logical and not tree.exists("/usr/sbin/lvm"):
            raise InputError(
                recipe.source,
                None,
                "the layout has logical volumes, the system no lvm2",
                "add it to %packages",
            )
        tree.write("/etc/fstab", fstab(layout))
        for _, file_system in layout.mounts:
            tree.make_directory(file_system.mountpoint)
        kernels = self.kernels(tree)
        self._renew_initramfs(tree, kernels)
        if not recipe.bootloader.install:
            return
        arguments = " ".join([*recipe.bootloader.append.split(), *_selinux_arguments(recipe)])
        title = systemd.os_release(tree).get("PRETTY_NAME", "Linux")
        _write_grub_defaults(tree, arguments, recipe.bootloader.timeout)
        menu = bootloader.menu(layout, kernels, arguments, title, recipe.bootloader.timeout, site_directory)
        tree.write("/boot/grub/grub.cfg", menu)

    def reconnect(self, files: Files, interface: NetworkInterface, mac: str) -> None:
        """See Family. netplan, Ubuntu's, comes first: it writes the configuration of the others at boot."""
        if files.exists("/usr/sbin/netplan"):
            systemd.reconnect_netplan(files, interface)
        elif systemd.has_unit(files, "NetworkManager.service"):
            systemd.reconnect_networkmanager(files, interface)
        elif files.exists("/usr/sbin/ifup"):
            text = "\n".join([*_LOOPBACK, "", *_stanza(interface)]) + "\n"
            systemd.reconnect_interfaces(files, interface, text)
        elif systemd.has_unit(files, "systemd-networkd.service"):
            systemd.reconnect_networkd(files, interface)
        else:
            raise VdibuildError(
                "nothing in the system configures networks", "add systemd, network-manager or ifupdown to it"
            )

    def boot_files(self, tree: Tree) -> BootFiles:
        """See families.Family."""
        bios, efi = "/usr/lib/grub/i386-pc", "/usr/lib/grub/x86_64-efi"
        grub = "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
        shim = "/usr/lib/shim/shimx64.efi.signed"
        signed, live = {}, {}
        manager = "/usr/lib/shim/mmx64.efi.signed"
        if tree.exists(grub) and tree.exists(shim):
            # The signed GRUB looks for its configuration in the directory built into it, EFI/debian.
            maker = systemd.os_release(tree).get("ID", "debian")
            signed = {
                "EFI/BOOT/BOOTX64.EFI": shim,
                "EFI/BOOT/grubx64.efi": grub,
                f"EFI/{maker}/shimx64.efi": shim,
                f"EFI/{maker}/grubx64.efi": grub,
            }
            if tree.exists(manager):
                signed |= {"EFI/BOOT/mmx64.efi": manager, f"EFI/{maker}/mmx64.efi": manager}
        removable = "/usr/lib/grub/x86_64-efi-signed/gcdx64.efi.signed"
        if tree.exists(removable) and tree.exists(shim):
            live = {"EFI/BOOT/BOOTX64.EFI": shim, "EFI/BOOT/grubx64.efi": removable}
            if tree.exists(manager):
                live["EFI/BOOT/mmx64.efi"] = manager
        return BootFiles(
            grub_directory="/boot/grub",
            bios_modules=bios if tree.path(bios).is_dir() else "",
            efi_modules=efi if tree.path(efi).is_dir() else "",
            signed=signed,
            live=live,
        )

    def kernels(self, tree: Tree) -> list[Kernel]:
        """See families.Family."""
        versions = [path.removeprefix("/boot/vmlinuz-") for path in tree.glob("/boot/vmlinuz-*")]
        if not versions:
            raise VdibuildError(
                "the system has no kernel",
                "add one to %packages: linux-image-amd64 or linux-image-cloud-amd64",
            )
        versions.sort(key=version_order, reverse=True)
        return [
            Kernel(version, f"/boot/vmlinuz-{version}", f"/boot/initrd.img-{version}") for version in versions
        ]

    def installed(self, tree: Tree) -> list[InstalledPackage]:
        """See families.Family."""
        fields = r"${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"
        listed = tree.run(["dpkg-query", "--show", "--showformat", fields], capture=True).stdout
        rows = [line.split("\t") for line in listed.splitlines()]
        return sorted(
            (InstalledPackage(*row[1:]) for row in rows if row[0].startswith("ii")),
            key=lambda package: (package.name, package.architecture),
        )

    def distribution(self, tree: Tree) -> Distribution:
        """See families.Family."""
        said = systemd.os_release(tree)
        name = said.get("ID", "debian")
        # Debian's testing has no VERSION_ID.
        return Distribution(
            "deb", name, f"{name}-{said.get('VERSION_ID') or said.get('VERSION_CODENAME', '')}"
        )

    def seal(self, tree: Tree) -> None:
        """See families.Family."""
        for pattern in _SEALED:
            for path in tree.glob(pattern):
                tree.remove(path)
        _make_host_keys_at_boot(tree)

    def _renew_initramfs(self, tree: Tree, kernels: list[Kernel]) -> None:
        """Make the initramfs again when something that it is made from has changed since."""
        made_from = tree.read(_INITRAMFS_STATE) if tree.exists(_INITRAMFS_STATE) else ""
        wanted = _initramfs_inputs(tree)
        if made_from == wanted and all(tree.exists(kernel.initramfs) for kernel in kernels):
            return
        progress.note("its configuration has changed: making the initramfs again")
        _make_initramfs(tree, [kernel.version for kernel in kernels])
        tree.write(_INITRAMFS_STATE, wanted)


_SEALED = (
    "/var/cache/apt/*.bin",
    "/var/cache/apt/archives/*",
    "/var/cache/debconf/*-old",
    "/var/lib/apt/lists/*",
    "/var/lib/apt/periodic/*",
    "/var/lib/dpkg/*-old",
    "/var/lib/dpkg/available",
    "/var/lib/ucf/*.[0-9]",
    "/var/log/apt/*",
    "/etc/**/*.dpkg-old",
    "/etc/**/*.dpkg-bak",
    "/etc/**/*.ucf-old",
    "/etc/apt/apt.conf.d/*proxy*",
)

family = Debian()


def _make_initramfs(tree: Tree, versions: list[str]) -> None:
    if not tree.exists("/usr/sbin/update-initramfs"):
        raise VdibuildError(
            "the system cannot make an initramfs", "add initramfs-tools (or dracut) to %packages"
        )
    with progress.step("initramfs"):
        for version in versions:
            tree.run(["update-initramfs", "-c", "-k", version])


def _initramfs_inputs(tree: Tree) -> str:
    """SHA-256 over what an initramfs is made from. Of modules and firmware the names and sizes count."""
    digest = hashlib.sha256()
    for inside in _INITRAMFS_INPUTS:
        top = tree.path(inside)
        entries = [top, *(Path(base) / name for base, _, names in os.walk(top) for name in names)]
        by_size = inside in ("/usr/lib/modules", "/usr/lib/firmware")
        for entry in sorted(entries):
            if entry.is_symlink():
                digest.update(f"{entry.relative_to(tree.root)}>{entry.readlink()}\0".encode())
            elif entry.is_file():
                size = entry.stat().st_size
                digest.update(f"{entry.relative_to(tree.root)}:{size}\0".encode())
                if not by_size:
                    digest.update(entry.read_bytes())
    # The fsck hook puts the programs for / and /usr in, as far as it can tell their types: / it looks up on
    # the disk, which is not there.
    for line in tree.read("/etc/fstab").splitlines() if tree.exists("/etc/fstab") else ():
        fields = line.split()
        if len(fields) > 2 and fields[1] == "/usr":
            digest.update(f"{fields[2]}\0".encode())
    return digest.hexdigest()


def _set_language(tree: Tree, recipe: Recipe) -> None:
    language = recipe.language or "C.UTF-8"
    if language not in ("C", "POSIX", "C.UTF-8"):
        language = _generate_locale(tree, recipe)
    # Since Debian 13 /etc/default/locale is a link to /etc/locale.conf, which systemd reads.
    tree.write("/etc/locale.conf", f"LANG={language}\n")
    tree.link("/etc/default/locale", "../locale.conf")


def _generate_locale(tree: Tree, recipe: Recipe) -> str:
    """Make the recipe's language, and no other. Returns its name."""
    line = systemd.line_of(recipe, "lang")
    if not tree.exists("/usr/share/i18n/SUPPORTED"):
        hint = "add the package locales to %packages, or use `lang C.UTF-8`"
        raise InputError(
            recipe.source, line, f"the system cannot make the language {recipe.language!r}", hint
        )
    supported = [text.split() for text in tree.read("/usr/share/i18n/SUPPORTED").splitlines()]
    name = recipe.language if "." in recipe.language else f"{recipe.language}.UTF-8"
    # SUPPORTED lists some UTF-8 locales without the ending.
    wanted = {name, name.removesuffix(".UTF-8")} if name.endswith(".UTF-8") else {name}
    for entry in supported:
        if len(entry) == 2 and entry[0] in wanted and (entry[1] == "UTF-8" or "." not in name):
            tree.write("/etc/locale.gen", f"{entry[0]} {entry[1]}\n")
            break
    else:
        hint = "write it like en_US.UTF-8; /usr/share/i18n/SUPPORTED lists all"
        raise InputError(recipe.source, line, f"no language {recipe.language!r} in the system", hint)
    with progress.step(f"language {name}"):
        tree.run(["locale-gen"])
    return entry[0]


def _set_keyboard(tree: Tree, recipe: Recipe) -> None:
    if not recipe.keyboard:
        return
    # Anaconda's `--xlayouts='de (nodeadkeys)'` and console keymaps such as de-nodeadkeys.
    match = re.fullmatch(r"([\w-]+)(?:\s*\((\w+)\))?", recipe.keyboard)
    layout, variant = (match[1], match[2] or "") if match else (recipe.keyboard, "")
    layout = _XKB_LAYOUT.get(layout, layout)
    if not variant and "-" in layout:
        layout, _, variant = layout.partition("-")
        variant = "" if variant.startswith("latin") else variant
    symbols = "/usr/share/X11/xkb/symbols"
    if tree.path(symbols).is_dir() and not tree.exists(f"{symbols}/{layout}"):
        line = systemd.line_of(recipe, "keyboard")
        hint = f"{symbols} in the system lists the layouts"
        raise InputError(recipe.source, line, f"no keyboard layout {recipe.keyboard!r} in the system", hint)
    # keyboard(5)
    names = f'XKBMODEL="pc105"\nXKBLAYOUT="{layout}"\nXKBVARIANT="{variant}"\nXKBOPTIONS=""\n'
    tree.write("/etc/default/keyboard", f'{names}\nBACKSPACE="guess"\n')
    if tree.exists("/usr/bin/setupcon"):
        tree.run(["setupcon", "--save-only"])


def _set_network(tree: Tree, recipe: Recipe) -> None:
    if systemd.has_unit(tree, "NetworkManager.service"):
        systemd.write_networkmanager(tree, recipe)
    elif tree.exists("/usr/sbin/ifup"):
        tree.write("/etc/network/interfaces", _interfaces(recipe))
        systemd.write_resolver(tree, recipe)
    elif systemd.has_unit(tree, "systemd-networkd.service"):
        systemd.write_networkd(tree, recipe)
    elif recipe.interfaces:
        line = recipe.interfaces[0].line
        hint = "add systemd, network-manager or ifupdown to %packages"
        raise InputError(recipe.source, line, "nothing in the system configures networks", hint)


_LOOPBACK = ("auto lo", "iface lo inet loopback")


def _interfaces(recipe: Recipe) -> str:
    """The text of /etc/network/interfaces (interfaces(5))."""
    lines = list(_LOOPBACK)
    for interface in recipe.interfaces:
        if ":" in interface.device:
            raise InputError(
                recipe.source,
                interface.line,
                "ifupdown knows interfaces by name, not by address",
                "use --device=NAME, or the package network-manager",
            )
        lines += ["", *_stanza(interface)]
    return "\n".join(lines) + "\n"


def _stanza(interface: NetworkInterface) -> list[str]:
    name = interface.device
    if name == "link":
        # A pattern: the wired interfaces that are there, under the name of one definition.
        lines = ["auto /en*=wired", "iface wired inet "]
    else:
        lines = [f"auto {name}", f"iface {name} inet "]
    if interface.address is None:
        lines[-1] += "dhcp"
    else:
        lines[-1] += "static"
        lines.append(f"    address {interface.address}/{interface.prefix}")
        if interface.gateway:
            lines.append(f"    gateway {interface.gateway}")
    if interface.nameservers:
        lines.append(f"    dns-nameservers {' '.join(interface.nameservers)}")
    if interface.mtu is not None:
        lines.append(f"    mtu {interface.mtu}")
    return lines


def _set_selinux(tree: Tree, recipe: Recipe) -> None:
    if recipe.selinux not in ("enforcing", "permissive"):
        return
    if not tree.exists("/etc/selinux/default/policy") or not tree.exists("/usr/sbin/selinux-activate"):
        raise InputError(
            recipe.source,
            systemd.line_of(recipe, "selinux"),
            f"the system has no SELinux policy to be {recipe.selinux}",
            "add selinux-basics, selinux-policy-default and auditd to %packages",
        )
    tree.write("/etc/selinux/config", f"SELINUX={recipe.selinux}\nSELINUXTYPE=default\nSETLOCALDEFS=0\n")
    # Labels are set at the first boot, which then boots once more.
    tree.write("/.autorelabel", "-F\n")


def _selinux_arguments(recipe: Recipe) -> list[str]:
    return ["security=selinux"] if recipe.selinux in ("enforcing", "permissive") else []


def _write_grub_defaults(tree: Tree, arguments: str, timeout: int) -> None:
    """What update-grub in the running system makes its menu from."""
    tree.write(
        "/etc/default/grub",
        "# Read by update-grub (info -f grub -n 'Simple configuration').\n"
        "GRUB_DEFAULT=0\n"
        f"GRUB_TIMEOUT={timeout}\n"
        'GRUB_DISTRIBUTOR="$(. /etc/os-release && echo "$NAME")"\n'
        'GRUB_CMDLINE_LINUX_DEFAULT=""\n'
        f"GRUB_CMDLINE_LINUX={shlex.quote(arguments)}\n"
        "GRUB_TERMINAL=console\n"
        "GRUB_DISABLE_OS_PROBER=true\n",
    )


def _make_host_keys_at_boot(tree: Tree) -> None:
    """Debian makes SSH host keys when the package is installed, since Debian 13 also at the first boot.

    That takes as long as the RSA key does: units of our own (overlays/ssh-host-keys) make the others first.
    """
    if not systemd.has_unit(tree, "ssh.service"):
        return
    overlay.lay(tree, resources.packaged() / "overlays" / "ssh-host-keys")
    if systemd.has_unit(tree, "sshd-keygen.service"):
        systemd.enable_units(tree, ["sshd-keygen.service"], "mask")
