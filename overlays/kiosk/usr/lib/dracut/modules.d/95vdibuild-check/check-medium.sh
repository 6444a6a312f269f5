#!/bin/sh
# dracut reads this whenever no device is being set up, until the system's medium is there.
. /lib/vdibuild-damaged.sh

check_medium() {
    label=$(getarg root=)
    medium=/dev/disk/by-label/${label#live:CDLABEL=}
    [ -e "$medium" ] || return 0
    mkdir -p /run/vdibuild-check
    : >/run/vdibuild-check/begun
    on_all_screens 'The card is being checked.' '    This takes a minute.'
    mkdir -p /run/vdibuild-check/medium
    if mount -t iso9660 -o ro "$medium" /run/vdibuild-check/medium &&
        (cd /run/vdibuild-check/medium && sha256sum -c LiveOS/SHA256SUMS) \
            >/run/vdibuild-check/said 2>&1; then
        umount /run/vdibuild-check/medium
        on_all_screens 'The card is as it was made.' '    The station starts.'
        return 0
    fi
    damaged "$(sed '/: OK$/d' /run/vdibuild-check/said)"
}

if getargbool 0 vdibuild.check && [ ! -e /run/vdibuild-check/begun ]; then
    check_medium
fi
