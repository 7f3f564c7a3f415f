#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, an overlay takes all memory of the host, or becomes unusable
# as a whole when it is full, or nobody is told in time.

. "$(dirname "$0")/common.sh"

fixture()
{
	make_brd 1024
	base=$REPLY
}

new_blocks_only()
{
	make_cow test-cow 2048 "$base" 2 limit 16
	io /dev/mapper/test-cow 'write 0 64k A'
	status_is test-cow health=full used=16 limit=16 refused=0
	io /dev/mapper/test-cow 'fails ENOSPC write 64k 4k B' 'fails ENOSPC write 68k 512 B' \
		'fails ENOSPC fua 72k 1k B' 'check 0 64k A' 'check 64k 64k .'
	status_is test-cow health=full used=16 peak=16 refused=3 errors=0
	io /dev/mapper/test-cow 'write 0 64k C' 'write 512 512 D' 'is 0 CDCCCCCC' \
		'check 4k 60k C' 'check 64k end .'
	status_is test-cow health=full used=16 refused=3
}

# A request that goes over the limit on its way: what fits is written.
in_the_middle_of_a_request()
{
	make_cow test-cow 8192 "$base" 2 limit 16
	io /dev/mapper/test-cow 'write 32k 4k A' 'fails ENOSPC write 0 1M B' \
		'check 0 64k B' 'check 64k 960k .' 'check 1M end 0'
	status_is test-cow used=16 refused=1
	io -b /dev/mapper/test-cow 'write 1M 64k C' 'fails EIO flush' drop
	io /dev/mapper/test-cow 'check 64k 960k .' 'check 1M end 0'
	status_is test-cow used=16
}

heals()
{
	make_cow test-cow 2048 "$base" 2 limit 16
	io /dev/mapper/test-cow 'write 0 64k A' 'fails ENOSPC write 64k 4k B'

	io /dev/mapper/test-cow 'discard 0 4k' 'write 64k 4k B' 'fails ENOSPC write 0 4k B' \
		'check 0 4k 0' 'check 64k 4k B'
	status_is test-cow health=full used=16

	dmsetup message test-cow 0 limit 17
	status_is test-cow limit=17 used=16 health=high
	is 'the table' "$(dmsetup table test-cow)" \
		"0 2048 nbdcow $(stat -c '%Hr:%Lr' "$base") 2 limit 17"
	io /dev/mapper/test-cow 'write 68k 4k B' 'fails ENOSPC write 72k 4k B'

	dmsetup message test-cow 0 limit none
	status_is test-cow limit=- used=17 health=ok
	io /dev/mapper/test-cow 'write 72k 4k B'

	dmsetup message test-cow 0 limit 4
	status_is test-cow limit=4 used=18 health=full
	io /dev/mapper/test-cow 'fails ENOSPC write 76k 4k B' 'write 72k 4k C' 'check 72k 4k C' \
		'check 4k 60k A'

	reload test-cow 2048 "$base" 2 limit 19
	status_is test-cow limit=19 used=18
	io /dev/mapper/test-cow 'write 76k 4k B' 'fails ENOSPC write 80k 4k B'
	reload test-cow 2048 "$base"
	status_is test-cow limit=- health=ok
	io /dev/mapper/test-cow 'write 80k 4k B'

	dmsetup message test-cow 0 limit 1
	dmsetup message test-cow 0 reset
	status_is test-cow limit=1 used=0 zeroed=0 health=ok peak=20
	io /dev/mapper/test-cow 'check 0 end .' 'write 0 4k D' 'fails ENOSPC write 4k 4k D'
}

# shared_memory_is KIB: or a MiB more or less
shared_memory_is()
{
	local kib

	kib=$(meminfo Shmem)
	[ "$kib" -ge $(($1 - 1024)) ] && [ "$kib" -le $(($1 + 1024)) ]
}

reset_frees()
{
	local before

	make_cow test-cow 65536 "$base"
	before=$(meminfo Shmem)
	io /dev/mapper/test-cow 'write 0 end A' 'discard 0 4M'
	between 'shared memory in KiB' $(($(meminfo Shmem) - before)) 27648 30720
	dmsetup message test-cow 0 reset
	status_is test-cow used=0 zeroed=0 peak=8192
	is total_used "$(<$MODULE/parameters/total_used)" "$total_used_before"
	wait_until 20 shared_memory_is "$before"
	io /dev/mapper/test-cow 'check 0 1M .' 'check 1M end 0'
}

events()
{
	dmsetup info -c --noheadings -o events test-cow | tr -d ' '
}

events_are()
{
	[ "$(events)" = "$1" ]
}

# All overlays together, whatever each of them may have.
total_limit()
{
	local param=$MODULE/parameters/total_limit

	[ "$total_used_before" = 0 ] || skip 'other overlays exist'
	undo eval "echo $(<$param) >$param"
	echo 256K >$param
	is total_limit "$(<$param)" 256K
	make_cow test-cow 2048 "$base" 2 limit 1000
	make_cow test-cow2 2048 "$base"
	io /dev/mapper/test-cow 'write 0 160k A'
	status_is test-cow health=ok
	echo 128K >$param
	wait_until 10 events_are 1
	status_is test-cow health=full
	echo 256K >$param
	status_is test-cow health=ok
	io /dev/mapper/test-cow2 'write 0 96k B' 'fails ENOSPC write 96k 4k B' 'check 96k 4k .'
	is total_used "$(<$MODULE/parameters/total_used)" 64
	status_is test-cow health=full used=40 refused=0
	status_is test-cow2 health=full used=24 refused=1
	io /dev/mapper/test-cow 'fails ENOSPC write 160k 4k A' 'write 0 4k B' 'discard 0 8k'
	io /dev/mapper/test-cow2 'write 96k 8k B' 'fails ENOSPC write 104k 4k B'
	dmsetup message test-cow 0 reset
	is total_used "$(<$MODULE/parameters/total_used)" 26
	status_is test-cow2 health=ok
	io /dev/mapper/test-cow2 'write 104k 4k B'
	dmsetup remove --retry test-cow2
	unset 'undo_list[-1]'
	is total_used "$(<$MODULE/parameters/total_used)" 0
	echo none >$param
	io /dev/mapper/test-cow 'write 0 1M A'
	is total_used "$(<$MODULE/parameters/total_used)" 256
}

total_limit_default()
{
	local param=$MODULE/parameters/total_limit limit percent

	limit=$(<$param)
	[ "$limit" = 50% ] || [ -z "${RUNNING_KERNEL:-}" ] || skip 'somebody has set total_limit'
	is total_limit "$limit" 50%

	# a percentage of the memory that the kernel has
	percent=$(awk '/^MemTotal:/ { print int($2 / 4 / 100) }' /proc/meminfo)
	make_cow test-cow $((percent * 8 + 8192)) "$base"
	undo eval "echo $limit >$param"
	echo 1% >$param
	io /dev/mapper/test-cow "write 0 $(((percent - 64) * 4))k A" \
		"fails ENOSPC write $(((percent - 64) * 4))k 1M A"
	between 'blocks stored' "$(<$MODULE/parameters/total_used)" $((percent - 64)) $((percent + 1))
}

total_limit_grammar()
{
	local param=$MODULE/parameters/total_limit value

	undo eval "echo $(<$param) >$param"
	for value in 1048576 4K 16m 2G 1T 25% 100% 0% none; do
		echo $value >$param
		is total_limit "$(<$param)" $value
	done
	for value in '' x -1 5x 10%% 'none at all' 1G2; do
		fails eval "echo '$value' >$param"
		is total_limit "$(<$param)" none
	done
}

events_at_80_and_100_percent()
{
	local waiter

	make_cow test-cow 2048 "$base" 2 limit 100
	is events "$(events)" 0
	dmsetup wait test-cow 0 &
	waiter=$!
	io /dev/mapper/test-cow 'write 0 316k A'
	status_is test-cow used=79 health=ok
	io /dev/mapper/test-cow 'write 316k 4k A'
	status_is test-cow used=80 health=high
	# this one returns only because of an event
	wait $waiter
	wait_until 10 events_are 1
	dmsetup wait test-cow 1 &
	waiter=$!
	io /dev/mapper/test-cow 'write 320k 76k A' 'write 0 1M A' || :
	status_is test-cow used=100 health=full
	wait $waiter
	wait_until 10 events_are 2

	# down, and up again; an event on the way down would show in the count
	io /dev/mapper/test-cow 'discard 0 380k'
	status_is test-cow used=5 health=ok
	io /dev/mapper/test-cow 'write 0 300k B'
	wait_until 10 events_are 3
	dmsetup message test-cow 0 limit 80
	wait_until 10 events_are 4
	status_is test-cow health=full
}

no_event_below_80_percent()
{
	make_cow test-cow 2048 "$base" 2 limit 100
	io /dev/mapper/test-cow 'write 0 316k A' 'discard 0 100k' 'write 0 100k A'
	dmsetup message test-cow 0 reset
	io /dev/mapper/test-cow 'write 0 316k A'
	# an event sent by now has arrived when a later one has
	io /dev/mapper/test-cow 'write 316k 4k A'
	wait_until 10 events_are 1
}

# refuses MESSAGE WORD...
refuses()
{
	expected+=("$1")
	shift
	echo "<6>tests: refuses $*" >/dev/kmsg
	fails dmsetup message -- test-cow 0 "$@"
}

messages()
{
	local -a expected=() said
	local i

	make_cow test-cow 2048 "$base" 2 limit 16
	io /dev/mapper/test-cow 'write 0 4k A'
	refuses 'unknown message' resets
	refuses 'unknown message' limits 4
	refuses 'takes 0 arguments' reset now
	refuses 'takes 1 arguments' limit
	refuses 'takes 1 arguments' limit 4 5
	refuses 'expected a number' limit 0
	refuses 'expected a number' limit -1
	refuses 'expected a number' limit 4k
	refuses 'expected a number' limit 99999999999999999999
	status_is test-cow limit=16 used=1
	io /dev/mapper/test-cow 'check 0 4k A' 'check 4k end .'
	# each message's answer is the line after it, but for what others say
	mapfile -t said < <(kernel_log | grep -e 'tests: refuses' -e 'nbdcow: ')
	is 'the number of answers' "${#said[@]}" $((2 * ${#expected[@]}))
	for i in "${!expected[@]}"; do
		[[ ${said[2 * i + 1]} == *"${expected[i]}"* ]] ||
			fail "${said[2 * i]}: answered ${said[2 * i + 1]}, not '${expected[i]}'"
	done
}

full_tmpfs()
{
	make_tmpfs tmpfs -o size=64k
	make_cow test-cow 2048 "$base" 2 tmpfs "$work/tmpfs"
	io /dev/mapper/test-cow 'write 0 64k A' 'fails ENOSPC write 64k 4k B' \
		'fails ENOSPC write 68k 512 B' 'check 0 64k A' 'check 64k end .'
	status_is test-cow health=full used=16 refused=2
	wait_until 10 events_are 1
	io /dev/mapper/test-cow 'write 0 64k C' 'discard 0 4k' 'write 64k 4k B' 'check 0 4k 0' \
		'check 4k 60k C' 'check 64k 4k B' 'fails ENOSPC write 0 4k B' 'check 0 4k 0'
	mount -o remount,size=128k "$work/tmpfs"
	io /dev/mapper/test-cow 'write 0 4k D'
	status_is test-cow health=ok used=17
}

run_tests \
	new_blocks_only 'a full overlay refuses new blocks and nothing else' \
	in_the_middle_of_a_request 'a request that reaches the limit half-way' \
	heals 'discard, a higher limit and reset heal it' \
	reset_frees 'a reset gives all memory back' \
	total_limit 'the limit over all overlays' \
	total_limit_default 'by default all overlays share half of the memory' \
	total_limit_grammar 'the grammar of total_limit' \
	events_at_80_and_100_percent 'events at 80 % and 100 %' \
	no_event_below_80_percent 'no event below 80 %' \
	messages 'wrong messages are refused and change nothing' \
	full_tmpfs 'a full tmpfs'
