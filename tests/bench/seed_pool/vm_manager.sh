#!/bin/sh
# Run by xinetd for each station that connects: gives it a machine of clear.list, tidies up, refills the pool.
#
# These four scripts do what the seed's of the same names do, step by step, with the same commands in the same order
# on the same four lists; what the web page lost of them (line ends, some blanks and quotes) is put back. Settings come
# from the environment instead of /etc/vm_manager.conf, and the hypervisor's commands from tests/bench/seed_pool.py.

give() {
    if [ -z "$(cat "$LISTS/clear.list")" ]; then
        echo "no machine in clear.list"
        keep_house
        return
    fi
    cat "$LISTS/clear.list" | while read -r port; do
        if netstat -lnt | grep ":$port" > /dev/null; then
            if netstat -nt | grep ":$port" | grep ESTABLISHED > /dev/null; then
                echo "$port is connected already"
                sed -i "/$port/d" "$LISTS/clear.list"
                echo "$port" >> "$LISTS/waste.list"
            else
                echo "$port is not connected"
                sed -i "/$port/d" "$LISTS/clear.list"
                echo "$port" >> "$LISTS/conn_wait.list"
                "$SCRIPTS/vm_connect.sh" "$port"
                keep_house
                exit
            fi
        else
            echo "$port is not listened on"
            sed -i "/$port/d" "$LISTS/clear.list"
            echo "$port" >> "$LISTS/waste.list"
            keep_house
        fi
    done
}

keep_house() {
    cat "$LISTS/waste.list" | while read -r port; do
        if netstat -lnt | grep ":$port" > /dev/null &&
            netstat -nt | grep ":$port" | grep ESTABLISHED > /dev/null; then
            echo "$port is in use"
        else
            sed -i "/$port/d" "$LISTS/waste.list"
            echo "$port" >> "$LISTS/recycle.list"
            "$SCRIPTS/vm_delete.sh" "$port"
        fi
    done
    refill
}

refill() {
    while [ "$POOL_SIZE" -gt 0 ]; do
        port=$((START_PORT + POOL_SIZE))
        if grep "$port" "$LISTS/clear.list" || grep "$port" "$LISTS/waste.list" ||
            grep "$port" "$LISTS/recycle.list" || grep "$port" "$LISTS/conn_wait.list"; then
            echo "$port is in a list"
        else
            echo "$port" >> "$LISTS/recycle.list"
            "$SCRIPTS/vm_create.sh" "$port"
        fi
        POOL_SIZE=$((POOL_SIZE - 1))
    done
}

give | tee -a "$LISTS/vm_manager.log"
