#!/bin/sh
# Lets whoever comes next to the SPICE port in to the machine on port $1, for ten seconds or until somebody is connected.
port=$1
redirect="PREROUTING -p tcp -i $INTERFACE --dport $SPICE_PORT -j DNAT --to-destination 127.0.0.1:$port"
iptables -I INPUT -i "$INTERFACE" -p tcp -m tcp --dport "$port" -j ACCEPT
iptables -I OUTPUT -o "$INTERFACE" -p tcp -m tcp --sport "$port" -j ACCEPT
# shellcheck disable=SC2086
iptables -t nat -I $redirect
echo "RULE ADDED, CONNECT NOW!"

close_up() {
    # shellcheck disable=SC2086
    iptables -t nat -D $redirect
    iptables -D INPUT -i "$INTERFACE" -p tcp -m tcp --dport "$port" -j ACCEPT
    iptables -D OUTPUT -o "$INTERFACE" -p tcp -m tcp --sport "$port" -j ACCEPT
    sed -i "/$port/d" "$LISTS/conn_wait.list"
}

tries=10
while [ $tries -gt 0 ]; do
    if netstat -nt | grep ":$port" | grep ESTABLISHED > /dev/null; then
        echo "$port is in use now"
        sleep 1
        close_up
        echo "$port" >> "$LISTS/waste.list"
        exit
    fi
    echo "$port is not in use"
    echo "RULE ADDED, CONNECT NOW!"
    sleep 1
    tries=$((tries - 1))
done
close_up
echo "$port" >> "$LISTS/clear.list"
