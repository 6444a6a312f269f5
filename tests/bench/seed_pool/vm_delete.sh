#!/bin/sh
# Destroys the machine whose screen is on port $1.
virsh destroy "$BASE-$1"
virsh undefine "$BASE-$1"
rm -f "$LISTS/$BASE-$1.xml"
sed -i "/$1/d" "$LISTS/recycle.list"
