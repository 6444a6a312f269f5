#!/bin/sh
# What a person is shown about the medium, wherever they look.
on_all_screens() {
    for screen in /dev/tty0 /dev/console; do
        # What begins with an escape character clears the screen.
        printf '\033[2J\033[H\n\n    %s\n\n%s\n' "$1" "$2" >$screen
    done
}

# Nobody is to use it. With another card in it, the machine finds its way by itself.
damaged() {
    on_all_screens 'THIS CARD IS DAMAGED: it has to be replaced.' "$1"
    sleep 60
    echo b >/proc/sysrq-trigger
    sleep 60
}
