#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a diff of a disk that is in use is not what the disk held at any
# time, or making one loses what is written meanwhile.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
VIEW=/dev/mapper/test-view

# 64 MiB and a bit more than the base, so that there are several leaves.
SECTORS=$((200 * 2048 + 8))

fixture()
{
	make_brd 102400
	make_cow test-cow $SECTORS /dev/ram0
}

fresh()
{
	dmsetup message test-cow 0 reset
	undo dmsetup message test-cow 0 reset
}

# make_view [NAME]
make_view()
{
	make_dm "${1:-test-view}" "0 $SECTORS nbdcow-view $COW /dev/ram0" --readonly
}

# view_is STATE SAVED
view_is()
{
	is 'the status' "$(dmsetup status test-view)" "0 $SECTORS nbdcow-view $1 $2"
}

total_is()
{
	is 'blocks of all overlays' "$(<"$MODULE/parameters/total_used")" "$1"
}

# Everything that can happen to a block, in each of the states it can be in.
WRITTEN=('write 4k 1M A' 'write 70M 4k A' 'discard 2M 64k' 'write 9s 1s B' 'write 150M 64k A')
THERE=('is 8s AB......' 'check 8k 1020k A' 'check 1028k 4k .' 'check 70M 4k A' 'check 2M 64k 0'
	'check 3M 64k .' 'check 150M 64k A' 'check 160M end 0')

is_frozen()
{
	io $VIEW 'is 8s ABAAAAAA' "${THERE[@]:1}"
}

instant()
{
	local table

	fresh
	io $COW "${WRITTEN[@]}"
	make_view
	is_frozen
	view_is ok 0

	io $COW 'write 4k 64k C' 'write 513k 512 D' 'discard 128k 256k' 'zeroout 70M 4k' \
		'write 2M 8k E' 'write 3M 8k E' 'write 1028k 4k E' 'discard 3080k 4k' \
		'discard 128M 64M' 'write 150M 4k F' 'write 160M 4k F'
	is_frozen
	io $COW 'check 4k 64k C' 'is 1024s AADAAAAA' 'check 128k 256k 0' 'check 70M 4k 0' \
		'check 2M 8k E' 'check 3M 8k E' 'check 150M 4k F' 'check 154M 6M 0'
	# 16, 1 and 64 blocks of the MiB, the one at 70 MiB, 16 at 150 MiB
	view_is ok 98
	total_is $((98 + $(field test-cow used)))
	# each is saved once
	io $COW 'write 4k 64k G' 'discard 0 end' 'write 4k 1M H'
	is_frozen
	is 'the map' "$(dmsetup message test-view 0 extents 0 1000000)" \
		"1b 256o 255b 16z 17392b 1o 20479b 16o $((SECTORS / 8 - 38416))b"

	dmsetup suspend test-view
	dmsetup resume test-view
	is_frozen
	table=$(dmsetup table test-view)
	is 'the table' "$table" \
		"0 $SECTORS nbdcow-view $(stat -Lc '%Hr:%Lr' $COW) $(stat -c '%Hr:%Lr' /dev/ram0)"
	# another table is another instant
	dmsetup load test-view --readonly --table "$table"
	is_frozen
	dmsetup resume test-view
	io $VIEW 'check 0 4k 0' 'check 4k 1M H' 'check 2M end 0'
	total_is "$(field test-cow used)"
}

# What a reset throws away, a view keeps.
reset()
{
	fresh
	io $COW "${WRITTEN[@]}"
	make_view
	io $COW 'write 4k 64k C' 'message test-cow reset' 'check 0 100M .' 'write 4k 64k D'
	is_frozen
	status_is test-cow used=16
	total_is $((16 + 16 + 256 + 1 + 16))
	dmsetup wipe_table test-view
	total_is 16
	io $COW 'check 4k 64k D'
}

several()
{
	local i tags=.ABCD

	fresh
	for i in 1 2 3 4; do
		io $COW "write 0 64k ${tags:i:1}" "write ${i}M 64k E"
		make_view "test-view$i"
	done
	io $COW 'write 0 32k F' 'discard 1M 128k' 'message test-cow reset' 'write 0 4M G'
	for i in 1 2 3 4; do
		io "/dev/mapper/test-view$i" "check 0 64k ${tags:i:1}" "check ${i}M 64k E" \
			"check $((i + 1))M 64k ."
	done
	dmsetup wipe_table test-view2
	io /dev/mapper/test-view3 'check 0 64k C' 'check 3M 64k E'
}

# The copy may get other tables, but for longer ones, and go.
tables()
{
	local COW=/dev/mapper/test-cow2

	fresh
	undo io /dev/ram0 'absent test-view' 'absent test-cow2' 'absent test-base'
	dmsetup create test-cow2 --table "0 $SECTORS nbdcow /dev/ram0 2 limit 300"
	io $COW 'write 4k 4k A'
	dmsetup create test-view --readonly --table "0 $SECTORS nbdcow-view $COW /dev/ram0"
	fails dmsetup load test-cow2 --table "0 $((SECTORS + 8)) nbdcow /dev/ram0"
	kernel_log | grep -F 'cannot grow while there is a view'
	dmsetup create test-base --table "0 204800 linear /dev/ram0 0"
	reload test-cow2 $SECTORS /dev/mapper/test-base 2 limit 5
	# what is saved does not count in the limit
	io $COW 'write 4k 4k B' 'write 1M 16k B' 'fails ENOSPC write 2M 4k B'
	io $VIEW 'is 8s AAAAAAAA' 'check 8k 4M .'
	dmsetup remove --retry test-cow2
	dmsetup remove --retry test-base
	io $VIEW 'is 8s AAAAAAAA' 'check 8k 4M .'
	total_is 6
	fails rmmod dm_nbdcow
	dmsetup remove --retry test-view
	total_is 0
}

# Never a write, but the view is lost when there is no memory for it.
no_room()
{
	local parameter=$MODULE/parameters/total_limit

	fresh
	io $COW 'write 0 64k A'
	make_view
	undo cp "$work/total_limit" "$parameter"
	cat "$parameter" >"$work/total_limit"
	echo $((20 * 4096)) >"$parameter"
	io $COW 'write 0 16k B'
	io $VIEW 'check 0 64k A'
	io $COW 'write 16k 16k B' 'discard 48k 8k' 'check 0 32k B' 'check 32k 16k A'
	fails dd if=$VIEW of=/dev/null bs=4k count=16 iflag=direct
	view_is failed 4
	kernel_log | grep -F 'a view is lost'
	io $COW 'check 0 32k B' 'write 0 32k C' 'check 48k 8k 0'
}

# refused TEXT TABLE
refused()
{
	fails dmsetup create test-view --readonly --table "$2"
	kernel_log | grep -F "$1"
}

bad_tables()
{
	refused 'Two devices are needed' "0 $SECTORS nbdcow-view $COW"
	refused 'longer than the device' "0 $((SECTORS + 8)) nbdcow-view $COW /dev/ram0"
	refused 'has no nbdcow table' "0 $SECTORS nbdcow-view /dev/ram0 /dev/ram0"
	refused 'does not exist' "0 $SECTORS nbdcow-view /dev/none /dev/ram0"
	refused 'Cannot open the base' "0 $SECTORS nbdcow-view $COW /dev/none"
	fails dmsetup create test-view --table "0 $SECTORS nbdcow-view $COW /dev/ram0"
	kernel_log | grep -F 'A view is read-only'
	undo dmsetup remove --retry test-self
	dmsetup create test-self --notable
	fails dmsetup load test-self --readonly \
		--table "0 $SECTORS nbdcow-view $COW /dev/mapper/test-self"
	make_view
	fails dmsetup message test-view 0 extents 0
	fails dmsetup message test-view 0 reset
	fails dmsetup message test-view 0 extents $((SECTORS / 8)) 1
	fails dd if=/dev/zero of=$VIEW bs=4k count=1 oflag=direct conv=notrunc
	dmsetup wipe_table test-view
	# what is longer than the device is its map only
	reload test-cow $((SECTORS - 8)) /dev/ram0
	make_dm test-view2 "0 8 zero"
	dmsetup load test-view2 --readonly --table "0 $((SECTORS - 8)) nbdcow-view $COW /dev/ram0"
	dmsetup resume test-view2
	io /dev/mapper/test-view2 'check 0 100M .' 'check 100M end 0'
	reload test-cow $SECTORS /dev/ram0
}

# It looks at what is stored, and not at each block.
large()
{
	make_cow test-cow2 $((1 << 31)) /dev/ram0
	io /dev/mapper/test-cow2 'write 5M 4k A'
	dmsetup create test-view --readonly \
		--table "0 $((1 << 31)) nbdcow-view /dev/mapper/test-cow2 /dev/ram0"
	undo dmsetup remove --retry test-view
	timeout 30 blkdiscard /dev/mapper/test-cow2
	io $VIEW 'check 4M 1M .' 'check 5M 4k A' 'check 200G 1M 0'
}

# A copy that grows again and again while its view goes, which has the layer for longer than
# it is in the list of views: until a grace period is over and what was saved is freed.
going()
{
	local COW=/dev/mapper/test-cow2 commands=() sectors=65536 i n

	undo io /dev/ram0 'absent test-view'
	make_cow test-cow2 $sectors /dev/ram0
	for i in 1 2 3; do
		commands+=('write 0 32M A' "create test-view 65536 nbdcow-view $COW /dev/ram0"
			'write 0 32M B' 'bg remove test-view')
		for ((n = 0; n < 200; n++)); do
			commands+=("try load test-cow2 $((sectors += n % 10 ? 0 : 8)) nbdcow /dev/ram0")
		done
		commands+=(join "reload test-cow2 $sectors nbdcow /dev/ram0" 'check 0 32M B'
			'message test-cow2 reset' 'check 0 32M .')
	done
	io $COW "${commands[@]}"
	io $COW "size ${sectors}s"
}

# Mounted and suspended with its file system, it can be frozen.
mounted()
{
	need mkfs.ext4
	need_module ext4
	fresh
	mkfs.ext4 -q $COW 64M
	mkdir "$work"/{mnt,mnt2}
	undo rmdir "$work"/{mnt,mnt2}
	mount -t ext4 $COW "$work/mnt"
	undo umount "$work/mnt"
	echo before >"$work/mnt/file"
	dmsetup suspend test-cow
	undo dmsetup resume test-cow
	make_view
	dmsetup resume test-cow
	echo after >"$work/mnt/file"
	sync -f "$work/mnt"
	# its journal is empty
	mount -t ext4 -o ro,noload $VIEW "$work/mnt2"
	undo umount "$work/mnt2"
	is 'the file' "$(<"$work/mnt2/file")" before
	is 'the live file' "$(<"$work/mnt/file")" after
}

# All blocks of a small copy, and a few that are far from each other.
races()
{
	local seconds=${VIEW_SECONDS:-4}

	undo io /dev/ram0 'absent test-view'
	make_cow test-cow2 6144 /dev/ram0
	view_race /dev/mapper/test-cow2 6144 /dev/ram0 "$seconds" 768
	make_cow test-cow3 $((1 << 31)) /dev/ram0
	view_race /dev/mapper/test-cow3 $((1 << 31)) /dev/ram0 "$seconds" 768
}

run_tests \
	instant 'a view shows an instant' \
	reset 'a reset beside a view' \
	several 'several views' \
	tables 'tables of a copy that is viewed' \
	no_room 'no memory to keep a block' \
	bad_tables 'tables and messages that are no good' \
	large 'a discard of 1 TiB beside a view' \
	going 'a view that goes while its device grows' \
	mounted 'a file system' \
	races 'views of a busy copy'
