"""Removes from a tree what identifies a machine, or the build it came from; the first boot makes it anew.

The checklist are virt-sysprep's operations (virt-sysprep(1), OPERATIONS); each pattern below names its own.
Not here are

- package-manager-cache, rpm-db: the family's `seal`;
- fs-uuids, lvm-uuids: decided for each disk before it is made (disk.layout);
- ca-certificates, firewall-rules, net-hostname, net-hwaddr, net-nmconn, ssh-userdir, user-account and the
  crontabs of cron-spool: in an image they come from its recipe and overlays, and are wanted;
- customize, script: %post sections;
- flag-reconfiguration: asks a person questions at the first boot.
"""

from __future__ import annotations

from vdibuild import process
from vdibuild.families import Family, systemd
from vdibuild.tree import Tree, host_command

# As find's -path takes them: `*` matches slashes as well.
IDENTITY = {
    "ssh-hostkeys": ("./etc/ssh/ssh_host_*",),
    "machine-id": ("./var/lib/dbus/machine-id",),
    "random-seed": (
        "./var/lib/systemd/random-seed",
        "./var/lib/random-seed",
        "./var/lib/urandom/random-seed",
        "./boot/loader/random-seed",
        "./boot/efi/loader/random-seed",
        "./efi/loader/random-seed",
    ),
    "credentials (systemd-creds' host key)": ("./var/lib/systemd/credential.secret",),
    "dhcp-client-state": (
        "./var/lib/dhclient/*",
        "./var/lib/dhcp/*",
        "./var/lib/dhcpcd/*",
        "./var/lib/NetworkManager/*.lease",
        "./var/lib/NetworkManager/secret_key",
        "./var/lib/NetworkManager/seen-bssids",
        "./var/lib/NetworkManager/timestamps",
        "./var/lib/NetworkManager/NetworkManager.state",
        "./var/lib/systemd/network/*",
    ),
    "dhcp-server-state": ("./var/lib/dhcpd/*",),
    "udev-persistent-net": ("./etc/udev/rules.d/*-persistent-*.rules",),
    "lvm-system-devices": (
        "./etc/lvm/archive/*",
        "./etc/lvm/backup/*",
        "./etc/lvm/cache/*",
        "./etc/lvm/devices/*",
    ),
    "blkid-tab": ("./etc/blkid.tab*", "./etc/blkid/*", "./run/blkid/*", "./var/run/blkid*"),
    "storage hosts": ("./etc/nvme/hostid", "./etc/nvme/hostnqn"),
    "cloud-init": ("./var/lib/cloud/*",),
    "kerberos-hostkeytab": ("./etc/krb5.keytab",),
    "kerberos-data": ("./var/kerberos/krb5kdc/principal*",),
    "ipa-client": ("./var/lib/ipa-client/pki/*", "./var/lib/ipa-client/sysrestore/*"),
    "sssd-db-log": ("./var/lib/sss/db/*", "./var/lib/sss/mc/*", "./var/lib/sss/keytabs/*"),
    "samba-db-log": ("./var/lib/samba/*.tdb", "./var/lib/samba/*.dat"),
    "dovecot-data": ("./var/lib/dovecot/*",),
    "puppet-data-log": ("./var/lib/puppet/*", "./etc/puppet/ssl/*", "./etc/puppetlabs/puppet/ssl/*"),
    "rh-subscription-manager": ("./etc/pki/consumer/*", "./etc/pki/entitlement/*", "./var/lib/rhsm/*"),
    "rhn-systemid": ("./etc/sysconfig/rhn/systemid", "./etc/sysconfig/rhn/osad-auth.conf"),
    "smolt-uuid": ("./etc/smolt/hw-uuid", "./etc/sysconfig/hw-uuid"),
    "yum-uuid": ("./var/lib/yum/uuid", "./var/lib/dnf/repos/*/countme"),
    "bluetooth": ("./var/lib/bluetooth/*",),
}
"""What tells one machine from another, by virt-sysprep's operation, or what it lacks."""

TRACES = {
    "bash-history": (
        "./root/.*_history",
        "./home/*/.*_history",
        "./root/.lesshst",
        "./home/*/.lesshst",
        "./root/.viminfo",
        "./home/*/.viminfo",
        "./root/.wget-hsts",
    ),
    "known hosts": ("./root/.ssh/known_hosts*", "./home/*/.ssh/known_hosts*"),
    "backup-files": ("./etc/*~", "./etc/*.bak", "./root/*~", "./home/*~"),
    "passwd-backups": (
        *("./etc/passwd-", "./etc/shadow-", "./etc/group-", "./etc/gshadow-"),
        *("./etc/subuid-", "./etc/subgid-", "./etc/.pwd.lock"),
    ),
    "cron-spool": ("./var/spool/at/*", "./var/spool/cron/at*/*", "./var/spool/anacron/*"),
    "mail-spool": ("./var/mail/*", "./var/spool/mail/*"),
    "crash-data, abrt-data": (
        "./var/crash/*",
        "./var/spool/abrt/*",
        "./var/lib/systemd/coredump/*",
        "./var/log/dump/*",
    ),
    "pacct-log": ("./var/account/pacct*", "./var/log/account/*"),
    "pam-data": ("./var/run/console/*", "./var/run/faillock/*", "./var/lib/faillock/*"),
    "utmp": ("./var/lib/wtmpdb/*", "./var/lib/lastlog/*", "./var/log/wtmp", "./var/log/btmp"),
    "logfiles": (
        *("./var/log/journal/*", "./var/log/*.gz", "./var/log/*.xz", "./var/log/*.old"),
        *("./var/log/*.[0-9]", "./root/anaconda-ks.cfg", "./root/original-ks.cfg"),
        *("./root/install.log", "./root/install.log.syslog"),
    ),
    "tmp-files": ("./tmp/*", "./var/tmp/*", "./run/*"),
    "caches": (
        "./root/.cache/*",
        "./home/*/.cache/*",
        "./var/cache/ldconfig/aux-cache",
        "./var/cache/man/*",
        "./var/lib/systemd/timers/*",
        "./var/lib/systemd/timesync/*",
        "./var/lib/plymouth/*",
    ),
}
"""What a build leaves behind, by virt-sysprep's operation, or what it lacks."""


def seal(tree: Tree, family: Family) -> None:
    """Make the tree one that any number of machines can be made from.

    With SOURCE_DATE_EPOCH set, what the build wrote gets that time, so that two builds have the same.
    Links in the tree are never followed. Raises CommandError.
    """
    patterns = [pattern for group in (IDENTITY, TRACES) for paths in group.values() for pattern in paths]
    chosen = [word for pattern in patterns for word in ("-o", "-path", pattern)][1:]
    _find(tree, [".", "-xdev", "(", *chosen, ")", "-delete"])
    # Others than root write to some logs: an emptied file keeps its owner and mode.
    logs = [".", "-xdev", "-path", "./var/log/*", "-type", "f", "-size", "+0"]
    _find(tree, [*logs, "-exec", "truncate", "--size=0"])
    systemd.make_anonymous(tree)
    systemd.mark_updated(tree)
    # The family last: where there is SELinux it labels all that is there.
    family.seal(tree)
    epoch = process.environment().get("SOURCE_DATE_EPOCH")
    if epoch:
        tree.date_back(epoch, "/")


def _find(tree: Tree, words: list[str]) -> None:
    """Run find in the tree's root, as the tree's root; an -exec at the end gets the paths."""
    ending = ["--", "{}", "+"] if "-exec" in words else []
    process.run(host_command(["find", "-P", *words, *ending]), cwd=tree.root)
