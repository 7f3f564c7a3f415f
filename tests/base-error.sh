#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a broken network or disk costs more than the reads that need
# it: changes are lost, errors turn into zeroes, or the device stays broken.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
# What is changed while the base works, on a device of 4 MiB.
CHANGE=('write 0 64k A' 'discard 128k 64k' 'write 385s 1s B' 'write 2M 4k A')

# The whole base fails: what goes on and what does not.
while_base_fails()
{
	local before

	io $COW 'check 0 64k A' 'check 128k 64k 0' 'check 2M 4k A' 'is 192k .B......' \
		'fails EIO check 1M 4k .'
	status_is test-cow health=base-error used=18 refused=0
	before=$(field test-cow errors)
	io $COW 'fails EIO check 1M 4k .'
	status_is test-cow errors=$((before + 1))

	# reads of many blocks, the stored ones in front and in the middle
	io $COW 'fails EIO check 1M 64k .' 'fails EIO check 60k 8k ?' 'fails EIO check 2044k 12k ?'
	status_is test-cow errors=$((before + 4))
	io $COW 'fails EIO write 300k 512 X' 'fails EIO write 305k 1k X' \
		'fails EIO zeroout 310k 512' 'fails EIO write 319k 2k X' \
		'fails EIO write 2047k 1k X'
	between 'base read errors' "$(field test-cow errors)" $((before + 10)) $((before + 20))

	io $COW 'write 0 512 C' 'is 0 CAAAAAAA' 'write 132k 512 C' 'is 132k C0000000' \
		'write 512k 64k C' 'check 512k 64k C' 'write 513k 512 D' 'is 512k CCDCCCCC' \
		'discard 600k 8k' 'check 600k 8k 0' 'zeroout 608k 4k' 'write 600k 512 C' flush
	status_is test-cow health=base-error used=36 refused=0
	before=$(field test-cow errors)
	io $COW 'check 512k 4k ?' 'check 600k 12k ?'
	status_is test-cow errors="$before"
}

# All of it after that, the base being back; and what failed works.
after_base_failed()
{
	io $COW 'is 0 CAAAAAAA' 'check 4k 60k A' 'check 64k 64k .' 'check 128k 4k 0' \
		'is 132k C0000000' 'check 136k 56k 0' 'is 192k .B......' 'check 196k 316k .' \
		'is 512k CCDCCCCC' 'check 516k 60k C' 'check 576k 24k .' 'is 600k C0000000' \
		'check 604k 8k 0' 'check 612k 1436k .' 'check 2M 4k A' 'check 2052k end .'
	status_is test-cow health=ok used=36 refused=0
	io $COW 'write 300k 512 X' 'is 300k X.......' 'write 319k 2k X' 'is 316k ......XXXX......'
	status_is test-cow health=ok used=39
}

# events_are N: how many device-mapper events there were
events_are()
{
	[ "$(dmsetup info -c --noheadings -o events test-cow | tr -d ' ')" = "$1" ]
}

events_of_the_base()
{
	make_brd 4096
	make_dm test-under '0 8192 linear /dev/ram0 0'
	make_cow test-cow 8192 "$REPLY"
	io $COW 'check 0 4k .' 'load test-under 8192 error' 'resume test-under' \
		'fails EIO check 0 4k .'
	wait_until 10 events_are 1
	# it goes on failing, which is no news
	io $COW 'fails EIO check 4k 4k .' 'fails EIO write 8k 512 X' \
		'load test-under 8192 linear /dev/ram0 0' 'resume test-under' 'check 0 4k .'
	wait_until 10 events_are 2
	status_is test-cow health=ok
}

errors_of_a_disk()
{
	make_brd 4096
	make_dm test-under '0 8192 linear /dev/ram0 0'
	make_cow test-cow 8192 "$REPLY"
	io $COW "${CHANGE[@]}" 'load test-under 8192 error' 'resume test-under'
	while_base_fails
	io $COW 'load test-under 8192 linear /dev/ram0 0' 'resume test-under'
	after_base_failed
}

# A bad spot in the middle: only who needs it gets the error, and a whole
# write covers it for good.
one_bad_block()
{
	make_brd 4096
	make_dm test-under $'0 24 linear /dev/ram0 0\n24 8 error\n32 8160 linear /dev/ram0 32'
	make_cow test-cow 8192 "$REPLY"
	io $COW 'check 0 12k .' 'check 16k end .'
	status_is test-cow health=ok errors=0
	io $COW 'fails EIO check 0 64k .'
	status_is test-cow health=base-error errors=1
	io $COW 'check 16k 4k .'
	status_is test-cow health=ok errors=1
	# the error of one block is no concern of its neighbours
	io $COW 'fails EIO submit write 25s 1s A' 'submit write 23s 1s A' 'submit write 33s 1s A' \
		reap 'is 16s .......A' 'is 32s .A......' 'fails EIO check 12k 4k .'
	status_is test-cow used=2 errors=3
	io $COW 'write 12k 4k B' 'is 16s .......ABBBBBBBB.A......' 'check 20k end .' \
		'write 25s 1s C' 'is 24s BCBBBBBB'
	status_is test-cow health=ok used=3 errors=3
}

# A bad spot that a stored block covers is no concern of a read across it.
covered_bad_block()
{
	make_brd 4096
	make_dm test-under $'0 24 linear /dev/ram0 0\n24 8 error\n32 8 linear /dev/ram0 32
		40 8 error\n48 8144 linear /dev/ram0 48'
	make_cow test-cow 8192 "$REPLY"
	io $COW 'write 12k 4k A' 'is 16s ........AAAAAAAA........' 'is 22s ..AAAAAAAA'
	status_is test-cow health=ok errors=0
	io $COW 'fails EIO check 8k 20k ?'
	status_is test-cow health=base-error errors=1
	io $COW 'discard 20k 4k' 'is 16s ........AAAAAAAA........00000000........'
	status_is test-cow health=ok errors=1
}

# Reads across stored blocks wait for the base with all others.
queued_reads()
{
	local pid

	make_brd 4096
	make_dm test-under '0 8192 error'
	make_cow test-cow 8192 "$REPLY" 1 queue_errors
	undo dmsetup message test-cow 0 queue_errors off
	io $COW 'write 4k 4k A'
	io $COW 'is 0 ........AAAAAAAA........BBBBBBBB' &
	pid=$!
	wait_until 10 queued_is 1
	io $COW 'write 12k 4k B' 'load test-under 8192 linear /dev/ram0 0' 'resume test-under'
	wait $pid
	status_is test-cow health=ok queued=0

	io $COW 'load test-under 8192 error' 'resume test-under'
	io $COW 'fails EIO check 0 12k ?' &
	pid=$!
	wait_until 10 queued_is 1
	dmsetup message test-cow 0 queue_errors off
	wait $pid
}

queued_is()
{
	[ "$(field test-cow queued)" = "$1" ]
}

# What waits tries again once a second, however well other reads of the base go.
paced_retries()
{
	local pid end errors

	make_brd 4096
	make_dm test-under $'0 24 linear /dev/ram0 0\n24 8 error\n32 8160 linear /dev/ram0 32'
	make_cow test-cow 8192 "$REPLY" 1 queue_errors
	undo dmsetup message test-cow 0 queue_errors off
	io $COW 'fails EIO check 12k 4k ?' &
	pid=$!
	wait_until 10 queued_is 1
	errors=$(field test-cow errors)
	end=$((SECONDS + 5))
	while [ $SECONDS -lt $end ]; do
		dd if=$COW of=/dev/null bs=4k skip=16 count=200 iflag=direct status=none
	done
	between 'retries' $(($(field test-cow errors) - errors)) 1 30
	dmsetup message test-cow 0 queue_errors off
	wait $pid
}

# io_uring asks not to wait, first. What was queued, and is sent to another base in the
# end, must wait all the same: it is too late to ask again.
requeued_nowait()
{
	local first other pid

	need nbdkit nbd-client fio
	make_loop_base 4194304
	start_nbdkit "$work/socket" -r --filter=error file "$work/base4194304" \
		error-pread=EIO error-pread-rate=100%
	make_nbd "$work/socket"
	first=$REPLY
	start_nbdkit "$work/other" -r --filter=delay file "$work/base4194304" rdelay=100ms
	make_nbd "$work/other"
	other=$REPLY
	make_cow test-cow 8192 "$first" 1 queue_errors
	undo dmsetup message test-cow 0 queue_errors off
	# every second block, so that they stay requests of their own
	fio --name=requeued --filename=$COW --rw=read:4k --bs=4k --size=3200k --direct=1 \
		--ioengine=io_uring --iodepth=400 --iodepth_batch_submit=400 \
		--iodepth_batch_complete_min=400 --output="$work/fio" &
	pid=$!
	wait_until 20 queued_is 400
	dmsetup load test-cow --table "0 8192 nbdcow $other 1 queue_errors"
	dmsetup resume --noflush --nolockfs test-cow
	wait $pid
}

# Reads across stored blocks that were one request for the driver of the base, and fail as
# one, are asked for again each by itself.
merged_reads()
{
	local i writes=() checks=()

	need nbdkit nbd-client fio
	make_loop_base 4194304
	start_nbdkit "$work/socket" -r --filter=error file "$work/base4194304" \
		error-pread=EIO error-pread-rate=100% error-file="$work/broken"
	undo rm -f "$work/broken"
	make_nbd "$work/socket"
	make_cow test-cow 8192 "$REPLY"
	for ((i = 0; i < 1024; i += 8)); do
		writes+=("write $((i + 4))k 4k A")
		checks+=("check ${i}k 4k ." "check $((i + 4))k 4k A")
	done
	io $COW "${writes[@]}"
	touch "$work/broken"
	fio --name=merged --filename=$COW --rw=read --bs=12k --size=960k --direct=1 \
		--ioengine=libaio --iodepth=32 --iodepth_batch_submit=32 \
		--iodepth_batch_complete_min=32 --continue_on_error=read --error_dump=0 || :
	between 'base read errors' "$(field test-cow errors)" 80 10000
	io $COW 'fails EIO check 0 4k .' 'check 4k 4k A'
	rm "$work/broken"
	io $COW "${checks[@]}"
}

# A base on an NBD server, of which another copy stays.
start_server()
{
	start_nbdkit "$work/socket" -r file "$work/base4194304"
}

kill_server()
{
	local pid

	pid=$(<"$work/socket.pid")
	kill -KILL "$pid"
	wait_until 10 test ! -d "/proc/$pid"
}

# nbd-client cannot connect a device anew while it is in use, so what comes back
# is another one behind the same device-mapper device.
killed_server()
{
	need nbdkit nbd-client
	make_loop_base 4194304
	start_server
	make_nbd "$work/socket"
	make_dm test-under "0 8192 linear $REPLY 0"
	make_cow test-cow 8192 "$REPLY"
	io $COW "${CHANGE[@]}"
	status_is test-cow health=ok errors=0
	kill_server
	while_base_fails
	start_server
	make_nbd "$work/socket"
	io $COW "load test-under 8192 linear $REPLY 0" 'resume test-under'
	after_base_failed
}

# The other cure: a table that names another device with the same content.
killed_server_replaced()
{
	local other

	need nbdkit nbd-client
	make_loop_base 4194304
	start_nbdkit "$work/other" -r file "$work/base4194304"
	make_nbd "$work/other"
	other=$REPLY
	start_server
	make_nbd "$work/socket"
	make_cow test-cow 8192 "$REPLY"
	io $COW "${CHANGE[@]}"
	kill_server
	while_base_fails
	reload test-cow 8192 "$other"
	after_base_failed
}

# One that does not answer any more: only the reads of it wait, and with a
# timeout they end.
hung_server()
{
	local pid

	need nbdkit nbd-client
	make_loop_base 4194304
	start_server
	pid=$(<"$work/socket.pid")
	make_nbd "$work/socket" -timeout 10
	make_cow test-cow 8192 "$REPLY"
	io $COW "${CHANGE[@]}"
	undo kill -CONT "$pid"
	kill -STOP "$pid"
	io $COW 'fails EIO submit write 300k 512 X' 'bg fails EIO check 1M 64k .' \
		'check 0 64k A' 'write 512k 64k C' 'write 2M 512 C' 'discard 600k 8k' \
		'is 2M CAAAAAAA' 'check 512k 64k C' 'check 600k 8k 0' 'pending 2' reap join
	status_is test-cow health=base-error used=34
	between 'base read errors' "$(field test-cow errors)" 2 20
}

# More reads than a base that hangs has room for hold up nobody who has another base.
hung_server_with_many_reads()
{
	local pid reader

	need nbdkit nbd-client fio taskset
	make_brd 1024
	make_cow test-cow2 2048 "$REPLY"
	make_loop_base 16777216
	start_nbdkit "$work/socket" -r file "$work/base16777216"
	pid=$(<"$work/socket.pid")
	make_nbd "$work/socket"
	make_cow test-cow 32768 "$REPLY" 1 cow_on_read
	undo kill -CONT "$pid"
	kill -STOP "$pid"
	taskset -c 0 fio --name=reads --filename=$COW --ioengine=io_uring --direct=1 --rw=randread \
		--bs=4k --iodepth=2048 --number_ios=2048 --output=/dev/null &
	reader=$!
	wait_until 30 many_reads
	taskset -c 0 io /dev/mapper/test-cow2 'write 512 512 A' 'is 0 .A......' &
	wait_until 10 test ! -d "/proc/$!"
	wait $!
	dmsetup message test-cow2 0 prefetch 0 256
	wait_until 10 prefetch_is test-cow2 done:256/256
	kill -CONT "$pid"
	wait $reader
	status_is test-cow health=ok errors=0
}

many_reads()
{
	awk '$1 < 2000 { exit 1 }' "$(sysfs_of $COW)/inflight"
}

# A base that is suspended: what needs it waits, and then gets the right bytes.
suspended_base()
{
	make_brd 4096
	make_dm test-under '0 8192 linear /dev/ram0 0'
	make_cow test-cow 8192 "$REPLY"
	undo dmsetup resume test-under
	io $COW "${CHANGE[@]}" 'suspend test-under' 'bg check 1M 64k .' 'bg check 60k 8k ?' \
		'submit write 300k 512 X' 'submit write 1201s 3s X' \
		"inflight $COW 4" 'check 0 64k A' 'write 512k 64k C' 'is 2M AAAAAAAA' \
		'discard 1M 64k' 'check 1M 64k 0' 'message test-cow limit 100' 'pending 4' \
		'resume test-under' reap join 'is 300k X.......' 'is 1200s .XXX....' \
		'check 512k 64k C' 'check 1M 64k 0' 'check 1088k 960k .'
	status_is test-cow health=ok errors=0 used=$((18 + 16 + 2))
}

# What waits is of the time before the reset, and ends after it.
reset_of_a_hung_base()
{
	make_brd 4096
	make_dm test-under '0 8192 linear /dev/ram0 0'
	make_cow test-cow 8192 "$REPLY"
	undo dmsetup resume test-under
	io $COW "${CHANGE[@]}" 'suspend test-under' 'submit write 300k 512 X' 'bg check 1M 64k .' \
		"inflight $COW 2" 'message test-cow reset' 'pending 2' 'resume test-under' reap join \
		'is 300k X.......' 'check 0 300k .' 'check 304k end .'
	status_is test-cow health=ok errors=0 used=1
}

slow_base()
{
	need_module dm-delay
	make_brd 4096
	make_dm test-under '0 8192 delay /dev/ram0 0 3'
	make_cow test-cow 8192 "$REPLY"
	io $COW 'model 4M' 'random 3 400' verify
	status_is test-cow health=ok errors=0
}

# Each write fails or works, whichever it says.
flakey_base()
{
	local -a commands=()
	local i errors

	need_module dm-flakey
	make_brd 4096
	# up for a second, down for another
	make_dm test-under '0 8192 flakey /dev/ram0 0 1 1'
	make_cow test-cow 8192 "$REPLY"
	for ((i = 0; i < 40; i++)); do
		commands+=("try write $((16 * i + 1))s 5s A" "try check $((16 * i))s 16s ?"
			"try zerorange $((16 * i + 3))s 1s" 'run sleep 0.1')
	done
	io $COW 'model 4M' "${commands[@]}" 'load test-under 8192 linear /dev/ram0 0' \
		'resume test-under' verify
	errors=$(field test-cow errors)
	between 'base read errors' "$errors" 10 110
	status_is test-cow health=ok
}

# told MESSAGE: a table was refused for this reason
told()
{
	[[ $(kernel_log) == *"nbdcow: $1"* ]] || fail "the kernel did not say '$1'"
}

read_only()
{
	make_brd 1024
	blockdev --setro "$REPLY"
	undo blockdev --setrw /dev/ram0
	make_cow test-cow 2048 "$REPLY"
	io $COW 'write 0 4k A' 'write 9s 1s A' 'discard 8k 4k' 'zeroout 25s 1s' flush 'is 0 AAAAAAAA' \
		'is 8s .A......' 'check 8k 4k 0' 'is 24s .0......' 'check 16k end .'
	status_is test-cow health=ok used=3 errors=0
}

read_only_loop()
{
	local file

	make_loop_base 1048576
	file=$work/base1048576
	make_loop "$file" -r
	guard "$REPLY"
	is 'its read-only flag' "$(blockdev --getro "$REPLY")" 1
	make_cow test-cow 2048 "$REPLY"
	io $COW 'write 0 4k A' 'write 9s 1s A' 'discard 8k 4k' 'zeroout 25s 1s' flush 'is 0 AAAAAAAA' \
		'is 8s .A......' 'check 8k 4k 0' 'is 24s .0......' 'check 16k end .'
	status_is test-cow health=ok used=3 errors=0
}

# resize LOOP BYTES: of its file
resize()
{
	truncate -s "$2" "$work/base4194304"
	losetup -c "$1"
	is "bytes of $1" "$(blockdev --getsize64 "$1")" "$2"
}

shrunk()
{
	local dev

	make_loop_base 4194304
	dev=$REPLY
	# longer than the base
	make_cow test-cow 10240 "$dev"
	io $COW 'write 3M 4k A' 'discard 3080k 4k' 'check 4M 1M 0'
	unguard "$dev"
	resize "$dev" 2097152
	# said before anybody read there
	status_is test-cow health=base-error errors=0 used=1
	io $COW 'check 0 2M .' 'fails EIO check 2M 4k ?' 'fails EIO check 3M 64k ?' \
		'fails EIO check 2044k 8k ?' 'fails EIO check 4092k 4k ?' \
		'fails EIO write 2560k 512 X' 'check 3M 4k A' 'check 3080k 4k 0' 'check 4M 1M 0'
	between 'base read errors' "$(field test-cow errors)" 5 10
	io $COW 'check 2040k 8k .' 'write 2M 4k B' 'write 2M 512 C' 'is 2M CBBBBBBB' \
		'write 1M 512 B' 'is 1M B.......' 'write 4M 512 B' 'is 4M B0000000'
	status_is test-cow health=base-error used=4

	fails dmsetup load test-cow --table "0 10240 nbdcow $dev"
	told "The base device is smaller than the overlay's base was"

	# what comes back need not be what was there, but it is there
	resize "$dev" 4194304
	io $COW 'check 0 1M .' 'check 2052k 4k 0' 'is 2M CBBBBBBB' 'check 3M 4k A'
	status_is test-cow health=ok used=4
	reload test-cow 10240 "$dev"
	io $COW 'is 2M CBBBBBBB' 'is 1M B.......' 'check 3M 4k A' 'check 3080k 4k 0'
}

# A file system above would go on with the sectors that it knows.
larger_sectors()
{
	local file

	make_loop_base 4194304
	file=$work/base4194304
	make_cow test-cow 8192 "$REPLY" 1 queue_errors
	io $COW 'write 512 512 A'
	make_loop "$file" --read-only --sector-size 4096
	fails dmsetup load test-cow --table "0 8192 nbdcow $REPLY 1 queue_errors"
	told "The base device has larger logical blocks than the overlay's base had"
	io $COW 'is 0 .A......' 'check 4k 512 .'
}

# Nor does a device get smaller ones than it had, which it could not keep.
smaller_sectors()
{
	local large

	make_loop_base 4194304
	make_loop "$work/base4194304" --read-only --sector-size 4096
	large=$REPLY
	make_cow test-cow 8192 "$large"
	make_loop "$work/base4194304" --read-only
	reload test-cow 8192 "$REPLY"
	is 'logical block' "$(blockdev --getss $COW)" 4096
	io $COW 'write 4k 4k A' 'check 8k 64k .'
	reload test-cow 8192 "$large"
	is 'logical block' "$(blockdev --getss $COW)" 4096
	io $COW 'check 4k 4k A' 'check 8k 64k .'
}

smaller_base()
{
	local dev

	make_loop_base 4194304
	dev=$REPLY
	make_cow test-cow 8192 "$dev"
	io $COW 'write 0 4k A' 'write 3M 4k A'
	make_loop_base 4190208
	fails dmsetup load test-cow --table "0 8192 nbdcow $REPLY"
	told "The base device is smaller than the overlay's base was"
	io $COW 'write 4k 4k B' 'check 0 4k A' 'check 4k 4k B' 'check 8k 64k .' 'check 3M 4k A' \
		'check 4092k 4k .'
	status_is test-cow health=ok used=3
	# a larger one changes nothing that can be seen
	make_loop_base 8388608
	reload test-cow 16384 "$REPLY"
	io $COW 'check 0 4k A' 'check 8k 3064k .' 'check 4092k 4k .' 'check 4M 4M 0'
}

not_connected()
{
	local dev

	need_module nbd
	for dev in /sys/block/nbd*; do
		[ -e "$dev/pid" ] || break
	done
	dev=/dev/${dev##*/}
	is "bytes of $dev" "$(blockdev --getsize64 "$dev")" 0
	fails dmsetup create test-cow --table "0 8 nbdcow $dev"
	told 'The base device is empty or not connected'
	# and as the next base of an overlay that has one
	make_brd 1024
	make_cow test-cow 2048 "$REPLY"
	io $COW 'write 0 4k A'
	fails dmsetup load test-cow --table "0 2048 nbdcow $dev"
	io $COW 'check 0 4k A' 'check 4k end .'
}

run_tests \
	events_of_the_base 'events when the base begins to fail and is back' \
	errors_of_a_disk 'a base that fails as a whole, and works again' \
	one_bad_block 'a base with one bad block' \
	covered_bad_block 'bad blocks of the base below blocks that are stored' \
	queued_reads 'reads across stored blocks that wait for the base' \
	paced_retries 'retries beside reads that go well' \
	requeued_nowait 'reads that may not wait, when another base comes' \
	merged_reads 'reads that were merged on their way to the base' \
	killed_server 'an NBD server that is killed and started anew' \
	killed_server_replaced 'an NBD server that is killed and replaced' \
	hung_server 'an NBD server that does not answer' \
	hung_server_with_many_reads 'many reads of a base that hangs, beside another base' \
	suspended_base 'a base that is suspended, and returns' \
	reset_of_a_hung_base 'a reset while the base is suspended' \
	slow_base 'a base that is slow' \
	flakey_base 'a base that comes and goes' \
	read_only 'a read-only disk' \
	read_only_loop 'a read-only loop device' \
	shrunk 'a base that shrinks' \
	smaller_base 'a table with a smaller base' \
	larger_sectors 'a table with a base of larger logical blocks' \
	smaller_sectors 'a table with a base of smaller logical blocks' \
	not_connected 'an NBD device that is not connected'
