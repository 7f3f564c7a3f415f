#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, programs that use io_uring get errors or wrong data, hang in
# the submission of a request, or are slowed down by worker threads.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow

states()
{
	make_brd 1024
	make_cow test-cow 4096 "$REPLY"
	io $COW 'write 0 4k A' 'discard 4k 4k'
	soon 'check 8k 64k .'
	soon 'check 0 4k A'
	soon 'check 512 1k A'
	soon 'check 4k 4k 0'
	soon 'check 1M 64k 0'
	soon 'is 0 AAAAAAAA00000000........'
	soon 'check 1020k 4k .'
	status_is test-cow used=1 zeroed=1

	soon 'write 0 4k B'
	soon 'write 1s 1s C'
	soon 'write 9s 1s C'
	soon 'write 64k 8k D'
	soon 'write 129s 17s E'
	soon 'write 1M 512 F'
	soon 'write 193s 1s G'
	# both ends need the base, so that this may be refused as often as it is tried
	io $COW 'nowait write 255s 10s H' || io $COW 'write 255s 10s H'
	io $COW 'is 0 BCBBBBBB0C000000........' 'is 64k DEEEEEEEEEEEEEEEEE......' \
		'is 1M F0000000' 'is 96k .G......' 'is 252s ...HHHHHHHHHH...' 'check 1028k end 0'
	# one request, every state
	soon 'write 2k 128k I'
	io $COW 'is 0 BCBB' 'check 2k 128k I' 'is 260s HHHHH...' 'is 1M F0000000'
	status_is test-cow health=ok refused=0 errors=0
}

# Nothing that might only be a lack of time counts as a lack of space.
over_the_limit()
{
	make_brd 1024
	make_cow test-cow 2048 "$REPLY" 2 limit 4
	io $COW 'write 0 16k A'
	io $COW 'fails EAGAIN nowait write 64k 4k B' 'fails EAGAIN nowait write 64k 64k B' \
		'fails EAGAIN nowait submit write 128k 4k B' reap 'check 16k end .'
	status_is test-cow used=4 refused=0
	io $COW 'fails ENOSPC write 64k 4k B'
	status_is test-cow used=4 refused=1
	soon 'write 0 8k C'
	soon 'check 0 8k C'
	soon 'check 64k 4k .'
	io $COW 'discard 0 4k'
	soon 'write 64k 4k B'
	io $COW 'check 0 4k 0' 'check 4k 4k C' 'check 8k 8k A' 'check 16k 48k .' 'check 64k 4k B'
	status_is test-cow used=4 refused=1 health=full
}

# A base that does not answer: what needs it is on its way when the submission
# returns, or refused, and all else goes on.
hung_base()
{
	make_brd 2048
	make_dm test-gate '0 4096 linear /dev/ram0 0'
	make_cow test-cow 4096 "$REPLY"
	undo dmsetup resume test-gate
	io $COW 'write 64k 64k A' 'discard 128k 4k' 'suspend test-gate' \
		'nowait submit write 1s 1s B' 'nowait submit write 9s 4s B' \
		'nowait submit write 2s 1s C' 'pending 3' \
		'nowait write 64k 8k D' 'nowait write 145s 3s D' 'is 64k DDDDDDDDDDDDDDDDADDDAAAA' \
		'nowait check 76k 52k A' 'nowait check 128k 4k 0' 'nowait write 257s 1s D' \
		'fails EAGAIN nowait check 1M 4k ?' 'fails EAGAIN nowait check 124k 64k ?' \
		'status test-cow errors=0 health=ok' 'pending 3' 'resume test-gate' reap \
		'is 0 .BC......BBBB...' 'is 128k 0D000000' 'check 1M 4k .' \
		'status test-cow errors=0 health=ok'
}

# The device itself is suspended.
suspended()
{
	make_brd 1024
	make_cow test-cow 2048 "$REPLY"
	undo dmsetup resume test-cow
	io $COW 'write 0 4k A' 'suspend test-cow' 'fails EAGAIN nowait write 0 4k B' \
		'fails EAGAIN nowait check 0 4k ?' 'fails EAGAIN nowait write 9s 1s B' \
		'resume test-cow' 'check 0 4k A' 'check 4k end .'
	status_is test-cow used=1
}

# Takes the locks that fio's requests want, until the file is gone.
disturb()
{
	while [ -e "$1" ]; do
		io $COW 'write 16M 2M A' 'discard 16M 2M' 'write 20M 1M A' 'zeroout 16M 16M'
	done
}

# Each request of io_uring comes with REQ_NOWAIT first; some are refused.
io_uring()
{
	local disturber

	need fio
	make_brd 32768
	make_cow test-cow 65536 "$REPLY"
	: >"$work/busy"
	disturb "$work/busy" &
	disturber=$!
	undo wait_until 20 test ! -d "/proc/$disturber"
	undo rm -f "$work/busy"
	fio --name=mixed --filename=$COW --direct=1 --ioengine=io_uring --iodepth=16 \
		--rw=randrw --rwmixread=30 --bssplit=512/20:1536/20:4k/20:20k/20:68k/20 \
		--blockalign=512 --size=12M --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
		--randseed=7 --aux-path="$work" --output-format=terse
	rm "$work/busy"
	wait $disturber
	status_is test-cow health=ok refused=0 errors=0
}

# Who polls gets answers, though the base alone could be polled: from 6.11 on that it
# is not supported, as with any device that does not poll.
polled()
{
	local polls rc=0

	need fio
	need_module null_blk nr_devices=1 gb=1 memory_backed=1 poll_queues=1
	undo modprobe -r null_blk
	make_cow test-cow 65536 /dev/nullb0
	polls=$(<"$(sysfs_of $COW)/queue/io_poll")
	fio --name=mixed --filename=$COW --direct=1 --ioengine=io_uring --hipri --iodepth=16 \
		--rw=randrw --rwmixread=50 --bssplit=512/20:4k/40:68k/40 --blockalign=512 \
		--size=32M --io_size=4M --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
		--randseed=7 --aux-path="$work" --output-format=terse >"$work/fio" 2>&1 || rc=$?
	if [ "$polls" = 1 ]; then
		is "fio's status" $rc 0
	else
		grep -q 'Operation not supported' "$work/fio"
	fi
	rm "$work/fio"
	io $COW 'write 0 4k A' 'check 0 4k A'
	status_is test-cow health=ok refused=0 errors=0
}

run_tests \
	states 'every block state, whole blocks and parts of them' \
	over_the_limit 'a full overlay' \
	hung_base 'a base that does not answer' \
	suspended 'a suspended device' \
	polled 'requests that are polled for' \
	io_uring "fio's verification passes with io_uring"
