#!/bin/sh
# dracut reads this before it has udev told of all devices there are. Of those that cannot lead to a medium, the
# system's own udev is told, as of all others; they are half of them.
udevadm() {
    case "$1 $2" in
        'trigger --type=devices')
            for kind in bdi clockevents event_source graphics input leds mem memory misc net serial-base sound thermal \
                tty vc vtconsole wakeup watchdog workqueue; do
                set -- "$@" "--subsystem-nomatch=$kind"
            done
            ;;
    esac
    command udevadm "$@"
}
