#!/bin/bash
# Keeps the kickstart that virt-install put into the initramfs (--initrd-inject) for the installer.

# called by dracut: only when it is asked for
check() {
    return 255
}

# called by dracut
install() {
    inst_hook pre-pivot 50 "$moddir/keep-kickstart.sh"
}
