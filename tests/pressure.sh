#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, what was written is lost, or everything hangs, when memory
# gets scarce and the kernel swaps an overlay out.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
CGROUP=/sys/fs/cgroup/test-p

# A line of /proc/vmstat.
vmstat()
{
	local name value

	while read -r name value; do
		[ "$name" != "$1" ] || echo "$value"
	done </proc/vmstat
}

within()
(
	echo $BASHPID >$CGROUP/cgroup.procs
	exec "$@"
)

# make_swapped_cow KIB: with a base and swap of that size, in a cgroup of its own
make_swapped_cow()
{
	need mkswap swapon
	[ -e /sys/fs/cgroup/cgroup.controllers ] || skip 'needs cgroup v2'
	echo +memory >/sys/fs/cgroup/cgroup.subtree_control || skip 'needs the memory controller'
	mkdir $CGROUP
	undo rmdir $CGROUP
	[ -e $CGROUP/memory.reclaim ] || skip 'needs memory.reclaim'
	make_brd "$1" 2
	unguard /dev/ram1
	# older kernels would reach the RAM disk itself without any bio
	make_dm test-swap "0 $(($1 * 2)) linear /dev/ram1 0"
	mkswap /dev/mapper/test-swap
	swapon -p 30000 /dev/mapper/test-swap
	undo swapoff /dev/mapper/test-swap
	within dmsetup create test-cow --table "0 $(($1 * 2)) nbdcow /dev/ram0"
	undo dmsetup remove --retry test-cow
}

# swapped_within LEAST MOST: in KiB
swapped_within()
{
	local bytes

	bytes=$(<$CGROUP/memory.swap.current)
	[ "$bytes" -ge $(($1 * 1024)) ] && [ "$bytes" -le $(($2 * 1024)) ]
}

push_out()
{
	echo 8M >$CGROUP/memory.reclaim || :
	swapped_within "$1" "$2"
} 2>/dev/null

# In turns with a program that pushes all but 4 MiB of it out of the memory.
random_io()
{
	local out in

	make_swapped_cow 32768
	cat >"$work/push" <<-EOF
		#!/bin/bash
		for ((i = 0; i < 100; i++)); do
			[ "\$(<$CGROUP/memory.current)" -ge $((4 << 20)) ] || exit 0
			echo 8M >$CGROUP/memory.reclaim
		done 2>/dev/null
		exit 1
	EOF
	chmod +x "$work/push"
	undo rm "$work/push"
	out=$(vmstat pswpout)
	in=$(vmstat pswpin)
	io $COW 'model 32M' 'write 0 16M A' "run $work/push" 'write 16M 16M B' "run $work/push" \
		'random 1 250' "run $work/push" verify "run $work/push" 'random 2 250' verify
	between 'pages swapped out' $(($(vmstat pswpout) - out)) 7000 1000000
	between 'pages swapped in' $(($(vmstat pswpin) - in)) 4096 1000000
	status_is test-cow refused=0 errors=0
	io $COW 'discard 0 end' 'check 0 end 0'
	status_is test-cow used=0
	wait_until 10 swapped_within 0 1024
}

# soon COMMAND: works with RWF_NOWAIT, though not necessarily at once
soon()
{
	local tries

	for ((tries = 0; tries < 20; tries++)); do
		if io $COW "nowait $1"; then
			return 0
		fi
		sleep 0.05
	done
	fail "nowait $1"
}

# All of the overlay is swapped out before each use.
swapped_out()
{
	local before

	make_swapped_cow 32768
	io $COW 'write 0 32M A'
	wait_until 20 push_out 31744 33792
	io $COW 'check 0 2M A' 'write 4097s 1s B' 'write 5s 1s B' 'write 4M 1M C' 'write 6M 64k C'
	soon 'check 8M 4k A'
	soon 'write 10M 4k D'
	soon 'write 20493s 3s D'
	io $COW 'zeroout 12289k 1k' 'discard 13M 4k' 'discard 13321k 30k'
	wait_until 20 push_out 31000 33792

	before=$(<$CGROUP/memory.swap.current)
	io $COW 'discard 16M 8M'
	between 'bytes of swap given back' $((before - $(<$CGROUP/memory.swap.current))) \
		$((7 << 20)) $((9 << 20))
	io -b $COW 'is 0 AAAAABAA' 'check 4k 2044k A' 'is 2M ABAAAAAA' 'check 2052k 2044k A' \
		'check 4M 1M C' 'check 5M 1M A' 'check 6M 64k C' 'check 6208k 4032k A' \
		'check 10M 4k D' 'is 20488s AAAAADDD' 'check 10248k 2040k A' 'is 12M AA00AAAA' \
		'check 12292k 1020k A' 'check 13M 4k 0' 'check 13316k 8k A' 'check 13324k 24k 0' \
		'check 13348k 3036k A' 'check 16M 8M 0' 'check 24M end A'
	status_is test-cow used=$((8192 - 1 - 6 - 2048)) zeroed=$((1 + 6 + 2048)) refused=0

	wait_until 20 push_out 22000 33792
	dmsetup message test-cow 0 reset
	wait_until 10 swapped_within 0 1024
	io $COW 'check 0 end .' 'write 0 16M E'
	wait_until 20 push_out 15360 33792
	dmsetup remove --retry test-cow
	unset 'undo_list[-1]'
	wait_until 10 swapped_within 0 1024
}

run_tests \
	random_io 'random I/O on an overlay that is swapped out again and again' \
	swapped_out 'blocks that are swapped out are read, rewritten and discarded'
