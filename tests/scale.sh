#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a host that gives each of its many clients an overlay of their
# own runs out of something after a while.
#
# SCALE_DEVICES tells how many at once (default 500), SCALE_ROUNDS how often
# (default 2).

. "$(dirname "$0")/common.sh"

devices=${SCALE_DEVICES:-500}
rounds=${SCALE_ROUNDS:-2}

# Objects of each kind that the kernel has: name and number.
slabs()
{
	local cache

	# empties what each CPU keeps
	for cache in /sys/kernel/slab/{kmalloc,nbdcow,bio,shmem,filp,biovec}*/shrink; do
		[ ! -w "$cache" ] || echo 1 >"$cache"
	done
	awk 'NR > 2 { print $1, $2 }' /proc/slabinfo
}

# grown BEFORE: kinds with as many more objects as one a device in each round;
# the kernel puts off the end of vmalloc areas
grown()
{
	slabs | awk -v least=$((devices * (rounds - 1))) '
		NR == FNR { before[$1] = $2; next }
		$1 != "vmap_area" && $2 - before[$1] >= least { print $1, before[$1], $2 }' "$1" -
}

nothing_grew()
{
	local kinds

	kinds=$(grown "$work/slabs")
	[ -z "$kinds" ] && [ "$(meminfo Shmem)" -le "$1" ]
}

many_devices()
{
	local first last shmem

	make_brd 1024
	# the first round may fill caches
	coproc scale "$devices" "$rounds" /dev/ram0
	read -r first <&"${COPROC[0]}" || fail 'the first round failed'
	is total_used "$(<$MODULE/parameters/total_used)" "$total_used_before"
	slabs >"$work/slabs"
	undo rm -f "$work/slabs"
	shmem=$(meminfo Shmem)
	echo go >&"${COPROC[1]}"
	read -r last <&"${COPROC[0]}" || fail 'a round failed'
	wait "$COPROC_PID"
	is 'minor numbers' "$last" "$first"
	is total_used "$(<$MODULE/parameters/total_used)" "$total_used_before"
	is 'devices that are left' "$(dmsetup ls --target nbdcow)" 'No devices found'
	if ! (wait_until 20 nothing_grew $((shmem + 64))) >/dev/null; then
		fail "$(meminfo Shmem) KiB of shared memory, after the first round $shmem;" \
			"more objects: $(grown "$work/slabs")"
	fi
}

run_tests \
	many_devices "$devices overlays on one base, $rounds times"
