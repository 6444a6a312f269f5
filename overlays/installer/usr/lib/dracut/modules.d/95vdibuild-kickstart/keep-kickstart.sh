#!/bin/sh
# /run goes over to the installed system; the rest of the initramfs ends here.
for file in /*.ks /*.ks.cfg; do
    if [ -f "$file" ]; then
        mkdir -p /run/install
        cp "$file" /run/install/
    fi
done
