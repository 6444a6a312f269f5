#!/bin/sh
# dracut reads this before it leaves the initramfs. The next program, without which nobody could say anything, is
# read once, and dm-verity asked whether anything was wrong with what has been read so far.
. /lib/vdibuild-damaged.sh

begin_verified() {
    for file in "$NEWROOT"/usr/lib/systemd/systemd "$NEWROOT"/usr/lib*/systemd/libsystemd-*.so \
        "$NEWROOT"/usr/lib/*/systemd/libsystemd-*.so; do
        [ ! -e "$file" ] || cat "$file" >/dev/null || return 1
    done
    case $(dmsetup status vdibuild-system) in
        *' verity V'*) return 0 ;;
    esac
    echo 'A block is not what it was.' >&2
    return 1
}

if getarg vdibuild.verity= >/dev/null; then
    begin_verified 2>/run/vdibuild-verity/said || damaged "$(cat /run/vdibuild-verity/said)"
fi
