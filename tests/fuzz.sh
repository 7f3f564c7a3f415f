#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, some mixture of operations that nobody thought of loses data.
#
# FUZZ_SECONDS tells how long to look (default 60), FUZZ_SEED with which seed to
# begin; V=1 shows the progress.

. "$(dirname "$0")/common.sh"

# The bases end within a block, shortly after a leaf of the map does: 64.25 MiB
# and three sectors. The last is slow in half of what is used most, so that reads of
# it overlap with what follows. /dev/ram1 is for swap.
fixture()
{
	local sectors=$((131072 + 512 + 3)) total=$MODULE/parameters/total_limit

	need fuzz
	make_brd 66560 2
	unguard /dev/ram1
	need_module dm-delay
	make_dm test-fast "0 $sectors linear /dev/ram0 0"
	# a queue of requests, which are merged on their way
	make_loop /dev/ram0 --read-only
	make_dm test-twin "0 $sectors linear $REPLY 0"
	make_dm test-slow "0 1024 delay /dev/ram0 0 1
1024 130304 linear /dev/ram0 1024
131328 $((sectors - 131328)) delay /dev/ram0 131328 1"
	undo remove_rest "$(<"$total")"
	seconds=${FUZZ_SECONDS:-60}
}

# What a failing run leaves behind.
remove_rest()
{
	local name

	for name in nbdcow-fuzz-view{0,1,2} nbdcow-fuzz; do
		! dmsetup info "$name" >/dev/null 2>&1 || dmsetup remove --force --retry "$name"
	done
	echo "$1" >$MODULE/parameters/total_limit
}

# play SECONDS OPTION...
play()
{
	local -a seed=()

	[ -z "${FUZZ_SEED:-}" ] || seed=(--seed "$FUZZ_SEED")
	fuzz --seconds "$1" "${seed[@]}" "${@:2}" /dev/mapper/test-{fast,twin,slow}
}

one_thread()
{
	play $((seconds / 4)) --threads 1
}

threads()
{
	play $((seconds / 2)) --threads 4
}

# On a tmpfs that is full soon, with huge pages where the kernel has them, and
# swapped out all the time.
swapped()
{
	local before i

	swap_to /dev/ram1
	mkdir "$work/tmpfs"
	mount -t tmpfs -o size=12m,huge=always none "$work/tmpfs" ||
		mount -t tmpfs -o size=8m none "$work/tmpfs"
	undo umount "$work/tmpfs"
	before=$(counted /proc/vmstat pswpin)
	# a slow machine may come no further than to a round that swaps nothing
	for ((i = 0; i < 5; i++)); do
		# only in a subshell can it be joined
		(
			echo $BASHPID >$SWAPPED/cgroup.procs
			play $((seconds / 4)) --tmpfs "$work/tmpfs" --cgroup $SWAPPED
		)
		[ "$(counted /proc/vmstat pswpin)" = "$before" ] || return 0
	done
	fail 'nothing was swapped'
}

#
# What is wrong is found
#

# /dev/mapper/test-wrong is as the other bases, but for some blocks where most is done.
make_wrong()
{
	local sectors

	sectors=$(blockdev --getsz /dev/mapper/test-fast)
	make_dm test-wrong "0 1008 linear /dev/ram0 0
1008 32 linear /dev/ram0 2048
1040 $((sectors - 1040)) linear /dev/ram0 1040"
	undo remove_rest "$(<$MODULE/parameters/total_limit)"
	undo rm -f "$work/found"
}

# tells COMMAND...: it fails, because it has found these; what it says is in $work/found
tells()
{
	local rc=0

	"$@" >"$work/found" 2>&1 || rc=$?
	cat "$work/found"
	is 'the status' $rc 1
	grep -q 'has sector 20[4-7][0-9] with tag 1$' "$work/found"
}

# told PATTERN: what the last line that begins like this goes on with
told()
{
	sed -n "s/^# $1//p" "$work/found" | tail -n 1
}

# What it finds, here in the second round and after a reload, comes again with the seed of
# that round, and is made short. What it prints for io fails too, and works with the right
# base.
one_is_wrong()
{
	local again before commands

	make_wrong
	tells fuzz --seed 34 --threads 1 --without nowait,views /dev/mapper/test-{fast,wrong}
	is 'what it begins with' "$(told 'seed ')" '34, 1 threads'
	between 'how many operations are left' \
		"$(sed -n 's/^# \([0-9]*\) operations are enough:$/\1/p' "$work/found")" 1 9
	again=$(told 'again: ')
	before=$(told sector)
	commands=$(sed -n '/^dmsetup create/,/[^\\]$/p' "$work/found")
	[[ $commands = *" nbdcow /dev/mapper/test-fast "*" nbdcow /dev/mapper/test-wrong "* ]]
	tells eval "$again"
	is 'the sector' "$(told sector)" "$before"
	tells eval "$commands"
	dmsetup remove --retry nbdcow-fuzz
	eval "${commands//test-wrong/test-fast}"
}

# What several threads find comes again with as few of them and of all else as will do.
threads_are_wrong()
{
	local again

	make_wrong
	tells fuzz --seed 1 --threads 3 --ops 100 /dev/mapper/test-wrong
	again=$(told 'again: ')
	[[ $again = *' --threads 2 --repeat --ops '*' --without '* ]]
	tells eval "$again"
}

run_tests \
	one_thread 'one thread, whose reads are certain' \
	threads 'four threads on the same blocks' \
	swapped 'the same with overlays that are swapped out' \
	one_is_wrong 'what one thread finds comes again, and is made short' \
	threads_are_wrong 'what several threads find comes again'
