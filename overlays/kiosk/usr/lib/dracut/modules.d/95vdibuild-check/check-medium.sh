#!/bin/sh
# dracut reads this whenever no device is being set up, until the system's medium is there.
on_all_screens() {
    for screen in /dev/tty0 /dev/console; do
        # What begins with an escape character clears the screen.
        printf '\033[2J\033[H\n\n    %s\n\n%s\n' "$1" "$2" >$screen
    done
}

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
    on_all_screens 'THIS CARD IS DAMAGED: it has to be replaced.' "$(sed '/: OK$/d' /run/vdibuild-check/said)"
    # Nobody is to use it. With another card in it, the machine finds its way by itself.
    sleep 60
    echo b >/proc/sysrq-trigger
    sleep 60
}

if getargbool 0 vdibuild.check && [ ! -e /run/vdibuild-check/begun ]; then
    check_medium
fi
