"""Fedora and EL: what their packages, configuration files and boot differ in from other distributions."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from vdibuild import process, progress
from vdibuild.disk import bootloader
from vdibuild.disk.layout import Layout, fstab, kernel_root, lvm_arguments
from vdibuild.errors import CommandError, InputError, VdibuildError
from vdibuild.families import (
    BootFiles,
    Distribution,
    InstalledPackage,
    Kernel,
    Medium,
    RepositoryState,
    dnf,
    systemd,
    version_order,
)
from vdibuild.recipe import NetworkInterface, Recipe
from vdibuild.settings.images import System
from vdibuild.tree import Files, Tree, host_command

_ENTRIES = "/boot/loader/entries"
"""Where the boot menu is: https://uapi-group.org/specifications/specs/boot_loader_specification/"""

_ENTRY_TOKEN = "f" * 32
"""Takes the machine id's place in the entries' names: each copy of an image gets an id of its own."""

_GRUB = "/boot/grub2"

# As lorax lays out a live ISO, and livecd-tools where it uses GRUB (lorax: share/templates.d/99-generic/live,
# x86.tmpl and efi.tmpl; livecd-tools: imgcreate/live.py).
_MEDIUM = Medium(
    kernel="/images/pxeboot/vmlinuz",
    initramfs="/images/pxeboot/initrd.img",
    menu=_GRUB,
    bios="/images/eltorito.img",
    esp="/images/efiboot.img",
    programs=True,
)

_SELINUX = "/etc/selinux/config"

_SCRIPTS = "/etc/sysconfig/network-scripts"

# xkb's names of layouts whose console keymap is called otherwise.
_XKB_LAYOUT = {"uk": "gb", "jp106": "jp", "sv-latin1": "se", "dk-latin1": "dk", "pt-latin1": "pt"}


class RedHat:
    """See families.Family."""

    name = "redhat"

    def mirrors(self, image: System) -> dict[str, str]:
        """See families.Family; the roles are in dnf.mirrors. Asking for one that there is not raises
        HostError.
        """
        return dnf.mirrors(image)

    def repository_states(self, recipe: Recipe, image: System) -> list[RepositoryState]:
        """See families.Family."""
        return dnf.states(recipe, image)

    def bootstrap(self, recipe: Recipe, image: System, root: Path, downloads: Path) -> None:
        """See families.Family. The initramfs is made by `prepare_boot`."""
        dnf.bootstrap(recipe, image, root, downloads)

    def configure(self, tree: Tree, recipe: Recipe, image: System) -> None:
        """See families.Family."""
        _set_language(tree, recipe)
        _set_keyboard(tree, recipe)
        systemd.set_timezone(tree, recipe)
        systemd.set_hostname(tree, recipe)
        systemd.create_accounts(tree, recipe, image.authorized_keys)
        _set_network(tree, recipe)
        _set_selinux(tree, recipe)

    def prepare_boot(self, tree: Tree, recipe: Recipe, layout: Layout, site_directory: Path) -> None:
        """See families.Family."""
        if layout.logical and not tree.exists("/usr/sbin/lvm"):
            message = "the layout has logical volumes, the system no lvm2"
            raise InputError(recipe.source, None, message, "add it to %packages")
        tree.write("/etc/fstab", fstab(layout))
        for _, file_system in layout.mounts:
            tree.make_directory(file_system.mountpoint)
        _copy_kernels(tree)
        kernels = self.kernels(tree)
        _make_initramfs(tree, recipe, kernels)
        kernels = self.kernels(tree)
        arguments = _arguments(recipe, layout)
        whole = f"root={kernel_root(layout)} ro{''.join(f' {word}' for word in arguments)}"
        # kernel-install(8) and grub2-mkconfig make the entries of later kernels from these.
        tree.write("/etc/kernel/cmdline", f"{whole}\n")
        if not recipe.bootloader.install:
            return
        timeout = recipe.bootloader.timeout
        tree.write("/etc/default/grub", _grub_defaults(" ".join(arguments), timeout))
        title = systemd.os_release(tree).get("PRETTY_NAME", "Linux")
        for name in tree.glob(f"{_ENTRIES}/*.conf"):
            tree.remove(name)
        for kernel in kernels:
            entry = bls_entry(layout, kernel, whole, title)
            tree.write(f"{_ENTRIES}/{_ENTRY_TOKEN}-{kernel.version}.conf", entry)
        if _reads_entries(tree, layout):
            tree.write(f"{_GRUB}/grub.cfg", grub_menu(layout, timeout), mode=0o600)
        else:
            menu = bootloader.menu(layout, kernels, " ".join(arguments), title, timeout, site_directory)
            tree.write(f"{_GRUB}/grub.cfg", menu, mode=0o600)

    def reconnect(self, files: Files, interface: NetworkInterface, mac: str) -> None:
        """See Family. EL 7 and 8 are served by ifcfg files, whoever reads them there; later ones may be."""
        there = [path for path in files.glob(f"{_SCRIPTS}/ifcfg-*") if path != f"{_SCRIPTS}/ifcfg-lo"]
        if there or files.exists(f"{_SCRIPTS}/ifup"):
            for path in there:
                files.remove(path)
            files.write(f"{_SCRIPTS}/ifcfg-wired", ifcfg(interface, mac))
        elif systemd.has_unit(files, "NetworkManager.service"):
            systemd.reconnect_networkmanager(files, interface)
        elif systemd.has_unit(files, "systemd-networkd.service"):
            systemd.reconnect_networkd(files, interface)
        else:
            raise VdibuildError(
                "nothing in the system configures networks", "add NetworkManager or systemd-networkd to it"
            )

    def boot_files(self, tree: Tree) -> BootFiles:
        """See families.Family. The signed programs are in the tree's /boot/efi, or in /usr/lib/efi."""
        bios, efi = "/usr/lib/grub/i386-pc", "/usr/lib/grub/x86_64-efi"
        signed: dict[str, str] = {}
        for pattern in ("/boot/efi/EFI/*/*", "/usr/lib/efi/*/*/EFI/*/*"):
            for path in tree.glob(pattern):
                if PurePosixPath(path).suffix.lower() in (".efi", ".csv"):
                    signed["/".join(PurePosixPath(path).parts[-3:])] = path
        # shim started as EFI/BOOT/BOOTX64.EFI looks beside itself for GRUB.
        own = next((place for place in signed if place.endswith("/grubx64.efi")), None)
        if own and "EFI/BOOT/BOOTX64.EFI" in signed:
            signed.setdefault("EFI/BOOT/grubx64.efi", signed[own])
        else:
            signed = {}
        live: dict[str, str] = {}
        removable = next((place for place in signed if place.endswith("/gcdx64.efi")), None)
        if removable:
            live = {place: path for place, path in signed.items() if place.startswith("EFI/BOOT/")}
            live["EFI/BOOT/grubx64.efi"] = signed[removable]
        return BootFiles(
            grub_directory=_GRUB,
            bios_modules=bios if tree.path(bios).is_dir() else "",
            efi_modules=efi if tree.path(efi).is_dir() else "",
            signed=signed,
            live=live,
            medium=_MEDIUM,
        )

    def kernels(self, tree: Tree) -> list[Kernel]:
        """See families.Family. A kernel that is not in /boot yet is named where its package put it."""
        found: dict[str, str] = {}
        for path in tree.glob("/lib/modules/*/vmlinuz"):
            found[PurePosixPath(path).parent.name] = path
        for path in tree.glob("/boot/vmlinuz-*"):
            version = path.removeprefix("/boot/vmlinuz-")
            if not version.startswith("0-rescue"):
                found[version] = path
        if not found:
            raise VdibuildError("the system has no kernel", "add `kernel` or `kernel-core` to %packages")
        kernels = []
        for version in sorted(found, key=version_order, reverse=True):
            initramfs = f"/boot/initramfs-{version}.img"
            kernels.append(Kernel(version, found[version], initramfs if tree.exists(initramfs) else ""))
        return kernels

    def installed(self, tree: Tree) -> list[InstalledPackage]:
        """See families.Family. The license is what the package says: SPDX since Fedora 40 and EL 10."""
        epoch = "%|EPOCH?{%{EPOCH}:}:{}|"
        tags = ("%{NAME}", f"{epoch}%{{VERSION}}-%{{RELEASE}}", "%{ARCH}", "%{SOURCERPM}", "%{LICENSE}")
        return [
            InstalledPackage(name, version, architecture, _source_name(source), license_)
            for name, version, architecture, source, license_ in dnf.query(tree, *tags)
        ]

    def distribution(self, tree: Tree) -> Distribution:
        """See families.Family."""
        said = systemd.os_release(tree)
        name = said.get("ID", "fedora")
        return Distribution("rpm", name, f"{name}-{said.get('VERSION_ID', '')}")

    def seal(self, tree: Tree) -> None:
        """See families.Family. Sets SELinux labels, so that nothing may change the tree's files after it."""
        for pattern in _SEALED:
            for path in tree.glob(pattern):
                tree.remove(path)
        _relabel(tree)


_SEALED = (
    "/etc/insights-client/*machine-id",
    "/root/.rpmdb",
    "/usr/lib/sysimage/rpm/.rpm.lock",
    "/usr/lib/sysimage/rpm/__db.*",
    "/var/cache/dnf",
    "/var/cache/libdnf5",
    "/var/cache/yum",
    "/var/lib/authselect/backups/*",
    # dnf's own record of what was asked for, with the time and the host; without it all counts as asked for.
    "/usr/lib/sysimage/libdnf5/transaction_history.sqlite*",
    "/var/lib/dnf/history.sqlite*",
    "/var/lib/dnf/*.pid",
    "/var/lib/rpm/.rpm.lock",
    "/var/lib/rpm/__db.*",
    "/var/log/anaconda",
    "/var/log/dnf*",
    "/var/log/hawkey.log*",
    "/var/log/rhsm",
    "/var/log/yum.log*",
)

family = RedHat()


def _source_name(source: str) -> str:
    """The name in a source package's file name: NAME-VERSION-RELEASE.src.rpm."""
    return source.rsplit("-", 2)[0] if source.endswith(".rpm") else ""


def _set_language(tree: Tree, recipe: Recipe) -> None:
    """Write /etc/locale.conf (locale.conf(5)). Raises InputError when the tree lacks the language."""
    language = recipe.language or "C.UTF-8"
    name, _, charset = language.partition(".")
    directory = f"/usr/lib/locale/{name}.{charset.replace('-', '').lower()}" if charset else ""
    there = name in ("C", "POSIX") or tree.exists("/usr/lib/locale/locale-archive")
    if not there and not (directory and tree.exists(directory)):
        raise InputError(
            recipe.source,
            systemd.line_of(recipe, "lang"),
            f"no language {language!r} in the system",
            f"add glibc-langpack-{name.partition('_')[0]} to %packages, or use `lang C.UTF-8`",
        )
    tree.write("/etc/locale.conf", f"LANG={language}\n")


def _set_keyboard(tree: Tree, recipe: Recipe) -> None:
    """Write /etc/vconsole.conf (vconsole.conf(5)), and X11's layout as localectl does."""
    if not recipe.keyboard:
        return
    # Anaconda's `--xlayouts='de (nodeadkeys)'`, and console keymaps such as de-nodeadkeys.
    match = re.fullmatch(r"([\w-]+)(?:\s*\((\w+)\))?", recipe.keyboard)
    layout, variant = (match[1], match[2] or "") if match else (recipe.keyboard, "")
    keymap = f"{layout}-{variant}" if variant else layout
    keymaps = "/usr/lib/kbd/keymaps"
    if tree.path(keymaps).is_dir() and not tree.glob(f"{keymaps}/**/{keymap}.map*"):
        line = systemd.line_of(recipe, "keyboard")
        hint = f"{keymaps} in the system has the names"
        raise InputError(recipe.source, line, f"no keyboard layout {recipe.keyboard!r} in the system", hint)
    layout = _XKB_LAYOUT.get(layout, layout)
    if not variant and "-" in layout:
        layout, _, variant = layout.partition("-")
    tree.write("/etc/vconsole.conf", f'KEYMAP="{keymap}"\nXKBLAYOUT="{layout}"\nXKBVARIANT="{variant}"\n')
    options = [f'        Option "XkbLayout" "{layout}"']
    if variant:
        options.append(f'        Option "XkbVariant" "{variant}"')
    lines = [
        'Section "InputClass"',
        '        Identifier "system-keyboard"',
        '        MatchIsKeyboard "on"',
        *options,
        "EndSection",
    ]
    tree.write("/etc/X11/xorg.conf.d/00-keyboard.conf", "\n".join(lines) + "\n")


def _set_network(tree: Tree, recipe: Recipe) -> None:
    if systemd.has_unit(tree, "NetworkManager.service"):
        systemd.write_networkmanager(tree, recipe)
    elif systemd.has_unit(tree, "systemd-networkd.service"):
        systemd.write_networkd(tree, recipe)
    elif recipe.interfaces:
        line = recipe.interfaces[0].line
        hint = "add NetworkManager or systemd-networkd to %packages"
        raise InputError(recipe.source, line, "nothing in the system configures networks", hint)


def ifcfg(interface: NetworkInterface, mac: str) -> str:
    """The text of an ifcfg file for the interface with that address.

    initscripts' own network service knows an interface by name or by HWADDR only, NetworkManager by any
    (initscripts: doc/sysconfig.txt; nm-settings-ifcfg-rh(5)).
    """
    lines = ["TYPE=Ethernet", "NAME=wired", f"HWADDR={mac.upper()}", "ONBOOT=yes"]
    if interface.address is None:
        lines.append("BOOTPROTO=dhcp")
    else:
        lines += ["BOOTPROTO=none", f"IPADDR={interface.address}", f"PREFIX={interface.prefix}"]
        lines += [f"GATEWAY={interface.gateway}"] if interface.gateway else []
    lines += [f"DNS{number}={server}" for number, server in enumerate(interface.nameservers, 1)]
    lines.append(f"IPV6INIT={'yes' if interface.ipv6 else 'no'}")
    lines += [f"MTU={interface.mtu}"] if interface.mtu is not None else []
    return "\n".join(lines) + "\n"


def _set_selinux(tree: Tree, recipe: Recipe) -> None:
    """Write the mode that the recipe asks for; without one the policy's own stays."""
    if not recipe.selinux:
        return
    if not tree.exists(_SELINUX):
        if recipe.selinux == "disabled":
            return
        raise InputError(
            recipe.source,
            systemd.line_of(recipe, "selinux"),
            f"the system has no SELinux policy to be {recipe.selinux}",
            "add selinux-policy-targeted to %packages",
        )
    text = re.sub(r"^SELINUX=.*\n?", "", tree.read(_SELINUX), flags=re.MULTILINE)
    tree.write(_SELINUX, f"{text.rstrip()}\nSELINUX={recipe.selinux}\n".lstrip())


def _arguments(recipe: Recipe, layout: Layout) -> list[str]:
    """The kernel's arguments after `root=… ro`."""
    # Since Fedora 34 the configuration file alone does not turn SELinux off.
    selinux = ["selinux=0"] if recipe.selinux == "disabled" else []
    append = recipe.bootloader.append
    return [*lvm_arguments(layout), *([append] if append else []), *selinux]


def _copy_kernels(tree: Tree) -> None:
    """Put the kernels into /boot as kernel-install(8) does, where their packages' scriptlets did not."""
    for path in tree.glob("/lib/modules/*/vmlinuz"):
        target = f"/boot/vmlinuz-{PurePosixPath(path).parent.name}"
        if not tree.exists(target):
            tree.make_directory("/boot")
            shutil.copyfile(tree.path(path), tree.path(target, follow=False))
            tree.path(target).chmod(0o755)


def _make_initramfs(tree: Tree, recipe: Recipe, kernels: list[Kernel]) -> None:
    """Make the initramfs with the tree's dracut; without a dracut, one that is there is left as it is."""
    if not tree.exists("/usr/bin/dracut"):
        missing = [kernel.version for kernel in kernels if not kernel.initramfs]
        if missing:
            message = f"the system cannot make an initramfs for its kernel {missing[0]}"
            raise InputError(recipe.source, recipe.packages.line or None, message, "add dracut to %packages")
        return
    with progress.step("initramfs"):
        for kernel in kernels:
            # Not for this host: a copy of the image starts on any machine.
            options = ["--force", "--no-hostonly", "--reproducible", "--kver", kernel.version]
            tree.run(["dracut", *options, f"/boot/initramfs-{kernel.version}.img"])


def bls_entry(layout: Layout, kernel: Kernel, arguments: str, title: str) -> str:
    """The text of a boot loader entry as Fedora's kernel-install writes it.

    arguments: all of the kernel's, with `root=`. title: the system's name.
    """
    lines = [f"title {title} ({kernel.version})", f"version {kernel.version}"]
    lines.append(f"linux {_seen_by_grub(layout, f'/boot/vmlinuz-{kernel.version}')}")
    lines.append(f"initrd {_seen_by_grub(layout, kernel.initramfs)}")
    lines += [f"options {arguments}", "grub_users $grub_users", "grub_arg --unrestricted"]
    return "\n".join([*lines, "grub_class fedora"]) + "\n"


def grub_menu(layout: Layout, timeout: int) -> str:
    """The text of a grub.cfg that shows the boot loader entries; needs the blscfg of Fedora's and EL's GRUB.

    timeout: seconds the menu is shown.
    """
    entries = _seen_by_grub(layout, _ENTRIES)
    return f"""\
# The entries are files in {_ENTRIES}; `grub2-mkconfig -o {_GRUB}/grub.cfg` makes this file anew.
set timeout={timeout}
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${{next_entry}}" ]; then
  set default="${{next_entry}}"
  set next_entry=
  save_env next_entry
else
  set default="${{saved_entry}}"
fi
function load_video {{
  insmod all_video
}}
search --no-floppy --fs-uuid --set=root {layout.boot.uuid}
set blsdir={entries}
insmod blscfg
blscfg
"""


def _grub_defaults(arguments: str, timeout: int) -> str:
    """What grub2-mkconfig in the running system makes grub.cfg from."""
    return (
        "# Read by grub2-mkconfig (info -f grub2 -n 'Simple configuration').\n"
        f"GRUB_TIMEOUT={timeout}\n"
        "GRUB_DISTRIBUTOR=\"$(sed 's, release .*$,,g' /etc/system-release)\"\n"
        "GRUB_DEFAULT=saved\n"
        "GRUB_DISABLE_SUBMENU=true\n"
        "GRUB_TERMINAL_OUTPUT=console\n"
        f"GRUB_CMDLINE_LINUX='{arguments}'\n"
        "GRUB_DISABLE_RECOVERY=true\n"
        "GRUB_ENABLE_BLSCFG=true\n"
        "GRUB_DISABLE_OS_PROBER=true\n"
    )


def _reads_entries(tree: Tree, layout: Layout) -> bool:
    """Whether the tree's GRUB can read boot loader entries: upstream's cannot."""
    boot = family.boot_files(tree)
    if layout.firmware == "uefi" and boot.signed:
        return True
    modules = boot.bios_modules if layout.firmware == "bios" else boot.efi_modules
    return bool(modules) and tree.exists(f"{modules}/blscfg.mod")


def _seen_by_grub(layout: Layout, path: str) -> str:
    """A path of the tree below /boot, from the top of the file system that holds it."""
    return f"/{PurePosixPath(path).relative_to(layout.boot.mountpoint)}"


def _relabel(tree: Tree) -> None:
    """Set the files' SELinux labels with the tree's own policy, now or, where that cannot be, at first boot.

    Nothing is done for a system without SELinux. An ordinary user may not write labels.
    """
    if not tree.exists(_SELINUX):
        return
    settings = dict(re.findall(r"^(SELINUX(?:TYPE)?)=(\S+)", tree.read(_SELINUX), re.MULTILINE))
    contexts = f"/etc/selinux/{settings.get('SELINUXTYPE', 'targeted')}/contexts/files/file_contexts"
    if settings.get("SELINUX") == "disabled" or not tree.exists(contexts):
        return
    tree.remove("/.autorelabel")
    if os.geteuid() == 0 and tree.exists("/usr/sbin/setfiles"):
        # The bare tree: what Tree.run mounts for programs would hide directories from it.
        sandbox = ["bwrap", "--bind", str(tree.root), "/", "--unshare-net", "--unshare-ipc", "--unshare-pid"]
        sandbox += ["--die-with-parent", "--cap-add", "ALL", "--chdir", "/"]
        with progress.step("SELinux labels"):
            try:
                # -m: do not leave out what lies on file systems that this host does not mount with labels.
                process.run(host_command([*sandbox, "--", "/usr/sbin/setfiles", "-m", "-F", contexts, "/"]))
            except CommandError as error:
                progress.warn(
                    f"SELinux labels cannot be set here ({error.message}): the first boot sets them"
                )
            else:
                return
    tree.write("/.autorelabel", "-F\n")
