#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, the cache that overlays on one base share gives one of them the
# data of another, old data or an error that has passed; or it does not help.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
OTHER=/dev/mapper/test-other
GATE=/dev/mapper/test-gate
UNDER=/dev/mapper/test-under
RELEASE='resume test-gate'
MEND=('load test-under 8192 linear /dev/ram0 0' 'resume test-under')
DROP='message test-other drop_cache'

fixture()
{
	make_brd 4096 2
	make_gate /dev/ram0
	make_cow test-cow 8192 $GATE 1 cow_on_read
	make_cow test-other 8192 $GATE 1 cow_on_read
	undo dmsetup resume test-gate
}

# Both overlays are as new when the test ends, and the cache is empty.
begin()
{
	undo io $COW 'absent test-third' "${MEND[@]}" "load test-cow 8192 nbdcow $GATE 1 cow_on_read" \
		'resume test-cow' 'message test-cow reset' 'message test-other reset' \
		'message test-cow cache_limit none' "$DROP"
	undo io $COW "$RELEASE"
}

# race COMMAND...: meanwhile the base is held still
race()
{
	begin
	io $COW "${CLOSE_GATE[@]}" "$@"
}

# The first 64 KiB are on their way into the cache while the commands are played.
miss()
{
	race 'bg check 0 64k .' 'held test-gate 1' "$@"
}

# reads DEVICE: requests and sectors, ever
reads()
{
	stat_of "$(sysfs_of "$1")" 0 2
}

# read_since BEFORE REQUESTS SECTORS: so much was read from the base
read_since()
{
	local -a before now

	read -ra before <<<"$1"
	read -ra now <<<"$(reads $GATE)"
	is 'requests and sectors read' \
		"$((now[0] - before[0])) $((now[1] - before[1]))" "$2 $3"
}

# has_at_most BLOCKS: the cache
has_at_most()
{
	[ "$(field test-cow cached)" -le "$1" ]
}

#
# A block is being read
#

whole_write()
{
	miss 'write 4k 4k A' 'is 4k AAAAAAAA' 'pending 1' "$RELEASE" join \
		'check 0 4k .' 'check 4k 4k A' 'check 8k 56k .' 'status test-cow used=1 cached=16' \
		'open test-other' 'check 0 64k .'
}

partial_write()
{
	miss 'submit write 9s 1s A' 'held test-gate 2' 'pending 2' "$RELEASE" reap join \
		'is 4k .A......' 'check 8k 56k .' 'write 17s 2s B' 'is 8k .BB.....' \
		'status test-cow used=2' 'open test-other' 'check 0 64k .'
}

discard()
{
	miss 'discard 4k 8k' 'check 4k 8k 0' 'pending 1' "$RELEASE" join 'check 0 4k .' \
		'check 4k 8k 0' 'write 9s 1s A' 'is 4k 0A000000' 'check 12k 52k .' \
		'open test-other' 'check 0 64k .'
}

reset()
{
	miss 'write 0 8k A' 'message test-cow reset' 'pending 1' "$RELEASE" join 'check 0 64k .' \
		'write 9s 1s A' 'is 4k .A......' 'status test-cow used=1' \
		'open test-other' 'check 0 64k .'
}

drop()
{
	miss "$DROP" 'pending 1' "$RELEASE" join 'status test-other cached=16' \
		'check 0 64k .' "$DROP" 'status test-other cached=0' 'check 0 64k .'
}

lower_limit()
{
	miss 'message test-cow cache_limit 4' 'pending 1' "$RELEASE" join 'check 0 64k .'
	# whoever waited is served first
	wait_until 10 has_at_most 4
	between 'cached' "$(field test-cow cached)" 1 4
}

suspend()
{
	miss 'bg suspend test-cow' 'asleep dm_wait' 'pending 2' "$RELEASE" join \
		'open test-other' 'check 0 64k .' 'resume test-cow' 'open -' 'check 0 64k .' \
		'status test-cow cached=16'
}

# The new base has a cache of its own.
rebase()
{
	miss 'write 4k 4k A' "load test-cow 8192 nbdcow $UNDER 1 cow_on_read" 'bg resume test-cow' \
		'asleep dm_wait' 'pending 2' "$RELEASE" join 'status test-cow cached=0' \
		'check 0 4k .' 'check 4k 4k A' 'check 8k 24k .' 'status test-cow cached=7 errors=0' \
		'status test-other cached=16' 'open test-other' 'check 0 64k .'
}

#
# Who reads what
#

one_read()
{
	local before

	before=$(reads $GATE)
	miss 'open test-other' 'bg check 0 64k .' 'bg check 5s 9s .' "inflight $OTHER 2" \
		'held test-gate 1' 'pending 3' "$RELEASE" join
	read_since "$before" 1 128
	io $OTHER 'check 0 64k .' 'open test-cow' 'check 0 64k .' 'write 9s 1s A'
	read_since "$before" 1 128
}

# Who wants more than what is on its way reads only the rest.
overlapping_reads()
{
	local before

	before=$(reads $GATE)
	miss 'open test-other' 'bg check 32k 64k .' 'held test-gate 2' "$RELEASE" join
	read_since "$before" 2 192
	# a gap in what is cached
	io $COW 'check 128k 4k .' 'check 64k 128k .'
	read_since "$before" 5 384
}

one_request()
{
	local before

	begin
	before=$(reads $GATE)
	io $COW 'check 0 1M .'
	read_since "$before" 1 2048
	# not for one sector more than was asked for, but whole blocks
	io $COW 'check 4095s 1s .' 'check 4088s 8s .'
	read_since "$before" 2 2056
}

read_ahead()
{
	begin
	io $COW 'message test-cow cow_on_read off' 'message test-cow cow_on_cache on'
	io $COW 'check 0 64k .' 'status test-cow cached=0'
	io -b $COW 'check 0 512k .'
	between 'cached' "$(field test-cow cached)" 8 512
	io $COW 'check 0 end .'
}

# A small limit is kept, and still serves.
small_limits()
{
	local limit

	begin
	for limit in 1 3 16; do
		io $COW "message test-cow cache_limit $limit" 'check 0 64k .' 'check 2M 1M .'
		between 'cached' "$(field test-cow cached)" 1 $limit
	done
}

# What was used again is kept when another block has to go.
second_chance()
{
	local before

	begin
	before=$(reads $GATE)
	io $COW 'message test-cow cache_limit 16' 'check 0 64k .' 'check 0 4k .' 'check 1M 4k .'
	read_since "$before" 2 136
	io $COW 'check 0 4k .'
	read_since "$before" 2 136
	io $COW 'check 4k 4k .'
	read_since "$before" 3 144
}

#
# Errors
#

failed_read()
{
	local errors others

	errors=$(field test-cow errors)
	others=$(field test-other errors)
	race 'bg fails EIO check 0 64k ?' 'held test-gate 1' 'open test-other' \
		'bg fails EIO check 4k 8k ?' 'bg fails EIO check 32k 4k ?' "inflight $OTHER 2" \
		'load test-under 8192 error' 'resume test-under' "$RELEASE" join
	status_is test-cow health=base-error errors=$((errors + 1))
	status_is test-other health=base-error errors=$((others + 2))
	# whoever waited is told first
	wait_until 10 has_at_most 0
	io $COW 'fails EIO check 0 4k ?'
	wait_until 10 has_at_most 0
	# it works again, and says so, though all goes through the cache
	io $COW "${MEND[@]}" 'check 0 64k .' 'status test-cow health=ok cached=16' \
		'open test-other' 'check 0 128k .' 'status test-other health=ok cached=32'
}

# Only who needs the bad block gets its error.
bad_block()
{
	dmsetup load test-under --table $'0 8 linear /dev/ram0 0\n8 8 error\n16 8176 linear /dev/ram0 16'
	dmsetup resume test-under
	race 'bg fails EIO check 0 64k ?' 'held test-gate 1' 'open test-other' 'bg check 0 4k .' \
		'bg fails EIO check 4k 4k ?' 'bg check 8k 16k .' "inflight $OTHER 3" "$RELEASE" join \
		'check 0 4k .' 'check 8k 56k .' 'fails EIO check 4k 4k ?' \
		"${MEND[@]}" 'check 0 64k .' 'status test-other cached=16'
}

#
# Prefetches
#

# prefetching COMMAND...: two reads of a prefetch are under way meanwhile
prefetching()
{
	race 'message test-cow prefetch 0 1024' 'held test-gate 2' "$@"
}

prefetch_ends()
{
	wait_until 20 prefetch_is test-cow done:1024/1024
	status_is test-cow cached=1024
}

prefetch_and_writes()
{
	local before

	before=$(reads $GATE)
	prefetching 'bg check 0 64k .' 'bg check 1000k 100k .' "inflight $COW 3" 'write 4k 4k A' \
		'discard 8k 4k' 'open test-other' 'bg check 1M 4k .' 'held test-gate 2' \
		"$RELEASE" join
	prefetch_ends
	read_since "$before" 4 8192
	io $COW 'check 0 4k .' 'check 4k 4k A' 'check 8k 4k 0' 'check 12k end .' \
		'write 4097s 1s B' 'is 2M .B......' 'open test-other' 'check 0 end .'
	read_since "$before" 4 8192
}

prefetch_and_reset()
{
	prefetching 'write 0 8k A' 'message test-cow reset' "$RELEASE"
	prefetch_ends
	io $COW 'check 0 end .' 'status test-cow used=0'
}

# Nothing more is read while it is suspended, which waits for nothing; then it goes on.
prefetch_and_suspend()
{
	local before

	prefetching 'suspend test-cow' "$RELEASE" "inflight $GATE 0"
	status_is test-cow cached=512
	before=$(reads $GATE)
	sleep 0.2
	read_since "$before" 0 0
	dmsetup resume test-cow
	prefetch_ends
	read_since "$before" 2 4096
	io $COW 'check 0 end .'
}

# The next one begins when what the stopped one reads has come.
stopped_prefetch()
{
	prefetching 'message test-cow prefetch stop' 'bg message test-cow prefetch 0 1024' \
		'asleep nbdcow_prefetch_start' 'pending 1' "$RELEASE" join
	prefetch_ends
	io $COW 'check 0 end .'
}

# It ends with its table, and what it has read stays.
prefetch_and_new_table()
{
	prefetching "load test-cow 8192 nbdcow $GATE 1 cow_on_read" 'bg resume test-cow' \
		'asleep nbdcow_base_exit' 'pending 1' 'write 0 4k A' 'is 0 AAAAAAAA' "$RELEASE" \
		join 'status test-cow prefetch=- cached=512' 'message test-cow prefetch 0 1024'
	prefetch_ends
	io $COW 'check 0 4k A' 'check 4k end .'
}

prefetch_and_remove()
{
	race "create test-third 8192 nbdcow $GATE" 'message test-third prefetch 0 1024' \
		'held test-gate 2' 'bg remove test-third' 'asleep nbdcow_base_exit' 'pending 1' \
		"$RELEASE" join 'status test-other cached=512' 'check 0 end .'
}

is_full()
{
	[[ $(field test-cow prefetch) = full:* ]]
}

prefetch_and_limit()
{
	prefetching 'message test-cow cache_limit 16' "$RELEASE"
	wait_until 20 is_full
	wait_until 10 has_at_most 16
	io $COW 'check 0 end .'
}

# A prefetch keeps to its rate, and leaves nothing of that to the next one.
rates()
{
	local start i gaps=()

	begin
	start=${EPOCHREALTIME/./}
	io $COW 'message test-cow prefetch 0 768 1024' 'suspend test-cow' 'resume test-cow'
	wait_until 20 prefetch_is test-cow done:768/768
	between 'microseconds for 3 MiB' $((${EPOCHREALTIME/./} - start)) 1800000 20000000
	io $COW "$DROP" 'message test-cow prefetch 0 1024 1'
	wait_until 20 prefetch_is test-cow running:256/1024
	dmsetup message test-cow 0 prefetch stop
	# once the read that is under way has ended
	wait_until 20 dmsetup message test-cow 0 prefetch 0 1024
	prefetch_ends

	# small reads as well, of which none is as long as a tick of the kernel
	io $COW "$DROP"
	for ((i = 0; i < 512; i += 2)); do
		gaps+=("check $((4 * i))k 4k .")
	done
	io $COW "${gaps[@]}"
	start=${EPOCHREALTIME/./}
	dmsetup message test-cow 0 prefetch 0 512 1024
	wait_until 20 prefetch_is test-cow done:512/512
	between 'microseconds for 1 MiB' $((${EPOCHREALTIME/./} - start)) 900000 20000000
}

# Who needs a block that is being prefetched does not wait for all who read something else:
# mq-deadline, the scheduler of nbd devices, lets idle reads wait for them up to ten seconds.
# The disk reads one thing at a time, and has enough of them to do for five seconds.
prefetch_beside_load()
{
	local disk=/dev/nullb0 dir load

	need_module null_blk nr_devices=1 queue_mode=2 submit_queues=1 hw_queue_depth=1 \
		max_sectors=255 irqmode=2 completion_nsec=5000000
	undo wait_until 10 rmmod null_blk
	dir=$(sysfs_of $disk)/queue
	echo mq-deadline >"$dir/scheduler" || skip 'needs mq-deadline'
	# what is not among these waits before the scheduler sees it
	echo 256 >"$dir/nr_requests"
	make_cow test-third 8192 $disk
	load="bg run dd if=$disk of=/dev/null bs=1M count=40 iflag=direct status=none skip="
	io /dev/mapper/test-third "${load}100" "${load}200" "${load}300" "inflight $disk 1" \
		'run sleep 0.5' 'message test-third prefetch 0 256' 'check 512k 4k ?' \
		'pending 3' join 'status test-third cached=256'
}

#
# Everything at once
#

# churn COMMAND...: again and again, until `calm'
churn()
{
	[ -e "$work/churn" ] || { touch "$work/churn"; undo rm -f "$work"/churn{,ed}; }
	while [ -e "$work/churn" ]; do
		io /dev/ram1 "$@" || exit 1
		echo >>"$work/churned"
	done &
	churners+=($!)
}

calm()
{
	local pid

	rm "$work/churn"
	for pid in "${churners[@]}"; do
		wait "$pid"
	done
	between 'rounds' "$(wc -l <"$work/churned")" ${#churners[@]} 1000000
	churners=()
}
churners=()

# random COUNT: I/O on both overlays at once, every byte of which is compared
random()
{
	local errors others

	errors=$(field test-cow errors)
	others=$(field test-other errors)
	io $OTHER 'model 4M' "random 1 $1" verify &
	io $COW 'model 4M' "random 2 $1" verify
	wait $!
	status_is test-cow health=ok errors="$errors"
	status_is test-other health=ok errors="$others"
}

evictions()
{
	begin
	churn "$DROP" 'message test-cow cache_limit 200' 'message test-other cache_limit 2'
	churn 'message test-cow cache_limit 20' "$DROP" 'message test-other cache_limit 1000'
	random 300
	calm
	between 'evictions' "$(field test-cow evicted)" 100 10000000
	io $OTHER 'message test-other cache_limit none'
}

prefetches()
{
	begin
	churn 'try message test-cow prefetch 0 1024' 'run sleep 0.01' 'message test-cow prefetch stop' \
		"$DROP" 'try message test-cow prefetch 0 1024' 'suspend test-cow' 'resume test-cow'
	churn "create test-third 8192 nbdcow $GATE" 'message test-third prefetch 0 1024' \
		"reload test-third 8192 nbdcow $GATE" 'message test-third prefetch 100 900' \
		'message test-third reset' 'remove test-third'
	random 300
	calm
	io $COW "$DROP" 'message test-cow prefetch stop'
	wait_until 20 io $COW 'message test-cow prefetch 0 1024'
	prefetch_ends
}

rebases()
{
	begin
	churn 'reload test-cow 8192 nbdcow /dev/ram1 1 cow_on_read' 'run sleep 0.01' \
		'try message test-cow prefetch 0 1024' "reload test-cow 8192 nbdcow $GATE 1 cow_on_read" \
		'run sleep 0.01' "$DROP"
	random 300
	calm
}

#
# Bases that are not as they seem
#

# A read that the base refuses with REQ_NOWAIT is repeated without.
busy()
{
	local loop

	begin
	make_loop $GATE -r --direct-io=on
	loop=$REPLY
	echo 4 >"$(sysfs_of "$loop")/queue/nr_requests"
	make_cow test-third 8192 "$loop" 1 cow_on_read
	# all requests that the disk can have are held
	io "$loop" "${CLOSE_GATE[@]}" 'bg check 1M 4k .' 'bg check 2M 4k .' 'bg check 3M 4k .' \
		'bg check 3M 8k .' 'held test-gate 4' 'open test-third' 'bg nowait check 0 64k .' \
		'inflight /dev/mapper/test-third 1' 'pending 5' "$RELEASE" join \
		'status test-third cached=16 errors=0' 'check 0 64k .'
}

# What the base has more than it had is not shown, whoever has cached it.
grown_base()
{
	local loop

	begin
	make_file grown 1050624
	make_loop "$REPLY"
	loop=$REPLY
	io "$loop" 'write 0 end .'
	make_cow test-short 4096 "$loop"
	truncate -s 2M "$work/grown"
	losetup -c "$loop"
	io "$loop" 'write 1026k end .'
	make_cow test-long 4096 "$loop" 1 cow_on_read
	io /dev/mapper/test-long 'check 1M 8k .' 'status test-long cached=2' 'open test-short' \
		'is 1M ....0000' 'write 2049s 1s A' 'is 1M .A..0000' 'write 2057s 1s A' \
		'is 1028k 0A000000'
}

# Nobody can say that the base has a hole where it has nothing.
holes_past_the_end()
{
	local range

	make_cow test-third 16384 /dev/ram1
	for range in '1024 1' '1023 2' '0 1025' '2047 1' '2048 1'; do
		# shellcheck disable=SC2086 # two words
		fails dmsetup message test-third 0 holes $range
	done
	is 'the map' "$(dmsetup message test-third 0 extents 0 2048)" '1024b 1024z'
	dmsetup message test-third 0 holes 1023 1
	is 'the map' "$(dmsetup message test-third 0 extents 0 2048)" '1023b 1h 1024z'
}

#
# The end
#

# KiB that nobody holds; those of a cache that is lost would still count as available.
unused()
{
	local part sum

	# What a CPU has freed it may keep for itself, from 6.7 on up to many MiB.
	sum=$(awk -v kib=$(($(getconf PAGESIZE) / 1024)) '$1 == "count:" { n += $2 }
		END { print n * kib }' /proc/zoneinfo)
	for part in MemFree Buffers Cached SReclaimable; do
		sum=$((sum + $(meminfo $part)))
	done
	echo "$sum"
}

# Whoever fills, reads and drops 256 MiB each time, one way or another, has them again.
all_is_freed()
{
	local before way

	need_module dm-zero
	[ "$(meminfo MemAvailable)" -ge 524288 ] || skip 'needs 512 MiB of memory'
	make_dm test-zero '0 524288 zero'
	undo io /dev/ram0 'absent test-third'
	before=$(unused)
	for way in 'status test-third cached=65536' 'message test-third drop_cache' \
		'message test-third cache_limit 1'; do
		io /dev/ram0 'create test-third 524288 nbdcow /dev/mapper/test-zero' \
			'prefetch test-third 0 65536' 'status test-third cached=65536' \
			'open test-third' 'check 0 64M 0' 'write 9s 1s A' 'open -' \
			"$way" 'remove test-third'
	done
	between 'KiB that are missing' $((before - $(unused))) -262144 49152
}

# null_disk BYTE: the null_blk device of that number, filled with it; what was there is gone,
# whoever has it open
null_disk()
{
	local config=/sys/kernel/config/nullb/nullb0

	[ ! -d $config ] || rmdir $config
	mkdir $config
	echo 4 >$config/size
	echo 1 >$config/memory_backed
	echo 1 >$config/power
	REPLY=/dev/nullb0
	wait_until 10 test -b $REPLY
	io $REPLY "write 0 end $1"
}

# The next disk of its number is another one, also while the first is in use.
same_number()
{
	need_module null_blk nr_devices=0
	mount_configfs
	undo rmmod null_blk
	undo rmdir /sys/kernel/config/nullb/nullb0
	null_disk A
	make_cow test-third 8192 "$REPLY" 1 cow_on_read
	io /dev/mapper/test-third 'check 0 64k A'
	null_disk B
	make_cow test-fourth 8192 "$REPLY" 1 cow_on_read
	io /dev/mapper/test-fourth 'check 0 64k B'
	io /dev/mapper/test-third 'check 0 64k A'
	status_is test-third cached=16
	status_is test-fourth cached=16
}

run_tests \
	whole_write 'a block is written while it is read into the cache' \
	partial_write 'a part of it is written meanwhile' \
	discard 'it is discarded meanwhile' \
	reset 'the overlay is reset meanwhile' \
	drop 'the cache is dropped meanwhile' \
	lower_limit 'the limit of the cache is lowered meanwhile' \
	suspend 'the device is suspended meanwhile' \
	rebase 'the device gets another base meanwhile' \
	one_read 'the base is read once, however many want it' \
	overlapping_reads 'only what is not on its way is read' \
	one_request 'contiguous blocks are one request' \
	read_ahead 'only what is read ahead is kept' \
	small_limits 'small limits' \
	second_chance 'what is used again stays' \
	failed_read 'a read that several wait for fails' \
	bad_block 'one block of a read that several wait for fails' \
	prefetch_and_writes 'reads and writes during a prefetch' \
	prefetch_and_reset 'a reset during a prefetch' \
	prefetch_and_suspend 'a suspend during a prefetch' \
	stopped_prefetch 'a prefetch after one that was stopped' \
	prefetch_and_new_table 'a new table during a prefetch' \
	prefetch_and_remove 'a removal during a prefetch' \
	prefetch_and_limit 'a lower limit during a prefetch' \
	rates 'rates of prefetches' \
	prefetch_beside_load 'who needs what is being prefetched, beside other load' \
	evictions 'random I/O while the cache is small, and dropped' \
	prefetches 'random I/O while prefetches start and end' \
	rebases 'random I/O while the base is exchanged' \
	busy 'a base that has no room for one more request' \
	grown_base 'a base that grew between two overlays' \
	holes_past_the_end 'holes past the end of the base' \
	same_number 'a base that gets the number of one that was pulled out' \
	all_is_freed 'all memory is free again'
