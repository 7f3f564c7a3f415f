#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a host that runs out of memory, or a base that fails, at the
# wrong moment loses what was written, leaks memory or hangs.
#
# Each operation is repeated while its first, second and so on allocation or
# request fails, until none is left that could. It wants a kernel with fault
# injection.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
FAULTS=/sys/kernel/debug

# knob FILE VALUE: of all kinds of faults that have it
knob()
{
	local kind

	for kind in failslab fail_page_alloc fail_make_request; do
		[ ! -e "$FAULTS/$kind/$1" ] || echo "$2" >"$FAULTS/$kind/$1"
	done
}

# may_fail DEVICE: so may its requests
may_fail()
{
	local dir

	dir=$(sysfs_of "$1")
	echo 1 >"$dir/make-it-fail"
	undo eval "echo 0 >'$dir/make-it-fail'"
}

# workers_may_fail 0|1: also those of the kernel
workers_may_fail()
{
	local comm

	for comm in /proc/[0-9]*/comm; do
		[[ $(<"$comm") != kworker/* ]] || echo "$1" >"${comm%comm}make-it-fail"
	done
}

# Whoever looks at the end of the boot would not see what is forgotten here.
forget_leaks()
{
	echo scan=off >$KMEMLEAK
	find_leaks
	is 'what the module leaked before' "$(module_leaks)" ''
	echo clear >$KMEMLEAK
}

fixture()
{
	knob times 0
	knob verbose 0
	knob interval 1
	knob probability 100
	undo knob probability 0
	knob task-filter Y
	knob ignore-gfp-wait N
	knob ignore-gfp-highmem N
	knob min-order 0
	# not each failure on the console, but what a kernel says that dies of one
	undo eval "echo '$(</proc/sys/kernel/printk)' >/proc/sys/kernel/printk"
	echo 4 >/proc/sys/kernel/printk
	[ ! -e $KMEMLEAK ] || forget_leaks
	make_brd 2048 2
	unguard /dev/ram1
	may_fail /dev/ram0
	# what all such devices share is there from now on
	make_cow test-other 4096 /dev/ram0
	make_dm test-other-view '0 4096 nbdcow-view /dev/mapper/test-other /dev/ram0' --readonly
}

# step COMMAND...: on a device of 3 MiB, of which the base has two, that all
# rounds begin with in the same state
step()
{
	make_cow test-cow 6144 /dev/ram0
	may_fail $COW
	io $COW 'before message test-cow reset' 'before model 2M' "$@"
}

# Without that, no request of the base has failed.
base_has_failed()
{
	between 'errors of the base' "$(field test-cow errors)" 1 1000000
}

whole_write()
{
	step 'after status test-cow used=1 zeroed=0' 'faults write 4k 4k A'
}

partial_write()
{
	step 'after status test-cow used=1 zeroed=0' 'faults write 9s 1s A'
	base_has_failed
}

many_blocks()
{
	step 'after status test-cow used=256 zeroed=0' 'faults write 64k 1M A'
}

# Partial blocks in front and at the end, stored and zeroed ones in the middle.
all_kinds_of_blocks()
{
	step 'before write 16k 4k B' 'before discard 24k 4k' \
		'after status test-cow used=8 zeroed=0' 'faults write 9s 57s A'
}

# What the base has not got is not read.
past_the_base()
{
	step 'after status test-cow used=2 zeroed=0' 'faults write 4111s 2s A'
}

rewrite()
{
	step 'before write 0 64k B' 'after status test-cow used=16' 'faults write 1s 70s A'
}

discard()
{
	step 'before write 64k 64k B' 'after status test-cow used=8 zeroed=16' \
		'faults discard 96k 64k'
	# where the map has nothing yet
	io $COW 'before message test-cow reset' 'before model 2M' \
		'after status test-cow used=0 zeroed=16' 'faults discard 96k 64k'
}

discard_everything()
{
	step 'before write 64k 64k B' 'after status test-cow used=0' 'faults discard 0 end'
}

# The kernel writes zeroes where it could not zero, if it is allowed to.
write_zeroes()
{
	step 'before write 64k 64k B' 'after status test-cow used=8 zeroed=16' \
		'faults punch 96k 64k'
	io $COW 'before message test-cow reset' 'before model 2M' 'before write 64k 64k B' \
		'faults zerorange 96k 64k'
}

partial_write_zeroes()
{
	step 'before write 64k 4k B' 'after status test-cow used=2 zeroed=3' \
		'faults punch 129s 33s'
	io $COW 'before message test-cow reset' 'before model 2M' \
		'after status test-cow used=1 zeroed=0' 'faults punch 9s 3s'
}

reading()
{
	step 'before write 64k 64k B' 'before discard 96k 8k' 'faults check 48k 16k .' \
		'before message test-cow reset' 'before write 64k 64k B' 'faults check 64k 64k B'
	base_has_failed
}

reset()
{
	step 'before write 64k 64k B' 'before discard 256k 64k' 'after model 2M' \
		'after status test-cow used=0 zeroed=0' 'faults message test-cow reset'
}

limit()
{
	step 'before write 0 64k B' 'before message test-cow limit none' \
		'after status test-cow limit=20' 'faults message test-cow limit 20' \
		'after status test-cow limit=20' 'faults status test-cow used=16'
}

# One that is full, and stays so.
full()
{
	step 'before message test-cow limit none' 'before write 0 64k B' \
		'before message test-cow limit 16' \
		'after fails ENOSPC write 64k 4k A' 'after fails ENOSPC write 129s 1s A' \
		'after status test-cow used=16 health=full' 'faults write 2s 5s C'
}

# The commands that make another device of 2 MiB, test-new
NEW=('absent test-new' 'create test-new 4096 nbdcow /dev/ram0' 'open test-new' 'write 0 64k A'
	'discard 64k 64k' 'open -')
THERE=('open test-new' 'check 0 64k A' 'check 64k 64k 0' 'check 128k 1920k .')

create()
{
	undo io /dev/ram0 'absent test-new'
	io /dev/ram0 'before absent test-new' 'failed absent test-new' 'after open test-new' \
		'after check 0 end .' 'after write 0 4k A' 'after status test-new used=1' \
		'after open -' \
		'faults create test-new 4096 nbdcow /dev/ram0 4 limit 1000 tmpfs /dev/shm'
}

# changes COMMAND...: of test-new
changes()
{
	undo io /dev/ram0 'absent test-new'
	io /dev/ram0 "${NEW[@]/#/before }" "${THERE[@]/#/after }" 'after open -' "$@" \
		'absent test-new'
}

load()
{
	changes "${THERE[@]/#/failed }" 'failed open -' 'after resume test-new' \
		'after status test-new used=16 limit=100' \
		'faults load test-new 4096 nbdcow /dev/ram0 2 limit 100'
}

# A failure may leave the device suspended, and without the table that waited.
reload()
{
	changes 'failed resume test-new' "${THERE[@]/#/failed }" 'failed open -' \
		'after status test-new used=16 limit=100' \
		'faults reload test-new 4096 nbdcow /dev/ram0 2 limit 100'
}

# Into another leaf of the map.
growth()
{
	changes 'failed resume test-new' "${THERE[@]/#/failed }" 'failed open -' \
		'after open test-new' 'after size 264192s' 'after check 2M 1M 0' \
		'after write 128M 4k B' 'after check 128M 4k B' 'after open -' \
		'faults reload test-new 264192 nbdcow /dev/ram0'
}

# Until it goes, everything is there.
removal()
{
	undo io /dev/ram0 'absent test-new'
	io /dev/ram0 "${NEW[@]/#/before }" "${THERE[@]/#/failed }" 'failed open -' \
		'faults remove test-new'
	is 'blocks of all overlays' "$(<$MODULE/parameters/total_used)" "$total_used_before"
}

# Blocks that come back from swap.
swapped_out()
{
	local -a out

	# a failed read of swap would be for good
	make_swapped_cow test-cow 4096 /dev/ram0 /dev/ram1
	may_fail $COW
	out=('before model 2M' 'before write 0 128k B' "before echo 128K $SWAPPED/memory.reclaim")
	io $COW 'write 0 128k B' "echo 128K $SWAPPED/memory.reclaim"
	between 'bytes that are swapped out' "$(<$SWAPPED/memory.swap.current)" 65536 \
		131072
	io $COW "${out[@]}" 'faults check 64k 4k B' \
		"${out[@]}" 'after status test-cow used=32' 'faults write 64k 8k A' \
		"${out[@]}" 'after status test-cow used=32' 'faults write 129s 1s A' \
		"${out[@]}" 'after status test-cow used=31' 'faults discard 64k 4k'
}

# What is stored waits for memory also when there was no room for a new block.
swapped_out_when_full()
{
	local command

	make_tmpfs tmpfs -o size=128k
	make_swapped_cow test-cow 4096 /dev/ram0 /dev/ram1 2 tmpfs "$work/tmpfs"
	io $COW 'write 0 128k B' "echo 128K $SWAPPED/memory.reclaim" 'fails ENOSPC write 256k 4k C'
	status_is test-cow health=full
	between 'bytes that are swapped out' "$(<$SWAPPED/memory.swap.current)" 65536 131072
	workers_may_fail 1
	undo workers_may_fail 0
	for command in 'check 64k 4k B' 'write 68k 1k B'; do
		io $COW "echo 256K $SWAPPED/memory.reclaim" drop \
			"echo 10 $FAULTS/fail_page_alloc/times" "$command"
		is "faults that $command left" "$(<$FAULTS/fail_page_alloc/times)" 0
	done
	io $COW 'check 0 128k B'
}

VIEW='create test-view 6144 nbdcow-view /dev/mapper/test-cow /dev/ram0'

view()
{
	undo io /dev/ram0 'absent test-view'
	step 'before absent test-view' 'before write 0 64k B' 'before discard 96k 8k' \
		'failed absent test-view' 'after write 0 64k A' 'after open test-view' \
		'after check 0 64k B' 'after check 96k 8k 0' 'after open -' 'after write 0 64k B' \
		"faults $VIEW" 'absent test-view'
}

# These never fail for a view.
viewed()
{
	undo io /dev/ram0 'absent test-view'
	step 'before absent test-view' 'before write 0 64k B' "before $VIEW" \
		'after status test-cow used=16' 'faults write 1s 70s A' 'absent test-view'
	io $COW 'before absent test-view' 'before message test-cow reset' 'before model 2M' \
		'before write 0 64k B' "before $VIEW" 'after status test-cow used=8' \
		'faults discard 32k 64k' 'absent test-view'
	io $COW 'before absent test-view' 'before message test-cow reset' 'before model 2M' \
		'before write 0 64k B' "before $VIEW" 'after model 2M' \
		'after status test-cow used=0' 'faults message test-cow reset' 'absent test-view'
}

# make_view SECTORS: of what is there, of which a half is overwritten then
make_view()
{
	make_dm test-view "0 $1 nbdcow-view $COW /dev/ram0" --readonly
	may_fail /dev/mapper/test-view
	io $COW 'write 0 64k A'
}

# What was saved for it, what the copy still has, zeroes and the base.
view_is_read()
{
	make_cow test-cow 6144 /dev/ram0
	io $COW 'write 0 128k B' 'discard 128k 4k'
	make_view 6144
	io /dev/mapper/test-view 'faults check 60k 8k B' 'faults is 130k 0000....'
}

view_is_swapped_out()
{
	make_swapped_cow test-cow 4096 /dev/ram0 /dev/ram1
	io $COW 'write 0 128k B'
	make_view 4096
	io /dev/mapper/test-view "before echo 256K $SWAPPED/memory.reclaim" \
		'faults check 32k 4k B' "before echo 256K $SWAPPED/memory.reclaim" \
		'faults check 96k 4k B'
	between 'bytes that are swapped out' "$(<$SWAPPED/memory.swap.current)" 65536 524288
}

BASE=/dev/mapper/test-base
# The base goes away, and comes back.
AWAY=('load test-base 4096 error' 'resume test-base')
BACK=('load test-base 4096 linear /dev/ram0 0' 'resume test-base')
FILL='prefetch test-cow 0 512'
# Neither a block nor a number is left of a cache that is dropped.
DROPPED=('message test-cow drop_cache' 'await test-cow cached=0')

# cache_step COMMAND...: as step, on a base with a cache that nobody else has
cache_step()
{
	make_dm test-base '0 4096 linear /dev/ram0 0'
	make_cow test-cow 6144 $BASE
	may_fail $COW
	io $COW "${BACK[@]/#/before }" 'before message test-cow reset' \
		"${DROPPED[@]/#/before }" 'before model 2M' "$@"
}

# filling COMMAND...: what is read goes into the cache, and is right there
filling()
{
	cache_step 'before message test-cow cow_on_read on' 'after verify' \
		"${DROPPED[@]/#/after }" "$@"
}

miss()
{
	filling 'faults check 48k 64k .'
}

eviction()
{
	filling 'before message test-cow cache_limit 16' 'before check 0 64k .' \
		'before status test-cow cached=16' 'faults check 64k 48k .'
}

cached_write()
{
	filling 'after status test-cow used=1' 'faults write 9s 1s A'
}

# Without the base all is compared with the cache.
prefetch()
{
	cache_step 'after status test-cow cached=512 prefetch=done:512' \
		"${AWAY[@]/#/after }" "faults $FILL"
}

write_without_base()
{
	cache_step "before $FILL" "${AWAY[@]/#/before }" \
		'after status test-cow used=8 cached=512' 'faults write 9s 57s A'
}

cache_limit()
{
	cache_step 'before message test-cow cache_limit none' "before $FILL" \
		'after status test-cow cached=64 cache_limit=64' \
		'faults message test-cow cache_limit 64'
}

drop_cache()
{
	cache_step "before $FILL" 'after status test-cow cached=0' \
		'faults message test-cow drop_cache'
}

# The old base keeps its cache, the new one begins its own.
rebase()
{
	make_dm test-base '0 4096 linear /dev/ram0 0'
	undo io /dev/ram0 'message test-other drop_cache'
	changes 'before prefetch test-new 0 512' \
		'failed resume test-new' "${THERE[@]/#/failed }" 'failed open -' \
		'after status test-new used=16 cached=480' 'after status test-other cached=512' \
		"faults reload test-new 4096 nbdcow $BASE 1 cow_on_read"
}

# Parts of two leaves of the map, and one as a whole. What is known is not read.
holes()
{
	local zeroes=309248

	need_module dm-zero
	make_dm test-zeroes "0 $zeroes zero"
	make_dm test-base "0 2048 linear /dev/ram0 0
		2048 $zeroes linear /dev/mapper/test-zeroes 0"
	undo io /dev/ram0 'absent test-new'
	io /dev/ram0 'before open -' 'before absent test-new' \
		"before load test-zeroes $zeroes zero" 'before resume test-zeroes' \
		"before create test-new 6144 nbdcow $BASE" 'before open test-new' \
		'before model 1M' "after load test-zeroes $zeroes error" \
		'after resume test-zeroes' \
		'faults message test-new holes 256 16128 16384 16384 32768 100' \
		'open -' 'absent test-new'
}

# Nothing is left of all that failed; device-mapper itself loses the names of devices
# that it cannot show in sysfs.
no_leak()
{
	[ -e $KMEMLEAK ] || skip 'needs kmemleak'
	find_leaks
	is 'what the module leaked' "$(module_leaks)" ''
}

if [ ! -e /proc/self/fail-nth ] || { [ ! -e $FAULTS/failslab/times ] &&
	! mount -t debugfs debugfs $FAULTS; } || [ ! -e $FAULTS/failslab/times ] ||
	[ ! -e $FAULTS/fail_make_request ] || [ ! -e $FAULTS/fail_page_alloc ]; then
	echo '1..0 # SKIP needs a kernel with fault injection'
	exit 4
fi

run_tests \
	create 'a device is made' \
	load 'a table is loaded' \
	reload 'a table is taken over' \
	growth 'a device grows' \
	removal 'a device is removed' \
	whole_write 'a block is written' \
	partial_write 'a sector is written' \
	many_blocks 'many blocks are written' \
	all_kinds_of_blocks 'blocks in all states are written' \
	past_the_base 'a sector past the end of the base is written' \
	rewrite 'stored blocks are written' \
	full 'stored blocks of a full overlay are written' \
	reading 'blocks are read' \
	discard 'blocks are discarded' \
	discard_everything 'all blocks are discarded' \
	write_zeroes 'blocks are zeroed' \
	partial_write_zeroes 'parts of blocks are zeroed' \
	reset 'the overlay is reset' \
	limit 'limit and status' \
	view 'a view is made' \
	viewed 'blocks that a view needs are written and discarded' \
	view_is_read 'a view is read' \
	view_is_swapped_out 'a view of blocks that are swapped out is read' \
	swapped_out 'blocks that are swapped out are read and written' \
	swapped_out_when_full 'they wait for memory also when the overlay is full' \
	miss 'blocks are read into the cache of the base' \
	eviction 'others make room for them there' \
	cached_write 'a sector is written, and its block cached' \
	prefetch 'the base is read ahead' \
	write_without_base 'parts of cached blocks are written' \
	cache_limit 'the cache gets a limit' \
	drop_cache 'the cache is dropped' \
	rebase 'a table with another base is taken over' \
	holes 'holes of the base become known' \
	no_leak 'nothing leaks'
