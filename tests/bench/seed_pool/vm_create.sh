#!/bin/sh
# Makes and starts the machine whose screen is on port $1. FIXED_MAC: its MAC is always one that libvirt takes.
port=$1
name=$BASE-$port
virsh shutdown "$BASE" > /dev/null 2>&1
virsh dumpxml "$BASE" > "$LISTS/$name.xml"
sed -i "s%<name>$BASE</name>%<name>$name</name>%g" "$LISTS/$name.xml"
mac=$(hexdump -n6 -e '/1 ":%02X"' /dev/urandom | sed s/^://g)
[ -z "$FIXED_MAC" ] || mac=52:54:00:${mac#*:*:*:}
sed -i "s%<mac address='.*'/>%<mac address='$mac'/>%g" "$LISTS/$name.xml"
virsh define "$LISTS/$name.xml"
virsh start "$name"
until virsh list --all | grep "$name" | grep running > /dev/null 2>&1; do
    echo "$name is not ready"
    sleep 2
done
sed -i "/$port/d" "$LISTS/recycle.list"
echo "$port" >> "$LISTS/clear.list"
echo "$name is started"
