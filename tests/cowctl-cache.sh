#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, what cowctl tells the cache of a base to do is not done, or what
# goes on in the background for a copy does not end with it.

. "$(dirname "$0")/cowctl-common.sh"

COW=/dev/mapper/test-cow

# read_blocks FILE BLOCK COUNT: past the page cache
read_blocks()
{
	dd if="$1" of=/dev/null bs=4k skip="$2" count="$3" iflag=direct,fullblock status=none
}

# features NAME: of its table
features()
{
	dmsetup table "$1" | cut -d ' ' -f 5-
}

# has_features NAME FEATURES
has_features()
{
	[ "$(features "$1")" = "$2" ]
}

# One cache for all copies of a base, which is no part of any of them.
shared_cache()
{
	local dev before

	need nbdkit nbd-client
	begin serve_image 4M
	cowctl create test-cow base="$REPLY" cow-on-read=true holes=false
	dev=$(member base_device test-cow)
	cowctl create test-cow2 base="$dev" cow-on-cache=true cache-limit=2M
	is 'the first' "$(features test-cow)" '1 cow_on_read'
	is 'the second' "$(features test-cow2)" '3 cow_on_cache cache_limit 512'
	is 'the limit' "$(member cache_limit test-cow)" 2097152
	before=$(sectors_read "$dev")
	read_blocks $COW 256 256
	is 'read from the base' $(($(sectors_read "$dev") - before)) 2048
	read_blocks $COW 256 256
	read_blocks /dev/mapper/test-cow2 256 256
	is 'read from the base' $(($(sectors_read "$dev") - before)) 2048
	is 'misses' "$(member misses test-cow)" 1048576
	is 'hits' "$(member hits test-cow)" 1048576
	is 'hits' "$(member hits test-cow2)" 1048576
	is 'cached' "$(member cached test-cow)" 1048576
	is 'used' "$(member used test-cow)" 0
	cowctl status test-cow | grep -E '^  cache +1\.0 MiB of at most 2\.0 MiB$'
	cowctl list | grep -E '^test-cow2 .* 1\.0 MiB +ok '

	# partial writes use it, and what was read reads so
	io $COW 'write 2049s 1s A' 'is 2048s .A......' 'check 1028k 1020k .'
	is 'read from the base' $(($(sectors_read "$dev") - before)) 2048
	io $COW 'check 0 1M .' 'check 2M 2M .'
	between 'evicted' "$(member evicted test-cow)" 1048576 2097152
	between 'cached' "$(member cached test-cow)" 1048576 2097152
	between 'read from the overlay' "$(member overlay_reads test-cow)" 512 4096
	cowctl set test-cow2 cache-limit=4K
	is 'cached' "$(member cached test-cow)" 4096
	cowctl remove test-cow2
	is 'the limit' "$(member cache_limit test-cow)" null
	io $COW 'check 0 1M .'
	cowctl set test-cow cache=drop
	is 'cached' "$(member cached test-cow)" 0
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# A slow base is slow once.
second_read()
{
	local start dev before

	need nbdkit nbd-client
	begin make_image 1M
	undo rm -f "$work/socket"
	start_nbdkit "$work/socket" --filter=delay file "$REPLY" rdelay=1
	undo sweep
	cowctl create test-cow base="nbd+unix:///?socket=$work/socket" holes=false cow-on-read=true
	start=${EPOCHREALTIME/./}
	read_blocks $COW 128 1
	between 'microseconds of the first read' $((${EPOCHREALTIME/./} - start)) 1000000 60000000
	dev=$(member base_device test-cow)
	before=$(sectors_read "$dev")
	read_blocks $COW 128 1
	is 'read from the base by the second' $(($(sectors_read "$dev") - before)) 0
}

set_switches()
{
	begin make_loop_base 1048576
	cowctl create test-cow base="$REPLY" on-base-error=queue
	is 'features' "$(features test-cow)" '1 queue_errors'
	is 'on_base_error' "$(member on_base_error test-cow)" queue
	cowctl set test-cow cow-on-read=true cow-on-cache=true cache-limit=1M limit=2M \
		on-base-error=error
	is 'features' "$(features test-cow)" '6 limit 512 cow_on_read cow_on_cache cache_limit 256'
	is 'cow_on_read' "$(member cow_on_read test-cow)" true
	is 'cow_on_cache' "$(member cow_on_cache test-cow)" true
	is 'on_base_error' "$(member on_base_error test-cow)" error
	cowctl set test-cow cow-on-read=false cow-on-cache=false cache-limit=none limit=none
	is 'features' "$(features test-cow)" 0
	is 'cow_on_read' "$(member cow_on_read test-cow)" false

	says 2 'cow-on-read=on is neither true, false nor' cowctl set test-cow cow-on-read=on
	says 2 'cow-on-read=a/b is neither' cowctl set test-cow cow-on-read=a/b
	says 2 'cow-on-cache=1 is neither' cowctl set test-cow cow-on-cache=1
	says 2 'cache-limit=0 is out of range' cowctl set test-cow cache-limit=0
	says 2 'cache-limit=x is no size' cowctl create test-cow2 base=/dev/loop0 cache-limit=x
	says 2 'on-base-error=wait is neither' cowctl set test-cow on-base-error=wait
	says 2 'cache=keep is not drop' cowctl set test-cow cache=keep
	says 2 'partitions=yes is neither' cowctl set test-cow partitions=yes
	says 2 'size=0 is out of range' cowctl set test-cow size=0
	# all or nothing
	says 2 'test-cow has .* bytes, and cannot shrink' cowctl set test-cow limit=1M \
		cow-on-cache=true size=4K
	is 'features' "$(features test-cow)" 0
	is 'size' "$(member size test-cow)" 1048576
}

ended()
{
	idle && ! run_files | grep .
}

# The path is there or not; so is cow-on-read. Nothing of it outlives the copy.
watched_path()
{
	local base flag="$work/a b/c" watches=/proc/sys/fs/inotify/max_user_watches

	begin make_image 1M
	base=$REPLY
	undo rm -rf "$work/a b"
	cowctl create test-cow base="$base" cow-on-read="$flag" | cat
	is 'features' "$(features test-cow)" 0
	is 'cow_on_read' "$(member cow_on_read test-cow)" "$flag"
	cowctl status test-cow | grep -E "^  cow-on-read +$flag\$"
	mkdir "$work/a b"
	touch "$flag"
	wait_until 10 has_features test-cow '1 cow_on_read'
	rm "$flag"
	wait_until 10 has_features test-cow 0
	mkdir "$flag"
	wait_until 10 has_features test-cow '1 cow_on_read'
	mv "$work/a b" "$work/elsewhere"
	wait_until 10 has_features test-cow 0
	mv "$work/elsewhere" "$work/a b"
	wait_until 10 has_features test-cow '1 cow_on_read'

	# unless the kernel has no more room for that
	undo eval "echo $(<$watches) >$watches"
	echo 0 >$watches
	says 1 "cannot watch $work/none: No space left" \
		cowctl create test-cow2 base="$base" cow-on-read="$work/none"
	echo 1000 >$watches

	# as create finds it; and set replaces one by another, or by a word
	cowctl create test-cow2 base="$base" cow-on-read="$flag"
	is 'features' "$(features test-cow2)" '1 cow_on_read'
	cowctl set test-cow2 cow-on-read="$work/none" cache-limit=4K
	is 'features' "$(features test-cow2)" '2 cache_limit 1'
	says 2 'cannot shrink' cowctl set test-cow2 cow-on-read="$flag" size=4K
	is 'cow_on_read' "$(member cow_on_read test-cow2)" "$work/none"
	says 2 'cannot shrink' cowctl set test-cow2 cow-on-read=true size=4K
	is 'cow_on_read' "$(member cow_on_read test-cow2)" "$work/none"
	cowctl set test-cow2 cow-on-read=true
	is 'cow_on_read' "$(member cow_on_read test-cow2)" true
	is 'the number of those who watch' "$(running_cowctls | wc -l)" 1
	rmdir "$flag"
	wait_until 10 has_features test-cow 0
	is 'features' "$(features test-cow2)" '3 cow_on_read cache_limit 1'
	cowctl remove test-cow2
	cowctl remove test-cow
	nothing_left

	# without cowctl's help
	cowctl create test-cow base="$base" cow-on-read="$flag"
	dmsetup remove --retry test-cow
	wait_until 10 ended
	# one that was killed is in nobody's way
	cowctl create test-cow base="$base" cow-on-read="$flag"
	pkill -KILL -f "^cowctl create test-cow base=$base "
	wait_until 10 idle
	is 'cow_on_read' "$(member cow_on_read test-cow)" false
	cowctl set test-cow cow-on-read="$flag"
	touch "$flag"
	wait_until 10 has_features test-cow '1 cow_on_read'
	cowctl remove test-cow
	nothing_left
}

# prefetch STATUS ARGUMENT...: leaves what it prints in $work/out, $work/err
prefetch()
{
	local status=$1 got=0

	shift
	cowctl prefetch "$@" >"$work/out" 2>"$work/err" || got=$?
	cat "$work/out" "$work/err"
	is "the exit status of 'prefetch $*'" "$got" "$status"
}

prefetch_state()
{
	[ "$(member prefetch.state test-cow)" = "$1" ]
}

# After a full one the server of the base may go.
whole_prefetch()
{
	local dev

	need nbdkit nbd-client
	begin serve_image 8M
	undo rm -f "$work/out" "$work/err"
	cowctl create test-cow base="$REPLY"
	is 'prefetch' "$(member prefetch test-cow)" null
	dev=$(member base_device test-cow)
	prefetch 0 test-cow
	is 'what it said last' "$(tail -n 1 "$work/out")" '100% 8.0 MiB of 8.0 MiB'
	is 'errors' "$(<"$work/err")" ''
	is 'cached' "$(member cached test-cow)" 8388608
	is 'prefetch' "$(cowctl status test-cow --json | jq -c .prefetch)" \
		'{"state":"done","done":8388608,"total":8388608}'
	cowctl status test-cow | grep -E '^  prefetch +done, 8\.0 MiB of 8\.0 MiB$'
	cowctl create test-cow2 base="$dev"
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	io $COW 'check 0 end .' 'write 1s 1s A' 'is 0 .A......'
	io /dev/mapper/test-cow2 'check 0 end .' 'write 5s 1s B'
	is 'health' "$(member health test-cow)" ok
	cowctl remove test-cow2
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

parts_of_prefetches()
{
	local rc=0

	begin make_loop_base 8388608
	undo rm -f "$work/out" "$work/err"
	cowctl create test-cow base="$REPLY" cache-limit=6M
	prefetch 0 test-cow range=1M-3M rate=100M
	is 'cached' "$(member cached test-cow)" 2097152
	prefetch 0 test-cow range=6144K- wait=false
	is 'what it printed' "$(<"$work/out")" ''
	wait_until 10 prefetch_state 'done'
	is 'cached' "$(member cached test-cow)" 4194304
	prefetch 7 test-cow
	grep 'no more room in the cache' "$work/err"
	prefetch_state full
	io $COW 'check 0 end .'
	cowctl set test-cow cache=drop cache-limit=none

	# one at a time, to be stopped by others
	prefetch 0 test-cow rate=16K wait=false
	prefetch 4 test-cow
	grep 'is under way' "$work/err"
	prefetch 0 test-cow stop
	prefetch_state stopped
	cowctl prefetch test-cow rate=16K >"$work/out" 2>"$work/err" &
	wait_until 10 prefetch_state running
	prefetch 0 test-cow stop
	wait $! && fail 'it was not stopped'
	cowctl prefetch test-cow range=4K- rate=16K >"$work/out" 2>"$work/err" &
	wait_until 10 prefetch_state running
	io $COW 'message test-cow prefetch stop' 'message test-cow prefetch 0 1'
	wait $! && fail 'it took another one for its own'
	grep 'another prefetch has taken the place' "$work/err"
	# and by Ctrl-C
	cowctl set test-cow cache=drop
	env --default-signal=INT cowctl prefetch test-cow rate=16K >"$work/out" 2>"$work/err" &
	wait_until 10 prefetch_state running
	wait_until 10 test -s "$work/out"
	kill -INT $!
	wait $! || rc=$?
	is 'its exit status' $rc 130
	prefetch_state stopped
	is 'errors' "$(<"$work/err")" ''
	# and when nobody reads what it says
	cowctl set test-cow cache=drop
	{ env --default-signal=PIPE cowctl prefetch test-cow rate=64K || echo $? >"$work/err"; } |
		head -n 1 >"$work/out"
	is 'its exit status' "$(<"$work/err")" 141
	prefetch_state stopped

	says 2 'range=1M is not of the form' cowctl prefetch test-cow range=1M
	says 2 'range=2M-1M is out of range' cowctl prefetch test-cow range=2M-1M
	says 2 'range=8M- begins past the end of the base, which has 8388608 bytes' \
		cowctl prefetch test-cow range=8M-
	says 2 'rate=100 is no size' cowctl prefetch test-cow rate=100
	says 2 'takes no keys' cowctl prefetch test-cow stop rate=1M
	says 3 'there is no device' cowctl prefetch test-cno
	says 1 'cannot write the output' bash -c 'cowctl prefetch test-cow >/dev/full'
	prefetch 0 --json test-cow
	is 'what it printed' "$(jq -r .prefetch.state "$work/out")" 'done'
}

prefetch_bar()
{
	need script
	begin make_loop_base 8388608
	undo rm -f "$work/out"
	cowctl create test-cow base="$REPLY"
	script -qec 'cowctl prefetch test-cow rate=16M' "$work/out" </dev/null
	grep -F '[########################################] 100%  8.0 MiB of 8.0 MiB' "$work/out"
}

failed_prefetch()
{
	need nbdkit nbd-client
	begin serve_image 8M
	undo rm -f "$work/out" "$work/err"
	cowctl create test-cow base="$REPLY"
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	prefetch 1 test-cow
	grep 'the base cannot be read' "$work/err"
	prefetch_state failed
	is 'cached' "$(member cached test-cow)" 0
}

# extents NAME: all runs
extents()
{
	dmsetup message "$1" 0 extents 0 1000000000
}

# The server knows where it has nothing; nobody asks it for that.
holes()
{
	local dev before uri

	need nbdkit nbd-client
	begin make_file sparse.img 102400M
	printf x | dd of="$work/sparse.img" bs=1M seek=2 conv=notrunc status=none
	dd if=/dev/urandom of="$work/sparse.img" bs=1M seek=50000 count=4 conv=notrunc status=none
	guard_sparse "$work/sparse.img"
	undo rm -f "$work/socket"
	start_nbdkit "$work/socket" file "$work/sparse.img"
	uri="nbd+unix:///?socket=$work/socket"
	cowctl create test-cow base="$uri"
	wait_until 30 idle
	is 'extents' "$(extents test-cow)" '512h 1b 12799487h 1024b 13413376h'
	dev=$(member base_device test-cow)
	before=$(sectors_read "$dev")
	cmp -n $((16 << 20)) -i 0:$((40000 << 20)) /dev/zero $COW
	cmp -i $((49990 << 20)) -n $((32 << 20)) "$work/sparse.img" $COW
	between 'sectors read' $(($(sectors_read "$dev") - before)) 8192 9216
	# other copies know, too, and a partial write does not ask
	cowctl create test-cow2 base="$dev"
	before=$(sectors_read "$dev")
	io /dev/mapper/test-cow2 'write 4097s 1s A' 'is 4097s A'
	cmp -n 512 -i $((4096 << 9)) "$work/sparse.img" /dev/mapper/test-cow2
	cmp -n 3072 -i $((4098 << 9)) "$work/sparse.img" /dev/mapper/test-cow2
	io /dev/mapper/test-cow2 'write 9s 1s A' 'is 8s 0A000000'
	is 'extents' "$(extents test-cow2)" '1h 1o 510h 1o 12799487h 1024b 13413376h'
	between 'sectors read' $(($(sectors_read "$dev") - before)) 8 8
	cowctl prefetch test-cow | tail -n 1
	between 'cached' "$(member cached test-cow)" 4194304 4198400
	cowctl remove test-cow2
	cowctl remove test-cow
	cowctl create test-cow base="$uri" holes=false
	is 'extents' "$(extents test-cow)" 26214400b
	cowctl remove test-cow
	nothing_left
}

# serve_extents LINE...: a server that tells them once $work/go is there
serve_extents()
{
	need nbdkit nbd-client
	undo rm -f "$work"/{socket,go}
	start_nbdkit "$work/socket" eval get_size='echo 1M' can_extents='exit 0' \
		pread="head -c \$3 /dev/zero | tr '\\0' x" \
		extents="while [ ! -e '$work/go' ]; do sleep 0.1; done
			echo '$(printf '%s\n' "$@")'"
	undo touch "$work/go"
	undo sweep
	REPLY="nbd+unix:///?socket=$work/socket"
}

# Whole blocks only, and of those only what reads as zeroes.
edges_of_holes()
{
	touch "$work/go"
	begin serve_extents '0 512 zero' '512 7680 hole' '8192 20480 hole,zero' '28672 1 zero' \
		'28673 10000 zero' '38673 1009903'
	cowctl create test-cow base="$REPLY"
	wait_until 30 idle
	is 'extents' "$(extents test-cow)" '2b 7h 247b'
}

server_without_holes()
{
	need nbdkit nbd-client
	begin serve_image 1M --filter=noextents
	cowctl create test-cow base="$REPLY"
	wait_until 30 idle
	is 'extents' "$(extents test-cow)" 256b
}

server_with_nonsense()
{
	touch "$work/go"
	begin serve_extents nonsense
	cowctl create test-cow base="$REPLY"
	wait_until 30 idle
	is 'extents' "$(extents test-cow)" 256b
}

# A slow answer is not waited for; and it ends with the copy.
slow_holes()
{
	begin serve_extents '0 65536 zero' '65536 983040'
	cowctl create test-cow base="$REPLY"
	is 'extents' "$(extents test-cow)" 256b
	touch "$work/go"
	wait_until 30 idle
	is 'extents' "$(extents test-cow)" '16h 240b'
	is 'what is left' "$(run_files)" "$run_dir/test-cow.nbd"
	cowctl remove test-cow
	rm "$work/go"
	cowctl create test-cow base="$REPLY"
	running_cowctls
	cowctl remove test-cow
	nothing_left
}

run_tests \
	shared_cache 'one cache for all copies of a base' \
	second_read 'a slow base is slow once' \
	set_switches 'what set changes, or leaves as it was' \
	watched_path 'a path switches cow-on-read' \
	whole_prefetch 'after a prefetch the base may go' \
	parts_of_prefetches 'ranges, rates and ends of prefetches' \
	prefetch_bar 'a bar on a terminal' \
	failed_prefetch 'a prefetch of a base that cannot be read' \
	holes 'holes that a server knows are not read' \
	edges_of_holes 'only whole blocks of zeroes are holes' \
	server_without_holes 'servers that know of no holes' \
	server_with_nonsense 'a server that fails to tell its holes' \
	slow_holes 'a server that takes its time'
