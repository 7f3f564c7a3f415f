#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a disk returns other bytes than were written to it: file
# systems on it get corrupt.

. "$(dirname "$0")/common.sh"

# 8,100 mixtures of three blocks
SWEEP_KIB=97200

fixture()
{
	make_brd $SWEEP_KIB
	base=$REPLY
}

sweep_direct()
{
	make_cow test-cow $((SWEEP_KIB * 2)) "$base"
	io /dev/mapper/test-cow "model ${SWEEP_KIB}k" sweep verify
	status_is test-cow health=ok refused=0 errors=0
}

# Half of the device lies past the end of its base.
random_direct()
{
	make_dm test-base "0 32776 linear $base 0"
	make_cow test-cow 65536 /dev/mapper/test-base
	io /dev/mapper/test-cow 'model 16388k' 'random 1 2000' verify 'random 2 2000' verify
}

random_buffered()
{
	make_dm test-base "0 32776 linear $base 0"
	make_cow test-cow 65536 /dev/mapper/test-base
	io -b /dev/mapper/test-cow 'model 16388k' 'random 3 1000' drop verify 'random 4 1000' drop \
		verify
}

# What went in through the page cache comes out without it, and the other way round.
views_agree()
{
	make_cow test-cow 8192 "$base"
	io -b /dev/mapper/test-cow 'write 512 3k A' flush
	io /dev/mapper/test-cow 'is 0 .AAAAAA.........' 'write 1k 6k B' 'fua 16k 1k C'
	io -b /dev/mapper/test-cow 'is 0 .ABBBBBBBBBBBB..' 'is 16k CC......'
}

# A program that nobody here wrote.
fio_verify()
{
	need fio
	make_cow test-cow 65536 "$base"
	fio --name=mixed --filename=/dev/mapper/test-cow --direct=1 --ioengine=libaio --iodepth=16 \
		--rw=randrw --rwmixread=30 --bssplit=512/20:1536/20:4k/20:20k/20:68k/20 \
		--blockalign=512 --size=8M --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
		--randseed=5 --aux-path="$work" --output-format=terse
	status_is test-cow health=ok refused=0 errors=0
}

# Another overlay on the same base sees nothing of it.
overlays_are_private()
{
	make_cow test-cow 8192 "$base"
	make_cow test-cow2 8192 "$base"
	io /dev/mapper/test-cow 'write 0 end A'
	io /dev/mapper/test-cow2 'check 0 end .' 'write 512 512 B' 'is 0 .B......'
	io /dev/mapper/test-cow 'check 0 end A'
	status_is test-cow used=1024
	status_is test-cow2 used=1
}

run_tests \
	sweep_direct 'writes and reads of every alignment over every mixture of block states' \
	random_direct 'random direct I/O agrees with a shadow copy' \
	random_buffered 'random I/O through the page cache agrees with a shadow copy' \
	views_agree 'buffered and direct I/O see the same data' \
	overlays_are_private 'overlays on one base do not see each other' \
	fio_verify "fio's verification passes"
