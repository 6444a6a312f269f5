"""Turns what a kickstart says into a checked recipe."""

from __future__ import annotations

import difflib
import ipaddress
import re
import zoneinfo
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from pykickstart.parser import Script

from vdibuild import process, progress, recipe
from vdibuild.disk import layout
from vdibuild.errors import InputError
from vdibuild.kickstart import liveimg
from vdibuild.kickstart.syntax import Command, Kickstart, Reader
from vdibuild.settings.images import Image, System

_USER = r"[a-z_][a-z0-9_-]{0,31}"  # useradd(8), Debian's and Red Hat's common ground
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1123, section 2.1
_HOST_NAME_MAX = 64  # sethostname(2)
_CRYPT = r"\$(1|2[abxy]|5|6|7|y|gy|md5|sha1)\$[^\s:!*]+"  # crypt(5)
_SSH_KEY = r"(?:sk-)?(?:ssh|ecdsa)-[a-z0-9@.-]+ [A-Za-z0-9+/]+={0,2}(?: .*)?"  # sshd(8), without options
_LVM_NAME = r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}"  # lvm(8), "valid names"

_FILE_SYSTEMS = ("ext4", "xfs", "btrfs")
# The kernel and the first programs need these before anything else is mounted.
_ON_ROOT = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys")


def parse(text: str, source: Path, image: System) -> recipe.Recipe:
    """Read and check a rendered kickstart for an image.

    source: the template it came from. A plain-text password is hashed at once, with a warning. Raises
    InputError naming the source and the line of the rendered text: for what is wrong, for what would not
    boot on the image's disk and firmware, and for any command or option that is not honoured.
    """
    reader = Reader(source, image.family, image.release)
    builder = _Builder(reader, image, reader.read(text))
    result = builder.build(text)
    if not isinstance(image, Image):
        return result
    try:
        layout.plan(result.storage, image.firmware, image.disk.size, image.disk.table, "", source)
    except InputError as error:
        error.hint = reader.place(error.line, error.hint)
        raise
    return result


class _Builder:
    """Makes the recipe of one kickstart."""

    def __init__(self, reader: Reader, image: System, kickstart: Kickstart) -> None:
        self.error = reader.error
        self.source = reader.source
        self.image = image
        self.kickstart = kickstart

    def build(self, text: str) -> recipe.Recipe:
        """The whole recipe; text: the kickstart's."""
        users = self._users()
        enabled, disabled = self._services()
        timezone, utc = self._timezone()
        return recipe.Recipe(
            text=text,
            source=self.source,
            url=self._url(),
            live_image=self._live_image(),
            repositories=self._repositories(),
            language=self._language(),
            keyboard=self._keyboard(),
            timezone=timezone,
            utc=utc,
            root_password=self._root_password(),
            users=users,
            groups=self._groups(),
            ssh_keys=self._ssh_keys(users),
            hostname=self._hostname(),
            interfaces=self._interfaces(),
            services_enabled=enabled,
            services_disabled=disabled,
            selinux=self._selinux(),
            bootloader=self._bootloader(),
            storage=self._storage(),
            packages=self._packages(),
            scripts=tuple(self._script(script) for script in self.kickstart.scripts),
        )

    def _check(self, pattern: str, value: str, line: int, what: str, hint: str = "") -> str:
        """The value, which must be of that form."""
        if not re.fullmatch(pattern, value):
            raise self.error(line, f"{value!r} is no {what}", hint)
        return value

    def _once(self, names: Iterable[tuple[object, int]], what: str) -> None:
        """Refuse a name (with its line) that is there twice."""
        seen: dict[object, int] = {}
        for name, line in names:
            if name in seen:
                raise self.error(line, f"{what} {name} is given twice, first in line {seen[name]}")
            seen[name] = line

    # Where packages come from

    def _live_image(self) -> recipe.LiveImage | None:
        command = self.kickstart.only("liveimg")
        if command is None:
            return None
        # Live systems are made of packages, as images without an installation are.
        if not isinstance(self.image, Image) or self.image.method != "install":
            raise self.error(
                command.line,
                "liveimg is not honoured without an installation",
                "write method: install in vdibuild.yaml, or %packages here",
            )
        for other in ("url", "repo"):
            for instead in self.kickstart.given(other):
                raise self.error(
                    instead.line, f"{other} has no meaning with liveimg, in line {command.line}", "remove it"
                )
        if self.kickstart.packages_line:
            raise self.error(
                self.kickstart.packages_line,
                f"%packages beside liveimg, in line {command.line}",
                "remove one",
            )
        if self.image.packages:
            raise self.error(
                command.line,
                "liveimg installs no packages, but the image has `packages:` in vdibuild.yaml",
                "remove them there, or install packages in place of liveimg",
            )
        return liveimg.read(command, self.error)

    def _url(self) -> recipe.Repository | None:
        command = self.kickstart.only("url")
        if command is None and self.kickstart.given("liveimg"):
            return None
        if command is None:
            raise self.error(None, "has no url command: where do packages come from?", "add: url --url=…")
        name = self.image.release if self.image.family == "debian" else "base"
        return self._repository(command, name, command.value.url)

    def _repositories(self) -> tuple[recipe.Repository, ...]:
        result = []
        for command in self.kickstart.given("repo"):
            form = (
                r"[a-z0-9][a-z0-9./-]*" if self.image.family == "debian" else r"[A-Za-z0-9][A-Za-z0-9_.:-]*"
            )
            what = "name of a suite" if self.image.family == "debian" else "name of a repository"
            name = self._check(form, command.value.name, command.line, what)
            result.append(self._repository(command, name, command.value.baseurl))
        # One suite can come from several archives.
        debian = self.image.family == "debian"
        self._once([((one.name, one.url) if debian else one.name, one.line) for one in result], "repo")
        return tuple(result)

    def _repository(self, command: Command, name: str, plain: str | None) -> recipe.Repository:
        value = command.value
        indirect = value.mirrorlist or value.metalink
        if indirect and self.image.family == "debian":
            raise self.error(command.line, "a Debian archive has no mirrorlist or metalink", "give its URL")
        url = plain or indirect or ""
        return recipe.Repository(
            name, self._location(url, command), command.line, bool(value.mirrorlist), bool(value.metalink)
        )

    def _location(self, url: str, command: Command) -> str:
        try:
            parts = urlsplit(url)
            remote = parts.scheme in ("http", "https", "ftp") and bool(parts.hostname)
            local = parts.scheme == "file" and parts.path.startswith("/")
        except ValueError:
            remote = local = False
        if not (remote or local) or not url.isprintable() or " " in url:
            raise self.error(command.line, f"{url!r} is no URL", "write it like https://example.org/debian")
        return url

    # What the system says about itself

    def _language(self) -> str:
        command = self.kickstart.only("lang")
        if command is None:
            return ""
        form = r"(?:[a-z]{2,3}_[A-Z]{2}|C)(?:\.[A-Za-z0-9-]+)?(?:@[a-z]+)?|POSIX"
        return self._check(form, command.value.lang, command.line, "locale", "write it like de_DE.UTF-8")

    def _keyboard(self) -> str:
        command = self.kickstart.only("keyboard")
        if command is None:
            return ""
        given, option = command.value._keyboard, command.value.vc_keymap
        if given and option:
            raise self.error(command.line, "keyboard has two layouts", "write: keyboard LAYOUT")
        form = r"[a-z][A-Za-z0-9_-]*"
        return self._check(form, given or option, command.line, "keyboard layout", "such as us or de")

    def _timezone(self) -> tuple[str, bool]:
        command = self.kickstart.only("timezone")
        if command is None:
            return "", True
        name = command.value.timezone or ""
        hint = "write it like Europe/Amsterdam or Etc/UTC"
        self._check(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*", name, command.line, "time zone", hint)
        if not _is_zone(name) and _is_zone("Etc/UTC"):
            close = difflib.get_close_matches(name, zoneinfo.available_timezones(), 1, 0.6)
            hint = f"did you mean {close[0]}?" if close else hint
            raise self.error(command.line, f"there is no time zone {name!r}", hint)
        return name, bool(command.value.isUtc)

    def _selinux(self) -> str:
        command = self.kickstart.only("selinux")
        if command is None:
            return ""
        if len(command.options) != 1:
            raise self.error(command.line, "selinux needs one of --enforcing, --permissive, --disabled")
        mode = next(iter(command.options)).removeprefix("--")
        if self.image.family == "debian" and mode != "disabled":
            raise self.error(command.line, f"selinux --{mode}: Debian images have no SELinux", "remove it")
        return mode

    def _services(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        lines: dict[str, dict[str, int]] = {"enabled": {}, "disabled": {}}
        for command in self.kickstart.given("services"):
            for kind, names in lines.items():
                for name in getattr(command.value, kind):
                    self._check(r"[A-Za-z0-9_][A-Za-z0-9_.:@\\-]*", name, command.line, "name of a service")
                    names.setdefault(name, command.line)
        for name, line in lines["disabled"].items():
            if name in lines["enabled"]:
                raise self.error(line, f"service {name} is enabled in line {lines['enabled'][name]}")
        return tuple(lines["enabled"]), tuple(lines["disabled"])

    # Who may use it

    def _password(self, password: str, command: Command, whose: str) -> recipe.Password:
        locked = "--lock" in command.options
        if not password:
            if "--password" in command.options and not locked:
                raise self.error(command.line, f"the password of {whose} is empty", "lock it with --lock")
            # As Anaconda does: a user without a password cannot log in with one.
            return recipe.Password("", locked=True)
        if {"--iscrypted", "--plaintext"} <= command.options:
            raise self.error(command.line, "a password is --iscrypted or --plaintext, not both")
        if "--iscrypted" in command.options:
            if not re.fullmatch(_CRYPT, password):
                raise self.error(
                    command.line,
                    f"the password of {whose} is not hashed as crypt(5) says",
                    "make the hash with: openssl passwd -6",
                )
            return recipe.Password(password, locked)
        progress.warn(
            f"the kickstart has {whose}'s password in plain text (line {command.line}); "
            "write its hash instead: openssl passwd -6, and --iscrypted"
        )
        # Through standard input: arguments can be read by every user of this host.
        hashed = process.run(["openssl", "passwd", "-6", "-stdin"], stdin=f"{password}\n", capture=True)
        return recipe.Password(hashed.stdout.strip(), locked)

    def _root_password(self) -> recipe.Password:
        command = self.kickstart.only("rootpw")
        if command is None:
            return recipe.Password("", locked=True)
        return self._password(command.value.password or "", command, "root")

    def _users(self) -> tuple[recipe.User, ...]:
        users = tuple(self._user(command) for command in self.kickstart.given("user"))
        self._once([(user.name, user.line) for user in users], "user")
        self._once([(user.uid, user.line) for user in users if user.uid is not None], "uid")
        return users

    def _user(self, command: Command) -> recipe.User:
        value, line = command.value, command.line
        name = self._check(
            _USER, value.name or "", line, "name of a user", "lower-case letters, digits, _ and -"
        )
        if name == "root":
            raise self.error(line, "root is always there", "use rootpw and sshkey --username=root")
        for number in (value.uid, value.gid):
            if number is not None:
                self._identifier(int(number), line)
        for path in filter(None, (value.homedir, value.shell)):
            self._check(r"/[^\s:]*", path, line, "absolute path")
        gecos = self._check(r"[^:\n]*", value.gecos or "", line, "comment on a user: it has a colon")
        groups = [self._check(_USER, group, line, "name of a group") for group in value.groups]
        return recipe.User(
            name,
            self._password(value.password or "", command, name),
            line,
            tuple(groups),
            gecos,
            value.homedir or "",
            value.shell or "",
            value.uid,
            value.gid,
        )

    def _groups(self) -> tuple[recipe.Group, ...]:
        groups = []
        for command in self.kickstart.given("group"):
            value = command.value
            name = self._check(_USER, value.name or "", command.line, "name of a group")
            if value.gid is not None:
                self._identifier(value.gid, command.line)
            groups.append(recipe.Group(name, command.line, value.gid))
        self._once([(group.name, group.line) for group in groups], "group")
        self._once([(group.gid, group.line) for group in groups if group.gid is not None], "gid")
        return tuple(groups)

    def _identifier(self, number: int, line: int) -> None:
        # 65534 is nobody; 65535 and the last 32-bit number mean "none" in system calls.
        if not 0 < number < 2**32 - 1 or number in (65534, 65535):
            raise self.error(line, f"{number} cannot be the number of a user or a group")

    def _ssh_keys(self, users: Iterable[recipe.User]) -> tuple[recipe.SshKey, ...]:
        names = ["root", *(user.name for user in users)]
        keys = []
        for command in self.kickstart.given("sshkey"):
            user, key = command.value.username, command.value.key.strip()
            if user not in names:
                raise self.error(command.line, f"there is no user {user!r}", f"add: user --name={user}")
            hint = 'quote it whole: "ssh-ed25519 AAAA… comment"'
            keys.append(
                recipe.SshKey(
                    user, self._check(_SSH_KEY, key, command.line, "public key", hint), command.line
                )
            )
        return tuple(keys)

    # Network

    def _hostname(self) -> str:
        named = [command for command in self.kickstart.given("network") if "--hostname" in command.options]
        if not named:
            return ""
        for command in named[1:]:
            raise self.error(command.line, f"the host has a name already, from line {named[0].line}")
        name, line = named[0].value.hostname, named[0].line
        if len(name) > _HOST_NAME_MAX:
            raise self.error(line, f"the host name is longer than {_HOST_NAME_MAX}")
        return self._check(rf"{_LABEL}(\.{_LABEL})*", name, line, "host name", "letters, digits and dashes")

    def _interfaces(self) -> tuple[recipe.NetworkInterface, ...]:
        commands = self.kickstart.given("network")
        # With nothing but a name, the command is about the host, not about an interface.
        found = tuple(self._interface(command) for command in commands if command.options - {"--hostname"})
        self._once([(interface.device, interface.line) for interface in found], "network device")
        return found

    def _interface(self, command: Command) -> recipe.NetworkInterface:
        value, line = command.value, command.line
        if not value.onboot:
            raise self.error(line, "network --onboot=no is not honoured here", "leave the interface out")
        address = prefix = gateway = None
        if value.bootProto == "static":
            for option in ("--ip", "--netmask"):
                if option not in command.options:
                    raise self.error(line, f"a static network needs {option}")
            address, prefix = str(self._ipv4(value.ip, line)), self._prefix(value.netmask, line)
            if value.gateway:
                gateway = self._gateway(value.gateway, address, prefix, line)
        elif value.bootProto == "dhcp":
            for option in ("--ip", "--netmask", "--gateway"):
                if option in command.options:
                    raise self.error(line, f"{option} has no meaning with DHCP", "add --bootproto=static")
        else:
            raise self.error(
                line, f"network --bootproto={value.bootProto} is not honoured here", "use dhcp or static"
            )
        return recipe.NetworkInterface(
            self._device(value.device or "link", line),
            line,
            address,
            prefix,
            gateway,
            tuple(str(self._ip(one.strip(), line)) for one in (value.nameserver or "").split(",") if one),
            not value.noipv6,
            self._mtu(value.mtu, line) if "--mtu" in command.options else None,
        )

    def _device(self, device: str, line: int) -> str:
        if ":" in device:
            form = r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"
            return self._check(form, device, line, "MAC address", "six pairs of hexadecimal digits").lower()
        if device in ("bootif", "ibft", "lo"):
            raise self.error(
                line, f"network --device={device} is not honoured here", "use link, a name or a MAC"
            )
        return self._check(r"[A-Za-z][A-Za-z0-9._-]{0,14}", device, line, "network device")

    def _ip(self, text: str, line: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        try:
            return ipaddress.ip_address(text)
        except ValueError:
            raise self.error(line, f"{text!r} is no IP address") from None

    def _ipv4(self, text: str, line: int) -> ipaddress.IPv4Address:
        address = self._ip(text, line)
        if not isinstance(address, ipaddress.IPv4Address):
            raise self.error(line, f"{text!r} is no IPv4 address")
        return address

    def _prefix(self, netmask: str, line: int) -> int:
        hosts = int(self._ipv4(netmask, line)) ^ 0xFFFFFFFF
        if hosts & (hosts + 1) or hosts == 0xFFFFFFFF:
            raise self.error(line, f"{netmask} is no netmask", "such as 255.255.255.0")
        return 32 - hosts.bit_length()

    def _gateway(self, text: str, address: str, prefix: int, line: int) -> str:
        gateway = self._ipv4(text, line)
        network = ipaddress.IPv4Network(f"{address}/{prefix}", strict=False)
        if gateway not in network:
            raise self.error(line, f"the gateway {gateway} is not in the network {network}")
        return str(gateway)

    def _mtu(self, text: str, line: int) -> int:
        number = int(self._check(r"[0-9]{1,5}", text, line, "MTU"))
        if not 68 <= number <= 65535:  # RFC 791, section 3.2
            raise self.error(line, f"the MTU {number} is not between 68 and 65535")
        return number

    # The disk and how it boots

    def _bootloader(self) -> recipe.Bootloader:
        command = self.kickstart.only("bootloader")
        if command is None:
            return recipe.Bootloader()
        value, line = command.value, command.line
        if value.location not in (None, "", "mbr", "none"):
            raise self.error(
                line, f"bootloader --location={value.location} is not honoured here", "use mbr or none"
            )
        if value.location == "none" and not isinstance(self.image, Image):
            raise self.error(line, "a live system does not start without a boot loader", "use mbr")
        append = value.appendLine or ""
        # It goes into files that shells and GRUB read: their own signs cannot stand in it.
        if sign := re.search(r"[\"'\\$`\n]", append):
            raise self.error(line, f"bootloader --append cannot have the character {sign[0]}")
        timeout = recipe.Bootloader().timeout if value.timeout is None else value.timeout
        if timeout < 0:
            raise self.error(line, "bootloader --timeout is less than 0")
        return recipe.Bootloader(" ".join(append.split()), timeout, value.location != "none", line)

    def _storage(self) -> recipe.Storage:
        if not isinstance(self.image, Image):
            self._no_disk()
            return recipe.Storage()
        self._one_disk()
        return recipe.Storage(
            tuple(self._partition(command) for command in self.kickstart.given("part")),
            tuple(self._group(command) for command in self.kickstart.given("volgroup")),
            tuple(self._logical(command) for command in self.kickstart.given("logvol")),
            self._table(self.image.disk.table),
        )

    def _no_disk(self) -> None:
        for name in ("zerombr", "clearpart", "part", "volgroup", "logvol"):
            for command in self.kickstart.given(name):
                raise self.error(command.line, f"{name}: a live system has no disk", "remove it")

    def _one_disk(self) -> None:
        """An image has one disk, so whatever it is called is right; two names would be two disks."""
        first = ""
        for command in self.kickstart.commands:
            value = command.value
            disks = {"clearpart": "drives", "bootloader": "bootDrive", "part": "disk"}.get(command.name)
            named = getattr(value, disks) if disks else None
            for name in [named] if isinstance(named, str) else named or []:
                if name and name != (first or name):
                    raise self.error(
                        command.line, f"an image has one disk: {name} beside {first}", "leave the names out"
                    )
                first = first or name

    def _table(self, wanted: str) -> str:
        command = self.kickstart.only("clearpart")
        if command is None or not command.value.disklabel:
            return wanted
        table = str(command.value.disklabel)
        if table not in ("gpt", "msdos"):
            raise self.error(
                command.line, f"clearpart --disklabel={table} is not honoured", "use gpt or msdos"
            )
        if table != wanted:
            raise self.error(
                command.line,
                f"clearpart --disklabel={table}, but the image's disk has table: {wanted}",
                "write --disklabel={{ image.disk.table }}, or change vdibuild.yaml",
            )
        return table

    def _partition(self, command: Command) -> recipe.Volume:
        place = command.value.mountpoint
        kind = command.value.fstype or ""
        if place.startswith("pv."):
            self._check(r"pv\.[A-Za-z0-9_.-]+", place, command.line, "name of a physical volume")
            kind = self._fixed("lvmpv", command)
        elif place == "biosboot":
            kind = self._fixed("biosboot", command)
        elif kind == "efi" and place == "/boot/efi":
            kind = "vfat"
        elif kind == "vfat" and place == "/boot/efi":
            pass
        else:
            kind = self._mounted(command)
        return self._volume(command, place, kind)

    def _logical(self, command: Command) -> recipe.Volume:
        value, line = command.value, command.line
        name = self._check(_LVM_NAME, value.name or "", line, "name of a logical volume")
        group = self._check(_LVM_NAME, value.vgname or "", line, "name of a volume group")
        return self._volume(command, value.mountpoint, self._mounted(command), name, group)

    def _mounted(self, command: Command) -> str:
        """The file system of swap, or of a mount point, which is checked."""
        place, kind, line = command.value.mountpoint, command.value.fstype or "", command.line
        if place == "swap":
            return self._fixed("swap", command)
        if not place.startswith("/"):
            raise self.error(line, f"{place!r} is no mount point", "a path, swap, biosboot or pv.NAME")
        self._check(r"/|(/[A-Za-z0-9._+@-]+)+", place, line, "mount point")
        if any(place == one or place.startswith(f"{one}/") for one in _ON_ROOT):
            raise self.error(line, f"{place} cannot be a file system of its own")
        if not kind:
            raise self.error(line, f"{place} has no file system", f"add --fstype={_FILE_SYSTEMS[0]}")
        if kind not in _FILE_SYSTEMS:
            raise self.error(
                line, f"{kind} is no file system for {place}", f"use one of {', '.join(_FILE_SYSTEMS)}"
            )
        return kind

    def _fixed(self, kind: str, command: Command) -> str:
        """The kind that the mount point's name implies; --fstype can only say the same."""
        given = command.value.fstype or kind
        if given != kind:
            raise self.error(command.line, f"{command.value.mountpoint} cannot be {given}", f"it is {kind}")
        return kind

    def _volume(
        self, command: Command, place: str, kind: str, name: str = "", group: str = ""
    ) -> recipe.Volume:
        value, line = command.value, command.line
        grow = bool(value.grow)
        maximum = value.maxSizeMB if "--maxsize" in command.options else None
        if maximum is not None and not grow:
            raise self.error(line, "--maxsize has no meaning without --grow")
        if value.size is not None and value.size < 1:
            raise self.error(line, f"--size={value.size} is no size", "give it in MiB, at least 1")
        raw = kind in ("lvmpv", "biosboot")
        for option in ("--label", "--fsoptions"):
            if raw and option in command.options:
                raise self.error(line, f"{option} has no meaning without a file system")
        label = self._check(r"[A-Za-z0-9._-]*", value.label or "", line, "label")
        options = self._check(r"[^\s\"'\\]*", value.fsopts or "", line, "list of mount options")
        return recipe.Volume(place, kind, value.size or 0, line, grow, maximum, label, options, name, group)

    def _group(self, command: Command) -> recipe.VolumeGroup:
        value, line = command.value, command.line
        name = self._check(_LVM_NAME, value.vgname or "", line, "name of a volume group")
        # --pesize is in KiB; LVM wants a power of two.
        size = value.pesize or recipe.VolumeGroup("", (), 0).extent * 1024
        if size < 1024 or size & (size - 1):
            raise self.error(
                line, f"--pesize={size} is no size of extents", "a power of two in KiB from 1024"
            )
        return recipe.VolumeGroup(name, tuple(value.physvols), line, size // 1024)

    # What is in it

    def _packages(self) -> recipe.Packages:
        found = self.kickstart.packages
        return recipe.Packages(
            names=tuple(found.packageList),
            groups=tuple(group.name for group in found.groupList),
            environment=found.environment or "",
            excluded_names=tuple(found.excludedList),
            excluded_groups=tuple(group.name for group in found.excludedGroupList),
            weak_dependencies=not found.excludeWeakdeps,
            documentation=not found.excludeDocs,
            translations=self._translations(found.instLangs),
            core=not found.nocore,
            line=self.kickstart.packages_line,
        )

    def _translations(self, languages: str | None) -> tuple[str, ...] | None:
        if languages is None:
            return None
        names = languages.split(",")
        for name in names:
            self._check(r"[a-z]{2,3}(_[A-Z]{2})?(@[a-z]+)?|C", name, self.kickstart.packages_line, "language")
        # C is the language that the programs are written in: there is nothing to install for it.
        return tuple(name for name in names if name != "C")

    def _script(self, script: Script) -> recipe.Script:
        for path in filter(None, (script.interp, script.logfile)):
            self._check(r"/[^\s]*", path, script.lineno, "absolute path")
        return recipe.Script(
            script.script,
            script.lineno,
            script.inChroot,
            script.interp,
            script.logfile or "",
            script.errorOnFail,
        )


def _is_zone(name: str) -> bool:
    """Whether this host's time zone database has the zone."""
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True
