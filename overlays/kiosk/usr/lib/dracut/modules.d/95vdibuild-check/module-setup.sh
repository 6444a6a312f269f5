#!/bin/bash
# What is done with the medium before anything of it is used: it is compared with its digests, when the kernel is
# given vdibuild.check; its system is read through dm-verity, when the kernel is given vdibuild.verity.

# called by dracut: only when it is asked for
check() {
    return 255
}

# called by dracut
depends() {
    echo dm dmsquash-live
}

# called by dracut
installkernel() {
    # The processor's own instructions for SHA-256: without them each read costs several times as much.
    instmods dm_verity sha256_ssse3
}

# called by dracut
install() {
    inst_multiple cat dmsetup losetup mkdir mount sed sha256sum sleep umount
    inst_simple "$moddir/damaged.sh" /lib/vdibuild-damaged.sh
    # Before the script that mounts the medium, which is called dmsquash-live-root.
    inst_hook initqueue/settled 00 "$moddir/check-medium.sh"
    inst_hook initqueue/settled 01 "$moddir/open-verified.sh"
    inst_hook pre-pivot 90 "$moddir/begin-verified.sh"
}
