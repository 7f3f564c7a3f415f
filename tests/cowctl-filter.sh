#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, somebody who moves here from nbdkit's cow filter loses something
# that worked there.

. "$(dirname "$0")/cowctl-common.sh"

COW=/dev/mapper/test-cow

# extents_are RUNS: of the whole device
extents_are()
{
	is 'extents' "$(dmsetup message test-cow 0 extents 0 1000000000)" "$1"
}

# Whatever is done to the copy, and however it ends, the image is what it was.
base_untouched()
{
	local before

	begin make_image 1M
	before=$(stat -c '%Y %Z' "$work/disk.img")
	cowctl create test-cow base="$work/disk.img" cow-on-read=true
	is 'read-only' "$(blockdev --getro "$(member base_device test-cow)")" 1
	io $COW 'write 0 end A' 'discard 0 512k' 'zeroout 600k 3k' 'write 1s 1s B'
	cowctl reset test-cow
	io $COW 'check 0 end .' 'write 0 512k A'
	blkdiscard $COW
	dmsetup remove --retry --force test-cow
	image_is_unchanged
	is 'its times' "$(stat -c '%Y %Z' "$work/disk.img")" "$before"
}

# Before and after writes and trims, in the middle, at the end, and in parts.
extents()
{
	begin make_image 1M
	cowctl create test-cow base="$work/disk.img" size=2M
	extents_are '256b 256z'
	io $COW 'write 64k 64k A'
	extents_are '16b 16o 224b 256z'
	io $COW 'discard 96k 64k'
	extents_are '16b 8o 16z 216b 256z'
	io $COW 'write 1020k 8k A' 'write 2044k 4k A'
	extents_are '16b 8o 16z 215b 2o 254z 1o'
	io $COW 'discard 64k 1k' 'discard 127k 2k'
	extents_are '16b 8o 16z 215b 2o 254z 1o'
	io $COW 'zeroout 64k 1k' 'zeroout 0 4k'
	extents_are '1z 15b 8o 16z 215b 2o 254z 1o'
	io $COW 'discard 0 end'
	extents_are 512z
	cowctl reset test-cow
	extents_are '256b 256z'
	is 'a part of them' "$(dmsetup message test-cow 0 extents 250 10)" '6b 4z'
}

# What crosses 4 GiB and what lies far behind it.
large()
{
	begin make_file disk.img 8G
	guard_sparse "$REPLY"
	cowctl create test-cow base="$work/disk.img"
	extents_are 2097152b
	io $COW 'write 4294963200 8k A' 'write 8589930496 4k B' 'discard 1G 2G'
	extents_are '262144b 524288z 262143b 2o 1048574b 1o'
	io $COW 'check 0 4k 0' 'check 4294959104 4k 0' 'check 4294963200 8k A' 'check 4294971392 4k 0' \
		'check 8589930496 4k B' 'check 8589926400 4k 0'
	cowctl remove test-cow
	cowctl create test-cow base="$work/disk.img" size=100T
	io $COW 'write 109951162773504 4k C' 'check 109951162773504 4k C' 'check 8G 4k 0'
	is 'the last extents' "$(dmsetup message test-cow 0 extents 26843545590 10)" '9z 1o'
}

# Smaller than a block, and no multiple of one.
odd_sizes()
{
	local bytes

	for bytes in 512 2048 130000; do
		begin make_image $bytes
		says_nothing_but_path cowctl create test-cow base="$work/disk.img" round=up
		is 'size' "$(member size test-cow)" $(((bytes + 4095) / 4096 * 4096))
		io $COW "check 0 $((bytes / 512))s ." "check $((bytes / 512))s end 0" \
			'write 0 end A' 'check 0 end A'
		cowctl remove test-cow
		image_is_unchanged
	done
	cowctl create test-cow base="$work/disk.img"
	is 'size' "$(member size test-cow)" 126976
	io $COW 'check 0 end .'
}

says_nothing_but_path()
{
	is 'what it printed' "$("$@")" $COW
}

# What cow-on-read keeps is what is read back, and what is written wins.
read_back()
{
	begin make_image 1M
	cowctl create test-cow base="$work/disk.img" cow-on-read=true
	io $COW 'check 0 256k .' 'check 300k 512 .' 'write 4k 4k A' 'write 33s 3s B' 'discard 64k 4k'
	io $COW 'check 0 4k .' 'check 4k 4k A' 'is 32s .BBB....' 'check 64k 4k 0' 'check 68k end .'
	io $COW 'check 0 4k .' 'check 4k 4k A' 'is 32s .BBB....' 'check 64k 4k 0' 'check 68k end .'
	is 'used' "$(member used test-cow)" 8192
	between 'hits' "$(member hits test-cow)" 900000 1200000
	is 'past the cache' "$(member base_reads test-cow)" 0
	image_is_unchanged
}

# A diff, the way that the filter's manual page has it.
diff_with_qemu()
{
	need nbdkit qemu-img
	begin make_image 4M
	cowctl create test-cow base="$work/disk.img"
	io $COW 'write 64k 64k A' 'discard 1M 128k' 'write 4092k 4k B'
	cowctl export test-cow
	undo rm -f "$work/diff.qcow2"
	qemu-img create -q -f qcow2 -F raw -b "nbd+unix:///?socket=$run_dir/test-cow.sock" \
		"$work/diff.qcow2"
	qemu-img rebase -f qcow2 -F raw -b "$work/disk.img" "$work/diff.qcow2"
	cp --sparse=never $COW "$work/copy"
	undo rm -f "$work/copy"
	cowctl unexport test-cow
	cowctl remove test-cow
	qemu-img compare -f qcow2 -F raw "$work/diff.qcow2" "$work/copy"
	between 'its size' "$(stat -c %s "$work/diff.qcow2")" 65536 1048576
	image_is_unchanged
}

run_tests \
	base_untouched 'the base stays as it is' \
	extents 'extents before and after writes and trims' \
	large 'beyond 4 GiB' \
	odd_sizes 'smaller than a block, and no multiple of one' \
	read_back 'what cow-on-read keeps is read back' \
	diff_with_qemu 'a diff by qemu-img'
