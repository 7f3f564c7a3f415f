#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a host that gives each of its many clients an overlay of their
# own runs out of something after a while.
#
# SCALE_DEVICES tells how many at once (default 300), SCALE_ROUNDS how often
# (default 3). What the second round leaves behind, after the first one has filled
# caches, is compared with what the last one does.

. "$(dirname "$0")/common.sh"

devices=${SCALE_DEVICES:-300}
rounds=${SCALE_ROUNDS:-3}

# Objects of each kind that the kernel has, and KiB of memory: name and number.
numbers()
{
	local cache

	# empties what each CPU keeps
	for cache in /sys/kernel/slab/*/shrink; do
		[ ! -w "$cache" ] || echo 1 >"$cache"
	done
	awk 'NR > 2 { print $1, $2 }' /proc/slabinfo
	echo "Percpu $(meminfo Percpu)"
	echo "VmallocUsed $(meminfo VmallocUsed)"
	echo "Shmem $(meminfo Shmem)"
}

# grown BEFORE AFTER: what there is more of, and by more than chance: the slabs that the
# CPUs work with count as full, up to 85 objects each, and the rest of the system comes
# and goes. Whatever each device loses is lost as often as there are devices. Not looked
# at are the memory of processes; vmalloc areas, whose end the kernel puts off; and what
# kernels that look for faults note of others.
grown()
{
	awk -v devices="$devices" '
		BEGIN {
			most["Percpu"] = 256; most["VmallocUsed"] = 1024; most["Shmem"] = 64
		}
		NR == FNR { before[$1] = $2; next }
		$1 ~ /^(anon_vma|anon_vma_chain|vm_area_struct|vmap_area|debug_objects_cache|kmemleak_.*)$/ {
			next
		}
		$2 - before[$1] > ($1 in most ? most[$1] : devices * 3 / 4) {
			print $1, before[$1], $2
		}' "$1" "$2"
}

# Nothing goes away any more: the kernel frees much of it later.
settled()
{
	mv "$work/now" "$work/before"
	sleep 2
	numbers >"$work/now"
	[ -z "$(grown "$work/now" "$work/before")" ]
}

# What is there once the kernel has freed all it will: in $work/now.
settle()
{
	numbers >"$work/now"
	wait_until 20 settled
}

# No more than after the second round, once all is freed
nothing_grew()
{
	numbers >"$work/now"
	[ -z "$(grown "$work/second" "$work/now")" ]
}

# next_round: its minor numbers in $REPLY
next_round()
{
	read -r REPLY <&"${COPROC[0]}" || fail 'a round failed'
	is total_used "$(<$MODULE/parameters/total_used)" "$total_used_before"
}

many_devices()
{
	local first pid i

	[ "$rounds" -ge 3 ] || fail 'needs three rounds'
	undo rm -f "$work"/{now,before,second}
	make_brd 1024
	coproc scale "$devices" "$rounds" /dev/ram0
	pid=$COPROC_PID
	next_round
	first=$REPLY
	for ((i = 2; i <= rounds; i++)); do
		echo go >&"${COPROC[1]}"
		next_round
		is 'minor numbers' "$REPLY" "$first"
		if [ $i = 2 ]; then
			settle
			mv "$work/now" "$work/second"
		fi
	done
	wait "$pid"
	is 'devices that are left' "$(dmsetup ls --target nbdcow)" 'No devices found'
	(wait_until 20 nothing_grew) >/dev/null ||
		fail "more objects or KiB than after the second round: $(grown "$work/second" "$work/now")"
}

run_tests \
	many_devices "$devices overlays on one base, $rounds times"
