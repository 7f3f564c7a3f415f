#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, what was written is lost, or everything hangs, when memory
# gets scarce and the kernel swaps an overlay out.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow

# make_swapped KIB [SWAP-KIB]: one on a base of that size
make_swapped()
{
	make_brd "$1" 2
	unguard /dev/ram1
	make_dm test-ram1 "0 $((${2:-$1} * 2)) linear /dev/ram1 0"
	make_swapped_cow test-cow $(($1 * 2)) /dev/ram0 /dev/mapper/test-ram1
}

# swapped_within LEAST MOST: in KiB
swapped_within()
{
	local bytes

	bytes=$(<$SWAPPED/memory.swap.current)
	[ "$bytes" -ge $(($1 * 1024)) ] && [ "$bytes" -le $(($2 * 1024)) ]
}

push_out()
{
	echo 8M >$SWAPPED/memory.reclaim || :
	swapped_within "$1" "$2"
} 2>/dev/null

# make_pusher BYTES: a program that pushes all but so much of it out of memory
make_pusher()
{
	REPLY=$work/push
	cat >"$REPLY" <<-EOF
		#!/bin/bash
		for ((i = 0; i < 100; i++)); do
			[ "\$(<$SWAPPED/memory.current)" -ge $1 ] || exit 0
			echo 8M >$SWAPPED/memory.reclaim
		done 2>/dev/null
		exit 1
	EOF
	chmod +x "$REPLY"
	undo rm "$REPLY"
}

# In turns with a program that pushes all but 4 MiB of it out of the memory.
random_io()
{
	local out in

	make_swapped 32768
	make_pusher $((4 << 20))
	out=$(counted /proc/vmstat pswpout)
	in=$(counted /proc/vmstat pswpin)
	io $COW 'model 32M' 'write 0 16M A' "run $work/push" 'write 16M 16M B' "run $work/push" \
		'random 1 250' "run $work/push" verify "run $work/push" 'random 2 250' verify
	between 'pages swapped out' $(($(counted /proc/vmstat pswpout) - out)) 7000 1000000
	between 'pages swapped in' $(($(counted /proc/vmstat pswpin) - in)) 4096 1000000
	status_is test-cow refused=0 errors=0
	io $COW 'discard 0 end' 'check 0 end 0'
	status_is test-cow used=0
	wait_until 10 swapped_within 0 1024
}

# All of the overlay is swapped out before each use.
swapped_out()
{
	local before

	make_swapped 32768
	io $COW 'write 0 32M A'
	wait_until 20 push_out 31744 33792
	io $COW 'check 0 2M A' 'write 4097s 1s B' 'write 5s 1s B' 'write 4M 1M C' 'write 6M 64k C'
	soon 'check 8M 4k A'
	soon 'write 10M 4k D'
	soon 'write 20493s 3s D'
	io $COW 'zeroout 12289k 1k' 'discard 13M 4k' 'discard 13321k 30k'
	wait_until 20 push_out 31000 33792

	before=$(<$SWAPPED/memory.swap.current)
	io $COW 'discard 16M 8M'
	between 'bytes of swap given back' $((before - $(<$SWAPPED/memory.swap.current))) \
		$((6 << 20)) $((9 << 20))
	io -b $COW 'is 0 AAAAABAA' 'check 4k 2044k A' 'is 2M ABAAAAAA' 'check 2052k 2044k A' \
		'check 4M 1M C' 'check 5M 1M A' 'check 6M 64k C' 'check 6208k 4032k A' \
		'check 10M 4k D' 'is 20488s AAAAADDD' 'check 10248k 2040k A' 'is 12M AA00AAAA' \
		'check 12292k 1020k A' 'check 13M 4k 0' 'check 13316k 8k A' 'check 13324k 24k 0' \
		'check 13348k 3036k A' 'check 16M 8M 0' 'check 24M end A'
	status_is test-cow used=$((8192 - 1 - 6 - 2048)) zeroed=$((1 + 6 + 2048)) refused=0

	wait_until 20 push_out 22000 33792
	dmsetup message test-cow 0 reset
	wait_until 10 swapped_within 0 1024
	io $COW 'check 0 end .' 'write 0 16M E'
	wait_until 20 push_out 15360 33792
	dmsetup remove --retry test-cow
	unset 'undo_list[-1]'
	wait_until 10 swapped_within 0 1024
}

# What a view needs comes back from swap to be kept, and what it keeps goes there.
viewed()
{
	make_swapped 32768
	io $COW 'write 0 16M A'
	make_dm test-view "0 65536 nbdcow-view $COW /dev/ram0" --readonly
	wait_until 20 push_out 15360 17408
	io $COW 'write 0 1M B' 'write 2049s 1s B' 'discard 4M 4M' 'write 20M 1M B'
	# 16 MiB, less 4, and 1 that is new, and 5 kept
	wait_until 20 push_out 17408 19456
	io /dev/mapper/test-view 'check 0 16M A' 'check 16M end .'
	io $COW 'check 0 1M B' 'is 2M AAAAAAAA' 'is 2048s ABAAAAAA' 'check 4M 4M 0' \
		'check 8M 8M A' 'check 20M 1M B'
	is 'the view' "$(dmsetup status test-view)" "0 65536 nbdcow-view ok $((256 + 1 + 1024))"
}

# all_out KIB: so much is swapped out, and none of that is in memory still
all_out()
{
	push_out "$1" "$1" && grep -qx 'swapcached 0' $SWAPPED/memory.stat
}

# readers_wait N: so many reads of a view wait for a page
readers_wait()
{
	[ "$(cat /proc/[0-9]*/stack 2>/dev/null | grep -c nbdcow_view_read)" = "$1" ]
}

# Readers of a view saw that a block is not kept yet, and wait for it to come back from
# swap behind a write, which keeps it first and then changes it.
kept_meanwhile()
{
	local -a swap=(test-swap 65536) writes=() reads=()
	local i job

	need_module dm-delay
	make_swapped 32768
	cat /proc/sys/vm/page-cluster >"$work/cluster"
	undo cp "$work/cluster" /proc/sys/vm/page-cluster
	echo 0 >/proc/sys/vm/page-cluster
	# those of 2 MiB would wait for each other
	for ((i = 0; i < 4; i += 2)); do
		io $COW "write ${i}M 4k A"
		writes+=("submit write ${i}M 512 B")
		reads+=("bg check ${i}M 4k A")
	done
	make_dm test-view "0 65536 nbdcow-view $COW /dev/ram0" --readonly
	wait_until 20 all_out 8
	undo dmsetup resume test-swap
	io $COW "load ${swap[*]} delay /dev/mapper/test-ram1 0 600000" 'resume test-swap' \
		"load ${swap[*]} linear /dev/mapper/test-ram1 0" "${writes[@]}" \
		'held test-swap 2' 'open test-view' "${reads[@]}" join reap &
	job=$!
	wait_until 20 readers_wait 2
	dmsetup resume test-swap
	wait $job
	io $COW 'is 0 BAAAAAAA' 'is 2M BAAAAAAA'
}

# Reclaim takes from the cache and from the overlay all the while, and much of the
# overlay is swapped out before that.
cached()
{
	local squeezer out

	make_swapped 16384
	make_pusher $((4 << 20))
	out=$(counted /proc/vmstat pswpout)
	dmsetup message test-cow 0 cow_on_read on
	# without a word in the log from here on
	echo 4 >/proc/sys/vm/drop_caches
	while :; do
		echo 2 >/proc/sys/vm/drop_caches
		sleep 0.05
		echo 4M >$SWAPPED/memory.reclaim || :
	done 2>/dev/null &
	squeezer=$!
	undo kill $squeezer
	io $COW 'model 16M' 'write 0 8M A' "run $work/push" 'random 11 600' verify \
		'message test-cow reset' 'check 0 end .'
	between 'pages swapped out' $(($(counted /proc/vmstat pswpout) - out)) 1000 1000000
	wait_until 10 cache_has_lost
}

cache_has_lost()
{
	io $COW 'check 0 end .'
	[ "$(field test-cow evicted)" -gt 0 ]
}

oom_kills()
{
	sed -n 's/^oom_kill //p' $SWAPPED/memory.events
}

# New blocks fail then, and nothing else.
full_swap()
{
	local used

	make_swapped 8192 2048
	io $COW 'write 0 4M A'
	wait_until 20 push_out 1792 2048
	cat $SWAPPED/memory.current >$SWAPPED/memory.max
	fails dd if=/dev/zero of=$COW bs=8k seek=512 count=512 oflag=direct
	used=$(field test-cow used)
	between 'blocks' "$used" 1024 2047
	io $COW 'check 0 1M A' 'fails ENOMEM write 8380416 4k B' 'write 1s 1s B' 'write 1M 64k B' \
		'is 0 ABAAAAAA' 'check 4k 1020k A' 'check 1M 64k B' 'check 1088k 3008k A'
	status_is test-cow health=full used="$used"
	is 'processes killed' "$(oom_kills)" 0
	# what came back from swap is more than there may be
	io $COW 'discard 0 3M' 'write 8380416 4k B' 'check 8380416 4k B' 'check 3M 1M A'
	status_is test-cow health=ok
}

# keep_memory MIB: takes the rest away
keep_memory()
{
	local pages

	pages=$((($(meminfo MemAvailable) - $1 * 1024) / $(meminfo Hugepagesize)))
	undo eval 'echo 0 >/proc/sys/vm/nr_hugepages'
	echo $pages >/proc/sys/vm/nr_hugepages
	between 'available memory in KiB' "$(meminfo MemAvailable)" 65536 $((2 * $1 * 1024))
}

# What a file system holds is more than there is memory, and has to go through
# it twice: as its own pages and as those of the overlay.
filesystem()
{
	local numbers=(10000000 41999999) out memory

	need mkfs.ext4 mkswap swapon
	[ "$(meminfo SwapFree)" -ge 393216 ] || make_zram 512M
	if [ "$(meminfo MemAvailable)" -gt 262144 ]; then
		[ -n "$(meminfo Hugepagesize)" ] || skip 'needs huge pages, or less memory'
		keep_memory 192
	fi
	memory=$(meminfo MemAvailable)
	undo eval "echo '$(<$MODULE/parameters/total_limit)' >$MODULE/parameters/total_limit"
	echo none >$MODULE/parameters/total_limit
	make_dm test-zero '0 4194304 zero'
	make_cow test-cow 4194304 /dev/mapper/test-zero
	mkfs.ext4 -q $COW
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount -t ext4 $COW "$work/mnt"
	undo umount "$work/mnt"
	out=$(counted /proc/vmstat pswpout)
	seq "${numbers[@]}" >"$work/mnt/numbers"
	sync -f "$work/mnt"
	[ $(($(field test-cow used) * 4)) -gt "$memory" ] ||
		fail 'the overlay was not bigger than the memory'
	between 'pages swapped out' $(($(counted /proc/vmstat pswpout) - out)) 4096 10000000
	echo 1 >/proc/sys/vm/drop_caches
	seq "${numbers[@]}" | cmp - "$work/mnt/numbers"
	umount "$work/mnt"
	unset 'undo_list[-1]'
	fsck.ext4 -nf $COW
	status_is test-cow refused=0 errors=0
}

# make_zram SIZE: swap that is compressed memory
make_zram()
{
	need_module zram num_devices=1
	undo wait_until 10 rmmod zram
	echo "$1" >/sys/block/zram0/disksize
	mkswap /dev/zram0
	swapon /dev/zram0
	undo swapoff /dev/zram0
}

run_tests \
	random_io 'random I/O on an overlay that is swapped out again and again' \
	swapped_out 'blocks that are swapped out are read, rewritten and discarded' \
	cached 'a cache and an overlay that lose memory all the time' \
	viewed 'a view of an overlay that is swapped out' \
	kept_meanwhile 'a block that is kept while a view reads it' \
	full_swap 'no swap left: errors for new blocks' \
	filesystem 'a file system on an overlay bigger than the memory'
