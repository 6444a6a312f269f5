#!/bin/sh
# Makes the device whose every read is compared with the hash that is vdibuild.verity=BLOCKS:HASH:SALT; by
# rd.live.squashimg dracut takes it instead of the file. dracut reads this as it does check-medium.sh.
. /lib/vdibuild-damaged.sh

# dm-verity's table: kernel.org, admin-guide/device-mapper/verity. Its superblock is a block of its own.
make_device() {
    mount -t iso9660 -o ro "$1" /run/vdibuild-verity/medium || return 1
    loop=$(losetup --read-only --find --show /run/vdibuild-verity/medium/LiveOS/squashfs.img) || return 1
    IFS=: read -r blocks hash salt <<END
$(getarg vdibuild.verity=)
END
    dmsetup create --readonly vdibuild-system --table \
        "0 $((blocks * 8)) verity 1 $loop $loop 4096 4096 $blocks $((blocks + 1)) sha256 $hash $salt" || return 1
    # What is unreadable at once is said here; dracut would only start again.
    mount -t squashfs -o ro /dev/mapper/vdibuild-system /run/vdibuild-verity/system || return 1
    [ -d /run/vdibuild-verity/system/usr ]
}

open_verified() {
    label=$(getarg root=)
    medium=/dev/disk/by-label/${label#live:CDLABEL=}
    [ -e "$medium" ] || return 0
    mkdir -p /run/vdibuild-verity/medium /run/vdibuild-verity/system
    : >/run/vdibuild-verity/begun
    if make_device "$medium" >/run/vdibuild-verity/said 2>&1; then
        umount /run/vdibuild-verity/system
        # The loop device goes on reading it.
        umount -l /run/vdibuild-verity/medium
        return 0
    fi
    damaged "$(cat /run/vdibuild-verity/said)"
}

if getarg vdibuild.verity= >/dev/null && [ ! -e /run/vdibuild-verity/begun ]; then
    open_verified
fi
