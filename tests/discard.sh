#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, deleting files does not give memory back, a full overlay
# cannot be emptied, or what was discarded comes back to life.

. "$(dirname "$0")/common.sh"

MIB=$((1 << 20))

fixture()
{
	make_brd 40960
	base=$REPLY
}

# frees_memory COMMAND...: on a device that stores 32 MiB of its 40
frees_memory()
{
	local before full after

	make_cow test-cow 81920 "$base"
	before=$(meminfo Shmem)
	io /dev/mapper/test-cow 'write 4M 32M A'
	full=$(meminfo Shmem)
	between 'shared memory in KiB, stored' $((full - before)) 31744 34816
	status_is test-cow used=8192 zeroed=0
	"$@"
	after=$(meminfo Shmem)
	between 'shared memory in KiB, freed' $((full - after)) 31744 34816
	status_is test-cow used=0 peak=8192 zeroed=8192 health=ok
	io /dev/mapper/test-cow 'check 0 4M .' 'check 4M 32M 0' 'check 36M 4M .'
}

discard_frees()
{
	frees_memory io /dev/mapper/test-cow 'discard 4M 32M'
}

zeroout_frees()
{
	frees_memory io /dev/mapper/test-cow 'zeroout 4M 32M'
}

falloc_frees()
{
	frees_memory io /dev/mapper/test-cow 'punch 4M 16M' 'zerorange 20M 16M'
}

# A block at a time, on both sides of a leaf of the map, which spans 64 MiB.
single_blocks()
{
	local -a writes=() discards=()
	local i

	make_cow test-cow $((66 * 2048)) "$base"
	for ((i = 16384 - 8; i < 16384 + 8; i++)); do
		writes+=("write $((i * 4))k 512 A")
		discards+=("discard $((i * 4))k 4k")
	done
	io /dev/mapper/test-cow "${writes[@]}"
	status_is test-cow used=16
	io /dev/mapper/test-cow "${discards[@]}" "check 0 40M ." 'check 40M end 0'
	status_is test-cow used=0 zeroed=16
}

# A tmpfs may have pages of 2 MiB. What a block brought along goes with the last of them.
huge_pages()
{
	local -a writes=() discards=()
	local i

	make_tmpfs tmpfs -o size=64m,huge=always || skip 'this kernel has no huge pages in tmpfs'
	make_cow test-cow $((66 * 2048)) "$base" 2 tmpfs "$work/tmpfs"
	for ((i = 1; i < 66; i += 4)); do
		writes+=("write ${i}M 4k A" "write $((i * 1024 + 64))k 8k B")
		discards+=("discard $((i * 1024 + 68))k 4k" "discard ${i}M 4k"
			"discard $((i * 1024 + 64))k 4k")
	done
	io /dev/mapper/test-cow "${writes[@]}"
	status_is test-cow used=51
	between 'KiB of the tmpfs, stored' "$(df --output=used "$work/tmpfs" | tail -n 1)" \
		$((17 * 2048)) $((17 * 2048 + 64))
	io /dev/mapper/test-cow "${discards[@]}" 'check 41M end 0'
	status_is test-cow used=0 zeroed=51
	is 'KiB of the tmpfs, freed' "$(($(df --output=used "$work/tmpfs" | tail -n 1)))" 0
}

# Half blocks at the ends: a discard leaves them alone, zeroing zeroes them.
edges()
{
	make_cow test-cow 2048 "$base"
	io /dev/mapper/test-cow \
		'write 0 64k A' \
		'discard 7s 10s' 'is 0 AAAAAAAA00000000AAAAAAAA' \
		'zeroout 19s 10s' 'is 16s AAA0000000000AAA' \
		'discard 33s 6s' 'is 32s AAAAAAAA' \
		'zeroout 34s 2s' 'is 32s AA00AAAA' \
		'discard 129s 14s' 'is 128s ................' \
		'zeroout 143s 10s' 'is 136s .......0000000000.......' \
		'zeroout 170s 1s' 'is 168s ..0.....' \
		'discard 168s 8s' 'is 168s 00000000' \
		'write 170s 2s B' 'is 168s 00BB0000' \
		'discard 176s 8s' 'write 184s 8s C' 'is 176s 00000000CCCCCCCC'
}

# Nothing that a discard does needs space.
works_when_full()
{
	make_cow test-cow 2048 "$base" 2 limit 16
	io /dev/mapper/test-cow 'write 0 64k A' 'fails ENOSPC write 64k 4k B'
	status_is test-cow health=full used=16
	io /dev/mapper/test-cow 'discard 128k 64k' 'zeroout 192k 64k' 'check 128k 128k 0'
	status_is test-cow health=full used=16 zeroed=32
	io /dev/mapper/test-cow 'discard 0 4k' 'zeroout 4k 4k' 'write 64k 8k B' \
		'check 0 8k 0' 'check 8k 56k A' 'check 64k 8k B' 'check 72k 56k .'
	status_is test-cow health=full used=16
	io /dev/mapper/test-cow 'discard 0 end' 'check 0 end 0'
	status_is test-cow health=ok used=0 zeroed=256
}

# Discarding what reads as zeroes already costs nothing; 16 TiB cost next to nothing.
huge()
{
	local size=$((1 << 35)) before

	make_dm test-base "0 $size zero"
	make_cow test-cow "$size" /dev/mapper/test-base
	before=$(field test-cow metadata)
	io /dev/mapper/test-cow 'write 5T 4k A' 'write 16777212M 2M B' 'write 512 1k C'
	status_is test-cow used=514
	timeout 120 blkdiscard /dev/mapper/test-cow
	status_is test-cow used=0 zeroed=$((1 << 32))
	between 'metadata in bytes' "$(field test-cow metadata)" 0 "$before"
	io /dev/mapper/test-cow 'check 0 8k 0' 'check 5T 8k 0' 'check 16777212M end 0'
	timeout 120 blkdiscard /dev/mapper/test-cow
	timeout 120 blkdiscard -z -l $((1 << 41)) /dev/mapper/test-cow
	status_is test-cow used=0 zeroed=$((1 << 32))
	between 'metadata in bytes' "$(field test-cow metadata)" 0 "$before"
}

limits_are_told()
{
	local queue

	make_cow test-cow 4096 "$base"
	queue=$(sysfs_of /dev/mapper/test-cow)/queue
	is discard_granularity "$(<"$queue/discard_granularity")" 4096
	between discard_max_bytes "$(<"$queue/discard_max_bytes")" $MIB $((1 << 32))
	between write_zeroes_max_bytes "$(<"$queue/write_zeroes_max_bytes")" $MIB $((1 << 32))
	is physical_block_size "$(<"$queue/physical_block_size")" 4096
	is minimum_io_size "$(<"$queue/minimum_io_size")" 4096
	is logical_block_size "$(<"$queue/logical_block_size")" 512
	# a volatile cache would make every fsync send flushes
	is write_cache "$(<"$queue/write_cache")" 'write through'
	io /dev/mapper/test-cow 'discard 0 end' 'check 0 end 0' 'write 0 512 A' \
		'is 0 A0000000' flush 'fua 4k 512 B' 'is 4k B0000000'
}

# A file system gives its memory back when its files are deleted.
file_system()
{
	local used

	need mkfs.ext4 fstrim
	need_module ext4
	make_cow test-cow $((48 * 2048)) "$base"
	mkfs.ext4 -q -O ^has_journal /dev/mapper/test-cow
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount -t ext4 /dev/mapper/test-cow "$work/mnt"
	undo umount "$work/mnt"
	dd if=/dev/zero bs=1M count=32 | tr '\0' 'x' >"$work/mnt/file"
	sync "$work/mnt/file"
	used=$(field test-cow used)
	between 'used blocks' "$used" 8192 9500
	rm "$work/mnt/file"
	sync -f "$work/mnt"
	fstrim "$work/mnt"
	between 'used blocks after deletion' "$(field test-cow used)" 0 $((used - 8000))
}

run_tests \
	discard_frees 'a discard frees memory' \
	zeroout_frees 'zeroing frees memory' \
	falloc_frees 'punching holes and zeroing ranges frees memory' \
	single_blocks 'blocks discarded one by one' \
	huge_pages 'blocks discarded from huge pages' \
	edges 'partial blocks at the ends' \
	works_when_full 'a full overlay can be discarded' \
	huge 'a device of 16 TiB discarded as a whole' \
	limits_are_told 'the limits that the device tells' \
	file_system 'fstrim of a file system'
