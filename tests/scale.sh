#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a host that gives each of its many clients an overlay of their
# own runs out of something after a while.
#
# SCALE_DEVICES tells how many at once (default 200), SCALE_ROUNDS how often
# (default 5). What the second round leaves behind, after the first one has filled
# caches, is compared with what the last one does.

. "$(dirname "$0")/common.sh"

devices=${SCALE_DEVICES:-200}
rounds=${SCALE_ROUNDS:-5}

# Objects of each kind that the kernel has, and KiB of memory: name, number, and how much
# of it may be chance: each CPU has a slab of its own, of which all objects count.
numbers()
{
	local cache

	# empties what each CPU keeps
	for cache in /sys/kernel/slab/*/shrink; do
		[ ! -w "$cache" ] || echo 1 >"$cache"
	done
	awk -v cpus="$(nproc)" 'NR > 2 { print $1, $2, cpus * $5 }' /proc/slabinfo
	echo "Percpu $(meminfo Percpu) 256"
	echo "VmallocUsed $(meminfo VmallocUsed) 1024"
	echo "Shmem $(meminfo Shmem) 64"
}

# What there is at least of each, by twenty samples, once the kernel has freed what it
# frees later. What the measuring itself uses goes up and down by hundreds of objects.
settled_numbers()
{
	local i

	for ((i = 0; i < 20; i++)); do
		sleep 1
		numbers
	done |
		awk '!($1 in least) || $2 < least[$1] { least[$1] = $2 }
			END { for (name in least) print name, least[name] }'
}

# lost: what there is more of than after the second round, and by more than chance. What a
# device loses, each of them loses in each round: more than 3/2 for each device. Not looked
# at are the memory of processes; vmalloc areas, whose end the kernel puts off; and what
# kernels that look for faults note of others.
lost()
{
	awk -v objects=$((devices * 3 / 2)) '
		NR == FNR { before[$1] = $2; next }
		$1 ~ /^(anon_vma|anon_vma_chain|vm_area_struct|vmap_area|debug_objects_cache|kmemleak_.*)$/ {
			next
		}
		$2 - before[$1] > $3 + ($1 ~ /^[A-Z]/ ? 0 : objects) {
			print $1, before[$1], $2
		}' "$work/second" "$work/now"
}

# Nothing is, once all is freed
nothing_lost()
{
	numbers >"$work/now"
	[ -z "$(lost)" ]
}

# next_round: its minor numbers in $REPLY
next_round()
{
	read -r REPLY <&"${COPROC[0]}" || fail 'a round failed'
	is total_used "$(<$MODULE/parameters/total_used)" "$total_used_before"
}

# What is there when it has failed.
remove_all()
{
	local name

	for name in $(dmsetup ls --target nbdcow | grep -o '^test-scale[^[:space:]]*'); do
		dmsetup remove --retry "$name"
	done
}

many_devices()
{
	local first pid i

	[ "$rounds" -ge 4 ] || fail 'needs four rounds'
	undo rm -f "$work"/{now,second}
	make_brd 1024
	undo remove_all
	coproc scale "$devices" "$rounds" /dev/ram0
	pid=$COPROC_PID
	next_round
	first=$REPLY
	for ((i = 2; i <= rounds; i++)); do
		echo go >&"${COPROC[1]}"
		next_round
		is 'minor numbers' "$REPLY" "$first"
		[ $i != 2 ] || settled_numbers >"$work/second"
	done
	wait "$pid"
	is 'devices that are left' "$(dmsetup ls --target nbdcow)" 'No devices found'
	(wait_until 20 nothing_lost) >/dev/null ||
		fail "more objects or KiB than after the second round: $(lost)"
}

run_tests \
	many_devices "$devices overlays on one base, $rounds times"
