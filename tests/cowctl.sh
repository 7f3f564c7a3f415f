#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a command of cowctl does not do what its manual page says, tells
# nothing or nonsense when it cannot, or leaves something behind.

. "$(dirname "$0")/cowctl-common.sh"

# On kernels newer than 6.1 it is the program with the sanitizers, if tests/user/cowctl.sh
# has built it. Where they find something it ends with a report instead of a sentence.
sanitized=$(dirname "$0")/../build/user/cowctl
if [[ $(uname -r) != 6.1.* && -x $sanitized/cowctl ]] &&
		[ -z "$(find "$(dirname "$0")/../tools" -newer "$sanitized/cowctl")" ]; then
	PATH=$(realpath "$sanitized"):$PATH
	# It looks for the plugin beside itself. With sanitizers nbdkit could not load it.
	ln -sf "$(realpath "$sanitized/../../nbdkit-nbdcow-plugin.so")" "$sanitized"
	echo '# with sanitizers'
fi

copy_of_a_device()
{
	begin make_brd 1024
	is 'the path' "$(cowctl create test-cow "base=$REPLY" limit=64K)" /dev/mapper/test-cow
	io /dev/mapper/test-cow 'check 0 end .' 'write 4k 4k A' 'discard 16k 8k'
	cowctl list | grep -E "^test-cow +1\.0 MiB +4\.0 KiB \(6%\) +64\.0 KiB +0 B +ok +$REPLY +-$"
	cowctl status test-cow | grep -E '^  used +4\.0 KiB \(6%\)$'
	is 'path' "$(member path test-cow)" /dev/mapper/test-cow
	is 'size' "$(member size test-cow)" 1048576
	is 'used' "$(member used test-cow)" 4096
	is 'limit' "$(member limit test-cow)" 65536
	is 'zeroed' "$(member zeroed test-cow)" 8192
	is 'health' "$(member health test-cow)" ok
	is 'base' "$(member base test-cow)" "$REPLY"
	is 'tmpfs' "$(member tmpfs test-cow)" null
	is 'export' "$(member export test-cow)" null
	is 'the list' "$(cowctl list --json | jq -c '.[] | select(.name == "test-cow")')" \
		"$(cowctl status test-cow --json | jq -c .)"
	says 1 'cannot write the output: Bad file descriptor' bash -c 'cowctl list >&-'

	# copies share their base
	cowctl create "$REPLY" test-cow2
	io /dev/mapper/test-cow2 'check 0 end .'
	is 'the number of lines' "$(cowctl list | grep -c '^test-cow')" 2
	cowctl remove test-cow
	cowctl remove test-cow2
	nothing_left
}

# Names may be left out.
the_name_is_cow()
{
	[ ! -e /dev/mapper/cow ] || skip 'cow is in use'
	begin make_brd 1024
	is 'the path' "$(cowctl create base="$REPLY")" /dev/mapper/cow
	undo cowctl remove
	cowctl status | grep '^/dev/mapper/cow$'
	cowctl set limit=1M
	cowctl reset
	cowctl export
	undo cowctl unexport
	says 4 'is exported at' cowctl remove
	cowctl unexport
	unset 'undo_list[-1]'
	cowctl remove
	unset 'undo_list[-1]'
	says 3 'there is no device cow' cowctl status
}

copy_of_an_image()
{
	local loop

	begin make_image 1050000
	(cd "$work" && cowctl create test-cow base=disk.img) 2>"$work/stderr"
	grep 'the last 400 bytes are left out' "$work/stderr"
	is 'base' "$(member base test-cow)" "$work/disk.img"
	loop=$(member base_device test-cow)
	is 'read-only' "$(blockdev --getro "$loop")" 1
	is 'freed with its last user' "$(cat "/sys/block/${loop#/dev/}/loop/autoclear")" 1
	is 'size' "$(member size test-cow)" $((1050000 / 4096 * 4096))
	io /dev/mapper/test-cow 'check 0 end .' 'write 0 end A' 'check 0 end A'
	cowctl remove test-cow
	nothing_left
	image_is_unchanged

	cowctl create test-cow base="$work/disk.img" round=up
	is 'size' "$(member size test-cow)" $(((1050000 / 4096 + 1) * 4096))
	io /dev/mapper/test-cow "check 0 $((1050000 / 512))s ." "check $((1050000 / 512))s 5s 0"
	cowctl remove test-cow
	cowctl create test-cow base="$work/disk.img" size=2M
	is 'size' "$(member size test-cow)" 2097152
	cowctl remove test-cow
	cowctl create test-cow base="$work/disk.img" size=9000
	is 'size' "$(member size test-cow)" 8192
	cowctl remove test-cow
	image_is_unchanged
	nothing_left
}

copy_over_nbd()
{
	local uri dev name

	need nbdkit nbd-client
	begin serve_image 1M
	for name in '' name 'a%20b/c%3d' '%C3%A4%0a%27%24%28id%29'; do
		uri="nbd+unix:///$name?socket=$work/socket"
		cowctl create test-cow base="$uri"
		is 'base' "$(member base test-cow)" "$uri"
		dev=$(member base_device test-cow)
		is 'read-only' "$(blockdev --getro "$dev")" 1
		io /dev/mapper/test-cow 'check 0 end .' 'write 0 64k A' 'check 64k 64k .'
		cowctl remove test-cow
		nothing_left
	done
	image_is_unchanged

	run_nbdkit "$work/tcp.pid" -i 127.0.0.1 -p 10999 -r file "$work/disk.img"
	for uri in nbd://127.0.0.1:10999 nbd://localhost:10999/any; do
		cowctl create test-cow base="$uri"
		io /dev/mapper/test-cow 'check 0 end .'
		cowctl remove test-cow
	done
	nothing_left
}

# Others look for a free NBD device at the same time, and use some in between.
busy_nbd_devices()
{
	local i pids=() tags=.ABCDEF

	need nbdkit nbd-client
	begin serve_image 1M
	make_nbd "$work/socket" -R
	exec 7</dev/nbd1
	for i in 1 2 3 4 5 6; do
		cowctl create test-cow$i base="nbd+unix:///?socket=$work/socket" &
		pids+=($!)
	done
	wait "${pids[@]}"
	exec 7<&-
	for i in 1 2 3 4 5 6; do
		io /dev/mapper/test-cow$i 'check 0 end .' "write 0 4k ${tags:i:1}"
	done
	is 'the number of bases' "$(cowctl list --json | jq -r .[].base_device | sort -u | wc -l)" 6
	for i in 1 2 3 4 5 6; do
		io /dev/mapper/test-cow$i "check 0 4k ${tags:i:1}"
		cowctl remove test-cow$i
	done
	# the one that was not made by cowctl is still there
	is 'the number of connections' "$(connected | wc -l)" 1
	io "$REPLY" 'check 0 end .'
}

limits()
{
	local ram blocks

	begin make_brd 1024
	cowctl create test-cow base="$REPLY" limit=25%
	ram=$(meminfo MemTotal)
	blocks=$(($(member limit test-cow) / 4096))
	between 'a quarter of the RAM in blocks' "$blocks" $((ram / 16 - 1)) $((ram / 16 + 1))
	cowctl set test-cow limit=8K
	io /dev/mapper/test-cow 'write 0 8k A' 'fails ENOSPC write 8k 4k A'
	is 'health' "$(member health test-cow)" full
	is 'refused' "$(member writes_refused test-cow)" 1
	cowctl list | grep -E '^test-cow .* 8\.0 KiB \(100%\) +8\.0 KiB +0 B +full '
	cowctl set test-cow limit=none
	is 'limit' "$(member limit test-cow)" null
	io /dev/mapper/test-cow 'write 8k 4k A'
	cowctl set test-cow limit=4096
	is 'limit' "$(member limit test-cow)" 4096
	io /dev/mapper/test-cow 'check 0 12k A' 'fails ENOSPC write 12k 4k A'
	says 2 'limit=0 is out of range' cowctl set test-cow limit=0
	says 2 'limit=4095 is out of range' cowctl set test-cow limit=4095
	says 2 'limit=101% is out of range' cowctl set test-cow limit=101%
	says 2 'limit=lots is no size' cowctl set test-cow limit=lots
	says 2 'what to change is missing' cowctl set test-cow
	is 'limit' "$(member limit test-cow)" 4096
}

tmpdir()
{
	local odd

	begin make_brd 1024
	make_tmpfs 'a b' -o size=64k
	TMPDIR="$work/a b" cowctl create test-cow base="$REPLY" limit=1M 2>&1 | tee "$work/stderr"
	is 'what it said' "$(<"$work/stderr")" /dev/mapper/test-cow
	is 'tmpfs' "$(member tmpfs test-cow)" "$work/a b"
	io /dev/mapper/test-cow 'write 0 64k A' 'fails ENOSPC write 64k 4k A'
	cowctl remove test-cow

	TMPDIR=/proc cowctl create test-cow base="$REPLY" 2>&1 | grep 'TMPDIR=/proc is not on a tmpfs'
	is 'tmpfs' "$(member tmpfs test-cow)" null
	cowctl remove test-cow
	TMPDIR=/no/such cowctl create test-cow base="$REPLY" 2>&1 | grep 'TMPDIR=/no/such is not'
	cowctl remove test-cow

	# neither on a terminal nor in JSON
	odd=$work/$'a b/\e[31m\xff'
	mkdir "$odd"
	TMPDIR=$odd cowctl create test-cow base="$REPLY" 2>&1 |
		grep -a ' contains a character that cannot be printed; what is written'
	is 'tmpfs' "$(member tmpfs test-cow)" null
	cowctl remove test-cow
	make_cow test-cow 2048 /dev/ram0 2 tmpfs "$work/a%20b/%1B%5B31m%FF"
	is 'tmpfs' "$(member tmpfs test-cow)" "$work/a%20b/%1B%5B31m%FF"
}

# After a reset nobody sees what was there before, whatever was cached or dirty.
resets()
{
	begin make_brd 1024
	cowctl create test-cow base="$REPLY"
	io /dev/mapper/test-cow 'write 0 64k A'
	cowctl reset test-cow
	io /dev/mapper/test-cow 'check 0 end .'
	is 'used' "$(member used test-cow)" 0

	exec 7<>/dev/mapper/test-cow
	says 4 'is open in 1 place.*force=true' cowctl reset test-cow
	dd if=/dev/zero of=/dev/mapper/test-cow bs=4k count=4 conv=notrunc status=none
	cmp -n 16384 /dev/zero /dev/mapper/test-cow
	cowctl reset test-cow force=true
	cmp -n 16384 "$REPLY" /dev/mapper/test-cow
	sync /dev/mapper/test-cow
	is 'used' "$(member used test-cow)" 0
	exec 7<&-

	mkfs.ext2 -q /dev/mapper/test-cow
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount /dev/mapper/test-cow "$work/mnt"
	undo umount "$work/mnt"
	says 4 "is mounted on $work/mnt.*force=true" cowctl reset test-cow
	says 2 'force=yes is neither' cowctl reset test-cow force=yes
	between 'used' "$(member used test-cow)" 4096 1048576
}

# serves SERVER URI [key=value...]
serves()
{
	local server=$1 uri=$2

	shift 2
	is 'what it printed' "$(cowctl export test-cow server="$server" "$@")" "$uri"
	is 'the export' "$(cowctl status test-cow --json | jq -c .export)" \
		"{\"server\":\"$server\",\"uri\":\"$uri\"}"
	only_on_loopback
	nbdcopy "$uri" "$work/out"
	cmp "$work/out" /dev/mapper/test-cow
	cowctl unexport test-cow
	is 'what is left' "$(run_files)" ''
	fails pgrep -af "$run_dir/test"
}

exports()
{
	local server socket=$run_dir/test-cow.sock

	need nbdkit nbd-server nbdcopy nbdinfo script
	begin make_brd 1024
	cowctl create test-cow base="$REPLY"
	io /dev/mapper/test-cow 'write 4k 64k A'
	undo rm -f "$work/out"
	mkdir "$work/d"
	undo rm -rf "$work/d"

	cowctl export test-cow
	cowctl list | grep '^test-cow ' | grep -F " nbd+unix:///?socket=$socket"
	says 4 "already exported at nbd+unix:///?socket=$socket" cowctl export test-cow port=1234
	says 4 'is exported at' cowctl remove test-cow
	cowctl unexport test-cow
	is 'the export' "$(member export test-cow)" null
	says 3 'is not exported' cowctl unexport test-cow

	# nbd-server takes its time, and much of it in emulation, before it answers
	for server in nbdcow nbdkit nbd-server; do
		serves $server "nbd+unix:///?socket=$work/d/a%20b%3D%5Cc" "socket=$work/d/a b=\\c"
		is 'what is left' "$(ls "$work/d")" ''
		serves $server nbd://127.0.0.1:10998 port=10998
	done
	serves nbdkit "nbd+unix:///?socket=$socket"
	serves nbdkit nbd://127.0.0.2:10809 address=127.0.0.2
	[ ! -e /proc/net/if_inet6 ] || serves nbdkit 'nbd://[::1]:10998' port=10998 address=::1
	(cd "$work/d" && cowctl export test-cow socket=here)
	is 'the address' "$(member export.uri test-cow)" "nbd+unix:///?socket=$work/d/here"
	cowctl unexport test-cow

	# it outlives the terminal it was started from, and keeps nothing of its caller's
	exec 7>"$work/out"
	flock 7
	script -qec 'cowctl export test-cow' /dev/null </dev/null
	exec 7>&-
	flock -n "$work/out" true
	nbdinfo --size "nbd+unix:///?socket=$socket"
}

# What a client writes is in the copy once it has flushed, or the server is stopped.
clients_write()
{
	need nbdkit nbdcopy
	begin make_brd 1024
	cowctl create test-cow base="$REPLY"
	cowctl export test-cow
	head -c 1M /dev/urandom >"$work/random"
	undo rm "$work/random"
	nbdcopy "$work/random" "$(member export.uri test-cow)"
	cowctl unexport test-cow
	cmp "$work/random" /dev/mapper/test-cow
}

cannot_export()
{
	local other

	need nbdkit nbd-server
	begin make_brd 1024
	cowctl create test-cow base="$REPLY"
	says 2 'server=qemu is neither' cowctl export test-cow server=qemu
	says 2 'port=0 is not a number' cowctl export test-cow port=0
	says 2 'excludes port=' cowctl export test-cow socket=/tmp/s port=1
	says 2 'too long for a socket' cowctl export test-cow "socket=/$(printf %0107d 0)"
	says 3 'there is no device test-cno' cowctl export test-cno
	touch "$work/file"
	undo rm -f "$work/file"
	says 4 'is not a socket' cowctl export test-cow socket="$work/file"
	test -f "$work/file"
	says 1 'cannot export test-cow' cowctl export test-cow socket="$work/none/socket"
	says 1 'address=192.0.2.1 is no address of this machine' cowctl export test-cow address=192.0.2.1
	undo rm -f "$work"/{socket,socket.pid}
	start_nbdkit "$work/socket" null
	says 4 'is in use' cowctl export test-cow socket="$work/socket"
	run_nbdkit "$work/tcp.pid" -i 127.0.0.1 -p 10997 null
	says 4 'port 10997 of 127.0.0.1 is in use' cowctl export test-cow port=10997
	says 4 'port 10997 of 127.0.0.1 is in use' cowctl export test-cow port=10997 server=nbd-server
	is 'what is left' "$(run_files)" ''
	is 'the export' "$(member export test-cow)" null

	# a server that died, and one that was never finished, are in nobody's way
	cowctl export test-cow
	pkill -KILL -f "$run_dir/test-cow.pid"
	wait_until 10 not pgrep -f "$run_dir/test-cow.pid"
	is 'the export' "$(member export test-cow)" null
	cowctl export test-cow
	rm $run_dir/test-cow.export
	cowctl export test-cow
	is 'the number of servers' "$(pgrep -f "$run_dir/test-cow.pid" | wc -l)" 1

	# nor what others call the same
	cowctl unexport test-cow
	undo rm -f "$work/nbdkit"
	cp "$(command -v tail)" "$work/nbdkit"
	chmod 4755 "$work/nbdkit"
	chmod 755 "$work"
	setpriv --reuid=nobody --clear-groups "$work/nbdkit" -f /dev/null $run_dir/test-cow.pid &
	other=$!
	undo eval "kill $other || :"
	wait_until 10 pgrep -f "^$work/nbdkit -f"
	says 3 'is not exported' cowctl unexport test-cow
	kill $other
	cowctl export test-cow

	# what listens where it did then is not its own
	pkill -KILL -f "$run_dir/test-cow.pid"
	wait_until 10 not pgrep -f "$run_dir/test-cow.pid"
	undo rm -f $run_dir/test-cow.sock{,.pid}
	start_nbdkit $run_dir/test-cow.sock null
	cowctl unexport test-cow
	nbdinfo --size "nbd+unix:///?socket=$run_dir/test-cow.sock"
	says 3 'is not exported' cowctl unexport test-cow
	says 4 'is in use' cowctl export test-cow
}

names()
{
	local name path

	begin make_brd 1024
	for name in 'test-c c' "test-c\$(id)'\"" 'test-cä牛' 'test-c%s%n' '-test-c -' \
		"test-c$(printf %0121d 0)"; do
		path=$(cowctl create -- "$name" base="$REPLY")
		undo dmsetup remove "${path##*/}"
		test -b "$path"
		is 'the name' "$(cowctl --json status -- "$name" | jq -r .name)" "$name"
		is 'the path' "$(cowctl --json list |
			jq -r --arg name "$name" '.[] | select(.name == $name).path')" "$path"
		cowctl list | grep -F -e "$name "
		cowctl set -- "$name" limit=1M
		is 'the name' "$(cowctl --json export -- "$name" socket="$work/s" | jq -r .name)" \
			"$name"
		says 4 'is exported at' cowctl remove -- "$name"
		cowctl unexport -- "$name"
		cowctl reset -- "$name"
		says 4 'exists already' cowctl create -- "$name" base="$REPLY"
		cowctl remove -- "$name"
		unset 'undo_list[-1]'
		says 3 'there is no device' cowctl remove -- "$name"
	done
	cowctl create "test-c$(printf %0121d 0)" base="$REPLY"
	says 2 'too long for a socket' cowctl export "test-c$(printf %0121d 0)"
	cowctl remove "test-c$(printf %0121d 0)"
	for name in '' / a/b ../x 'a\b' . .. control $'a\nb' $'a\e[31m' $'\xff' "$(printf %0128d 0)" \
		"$(printf %032d 0 | tr 0 ' ')"; do
		says 2 'the name' cowctl remove "$name"
	done
	nothing_left
}

refuses_bases()
{
	local dev=/dev/ram0

	begin make_brd 1024
	cowctl create test-cow base=$dev
	says 4 'exists already' cowctl create test-cow base=$dev
	cowctl remove test-cow
	make_dm test-other '0 8 zero'
	says 4 'another kind of mapped device' cowctl create test-other base=$dev
	says 3 'another kind of mapped device' cowctl remove test-other
	says 3 'another kind of mapped device' cowctl reset test-other
	says 2 'base= is missing' cowctl create test-cow
	says 1 'cannot find base /no/such' cowctl create test-cow base=/no/such
	says 1 "base $work is no block device" cowctl create test-cow base="$work"
	says 1 'base /dev/null is no block device' cowctl create test-cow base=/dev/null
	make_file small 511
	says 1 'has 511 bytes' cowctl create test-cow base="$work/small"
	make_file smaller 2048
	says 2 'no block of 4096 bytes; say round=up' cowctl create test-cow base="$work/smaller"
	says 2 'size=x is no size' cowctl create test-cow base=$dev size=x
	says 2 'size=0 is out of range' cowctl create test-cow base=$dev size=0
	says 2 'size=16E is out of range' cowctl create test-cow base=$dev size=16E
	says 2 'round=off is neither' cowctl create test-cow base=$dev round=off
	says 2 'limit=x is no size' cowctl create test-cow base=$dev limit=x
	says 2 'size=8P is out of range: from 1 byte to less than 8 PiB' \
		cowctl create test-cow base=$dev size=8P
	says 2 'neither nbd:// nor' cowctl create test-cow base=http://localhost/
	says 2 'neither nbd:// nor' cowctl create test-cow base=nbds://localhost/
	says 2 'is not of the form' cowctl create test-cow base=nbd://
	says 2 'is not of the form' cowctl create test-cow base=$'nbd://localhost/a\nb'
	says 2 "'=' in it" cowctl create test-cow 'base=nbd+unix:///?socket=/tmp/a%3Db'
	says 1 'nbd-client cannot connect to nbd://127.0.0.1:10996' \
		cowctl create test-cow base=nbd://127.0.0.1:10996
	says 1 'nbd-client cannot connect to nbd+unix' \
		cowctl create test-cow "base=nbd+unix:///?socket=$work/none"
	nothing_left
}

# Somebody could write to such a base.
refuses_busy_bases()
{
	local dev loop

	need sfdisk mkswap
	begin need_module brd rd_nr=1 rd_size=2048
	undo wait_until 10 rmmod brd
	dev=/dev/ram0
	mkfs.ext2 -q $dev
	mkdir "$work/m n"
	undo rmdir "$work/m n"
	mount $dev "$work/m n"
	says 4 "base /dev/ram0 is mounted on $work/m n;" cowctl create test-cow base=$dev
	umount "$work/m n"

	mkswap $dev
	swapon $dev
	undo swapoff $dev
	says 4 'base /dev/ram0 is in use' cowctl create test-cow base=$dev
	swapoff $dev
	unset 'undo_list[-1]'

	make_dm test-other "0 4096 linear $dev 0"
	says 4 'base /dev/ram0 is in use by dm-' cowctl create test-cow base=$dev
	dmsetup remove --retry test-other
	unset 'undo_list[-1]'

	# but a copy that is just being made is none of these
	dmsetup create test-other -u NBDCOW-1 --notable
	undo dmsetup remove --retry test-other
	dmsetup load test-other --table "0 4096 nbdcow $dev"
	cowctl create test-cow base=$dev
	cowctl remove test-cow
	dmsetup clear test-other

	make_file parts 4M
	printf ',,L\n' | sfdisk -q "$work/parts"
	make_loop "$work/parts" -P
	loop=$REPLY
	wait_until 10 test -b "${loop}p1"
	mkfs.ext2 -q "${loop}p1"
	mount "${loop}p1" "$work/m n"
	undo umount "$work/m n"
	says 4 'is mounted on' cowctl create test-cow base="$loop"
	fails dmsetup info test-cow
}

cannot_remove()
{
	begin make_brd 1024
	cowctl create test-cow base="$REPLY"
	exec 7</dev/mapper/test-cow
	says 4 'is open in 1 place' cowctl remove test-cow
	exec 7<&-
	mkfs.ext2 -q /dev/mapper/test-cow
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount /dev/mapper/test-cow "$work/mnt"
	says 4 "is mounted on $work/mnt" cowctl remove test-cow
	umount "$work/mnt"
	cowctl create test-cow2 base=/dev/mapper/test-cow
	says 4 'is the base of another copy' cowctl remove test-cow
	make_dm test-other '0 8 linear /dev/mapper/test-cow2 0'
	says 4 'is in use by dm-' cowctl remove test-cow2
	dmsetup remove --retry test-other
	unset 'undo_list[-1]'
	cowctl remove test-cow2
	cowctl remove test-cow
	says 3 'there is no device' cowctl remove test-cow
	says 3 'there is no device' cowctl status test-cow
	says 3 'there is no device' cowctl reset test-cow
	says 3 'there is no device' cowctl set test-cow limit=1G
	says 3 'is not exported' cowctl unexport test-cow
}

misses_programs()
{
	local cowctl

	need unshare
	begin make_brd 1024
	cowctl=$(realpath "$(command -v cowctl)")
	cowctl create test-cow base="$REPLY"
	says 6 'nbdkit is not installed; it is in the package nbdkit' \
		without /usr/bin "$cowctl" export test-cow
	says 6 'nbd-server is not installed; it is in the package nbd-server' \
		without /usr/bin "$cowctl" export test-cow server=nbd-server
	is 'the export' "$(member export test-cow)" null
	cowctl remove test-cow
	modprobe nbd
	says 6 'nbd-client is not installed; it is in the package nbd-client' \
		without /usr/sbin "$cowctl" create test-cow base=nbd://127.0.0.1
	nothing_left
}

misses_the_module()
{
	local cowctl

	need unshare
	begin make_brd 1024
	cowctl=$(realpath "$(command -v cowctl)")
	rmmod dm-nbdcow || skip 'the module is in use'
	says 6 'module dm-nbdcow is not loaded' \
		without /lib/modules "$cowctl" create test-cow base="$REPLY"
	# otherwise it is loaded
	cowctl create test-cow base="$REPLY"
	cowctl remove test-cow
}

# One wins, the others are told so; nothing of them is left.
two_at_once()
{
	local round i rc won lost pids

	begin make_image 1M
	for round in 1 2 3; do
		won=0 lost=0 pids=()
		for i in 1 2 3 4; do
			cowctl create test-cow base="$work/disk.img" &
			pids+=($!)
		done
		for i in "${pids[@]}"; do
			rc=0
			wait "$i" || rc=$?
			case $rc in
			0)	won=$((won + 1)) ;;
			4)	lost=$((lost + 1)) ;;
			esac
		done
		is "winners and losers of round $round" "$won and $lost" '1 and 3'
		is 'the number of loop devices' "$(losetup -a | grep -c "($work")" 1
		cowctl remove test-cow
		nothing_left
	done
}

run_tests \
	copy_of_a_device 'a copy of a device: create, list, status, remove' \
	the_name_is_cow 'the name is cow unless given' \
	copy_of_an_image 'a copy of an image file, its size and rounding' \
	copy_over_nbd 'a copy of an NBD export' \
	busy_nbd_devices 'each gets an NBD device of its own, whoever looks for one' \
	limits 'limits, and changing them' \
	tmpdir 'TMPDIR is used when it is a tmpfs' \
	resets 'a reset, and what was cached' \
	exports 'exports: servers and addresses' \
	clients_write 'what clients write is in the copy' \
	cannot_export 'exports that cannot be' \
	names 'names of all kinds' \
	refuses_bases 'bases and sizes that cannot be' \
	refuses_busy_bases 'bases that somebody may write to' \
	cannot_remove 'copies that are in use' \
	misses_programs 'programs that are not installed' \
	misses_the_module 'the module is loaded, or missed' \
	two_at_once 'several at once for one name'
