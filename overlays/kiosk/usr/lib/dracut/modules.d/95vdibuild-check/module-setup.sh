#!/bin/bash
# Compares the medium with its digests before anything of it is used, when the kernel is given vdibuild.check.

# called by dracut: only when it is asked for
check() {
    return 255
}

# called by dracut
depends() {
    echo dmsquash-live
}

# called by dracut
install() {
    inst_multiple mkdir mount sed sha256sum sleep umount
    # Before the script that mounts the medium, which is called dmsquash-live-root.
    inst_hook initqueue/settled 00 "$moddir/check-medium.sh"
}
