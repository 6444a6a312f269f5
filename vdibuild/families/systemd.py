"""What systemd distributions have in common: users, host name, time zone, network, services, identity.

Functions that change files take a tree and what the recipe says; they run as root of the tree. None of them
reads or writes through a link that leads out of the tree: plain files go through `Tree`, all else is done by
programs of the tree (useradd, chpasswd, systemctl).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from vdibuild.errors import CommandError, InputError
from vdibuild.recipe import NetworkInterface, Password, Recipe
from vdibuild.tree import Files, Tree

_UTC = ("UTC", "Etc/UTC", "GMT", "Etc/GMT", "Zulu", "Etc/Zulu", "Universal", "Etc/Universal")

_MAC = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")


def line_of(recipe: Recipe, command: str, word: str = "") -> int | None:
    """The line of the rendered kickstart on which `command` names `word`; None where there is none.

    For settings whose typed value carries no line of its own.
    """
    for number, text in enumerate(recipe.text.splitlines(), start=1):
        words = re.split(r"[\s=,\"']+", text)
        if words[0] == command and (not word or word in words):
            return number
    return None


def set_hostname(tree: Tree, recipe: Recipe) -> None:
    """Write /etc/hostname and /etc/hosts; without a name in the recipe DHCP gives one, else `localhost`."""
    name_host(tree, recipe.hostname)


def name_host(files: Files, hostname: str) -> None:
    """Give a system its host name; an empty one is given by DHCP, or is `localhost`."""
    names = "localhost"
    own = ""
    if hostname:
        files.write("/etc/hostname", f"{hostname}\n")
        short = hostname.partition(".")[0]
        own = f"127.0.1.1 {' '.join(dict.fromkeys((hostname, short)))}\n"
    else:
        files.remove("/etc/hostname")
    files.write("/etc/hosts", f"127.0.0.1 {names}\n{own}::1 {names} ip6-localhost ip6-loopback\n")


def set_timezone(tree: Tree, recipe: Recipe) -> None:
    """Point /etc/localtime at the recipe's zone, and say in /etc/adjtime whether the clock is in UTC.

    Raises InputError when the tree does not know the zone.
    """
    if not recipe.timezone:
        return
    zone = f"/usr/share/zoneinfo/{recipe.timezone}"
    if recipe.timezone in _UTC and not tree.exists(zone):
        # Without a zone the C library uses UTC; the smallest systems have no table of zones.
        tree.remove("/etc/localtime")
    elif ".." in PurePosixPath(recipe.timezone).parts or not tree.path(zone).is_file():
        hint = (
            "`timedatectl list-timezones` shows the names"
            if tree.exists("/usr/share/zoneinfo/Etc/UTC")
            else "add the package tzdata to %packages"
        )
        line = line_of(recipe, "timezone")
        raise InputError(recipe.source, line, f"no time zone {recipe.timezone!r} in the system", hint)
    else:
        tree.link("/etc/localtime", f"..{zone}")
    if recipe.utc:
        tree.remove("/etc/adjtime")
    else:
        tree.write("/etc/adjtime", "0.0 0 0.0\n0\nLOCAL\n")


def create_accounts(tree: Tree, recipe: Recipe, authorized_keys: Sequence[str] = ()) -> None:
    """Create the recipe's groups and users, set passwords, install SSH keys.

    authorized_keys: further keys for root. Raises InputError naming the line of what the tree's own tools
    refuse (a bad name, an id that is taken, a group or a user that does not exist).
    """
    for group in recipe.groups:
        number = [] if group.gid is None else ["--gid", str(group.gid)]
        _run_for(recipe, group.line, tree, ["groupadd", *number, "--", group.name])
    for user in recipe.users:
        options = ["--create-home", "--comment", user.gecos]
        if user.groups:
            options += ["--groups", ",".join(user.groups)]
        if user.home:
            options += ["--home-dir", user.home]
        if user.uid is not None:
            options += ["--uid", str(user.uid)]
        if user.gid is not None:
            options += ["--gid", str(user.gid)]
        options += ["--shell", user.shell or "/bin/bash"]
        _run_for(recipe, user.line, tree, ["useradd", *options, "--", user.name])
    # useradd keeps a copy of what it changes; chpasswd gets the hashes on its standard input, unseen by ps.
    passwords = [("root", recipe.root_password), *((user.name, user.password) for user in recipe.users)]
    text = "".join(f"{name}:{_shadow(password)}\n" for name, password in passwords)
    tree.run(["chpasswd", "--encrypted"], stdin=text)
    keys: dict[str, list[str]] = {}
    lines: dict[str, int | None] = {}
    for key in authorized_keys:
        keys.setdefault("root", []).append(key)
    for entry in recipe.ssh_keys:
        keys.setdefault(entry.user, []).append(entry.key)
        lines.setdefault(entry.user, entry.line)
    for name, texts in keys.items():
        _install_keys(tree, recipe, name, texts, lines.get(name))


def _shadow(password: Password) -> str:
    """A password in the form of shadow(5)'s second field."""
    return f"!{password.hashed}" if password.locked else password.hashed or "*"


def _install_keys(tree: Tree, recipe: Recipe, name: str, keys: Iterable[str], line: int | None) -> None:
    entries = [entry.split(":") for entry in tree.read("/etc/passwd").splitlines()]
    found = [entry for entry in entries if entry[0] == name and len(entry) == 7]
    if not found:
        raise InputError(
            recipe.source, line, f"an SSH key for {name!r}, who is no user", "create the user with `user`"
        )
    owner = ["--owner", found[0][2], "--group", found[0][3]]
    directory = str(PurePosixPath(found[0][5]) / ".ssh")
    tree.run(["install", "--directory", "--mode", "0700", *owner, "--", directory])
    text = "".join(f"{key.strip()}\n" for key in dict.fromkeys(keys))
    target = f"{directory}/authorized_keys"
    tree.run(["install", "--mode", "0600", *owner, "--", "/dev/stdin", target], stdin=text)


def _run_for(recipe: Recipe, line: int | None, tree: Tree, argv: Sequence[str]) -> None:
    """Run a program of the tree on behalf of a line of the recipe, which is to blame when it refuses."""
    try:
        tree.run(argv)
    except CommandError as error:
        said = error.tail[-1] if error.tail else error.message
        raise InputError(recipe.source, line, said) from error


def switch_services(tree: Tree, recipe: Recipe) -> None:
    """Enable and disable the recipe's services, as `systemctl` does.

    To be called when the overlays are in place: they may bring units. Raises InputError naming the line for
    a unit that the tree does not have.
    """
    for verb, names in (("enable", recipe.services_enabled), ("disable", recipe.services_disabled)):
        for name in names:
            try:
                enable_units(tree, [name], verb)
            except CommandError as error:
                said = error.tail[-1] if error.tail else error.message
                line = line_of(recipe, "services", name)
                hint = "add the package that has it to %packages, or the unit to an overlay"
                raise InputError(recipe.source, line, f"cannot {verb} {name}: {said}", hint) from error


def enable_units(tree: Tree, names: Sequence[str], verb: str = "enable") -> None:
    """Enable units (verb: or `disable`, `mask`) in the tree. Raises CommandError for one it does not have."""
    tree.run(["systemctl", "--root=/", verb, "--", *names])


def has_unit(files: Files, name: str) -> bool:
    """Whether the system has a unit of that name (`sshd.service`)."""
    places = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
    return any(files.exists(f"{place}/{name}") for place in places)


def networkd_file(interface: NetworkInterface) -> tuple[str, str]:
    """The name and text of the systemd.network(5) file for an interface."""
    lines = ["[Match]"]
    if interface.device == "link":
        # Kind=! leaves out bridges, bonds and tunnels, which are of type ether too.
        lines += ["Type=ether", "Kind=!*"]
    elif _MAC.fullmatch(interface.device):
        lines.append(f"MACAddress={interface.device}")
    else:
        lines.append(f"Name={interface.device}")
    if interface.mtu is not None:
        lines += ["", "[Link]", f"MTUBytes={interface.mtu}"]
    lines += ["", "[Network]"]
    if interface.address is None:
        lines.append("DHCP=yes" if interface.ipv6 else "DHCP=ipv4")
    else:
        lines.append(f"Address={interface.address}/{interface.prefix}")
        if interface.gateway:
            lines.append(f"Gateway={interface.gateway}")
    lines += [f"DNS={server}" for server in interface.nameservers]
    if not interface.ipv6:
        lines += ["LinkLocalAddressing=ipv4", "IPv6AcceptRA=no"]
    return f"20-{_file_name(interface)}.network", "\n".join(lines) + "\n"


def write_networkd(tree: Tree, recipe: Recipe) -> None:
    """Configure the recipe's interfaces for systemd-networkd, and enable it (with systemd-resolved)."""
    for interface in recipe.interfaces:
        name, text = networkd_file(interface)
        tree.write(f"/etc/systemd/network/{name}", text)
    if recipe.interfaces:
        enable_units(tree, ["systemd-networkd.service"])
    if has_unit(tree, "systemd-resolved.service"):
        enable_units(tree, ["systemd-resolved.service"])
        tree.link("/etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    else:
        write_resolver(tree, recipe)


def write_resolver(tree: Tree, recipe: Recipe) -> None:
    """Write /etc/resolv.conf with the recipe's name servers; without any, leave it to others."""
    tree.remove("/etc/resolv.conf")
    _name_servers(tree, recipe.interfaces)


def _name_servers(files: Files, interfaces: Iterable[NetworkInterface]) -> None:
    servers = dict.fromkeys(server for entry in interfaces for server in entry.nameservers)
    if servers:
        files.write("/etc/resolv.conf", "".join(f"nameserver {server}\n" for server in servers))


def reconnect_networkd(files: Files, interface: NetworkInterface) -> None:
    """Configure the one interface of a system that systemd-networkd serves already."""
    name, text = networkd_file(interface)
    files.write(f"/etc/systemd/network/{name}", text)
    if not has_unit(files, "systemd-resolved.service"):
        _name_servers(files, [interface])


def reconnect_networkmanager(files: Files, interface: NetworkInterface) -> None:
    """Configure the one interface of a system that NetworkManager serves already."""
    name, text = keyfile(interface)
    files.write(f"/etc/NetworkManager/system-connections/{name}", text, mode=0o600)


def reconnect_interfaces(files: Files, interface: NetworkInterface, text: str) -> None:
    """Configure the one interface of a system that ifupdown serves already. text: interfaces(5)."""
    files.write("/etc/network/interfaces", text)
    _name_servers(files, [interface])


def reconnect_netplan(files: Files, interface: NetworkInterface) -> None:
    """Configure the one interface of a system that netplan serves already, and no other."""
    manager = has_unit(files, "NetworkManager.service")
    for path in files.glob("/etc/netplan/*.yaml"):
        files.remove(path)
    if manager:
        # One that the image came with would be as good as netplan's own.
        files.remove(f"/etc/NetworkManager/system-connections/{keyfile(interface)[0]}")
    text = netplan(interface, "NetworkManager" if manager else "networkd")
    files.write(f"/etc/netplan/20-{_file_name(interface)}.yaml", text, mode=0o600)


def netplan(interface: NetworkInterface, renderer: str) -> str:
    """The text of netplan's file for any wired interface (netplan(5), the YAML reference).

    renderer: networkd or NetworkManager.
    """
    settings: dict[str, Any] = {"match": {"name": "e*"}}
    if interface.address is None:
        settings["dhcp4"] = True
    else:
        settings["addresses"] = [f"{interface.address}/{interface.prefix}"]
        if interface.gateway:
            # `to: default` is younger than Ubuntu 20.04.
            settings["routes"] = [{"to": "0.0.0.0/0", "via": interface.gateway}]
    if interface.nameservers:
        settings["nameservers"] = {"addresses": list(interface.nameservers)}
    if interface.ipv6 and renderer == "NetworkManager":
        settings["dhcp6"] = True  # without it netplan tells NetworkManager that it will name an address
    if not interface.ipv6:
        settings |= {"link-local": ["ipv4"], "accept-ra": False}
    if interface.mtu is not None:
        settings["mtu"] = interface.mtu
    ethernets = {_file_name(interface): settings}
    network = {"version": 2, "renderer": renderer, "ethernets": ethernets}
    return yaml.safe_dump({"network": network}, sort_keys=False)


def keyfile(interface: NetworkInterface) -> tuple[str, str]:
    """The name and text of NetworkManager's keyfile for an interface (nm-settings-keyfile(5))."""
    name = _file_name(interface)
    lines = ["[connection]", f"id={name}", "type=ethernet"]
    ethernet = []
    if _MAC.fullmatch(interface.device):
        ethernet.append(f"mac-address={interface.device}")
    elif interface.device != "link":
        lines.append(f"interface-name={interface.device}")
    if interface.mtu is not None:
        ethernet.append(f"mtu={interface.mtu}")
    if ethernet:
        lines += ["", "[ethernet]", *ethernet]
    lines += ["", "[ipv4]"]
    if interface.address is None:
        lines.append("method=auto")
    else:
        gateway = f",{interface.gateway}" if interface.gateway else ""
        lines += ["method=manual", f"address1={interface.address}/{interface.prefix}{gateway}"]
    by_version: dict[bool, list[str]] = {False: [], True: []}
    for server in interface.nameservers:
        by_version[":" in server].append(server)
    if by_version[False]:
        lines.append(f"dns={';'.join(by_version[False])};")
    lines += ["", "[ipv6]", f"method={'auto' if interface.ipv6 else 'disabled'}"]
    if by_version[True] and interface.ipv6:
        lines.append(f"dns={';'.join(by_version[True])};")
    return f"{name}.nmconnection", "\n".join(lines) + "\n"


def write_networkmanager(tree: Tree, recipe: Recipe) -> None:
    """Configure the recipe's interfaces for NetworkManager, and enable it."""
    for interface in recipe.interfaces:
        name, text = keyfile(interface)
        # NetworkManager ignores a keyfile that others than root may read.
        tree.write(f"/etc/NetworkManager/system-connections/{name}", text, mode=0o600)
    enable_units(tree, ["NetworkManager.service"])
    # NetworkManager writes the file itself, or finds systemd-resolved's link.
    if has_unit(tree, "systemd-resolved.service"):
        tree.link("/etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    else:
        tree.remove("/etc/resolv.conf")


def _file_name(interface: NetworkInterface) -> str:
    return "wired" if interface.device == "link" else interface.device.replace(":", "-").lower()


def make_anonymous(tree: Tree) -> None:
    """Make every copy of the tree a machine of its own at its first boot, without anybody's help.

    An empty machine-id is filled at boot. `uninitialized` would be too, but it also makes that boot a
    "first boot", at which systemd-firstboot asks a person at the console for what the recipe left out, and
    presets switch services on again that the recipe switched off (machine-id(5), "First boot semantics").
    """
    tree.write("/etc/machine-id", "", mode=0o444)
    tree.remove("/var/lib/dbus/machine-id")
    if tree.path("/var/lib/dbus").is_dir():
        tree.link("/var/lib/dbus/machine-id", "/etc/machine-id")


def mark_updated(tree: Tree) -> None:
    """Say that caches made from /usr are up to date, which the packages' own scripts have seen to.

    Otherwise each copy rebuilds the linker's cache, the journal's catalog and the hardware database at its
    first boot (systemd-update-done.service(8)). Has to be the last thing that is written to the tree.
    """
    for directory in ("/etc", "/var"):
        tree.write(f"{directory}/.updated", "")


def os_release(tree: Tree) -> dict[str, str]:
    """What the system says of itself in /etc/os-release (os-release(5))."""
    pairs = (line.partition("=") for line in tree.read("/etc/os-release").splitlines() if "=" in line)
    return {name: value.strip("\"'") for name, _, value in pairs}
