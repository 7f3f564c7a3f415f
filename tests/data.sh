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

# The disk of the SCSI target that is on this machine, in REPLY.
loop_disk()
{
	for REPLY in /sys/block/sd*; do
		if [[ $(readlink "$REPLY") = */tcm_loop_adapter_* ]]; then
			REPLY=/dev/${REPLY##*/}
			return
		fi
	done
	return 1
}

# make_scsi_disk DEVICE: a disk of the kernel's own SCSI target, in REPLY. Its driver takes
# buffers that begin anywhere, and hands them on as they are.
make_scsi_disk()
{
	local target=/sys/kernel/config/target group

	need_module tcm_loop
	need_module target_core_iblock
	need_module sd_mod
	mount_configfs
	[ -d $target/loopback ] || mkdir $target/loopback
	mkdir -p $target/core/iblock_0/test
	undo rmdir $target/core/iblock_0
	undo rmdir $target/core/iblock_0/test
	echo "udev_path=$1" >$target/core/iblock_0/test/control
	echo 1 >$target/core/iblock_0/test/enable
	group=$target/loopback/naa.6001405000000001
	mkdir -p $group/tpgt_0
	undo rmdir $group
	undo rmdir $group/tpgt_0
	echo naa.6001405000000002 >$group/tpgt_0/nexus
	mkdir $group/tpgt_0/lun/lun_0
	undo rmdir $group/tpgt_0/lun/lun_0
	ln -s $target/core/iblock_0/test $group/tpgt_0/lun/lun_0/test
	undo rm $group/tpgt_0/lun/lun_0/test
	wait_until 20 loop_disk
	wait_until 20 test -b "$REPLY"
}

# What the segments of a request hold need not be whole sectors.
odd_segments()
{
	local cow=/dev/mapper/test-cow

	# brd cannot have such segments, and loop devices refuse them in newer kernels
	make_cow test-lower 8192 "$base"
	io /dev/mapper/test-lower 'write 0 end .'
	make_cow test-cow 8192 /dev/mapper/test-lower
	io $cow 'discard 0 64k' 'write 4k 4k A' 'write 12k 512 A' 'write 36k 8k A'
	dmsetup message test-cow 0 holes 256 16
	make_scsi_disk $cow
	io "$REPLY" 'shift 260' 'is 0 00000000AAAAAAAA00000000A000000000000000' \
		'is 28k 0000000000000000AAAAAAAAAAAAAAAA00000000' 'check 64k 900k .' \
		'write 8k 16k B' 'write 1k 2k C' 'write 1020k 12k D' 'write 40k 8k E' 'write 128k 24k F'
	dmsetup message test-cow 0 cow_on_read on
	io "$REPLY" 'shift 260' 'check 192k 24k .' 'check 192k 24k .' 'check 188k 64k .'
	io $cow 'is 0 00CCCC00AAAAAAAA' 'check 8k 16k B' 'check 24k 12k 0' 'check 36k 4k A' \
		'check 40k 8k E' 'check 48k 16k 0' 'check 64k 64k .' 'check 128k 24k F' \
		'check 152k 868k .' 'check 1020k 12k D' 'check 1032k 24k 0'
	status_is test-cow health=ok refused=0 errors=0
}

run_tests \
	sweep_direct 'writes and reads of every alignment over every mixture of block states' \
	random_direct 'random direct I/O agrees with a shadow copy' \
	random_buffered 'random I/O through the page cache agrees with a shadow copy' \
	views_agree 'buffered and direct I/O see the same data' \
	odd_segments 'requests in segments that are not whole sectors' \
	overlays_are_private 'overlays on one base do not see each other' \
	fio_verify "fio's verification passes"
