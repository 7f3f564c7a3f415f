#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, changing a live device, its limit, its base or its size, loses
# what was written to it, or hangs those who use it.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow

# Two bases of the same content, but for the sector that tells them apart.
fixture()
{
	need_module brd rd_nr=2 rd_size=16384
	undo wait_until 10 rmmod brd
	guard /dev/ram0 'write 0 end .' 'write 20s 1s X'
	guard /dev/ram1 'write 0 end .' 'write 20s 1s Y'
	make_cow test-cow 32768 /dev/ram0
}

# Whatever the test before has done: an empty overlay on /dev/ram0, no limit.
fresh()
{
	dmsetup message test-cow 0 reset
	reload test-cow 32768 /dev/ram0
	undo dmsetup message test-cow 0 reset
}

WRITTEN=('write 1s 1s A' 'write 64k 1M B' 'discard 2M 64k' 'zeroout 9s 1s')
THERE=('is 0 .A.......0......' 'check 64k 1M B' 'check 2M 64k 0' 'check 2112k 64k .'
	'status test-cow used=258 zeroed=16')

same_table()
{
	local i

	fresh
	io $COW "${WRITTEN[@]}"
	for i in 1 2 3; do
		dmsetup load test-cow --table "$(dmsetup table test-cow)"
		io $COW "${THERE[@]}"
		dmsetup resume test-cow
		io $COW "${THERE[@]}"
	done
	# a table that is dropped before it was used
	dmsetup load test-cow --table "0 32768 nbdcow /dev/ram1 2 limit 1"
	dmsetup clear test-cow
	io $COW "${THERE[@]}" 'status test-cow limit=-' 'is 20s X'
}

other_limit()
{
	fresh
	io $COW "${WRITTEN[@]}"
	reload test-cow 32768 /dev/ram0 2 limit 259
	io $COW "${THERE[@]}" 'status test-cow limit=259 health=high' 'write 4M 4k C' \
		'fails ENOSPC write 5M 4k C' 'write 64k 4k B' 'status test-cow health=full'
	reload test-cow 32768 /dev/ram0 2 limit 1
	io $COW 'fails ENOSPC write 5M 4k C' 'write 64k 4k B' 'check 4M 4k C' \
		'status test-cow limit=1 used=259'
	# a limit in a table that waits is not yet in force
	dmsetup load test-cow --table '0 32768 nbdcow /dev/ram0'
	io $COW 'fails ENOSPC write 5M 4k C'
	dmsetup resume test-cow
	io $COW 'write 5M 4k C' 'status test-cow limit=- health=ok'
}

# The new base is what is read, and the old one is free.
other_base()
{
	fresh
	io $COW "${WRITTEN[@]}" 'is 20s X' 'write 24s 1s C' 'is 24s C.......'
	reload test-cow 32768 /dev/ram1
	io $COW "${THERE[@]:0:4}" 'is 20s Y' 'is 24s C.......' 'write 17s 1s D' 'is 16s .D..Y...'
	is 'holders of the old base' "$(ls /sys/block/ram0/holders)" ''
	is 'the table' "$(dmsetup table test-cow)" \
		"0 32768 nbdcow $(stat -c '%Hr:%Lr' /dev/ram1) 0"
	reload test-cow 32768 /dev/ram0
	# blocks 2 and 3 were copied when they were written, with what was there then
	io $COW "${THERE[@]:0:4}" 'is 16s .D..Y...C.......'
}

shorter()
{
	fresh
	io $COW 'write 16380k 4k A'
	fails dmsetup load test-cow --table '0 32760 nbdcow /dev/ram0'
	kernel_log | grep -F 'shorter than the changes'
	io $COW 'check 16380k 4k A' 'discard 16380k 4k'
	fails dmsetup load test-cow --table '0 32760 nbdcow /dev/ram0'
	io $COW 'size 32768s' 'check 16380k 4k 0'

	# the device goes on after a table was loaded
	fresh
	dmsetup load test-cow --table '0 32760 nbdcow /dev/ram0'
	io $COW 'write 16380k 4k B'
	fails dmsetup resume test-cow
	kernel_log | grep -F 'the table is shorter than the changes'
	reload test-cow 32768 /dev/ram0
	io $COW 'size 32768s' 'check 16380k 4k B'
}

# Within a block nobody knows what was changed, so none that was may be cut.
shorter_within_a_block()
{
	local part=/dev/mapper/test-part

	make_dm test-base '0 13 linear /dev/ram0 0'
	make_cow test-part 13 /dev/mapper/test-base
	io $part 'write 9s 1s A'
	reload test-part 16 /dev/mapper/test-base
	reload test-part 16 /dev/mapper/test-base
	fails dmsetup load test-part --table '0 13 nbdcow /dev/mapper/test-base'
	io $part 'is 8s .A...000' 'write 14s 1s B'
	fails dmsetup load test-part --table '0 13 nbdcow /dev/mapper/test-base'
	io $part 'is 8s .A...0B0'
	dmsetup message test-part 0 reset
	reload test-part 13 /dev/mapper/test-base
	# a longer one that was loaded only does not count
	dmsetup load test-part --table '0 16 nbdcow /dev/mapper/test-base'
	dmsetup clear test-part
	io $part 'write 9s 1s A' 'discard 0 13s' 'size 13s' 'check 0 13s 0' 'status test-part used=0'
	reload test-part 16 /dev/mapper/test-base
	io $part 'check 0 16s 0'
}

# While suspended nothing gets through, afterwards everything.
suspended()
{
	fresh
	io $COW 'write 0 4k A' 'suspend test-cow' 'bg write 0 4k B' 'bg check 12k 4k .' \
		'bg write 9s 1s C' 'pending 3' 'message test-cow limit 5' \
		'status test-cow used=1 limit=5' 'pending 3' 'resume test-cow' join \
		'check 0 4k B' 'is 8s .C......' 'status test-cow used=2 limit=5' \
		'message test-cow limit none'
}

reset_while_suspended()
{
	fresh
	io $COW "${WRITTEN[@]}" 'suspend test-cow' 'message test-cow reset' 'resume test-cow' \
		'is 0 ................' 'check 64k 3M .' 'status test-cow used=0 zeroed=0'
}

# A busy device gets new tables, limits and bases, and no byte of it is wrong.
under_load()
{
	local player i

	fresh
	make_dm test-base '0 32768 linear /dev/ram0 0'
	# the same content without the sector that tells the bases apart
	io $COW 'write 16s 8s .'
	io $COW 'model 16M' 'random 7 6000' verify &
	player=$!
	for ((i = 0; ; i++)); do
		io /dev/ram0 'load test-cow 32768 nbdcow /dev/ram1 2 limit 100000' 'resume test-cow' \
			'suspend test-cow' 'message test-cow limit 90000' 'resume test-cow' \
			'load test-cow 32768 nbdcow /dev/mapper/test-base' 'suspend test-cow' \
			'resume test-cow' 'load test-cow 32768 nbdcow /dev/ram0' 'resume test-cow'
		kill -0 $player 2>/dev/null || break
	done
	wait $player
	echo "$i rounds"
	between rounds "$i" 3 100000
}

is_open()
{
	[ "$(dmsetup info -c --noheadings -o open "$1")" -gt 0 ]
}

# The device is open and busy: it cannot go, but its memory can be had back.
removed_under_load()
{
	local player used

	make_cow test-cow2 32768 /dev/ram0
	io /dev/mapper/test-cow2 'write 0 16M A'
	io /dev/mapper/test-cow2 'model 16M' 'write 0 end .' 'random 8 1000000' &
	player=$!
	wait_until 10 is_open test-cow2
	fails dmsetup remove test-cow2
	dmsetup wipe_table test-cow2
	fails wait $player
	used=$(<$MODULE/parameters/total_used)
	is 'blocks of all overlays' "$used" "$total_used_before"
}

run_tests \
	same_table 'the same table' \
	other_limit 'another limit' \
	other_base 'another base of the same content' \
	shorter 'a shorter table is refused' \
	shorter_within_a_block 'a table that ends within a changed block' \
	suspended 'a suspended device' \
	reset_while_suspended 'a reset of a suspended device' \
	under_load 'new tables for a busy device' \
	removed_under_load 'removal of a busy device'
