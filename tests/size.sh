#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a disk of an odd or large size loses its last sectors, shows
# data where there is none, or costs memory that nobody has.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow

fixture()
{
	make_brd 1024
	base=$REPLY
}

# play BASE SECTORS: random I/O on a device of so many sectors. The model then
# says where the base ends, and that what is past it is zero.
play()
{
	local sectors=$2

	make_cow test-cow "$sectors" "$1"
	io $COW "size ${sectors}s" "model $(blockdev --getsize64 "$1")" verify \
		"random $sectors 200" verify 'message test-cow reset' \
		"model $(blockdev --getsize64 "$1")" verify
	io -b $COW "model $(blockdev --getsize64 "$1")" "random $sectors 100" drop verify
	dmsetup remove --retry test-cow
	unset 'undo_list[-1]'
}

# A base of 512 bytes, in a file.
one_sector()
{
	local loop

	make_loop_base 512
	loop=$REPLY
	play "$loop" 1
	play "$loop" 8
	play "$loop" 25
}

# 253 sectors and a half.
uneven_file()
{
	local loop

	make_loop_base 130000
	loop=$REPLY
	play "$loop" 248
	play "$loop" 253
	play "$loop" 400
}

around_one_block()
{
	local sectors

	for sectors in 7 8 9; do
		make_dm test-base "0 $sectors linear $base 0"
		play /dev/mapper/test-base $sectors
		play /dev/mapper/test-base 16
		dmsetup remove --retry test-base
		unset 'undo_list[-1]'
	done
}

# A block that the base fills only in part, written in part.
last_block_of_the_base()
{
	make_dm test-base "0 13 linear $base 0"
	make_cow test-cow 24 /dev/mapper/test-base
	io $COW 'is 8s .....000' 'write 9s 1s A' 'is 8s .A...000' 'write 15s 1s B' \
		'is 8s .A...00B' 'is 16s 00000000' 'write 17s 1s C' 'is 16s 0C000000' \
		'message test-cow reset' 'write 15s 2s D' 'is 8s .....00DD0000000' \
		'status test-cow used=2'
}

# A base that goes on behind the end of the device.
shorter_than_the_base()
{
	make_cow test-cow 13 "$base"
	io $COW 'size 13s' 'model 13s' 'check 0 end .' 'write 10s 3s A' 'is 8s ..AAA' \
		'discard 0 end' 'is 0 00000000' 'message test-cow reset' 'is 8s .....' \
		'zeroout 0 end' 'check 0 end 0'
	# what was zeroed as a whole must not hide the base in a longer table
	reload test-cow 16 "$base"
	io $COW 'is 0 0000000000000...'
}

# big BYTES OFFSET...: a sparse base that has data at these offsets only
big()
{
	local bytes=$1 offset file
	local -a fill=() checks=() writes=() after=()

	shift
	for offset; do
		fill+=("write $offset 8k .")
		checks+=("check $offset 8k .")
		writes+=("write $((offset + 512)) 512 A" "write $((offset + 4096)) 4k B")
		after+=("is $offset .A......BBBBBBBB")
	done
	# other file systems than a tmpfs may not have files so large
	file=$(mktemp -p /dev/shm)
	undo rm -f "$file"
	truncate -s "$bytes" "$file"
	make_loop "$file"
	guard "$REPLY" "${fill[@]}"
	make_cow test-cow $((bytes / 512)) "$REPLY"
	# all of it before the first write, all of it after the last: nothing may alias
	io $COW "size $bytes" "${checks[@]}" "${writes[@]}" "${after[@]}" \
		"status test-cow used=$((2 * $#)) errors=0" 'discard 0 12k' 'check 0 8k 0' \
		"${after[@]:1}" 'message test-cow reset' "${checks[@]}"
	between 'allocated KiB of the base' "$(du -k "$file" | cut -f 1)" 1 $((8 * $# + 64))
}

G=$((1 << 30)) T=$((1 << 40))

over_4_gib()
{
	big $((4 * G + 12288 + 512)) 0 $((4 * G - 8192)) $((4 * G)) 1048576
}

over_2_tib()
{
	big $((2 * T + 4096)) 0 $((2 * T - 4096)) $((4 * G)) $((8 * G - 8192))
}

sixteen_tib()
{
	big $((16 * T)) 0 $((16 * T - 8192)) $((2 * T)) $((8 * T)) $((4 * G)) $((8 * T - 8192))
}

# What a fresh device of 16 TiB takes: its memory and its time.
sixteen_tib_for_nothing()
{
	local before best sectors=$((16 * T / 512))

	make_dm test-base "0 $sectors zero"
	before=$(meminfo MemAvailable)
	make_cow test-cow "$sectors" /dev/mapper/test-base
	between 'memory in KiB' $((before - $(meminfo MemAvailable))) -16384 16384
	between 'metadata in bytes' "$(field test-cow metadata)" 1 $((2200 << 10))
	io $COW 'write 1M 4k A' 'write 7T 4k A' 'write 8T 4k A' 'write 16777215M 4k A' \
		'check 7T 4k A' 'check 4T 4k 0' 'check 16777215M 4k A'
	between 'metadata in bytes' "$(field test-cow metadata)" 1 $((2200 << 10))

	make_dm test-zero '0 8 zero'
	best=$(io $COW "timed 5 load test-zero $sectors nbdcow /dev/mapper/test-base")
	between 'microseconds to create' "$best" 0 20000
}

# The block size of the base is that of the device.
sectors_of_4096_bytes()
{
	local dir

	make_loop_base 1048576 -b 4096
	make_cow test-cow 4096 "$REPLY"
	dir=$(sysfs_of $COW)
	is logical_block_size "$(<"$dir/queue/logical_block_size")" 4096
	is physical_block_size "$(<"$dir/queue/physical_block_size")" 4096
	io $COW 'fails EINVAL write 0 512 A' 'fails EINVAL check 512 4k .' 'model 1M' verify \
		'random 1 500' verify
	fails dmsetup load test-cow --table "0 4100 nbdcow $REPLY"
}

growth()
{
	local sectors

	make_cow test-cow 1029 "$base"
	io $COW 'write 1s 1s A' 'write 100k 8k B' 'discard 200k 8k' 'write 1028s 1s C'
	# into the base, past its end, into another leaf of the map
	for sectors in 1032 2048 4096 $((130 * 2048)); do
		reload test-cow "$sectors" "$base"
		io $COW "size ${sectors}s" 'is 0 .A......' 'check 100k 8k B' 'check 108k 4k .' \
			'check 200k 8k 0' 'check 208k 4k .' 'is 1024s ....C' 'status test-cow used=4'
	done
	io $COW 'is 1024s ....C...' 'check 516k 508k .' 'check 1M end 0' 'write 128M 4k D' \
		'check 128M 4k D' 'check 127M 4k 0' 'check 129M end 0'
}

run_tests \
	one_sector 'a base of 512 bytes' \
	uneven_file 'a base of 130,000 bytes' \
	around_one_block 'a base of a block, and a sector less or more' \
	last_block_of_the_base 'a block that the base fills in part' \
	shorter_than_the_base 'a base that is longer than the device' \
	over_4_gib 'just over 4 GiB' \
	over_2_tib 'just over 2 TiB' \
	sixteen_tib '16 TiB' \
	sixteen_tib_for_nothing '16 TiB cost next to nothing' \
	sectors_of_4096_bytes 'sectors of 4096 bytes' \
	growth 'a device that grows'
