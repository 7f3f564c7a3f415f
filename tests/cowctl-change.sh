#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a live device does not grow, its partitions are not those that it
# has, or a change of its base costs data or errors.

. "$(dirname "$0")/cowctl-common.sh"

COW=/dev/mapper/test-cow

grows()
{
	begin make_image 4M
	cowctl create test-cow base="$REPLY" cow-on-read=true limit=8M
	io $COW 'write 0 64k A' 'discard 128k 64k' 'check 1M 64k .'
	cowctl set test-cow size=20M
	io $COW 'size 20M' 'check 0 64k A' 'check 64k 64k .' 'check 128k 64k 0' 'check 192k 3904k .' \
		'check 4M 16M 0' 'write 20476k 4k B'
	is 'the table' "$(dmsetup table test-cow | cut -d ' ' -f 5-)" '3 limit 2048 cow_on_read'
	cowctl set test-cow size=20M
	cowctl set test-cow size=20975616 cache=drop
	is 'size' "$(member size test-cow)" 20975616
	says 2 'has .* bytes, and cannot shrink' cowctl set test-cow size=20M
	io $COW 'check 0 64k A' 'check 20476k 4k B' 'check 20M 4k 0'
	cowctl remove test-cow
	nothing_left
}

# interrupt_growth SIGNAL: comes before the new table does, and after the limit
interrupt_growth()
{
	exec strace -qq -o "$work/trace" -P /dev/kmsg -e trace=openat \
		-e "inject=openat:signal=$1:when=1" cowctl set test-cow limit=1M size=4M
}

interrupted_set()
{
	local table rc=0

	need strace
	begin make_brd 2048
	cowctl create test-cow base="$REPLY" limit=2M
	table=$(dmsetup table test-cow)
	(interrupt_growth TERM) || rc=$?
	is 'the status' $rc 143
	is 'the table' "$(dmsetup table test-cow)" "$table"
	is 'the state' "$(dmsetup info -c --noheadings -o suspended,tables_loaded test-cow)" \
		Active:Live
	io $COW 'write 0 4k A'
}

# A file system grows while it is mounted.
grows_mounted()
{
	need resize2fs
	begin make_loop_base 16777216
	cowctl create test-cow base="$REPLY"
	mkfs.ext4 -q $COW
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount $COW "$work/mnt"
	undo umount "$work/mnt"
	echo before >"$work/mnt/file"
	cowctl set test-cow size=64M
	resize2fs $COW
	dd if=/dev/zero of="$work/mnt/big" bs=1M count=30 status=none
	is 'the file' "$(<"$work/mnt/file")" before
	between 'size' "$(df --output=size -k "$work/mnt" | tail -n 1)" 40000 65536
}

# make_disk: an image with two partitions, GPT
make_disk()
{
	make_image 16M
	printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=8192\n' |
		sfdisk -q "$work/disk.img"
	image_sum=$(sha256sum <"$work/disk.img")
	REPLY=$work/disk.img
}

partitions()
{
	cowctl status "$1" --json | jq -c .partitions
}

maps_partitions()
{
	local name

	need kpartx sfdisk sgdisk nbdkit
	begin make_disk
	cowctl create test-cow base="$REPLY" partitions=true
	is 'partitions' "$(partitions test-cow)" '["/dev/mapper/test-cowp1","/dev/mapper/test-cowp2"]'
	cowctl status test-cow | grep -E '^  partition +/dev/mapper/test-cowp2$'
	io ${COW}p1 'size 2M' 'write 0 4k A'
	blockdev --flushbufs $COW
	cmp -n 2M -i 0:1M ${COW}p1 $COW

	# in use, each of them
	mkfs.ext2 -q ${COW}p2
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount ${COW}p2 "$work/mnt"
	says 4 "test-cowp2 is mounted on $work/mnt" cowctl remove test-cow
	says 4 "test-cowp2 is mounted on $work/mnt" cowctl reset test-cow
	says 4 "test-cowp2 is mounted on $work/mnt" cowctl set test-cow partitions=false
	is 'partitions' "$(partitions test-cow | jq length)" 2
	cowctl export test-cow 2>&1 | grep "^cowctl: test-cow is mounted on $work/mnt; a client"
	says 4 'is already exported' cowctl export test-cow
	cowctl unexport test-cow
	umount "$work/mnt"
	exec 7<${COW}p1
	says 4 'test-cowp1 is open in 1 place' cowctl remove test-cow
	exec 7<&-
	exec 7<$COW
	says 4 'test-cow is open in 1 place' cowctl remove test-cow
	exec 7<&-

	# growth, and the rest of a GPT's
	cowctl set test-cow size=32M
	sgdisk -e $COW
	sgdisk -n 3:16M:30M $COW
	is 'partitions' "$(partitions test-cow | jq length)" 2
	cowctl set test-cow partitions=true
	is 'partitions' "$(partitions test-cow | jq length)" 3
	io ${COW}p1 'check 0 4k A'
	io ${COW}p3 'check 0 1M 0'
	cowctl reset test-cow
	is 'partitions' "$(partitions test-cow | jq length)" 2
	cmp -n 2M -i 0:1M ${COW}p1 "$work/disk.img"
	# what is yet to be written by way of them
	exec 7<>${COW}p1
	dd if=/dev/zero of=${COW}p1 bs=4k count=4 conv=notrunc status=none
	cowctl reset test-cow force=true
	cmp -n 2M -i 0:1M ${COW}p1 "$work/disk.img"
	sync ${COW}p1
	is 'used' "$(member used test-cow)" 0
	exec 7<&-
	cowctl set test-cow partitions=false
	is 'partitions' "$(partitions test-cow)" '[]'
	is 'open' "$(member open_count test-cow)" 0
	cowctl set test-cow partitions=true
	cowctl remove test-cow
	nothing_left

	# a device without any, and odd names
	for name in 'test-c c' test-c1 'test-cä'; do
		cowctl create "$name" base="$work/disk.img" partitions=true
		is 'partitions' "$(partitions "$name" | jq length)" 2
		cowctl remove "$name"
	done
	make_file empty 1M
	cowctl create test-cow base="$REPLY" partitions=true
	is 'partitions' "$(partitions test-cow)" '[]'
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# A partition table that is not there any more, or whose devices cannot be made.
no_partitions()
{
	need kpartx sfdisk wipefs
	begin make_disk
	make_file other 1M
	cowctl create test-cow base="$work/disk.img" partitions=true
	wipefs -qaf $COW
	cowctl set test-cow partitions=true
	is 'partitions' "$(partitions test-cow)" '[]'

	# the name of the second one is taken
	cowctl create test-cowp2 base="$work/other"
	cowctl reset test-cow
	says 1 'kpartx fails' cowctl set test-cow partitions=true limit=1M
	is 'partitions' "$(partitions test-cow)" '[]'
	is 'limit' "$(member limit test-cow)" null
	cowctl remove test-cowp2
	cowctl set test-cow partitions=true
	is 'partitions' "$(partitions test-cow | jq length)" 2

	# a reset is one, whatever becomes of the devices
	cowctl set test-cow partitions=false
	wipefs -qaf $COW
	printf 'label: gpt\nstart=2048,size=4096\n' | sfdisk -q --no-tell-kernel $COW
	cowctl set test-cow partitions=true
	cowctl create test-cowp2 base="$work/other"
	cowctl reset test-cow force=true 2>"$work/err"
	grep '^cowctl: test-cow was reset, but the devices are not' "$work/err"
	is 'used' "$(member used test-cow)" 0
	rm "$work/err"
	cowctl remove test-cowp2
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# Without kpartx nothing is made.
misses_kpartx()
{
	need unshare
	begin make_image 1M
	says 6 'kpartx is not installed; it is in the package kpartx' \
		without /usr/sbin "$(realpath "$(command -v cowctl)")" create test-cow \
		base="$REPLY" partitions=true cow-on-read=/none
	nothing_left
}

# serve NAME FILE: another server
serve()
{
	undo rm -f "$work/$1"
	start_nbdkit "$work/$1" -r file "$2"
	undo sweep
	REPLY="nbd+unix:///?socket=$work/$1"
}

belongs_to_it()
{
	[ "$(run_files | sort)" = "$1" ]
}

holders()
{
	ls "/sys/block/${1#/dev/}/holders"
}

moves()
{
	local dev dev2 uri uri2

	need nbdkit nbd-client
	begin serve_image 4M
	uri=$REPLY
	serve socket2 "$work/disk.img"
	uri2=$REPLY
	cp "$work/disk.img" "$work/copy.img"
	undo rm "$work/copy.img"
	make_loop "$work/copy.img" -r
	dev=$REPLY

	# between all kinds of bases; what was made for the old one is given back
	cowctl create test-cow base="$dev" limit=2M cow-on-read="$work/flag"
	io $COW 'write 1s 1s A' 'write 1M 64k B' 'discard 2M 64k'
	cowctl rebase test-cow base="$uri" >"$work/out"
	undo rm -f "$work/out"
	is 'what it said' "$(<"$work/out")" \
		'compared 256 of 1024 blocks with the old base: the same'
	is 'base' "$(member base test-cow)" "$uri"
	is 'holders of the old base' "$(holders "$dev")" ''
	is 'limit' "$(member limit test-cow)" 2097152
	is 'cow_on_read' "$(member cow_on_read test-cow)" "$work/flag"
	dev2=$(member base_device test-cow)
	cowctl rebase test-cow base="$uri2"
	is 'base' "$(member base test-cow)" "$uri2"
	[ "$(member base_device test-cow)" != "$dev2" ] || fail 'it is the same device'
	is 'the number of connections' "$(connected | wc -l)" 1
	# those who ask for the holes may still be at it
	wait_until 30 belongs_to_it "$run_dir/test-cow.nbd
$run_dir/test-cow.watch"
	cowctl rebase test-cow base="$work/copy.img"
	is 'base' "$(member base test-cow)" "$work/copy.img"
	is 'connections left' "$(connected || :)" ''
	cowctl rebase test-cow "$work/disk.img" --json | jq -e ".base == \"$work/disk.img\""
	is 'the number of loop devices' "$(losetup -a | grep -c "($work")" 2
	cowctl rebase test-cow base="$dev"
	cowctl rebase test-cow base="$dev"
	is 'the number of loop devices' "$(losetup -a | grep -c "($work")" 1
	io $COW 'is 0 .A......' 'check 4k 1020k .' 'check 1M 64k B' 'check 2M 64k 0' \
		'check 2112k end .'
	touch "$work/flag"
	undo rm "$work/flag"
	wait_until 10 has_cow_on_read
	cowctl rebase test-cow base="$uri"
	cowctl remove test-cow
	is 'what is left' "$(connected || run_files)" ''
	image_is_unchanged
}

has_cow_on_read()
{
	dmsetup table test-cow | grep -w cow_on_read
}

# The last bytes, which fill no block, are compared as well.
small_bases()
{
	begin make_image 2K
	make_file other 2K
	cp "$work/disk.img" "$work/other"
	printf x | dd of="$work/other" bs=1 seek=2047 conv=notrunc status=none
	cowctl create test-cow base="$work/disk.img" round=up
	says 1 'differs from the base of test-cow, at byte 0' \
		cowctl rebase test-cow base="$work/other"
	cp "$work/disk.img" "$work/other"
	cowctl rebase test-cow base="$work/other"
	is 'base' "$(member base test-cow)" "$work/other"
	image_is_unchanged

	truncate -s 6K "$work/other"
	cowctl create test-c2 base="$work/other" round=up
	is 'what it said' "$(cowctl rebase test-c2 base="$work/other")" \
		'compared 2 of 2 blocks with the old base: the same'
}

# What cannot take the base's place does not, and leaves all as it was.
cannot_move()
{
	local table

	need nbdkit nbd-client
	begin serve_image 4M
	cowctl create test-cow base="$REPLY" limit=2M
	cowctl create test-cow2 base=$COW
	table=$(dmsetup table test-cow)
	make_file small 2M
	head -c 2M "$work/disk.img" >"$work/small"
	make_file other 4M
	cp "$work/disk.img" "$work/other"
	printf x | dd of="$work/other" bs=1 seek=4194303 conv=notrunc status=none
	says 1 'has 2097152 bytes, fewer than the 4194304' cowctl rebase test-cow base="$work/small"
	says 1 'fewer than' cowctl rebase test-cow base="$work/small" force=true
	says 1 "differs from the base of test-cow, at byte 4190208" \
		cowctl rebase test-cow base="$work/other"
	says 4 'is test-cow itself, or made of it' cowctl rebase test-cow base=/dev/mapper/test-cow2
	says 4 'test-cow' cowctl rebase test-cow base=$COW
	says 1 'cannot find base' cowctl rebase test-cow base=/no/such
	says 1 'nbd-client cannot connect' cowctl rebase test-cow base="nbd+unix:///?socket=$work/x"
	says 2 'neither nbd:// nor' cowctl rebase test-cow base=http://localhost/
	says 2 'base= is missing' cowctl rebase test-cow
	says 2 'force=yes is neither' cowctl rebase test-cow base="$work/other" force=yes
	says 3 'there is no device' cowctl rebase test-cno base="$work/other"
	serve socket3 "$work/other"
	says 1 'differs from the base' cowctl rebase test-cow base="$REPLY"
	is 'the table' "$(dmsetup table test-cow)" "$table"
	is 'the number of loop devices' "$(losetup -a | grep -c "($work" || :)" 0
	is 'the number of connections' "$(connected | wc -l)" 1
	wait_until 30 belongs_to_it "$run_dir/test-cow.nbd"
	io $COW 'check 0 end .'
	# whoever insists gets it
	cowctl rebase test-cow base="$work/other" force=true
	is 'base' "$(member base test-cow)" "$work/other"
	is 'connections left' "$(connected || :)" ''
	image_is_unchanged
}

# The server dies, readers wait, and go on at another one.
waits_for_a_base()
{
	local reader writer

	need nbdkit nbd-client
	begin serve_image 4M
	cowctl create test-cow base="$REPLY" on-base-error=queue
	io $COW 'write 1M 4k A'
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	io $COW 'check 64k 64k .' &
	reader=$!
	io $COW 'write 2049s 1s B' 'write 4097s 1s C' 'is 4096s .C......' &
	writer=$!
	wait_until 20 waiting 2
	cowctl status test-cow | grep -E '^  requests waiting +[2-9]'
	is 'health' "$(member health test-cow)" base-error
	io $COW 'is 1M ABAAAAAA'
	serve socket2 "$work/disk.img"
	says 1 'nothing can be compared; say force=true' cowctl rebase test-cow base="$REPLY"
	waiting 2
	kill -0 $reader $writer
	cowctl rebase test-cow base="$REPLY" force=true
	wait $reader
	wait $writer
	is 'queued' "$(member queued test-cow)" 0
	is 'health' "$(member health test-cow)" ok
	is 'the number of connections' "$(connected | wc -l)" 1
	cowctl set test-cow size=8M
	io $COW 'check 4M end 0'

	# or they are told
	kill_nbdkit "$work/socket2" "$(member base_device test-cow)"
	io $COW 'fails EIO check 3M 64k .' &
	reader=$!
	wait_until 20 waiting 1
	cowctl set test-cow on-base-error=error
	wait $reader
	io $COW 'fails EIO check 3M 64k .'
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# reconnector: the process that waits for the base to come back, from whom has its lock
reconnector()
{
	local file=$run_dir/test-cow.reconnect

	[ -e "$file" ] || return 1
	awk -v inode="$(stat -c %i "$file")" '$6 ~ ":" inode "$" { print $5; found = 1 }
		END { exit !found }' /proc/locks
}

# The server of the image, again.
serve_again()
{
	serve socket "$work/disk.img"
	undo let_go
}

# connections_are N
connections_are()
{
	[ "$(connected | wc -l)" = "$1" ]
}

# goes_away COMMAND...: the server does, and io's commands wait for it; as $reader
goes_away()
{
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	io $COW "$@" &
	reader=$!
	wait_until 20 waiting 1
}

# What waited has ended, over another connection.
is_back()
{
	wait_until 20 not waiting 1
	wait "$reader"
	wait_until 20 connections_are 1
	is 'base' "$(member base test-cow)" "$uri"
}

# The server is away for some time.
comes_back()
{
	local reader uri dev

	need nbdkit nbd-client
	begin serve_image 4M
	uri=$REPLY
	cowctl create test-cow base="$uri" on-base-error=queue cow-on-read="$work/flag"
	undo let_go
	cowctl status test-cow | grep -E '^  on base error +queue, and connects anew$'
	dev=$(member base_device test-cow)
	io $COW 'write 1M 4k A'
	goes_away 'check 64k 64k .' 'is 1M AAAAAAAA' 'check 4k 1020k .'
	serve_again
	is_back
	[ "$(member base_device test-cow)" != "$dev" ] || fail 'it is the same device'
	is 'health' "$(member health test-cow)" ok
	is 'cow_on_read' "$(member cow_on_read test-cow)" "$work/flag"

	# nothing of it is in the way when it is killed, and it is started again
	kill -KILL "$(reconnector)"
	wait_until 10 not reconnector
	goes_away 'check 2M 64k .'
	serve_again
	cowctl set test-cow on-base-error=queue
	is_back

	# it is there for those only who need it
	cowctl set test-cow on-base-error=error
	fails reconnector
	cowctl set test-cow on-base-error=queue
	reconnector
	cowctl rebase test-cow base="$work/disk.img" force=true
	fails reconnector
	cowctl set test-cow on-base-error=queue
	fails reconnector
	cowctl rebase test-cow base="$uri" force=true
	reconnector
	io $COW 'check 64k 64k .' 'check 1M 4k A'
	cowctl remove test-cow

	# a path of the socket that is not absolute is one all the same
	(cd "$work" && cowctl create test-cow base='nbd+unix:///?socket=socket' on-base-error=queue)
	is 'base' "$(member base test-cow)" "$uri"
	goes_away 'check 2M 64k .'
	serve_again
	is_back
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# What is to be written to a mounted copy needs the base, which is away.
dirty_and_away()
{
	need nbdkit nbd-client mkfs.ext2
	begin serve_image 8M
	uri=$REPLY
	cowctl create test-cow base="$uri" on-base-error=queue holes=false
	# blocks of the file system are a part of the overlay's
	mkfs.ext2 -q -b 1024 -E nodiscard $COW
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount $COW "$work/mnt"
	undo unmount "$work/mnt"
	undo let_go
	touch "$work/mnt/file"
	sync
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	echo 'not synced' >"$work/mnt/file"
}

# It is back: nothing of that was lost.
written_after_all()
{
	serve_again
	undo unmount "$work/mnt"
	sync -f "$work/mnt"
	umount "$work/mnt"
	mount $COW "$work/mnt"
	is 'the file' "$(<"$work/mnt/file")" 'not synced'
	umount "$work/mnt"
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

reset_waits()
{
	local uri

	dirty_and_away
	says 4 'waits for the base' cowctl reset test-cow force=true
	written_after_all
}

diff_does_not_wait()
{
	local uri

	need qemu-img
	dirty_and_away
	cowctl diff test-cow "$work/a.qcow2"
	rm "$work/a.qcow2"
	written_after_all
}

# A server of the copy that waits for the base cannot be ended.
unexport_waits()
{
	local reader uri

	need nbdkit nbd-client nbdinfo nbdsh
	begin serve_image 4M
	uri=$REPLY
	cowctl create test-cow base="$uri" on-base-error=queue
	undo let_go
	cowctl export test-cow
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	nbdsh -u "$(member export.uri test-cow)" -c 'h.pread(4096, 65536)' &
	reader=$!
	wait_until 20 waiting 1
	says 4 'the server of test-cow waits for the base' cowctl unexport test-cow
	says 4 'the server of test-cow waits for the base' cowctl unexport test-cow
	says 4 'is exported' cowctl remove test-cow
	serve_again
	wait_until 20 not waiting 1
	wait $reader || :
	wait_until 20 not pgrep -f "$run_dir/test-cow.pid"
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# tries N: so often somebody has connected, and left again
tries()
{
	[ "$(grep -c Disconnect "$work/log")" -ge "$1" ]
}

# What cannot be the base, or need not be connected anew, is left alone.
stays_where_it_is()
{
	local reader dev

	need nbdkit nbd-client
	undo rm -f "$work"/{log,bad,socket,socket.pid}
	begin make_image 4M
	start_nbdkit "$work/socket" -r --filter=log --filter=error --filter=delay \
		file "$work/disk.img" logfile="$work/log" \
		error=EIO error-pread-rate=1 error-file="$work/bad" delay-open=3
	undo sweep
	cowctl create test-cow base="nbd+unix:///?socket=$work/socket" on-base-error=queue \
		holes=false
	undo let_go
	dev=$(member base_device test-cow)

	# one that fails over each connection
	touch "$work/bad"
	io $COW 'check 64k 64k .' &
	reader=$!
	wait_until 30 tries 1
	is 'the device' "$(member base_device test-cow)" "$dev"
	# one that is back before the other connection is made
	wait_until 30 test -e "$run_dir/test-cow~.nbd"
	rm "$work/bad"
	wait_until 20 not waiting 1
	wait $reader
	wait_until 30 tries 2
	wait_until 10 test ! -e "$run_dir/test-cow~.nbd"
	is 'the device' "$(member base_device test-cow)" "$dev"

	# one that is smaller now
	make_file small 2M
	kill_nbdkit "$work/socket" "$dev"
	rm "$work/log"
	io $COW 'check 1M 64k .' &
	reader=$!
	start_nbdkit "$work/socket" -r --filter=log file "$work/small" logfile="$work/log"
	undo sweep
	wait_until 30 tries 1
	is 'the device' "$(member base_device test-cow)" "$dev"
	wait_until 10 waiting 1
	wait_until 10 connections_are 1
	kill -KILL "$(<"$work/socket.pid")"
	serve_again
	wait_until 20 not waiting 1
	wait $reader
	cowctl remove test-cow
	nothing_left
	image_is_unchanged
}

# A base that does not answer is waited for, unless one is told to stop.
hanging_base()
{
	local server reader pid

	need nbdkit nbd-client
	begin serve_image 4M
	server=$(<"$work/socket.pid")
	cowctl create test-cow base="$REPLY" holes=false
	undo kill -CONT "$server"
	kill -STOP "$server"
	io $COW 'write 0 4k A' 'check 1M 4k .' &
	reader=$!
	wait_until 10 has_used 4096
	# neither when both are compared
	cowctl rebase test-cow base="$work/disk.img" &
	wait_until 10 compares $!
	is_terminated
	cowctl rebase test-cow base="$work/disk.img" force=true &
	wait_until 10 loop_is_held
	is_terminated
	is 'loop devices left' "$(losetup -a | grep "($work" || :)" ''
	kill -0 $reader
	# what nohup has it ignore is no reason to stop
	env --ignore-signal=HUP cowctl rebase test-cow base="$work/disk.img" force=true &
	pid=$!
	wait_until 10 loop_is_held
	wait_until 10 suspends $pid
	kill -HUP $pid
	kill -CONT "$server"
	wait $reader
	wait $pid
	is 'base' "$(member base test-cow)" "$work/disk.img"
	io $COW 'check 0 4k A' 'check 4k end .'
}

# What runs in the background ends by SIGTERM.
is_terminated()
{
	local rc=0

	kill -TERM $!
	wait $! || rc=$?
	is 'its exit status' $rc 143
}

# It has a process that reads.
compares()
{
	pgrep -P "$1" -x cowctl
}

# It waits in the kernel, for what is under way.
suspends()
{
	grep -q dm_wait_for "/proc/$1/stack"
}

has_used()
{
	[ "$(member used test-cow)" = "$1" ]
}

# A table on it is loaded.
loop_is_held()
{
	find /sys/block/loop*/holders/ -name 'dm-*' | grep .
}

# A connection that others use, too, stays theirs.
shared_connection()
{
	local dev

	need nbdkit nbd-client
	begin serve_image 1M
	cowctl create test-cow base="$REPLY"
	dev=$(member base_device test-cow)
	cowctl create test-cow2 base="$dev"
	cowctl rebase test-cow base="$work/disk.img" 2>&1 | grep 'somebody else uses it'
	is 'base' "$(member base test-cow)" "$work/disk.img"
	io /dev/mapper/test-cow2 'check 0 end .'
	cowctl remove test-cow2
	cowctl remove test-cow
	nothing_left
}

# A base that is cut short is said to be.
shrunken_base()
{
	local loop shrunk

	begin make_file disk.img 2M
	make_loop "$work/disk.img"
	undo sweep
	loop=$REPLY
	io "$loop" 'write 0 end .'
	cowctl create test-cow base="$loop" size=4M
	io $COW 'write 1536k 4k A'
	truncate -s 1M "$work/disk.img"
	losetup -c "$loop"
	is 'health' "$(member health test-cow)" base-error
	is 'base_size' "$(member base_size test-cow)" 1048576
	is 'base_size_expected' "$(member base_size_expected test-cow)" 2097152
	shrunk='base-error: the base has shrunk from 2097152 to 1048576 bytes'
	cowctl status test-cow | grep -E "^  health +$shrunk\$"
	cowctl list | grep -E '^test-cow .* base-error '
	io $COW 'check 0 1M .' 'check 1536k 4k A' 'fails EIO check 1M 4k ?' 'check 2M end 0'
	cowctl status test-cow | grep -E "^  health +$shrunk\$"
	says 1 'base device is smaller' cowctl set test-cow size=8M
	truncate -s 2M "$work/disk.img"
	losetup -c "$loop"
	io $COW 'check 1M 4k 0'
	is 'health' "$(member health test-cow)" ok
}

run_tests \
	grows 'a device grows' \
	interrupted_set 'SIGTERM in the middle of several changes' \
	grows_mounted 'a mounted file system grows' \
	maps_partitions 'devices for partitions' \
	no_partitions 'partitions that are gone, or cannot have devices' \
	misses_kpartx 'kpartx is missed' \
	moves 'from base to base' \
	small_bases 'bases that are smaller than a block' \
	cannot_move 'bases that cannot take the place' \
	waits_for_a_base 'readers wait for a base' \
	comes_back 'a server that is away for some time' \
	stays_where_it_is 'servers that cannot be the base, or need not be connected anew' \
	reset_waits 'a reset, when what is to be written waits for the base' \
	diff_does_not_wait 'a diff, when what is to be written waits for the base' \
	unexport_waits 'unexport, when the server waits for the base' \
	hanging_base 'a base that does not answer' \
	shared_connection 'a connection that somebody else uses' \
	shrunken_base 'a base that shrank'
