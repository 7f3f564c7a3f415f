#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, what cowctl diff, load and commit keep of a copy is something else than
# what it was, or they leave something behind, or open what they must not.

. "$(dirname "$0")/cowctl-common.sh"

# The tests work in a directory of their own.
PATH=$(realpath "$(dirname "$0")/../build/tests"):$PATH
COW=/dev/mapper/test-cow
COW2=/dev/mapper/test-c2

# begin_here [COMMAND...]: makes the base
begin_here()
{
	need cowctl jq qemu-img qemu-nbd
	mkdir "$work/here"
	undo rm -rf "$work/here"
	cd "$work/here"
	begin "${@:-:}"
	BASE=${REPLY:-}
}

# fill FILE BYTES: with what bases hold, and at the end something else
fill()
{
	truncate -s $(($2 / 512 * 512)) "$1"
	make_loop "$PWD/$1"
	io "$REPLY" 'write 0 end .'
	losetup -d "$REPLY"
	unset 'undo_list[-1]'
	head -c $(($2 % 512)) /dev/urandom >>"$1"
}

# With its backing file the image is the same as the device.
same_as()
{
	qemu-img compare -f qcow2 -F raw "$1" "$2"
}

# Neither view, server, connection nor half of a file, and the device works.
all_gone()
{
	! dmsetup ls | grep cowctl-view && ! pgrep -a qemu-nbd &&
		! find . "$run_dir" -name '*part' -o -name '*.image' | grep .
}

working()
{
	[ "$(dmsetup info -c --noheadings -o suspended "$1")" = Active ]
}

# change_at_random DEVICE BYTES SEED [OPERATION]: BYTES are in the base
change_at_random()
{
	io "$1" "model $2" "random $3 100" 'discard 100k 300k' 'zeroout 500k 8k' 'write 1020k 8k A' \
		"${@:4}" verify
}

# round_trip BASE SIZE ROUND [OPERATION]: of a copy of that size
round_trip()
{
	local how=("base=$1" "round=$3" ${2:+"size=$2"}) bytes sum

	sum=$(sha256sum <"$1")
	cowctl create test-cow "${how[@]}"
	cowctl create test-c2 "${how[@]}"
	bytes=$(member base_size test-cow)
	change_at_random $COW "$bytes" "$RANDOM" "${@:4}"
	cowctl diff test-cow a.qcow2
	same_as a.qcow2 $COW
	cowctl load test-c2 a.qcow2 2>warning
	is 'what it warned of' "$(<warning)" ''
	cmp $COW $COW2
	is 'the changes' "$(cowctl changes test-c2 --json)" "$(cowctl changes test-cow --json)"
	is 'its mode' "$(stat -c %a a.qcow2)" 600
	qemu-img check -q a.qcow2
	cowctl remove test-cow
	cowctl remove test-c2
	rm a.qcow2
	all_gone
	is 'the base' "$(sha256sum <"$1")" "$sum"
}

round_trips()
{
	begin_here make_brd 2048
	# longer than its base, and shorter
	round_trip "$BASE" 3M down
	round_trip "$BASE" 1100K down
}

# A file that ends within a block, or even within a sector. In the latter case it has more of
# its last block than the copy shows; that is saved, changed or not.
odd_tails()
{
	local bytes

	begin_here
	for bytes in 2098176 2098852; do
		fill disk.img "$bytes"
		round_trip disk.img '' up 'write 2M 4k B'
		rm disk.img
	done
	fill disk.img 2098852
	round_trip disk.img 3M down 'write 2M 4k B'
}

# What is under the image may have more than the device shows of it.
base_grew()
{
	local sum

	begin_here
	fill disk.img 1049000
	sum=$(sha256sum <disk.img)
	cowctl create test-cow base=disk.img size=2M
	io $COW 'write 8k 4k A' 'write 1200k 4k B'
	(cat disk.img; head -c 300000 /dev/urandom) >more.img
	cowctl rebase test-cow base=more.img force=true
	cowctl diff test-cow a.qcow2
	same_as a.qcow2 $COW
	cp more.img copy.img
	cowctl commit test-cow to=copy.img
	cmp copy.img $COW
	is 'the base' "$(sha256sum <disk.img)" "$sum"
}

# all zeroes of the device are there, whatever is in the backing file
zeroes_are_kept()
{
	begin_here make_brd 4096
	cowctl create test-cow base="$BASE"
	io $COW 'discard 0 4M' 'write 1M 4k A'
	cowctl diff test-cow a.qcow2 --json >report
	is 'the report' "$(jq -c . report)" "{\"name\":\"test-cow\",\"file\":\"$PWD/a.qcow2\",\"size\":4194304,\"written\":4096,\"zeroed\":4190208,\"backing\":\"/dev/ram0\",\"format\":\"raw\"}"
	same_as a.qcow2 $COW
	between 'its size' "$(stat -c %b a.qcow2)" 1 2048
	cowctl reset test-cow
	cowctl diff test-cow none.qcow2
	same_as none.qcow2 "$BASE"
}

# Blocks are written one after the other, each time with the next number: the state of
# one instant has all of them up to some number, and none of those after it.
diff_of_one_instant()
{
	local writer

	need python3
	begin_here make_brd 2048
	cowctl create test-cow base="$BASE"
	cat >write.py <<-'EOF'
		import itertools, mmap, os
		fd = os.open("/dev/mapper/test-cow", os.O_RDWR | os.O_DIRECT)
		buf = mmap.mmap(-1, 4096)
		for n in itertools.count(1):
		    buf[:8] = n.to_bytes(8, "little")
		    os.pwrite(fd, buf, n % 512 * 4096)
		    if n % 100 == 0:
		        with open("now.new", "w") as f:
		            f.write(str(n))
		        os.rename("now.new", "now")
	EOF
	python3 write.py &
	writer=$!
	undo kill $writer
	wait_until 30 written 1200
	cowctl diff test-cow a.qcow2
	cowctl diff test-cow b.qcow2
	wait_until 30 written $(($(<now) + 1000))
	kill -0 $writer
	for image in a b; do
		qemu-img convert -O raw $image.qcow2 $image.raw
		python3 -c '
import struct, sys
data = open(sys.argv[1], "rb").read()
numbers = [struct.unpack_from("<Q", data, i * 4096)[0] for i in range(512)]
last = max(numbers)
assert last >= 1200, last
for i, n in enumerate(numbers):
    assert n == last - (last - i) % 512, (i, n, last)
print("instant", last)' $image.raw
	done
	all_gone
}

written()
{
	[ -e now ] && [ "$(<now)" -ge "$1" ]
}

# What a file system has not yet written is there, too; it is clean after its journal.
mounted()
{
	begin_here make_brd 8192
	cowctl create test-cow base="$BASE"
	cowctl create test-c2 base="$BASE"
	mkfs.ext2 -q $COW
	mkdir mnt
	mount $COW mnt
	undo unmount "$PWD/mnt"
	echo 'not synced' >mnt/file
	cowctl diff test-cow a.qcow2
	echo later >mnt/other
	working test-cow
	umount mnt
	cowctl load test-c2 a.qcow2
	mount -o ro $COW2 mnt
	is 'the file' "$(<mnt/file)" 'not synced'
	test ! -e mnt/other
	umount mnt
	says 4 'is mounted on' mounted_load
}

# The same on a partition; one whose device somebody has suspended stays so.
mounted_partition()
{
	need kpartx sgdisk
	begin_here
	truncate -s 16M disk.img
	sgdisk -n 1:1M:7M -n 2:8M:15M disk.img
	cowctl create test-cow base=disk.img partitions=true
	mkfs.ext2 -q ${COW}p1
	mkdir mnt
	mount ${COW}p1 mnt
	undo unmount "$PWD/mnt"
	dmsetup suspend test-cowp2
	echo 'not synced' >mnt/file
	cowctl diff test-cow a.qcow2
	working test-cow
	working test-cowp1
	fails working test-cowp2
	dmsetup resume test-cowp2
	umount mnt
	cowctl create test-c2 base=disk.img
	cowctl load test-c2 a.qcow2
	cowctl set test-c2 partitions=true
	mount -o ro ${COW2}p1 mnt
	is 'the file' "$(<mnt/file)" 'not synced'
	umount mnt
}

mounted_load()
{
	cowctl reset test-c2
	mkfs.ext2 -q $COW2 && cowctl diff test-c2 fs.qcow2 >/dev/null && cowctl reset test-c2 &&
		cowctl load test-c2 fs.qcow2 >/dev/null && mount $COW2 mnt &&
		cowctl reset test-c2 force=true
	cowctl load test-c2 fs.qcow2
}

two_at_once()
{
	local pids=() pid failed=0 i

	begin_here make_brd 2048
	cowctl create test-cow base="$BASE"
	change_at_random $COW 2M "$RANDOM"
	for i in 1 2; do
		cowctl diff test-cow $i.qcow2 &
		pids+=($!)
	done
	wait "${pids[0]}"
	wait "${pids[1]}"
	same_as 1.qcow2 $COW
	same_as 2.qcow2 $COW
	# only one of these can make it
	pids=()
	for i in 1 2 3; do
		cowctl diff test-cow same.qcow2 &
		pids+=($!)
	done
	for pid in "${pids[@]}"; do
		wait "$pid" || { is 'the status' $? 4; failed=$((failed + 1)); }
	done
	is 'how many failed' $failed 2
	same_as same.qcow2 $COW
	all_gone
}

no_room_for_it()
{
	begin_here make_brd 4096
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 3M A'
	mkdir small
	mount -t tmpfs -o size=1M none small
	undo umount "$PWD/small"
	says 1 'cannot write small/a.qcow2: No space left' cowctl diff test-cow small/a.qcow2
	is 'what is there' "$(ls -A small)" ''
	all_gone
	io $COW 'check 0 3M A' 'write 0 4k B'
}

# at_read ACTION COMMAND...: strace does that when it reads its view for the second time
at_read()
{
	local action=$1 minor

	shift
	minor=$(dmsetup info -c --noheadings -o minor test-cow)
	# the view is made next; the loader of programs reads by pread64, too
	at_call -P "/dev/dm-$((minor + 1))" pread64 "$action:when=2" "$@"
}

# at_call [-P PATH] CALL ACTION COMMAND...
at_call()
{
	local path=()

	[ "$1" != -P ] || { path=(-P "$2"); shift 2; }
	# the shell may have it ignored
	exec env --default-signal=INT strace -qq -o "$work/trace" "${path[@]}" -e "trace=$1" \
		-e "inject=$1:$2" "${@:3}"
}

# hold COMMAND...: runs it in the background, as $tracer, until strace has stopped it
hold()
{
	rm -f "$work/trace"
	"$@" &
	tracer=$!
	wait_until 30 grep -qs 'stopped by SIGSTOP' "$work/trace"
}

# disturbed SIGNAL WHERE...: comes at that step of a diff, which then leaves nothing that
# the next one minds
disturbed()
{
	local rc=0

	("${@:2}" cowctl diff test-cow a.qcow2) || rc=$?
	is "the status after $1" $rc $((128 + $(kill -l "$1")))
	test ! -e a.qcow2
	# what the kernel takes away does not wait for anybody
	wait_until 10 working test-cow
	wait_until 10 not pgrep -a qemu-nbd
	[ "$1" = KILL ] || is 'what is there' "$(ls -A)" ''
}

# disturbed_by FIRST SECOND: while it is frozen, and copied
disturbed_by()
{
	need strace
	begin_here make_brd 1024
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 1M A'
	disturbed "$1" at_call poll "signal=$1:when=1"
	disturbed "$2" at_read "signal=$2"
	cowctl diff test-cow a.qcow2
	same_as a.qcow2 $COW
	all_gone
}

interrupted()
{
	disturbed_by INT TERM
}

killed()
{
	disturbed_by KILL KILL
}

# The memory for what is overwritten meanwhile is used up.
no_memory()
{
	local parameter=$MODULE/parameters/total_limit tracer rc=0

	need strace
	begin_here make_brd 4096
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 3M A'
	undo cp "$work/total_limit" "$parameter"
	cat "$parameter" >"$work/total_limit"
	hold at_read signal=STOP cowctl diff test-cow a.qcow2 2>"$work/stderr"
	is 'the niceness' "$(ps -o ni= -p "$(pgrep -x cowctl)" | tr -d ' ')" 10
	echo $((3145728 + 65536)) >"$parameter"
	io $COW 'write 0 128k B'
	kill -CONT "$(pgrep -x cowctl)"
	wait "$tracer" || rc=$?
	is 'the status' $rc 1
	is 'what it said' "$(<"$work/stderr")" \
		'cowctl: no memory to keep what is overwritten in test-cow'
	is 'what is there' "$(ls -A)" ''
	all_gone
	io $COW 'check 0 128k B' 'check 128k 2944k A' 'write 0 3M C'
	cp "$work/total_limit" "$parameter"
	cowctl diff test-cow a.qcow2
	same_as a.qcow2 $COW
}

# The child that freezes waits, too.
freezing()
{
	[ "$(pgrep -c -x -r S cowctl)" = 2 ]
}

reads_in_flight()
{
	[ "$(awk '{ print $1 }' "$(sysfs_of $COW)/inflight")" != 0 ]
}

# A read that the server does not answer is waited for, since a view has none of those.
base_hangs()
{
	local server reader pid rc=0

	need nbdkit nbd-client
	begin_here serve_image 1048576
	cowctl create test-cow base="$BASE" holes=false
	io $COW 'write 0 64k A'
	server=$(<"$work/socket.pid")
	kill -STOP "$server"
	undo kill -CONT "$server"
	dd if=$COW of=first bs=4k count=1 skip=100 iflag=direct status=none &
	reader=$!
	wait_until 10 reads_in_flight
	env --default-signal=INT cowctl diff test-cow a.qcow2 2>"$work/stderr" &
	pid=$!
	wait_until 10 freezing
	kill -INT $pid
	wait $pid || rc=$?
	is 'the status' $rc 130
	is 'what it said' "$(<"$work/stderr")" ''
	working test-cow
	is 'what is there' "$(ls -A)" first
	all_gone
	io $COW 'check 0 64k A' 'write 64k 4k B'

	cowctl diff test-cow a.qcow2 &
	pid=$!
	wait_until 10 freezing
	kill -CONT "$server"
	wait $pid
	wait $reader
	cmp -n 4096 first "$work/disk.img" 0 409600
	same_as a.qcow2 $COW
	all_gone
}

# Those that wait in the kernel for the base to come back neither fail nor delay it.
base_is_away()
{
	local reader

	need nbdkit nbd-client
	begin_here serve_image 1048576
	cowctl create test-cow base="$BASE" holes=false on-base-error=queue
	io $COW 'write 0 64k A'
	kill_nbdkit "$work/socket" "$(member base_device test-cow)"
	dd if=$COW of=first bs=4k count=1 skip=100 iflag=direct status=none &
	reader=$!
	wait_until 10 waiting 1
	cowctl diff test-cow a.qcow2
	waiting 1
	all_gone
	rm "$work/socket"
	start_nbdkit "$work/socket" -r file "$work/disk.img"
	undo sweep
	undo let_go
	cowctl rebase test-cow base="$BASE" force=true holes=false
	wait $reader
	cmp -n 4096 first "$work/disk.img" 0 409600
	same_as a.qcow2 $COW
}

# without_qemu COMMAND...: what qemu-utils has is not where it is; here it may be
without_qemu()
{
	PATH=$PWD/bin:$PATH without /usr/bin "$(realpath "$(command -v cowctl)")" "$@"
}

# qemu_says PROGRAM TEXT: one that is so old that it does not understand us
qemu_says()
{
	cp "$(command -v busybox)" bin/sh
	printf '#!%s\necho %q >&2\nexit 1\n' "$PWD/bin/sh" "$2" >"bin/$1"
	chmod +x "bin/$1"
}

no_qemu()
{
	local qemu_img qemu_nbd

	need busybox
	begin_here make_brd 1024
	mkdir bin
	qemu_img=$(command -v qemu-img)
	qemu_nbd=$(command -v qemu-nbd)
	cowctl create test-cow base="$BASE"
	cowctl create test-c2 base="$BASE"
	io $COW 'write 0 4k A'
	cowctl diff test-cow a.qcow2

	says 6 'qemu-img is not installed; it is in the package qemu-utils' \
		without_qemu diff test-cow b.qcow2
	says 6 'qemu-img is not installed' without_qemu load test-c2 a.qcow2
	qemu_says qemu-img "qemu-img: /proc/self/fd/6: Invalid parameter 'extended_l2'"
	says 6 'qemu-img is too old; it must be of QEMU 5.2' without_qemu diff test-cow b.qcow2

	cp "$qemu_img" bin
	says 6 'qemu-nbd is not installed; it is in the package qemu-utils' \
		without_qemu diff test-cow b.qcow2
	says 6 'qemu-nbd is not installed' without_qemu load test-c2 a.qcow2
	qemu_says qemu-nbd "qemu-nbd: unrecognized option '--allocation-depth'
Try \`qemu-nbd --help' for more information."
	says 6 'qemu-nbd is too old; it must be of QEMU 5.2' without_qemu load test-c2 a.qcow2
	is 'what is there' "$(ls -A)" "$(printf '%s\n' a.qcow2 bin)"
	all_gone

	cp "$qemu_nbd" bin
	without_qemu load test-c2 a.qcow2
	cmp $COW $COW2
}

# On a terminal only
progress_bar()
{
	need script
	begin_here make_brd 2048
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 2M A'
	script -qec 'cowctl diff test-cow a.qcow2' screen </dev/null
	grep -F '[########################################] 100%  2.0 MiB of 2.0 MiB' screen
	grep '^a.qcow2: 2.0 MiB written' screen
	cowctl diff test-cow b.qcow2 >out
	is 'what is no terminal' "$(<out)" \
		'b.qcow2: 2.0 MiB written, 0 B zeroed, on top of /dev/ram0'
	cowctl reset test-cow
	script -qec 'cowctl load test-cow a.qcow2' screen </dev/null
	grep -F '[########################################] 100%  2.0 MiB of 2.0 MiB' screen
	cowctl reset test-cow
	cowctl load test-cow a.qcow2 >out
	is 'what is no terminal' "$(<out)" "$COW: 2.0 MiB written, 0 B zeroed"
}

# Of a base of that name the qcow2 file tells, but nobody looks there.
foreign_names()
{
	local opens=(-f --seccomp-bpf -qq -e 'trace=open,openat,openat2' -o trace) rc=0

	need strace
	begin_here make_brd 2048
	echo secret >secret
	truncate -s 2M secret
	cowctl create test-cow base="$BASE"
	qemu-img create -q -f qcow2 -u -b "$PWD/secret" -F raw evil.qcow2 2M
	strace "${opens[@]}" cowctl load test-cow evil.qcow2 2>warning || fail "$(<warning)"
	grep 'was saved on top of .*/secret; /dev/ram0 must have the same content' warning
	grep -q evil.qcow2 trace
	fails grep '/secret"' trace
	cmp $COW "$BASE"
	truncate -s 1M secret
	says 1 'not as large as /dev/ram0; or say force=true' cowctl load test-cow evil.qcow2
	cowctl load test-cow evil.qcow2 force=true
	cowctl reset test-cow
	make_loop "$PWD/secret"
	cowctl diff test-cow part.qcow2 backing="$REPLY"
	says 1 "$REPLY, not as large as /dev/ram0" cowctl load test-cow part.qcow2
	# the size of such a file is not that of its disk
	qemu-img create -q -f qcow2 golden.qcow2 2M
	cowctl diff test-cow other.qcow2 backing=golden.qcow2 format=qcow2
	cowctl load test-cow other.qcow2 2>warning
	grep 'must have the same content' warning

	qemu-img create -q -f qcow2 -o data_file="$PWD/secret",data_file_raw=on data.qcow2 2M
	strace "${opens[@]}" cowctl load test-cow data.qcow2 2>error || rc=$?
	is 'the status' $rc 1
	grep 'its data are in another file' error
	fails grep '/secret"' trace
	all_gone
}

# Names that qemu takes for something else, and cowctl for keys
odd_names()
{
	local name

	begin_here make_brd 1024
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 4k A'
	for name in 'json:{}' $'a:b,file=\303\244 "b'; do
		cowctl diff test-cow "./$name"
		same_as "./$name" $COW
		cowctl create test-c2 base="$BASE"
		cowctl load test-c2 "./$name"
		cmp $COW $COW2
		cowctl remove test-c2
	done
	mkdir $'d\xff'
	is 'the files in a directory whose name is no text' "$(cd $'d\xff' && cp "$BASE" copy &&
		(cowctl diff test-cow ./v --json; cowctl commit test-cow to=copy --json) |
		jq -r .file | xargs)" './v copy'
	cowctl diff test-cow "$PWD/x=y.qcow2" backing=nbd:x.img format=qcow2
	is 'the backing file' "$(qemu-img info --output=json x=y.qcow2 |
		jq -r '.["backing-filename"], .["backing-filename-format"]' | xargs)" './nbd:x.img qcow2'
	says 2 'cannot be printed' cowctl diff test-cow $'./a\nb'
	says 2 'format= is that of backing=, which is missing' cowctl diff test-cow u.qcow2 format=raw
	says 2 'format=nonsense is none that qemu-img knows' cowctl diff test-cow u.qcow2 \
		backing=x format=nonsense
	is 'what is there' "$(find . -name '*u.qcow2*')" ''
	says 1 'cannot find the directory' cowctl diff test-cow none/u.qcow2
	says 2 'the file to make is missing' cowctl diff test-cow
	says 2 'the file to load is missing' cowctl load test-cow
	says 3 'there is no device cow' cowctl diff u.qcow2
	says 3 'there is no device test-cno' cowctl diff test-cno u.qcow2
	says 4 'x=y.qcow2 exists already' cowctl diff test-cow ./x=y.qcow2
}

# The address of its server is recorded, which qemu understands.
nbd_base()
{
	begin_here serve_image 1048576
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 4k A' 'discard 64k 64k'
	cowctl diff test-cow a.qcow2
	is 'the backing file' "$(qemu-img info --output=json a.qcow2 | jq -r '.["backing-filename"]')" "$BASE"
	same_as a.qcow2 $COW
	cowctl reset test-cow
	cowctl load test-cow a.qcow2 2>warning
	is 'what it warned of' "$(<warning)" ''
	same_as a.qcow2 $COW
	cowctl remove test-cow
	image_is_unchanged
}

# refused STATUS PATTERN FILE: and the copy is as fresh as it was
refused()
{
	says "$1" "$2" cowctl load test-cow "$3"
	status_is test-cow used=0 zeroed=0
	all_gone
}

bad_images()
{
	begin_here make_brd 2048
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 1000k A' 'discard 1200k 400k' 'write 2000k 4k B'
	cowctl diff test-cow a.qcow2
	cp $COW all
	says 4 'has been changed already; "cowctl reset" it first' cowctl load test-cow a.qcow2
	cowctl reset test-cow

	refused 1 'cannot open none.qcow2: No such file' none.qcow2
	refused 1 'is no file' /dev/null
	head -c 2M /dev/urandom >bad
	refused 1 'bad is no qcow2 image' bad
	: >bad
	refused 1 'bad is no qcow2 image' bad
	head -c 60 a.qcow2 >bad
	refused 1 'bad' bad
	for cut in 1 200000 1000000; do
		cp a.qcow2 bad
		truncate -s -$cut bad
		refused 1 'bad \(was cut off\|is damaged\)' bad
	done
	# the first entry of the table of tables
	cp a.qcow2 bad
	printf '\377\377\377\377\377\377\377\377' | dd of=bad bs=1 conv=notrunc status=none \
		seek=$((0x$(xxd -s 40 -l 8 -p a.qcow2)))
	refused 1 'bad' bad
	exec 7<>a.qcow2
	refused 4 'a.qcow2 is open for writing in another program' a.qcow2
	exec 7<&-
	qemu-img create -q -f qcow2 bad 3M
	refused 1 'is a disk of 3145728 bytes, but test-cow has 2097152' bad
	qemu-img create -q -f qcow2 --object secret,id=s,data=x \
		-o encrypt.format=aes,encrypt.key-secret=s bad 2M
	refused 1 'is encrypted' bad
	# half of it fits
	cowctl set test-cow limit=500K
	refused 1 'cannot write to test-cow: No space left' a.qcow2
	cowctl set test-cow limit=none
	exec 7<$COW
	refused 4 'is open in 1 place' a.qcow2
	exec 7<&-
	# for a moment, as udev does
	(exec 7<$COW && sleep 0.3) &
	cowctl load test-cow a.qcow2
	wait
	cmp all $COW

	# what others make of it
	cowctl reset test-cow
	qemu-img convert -c -O qcow2 -B "$BASE" -F raw a.qcow2 small.qcow2
	cowctl load test-cow small.qcow2
	cmp all $COW

	# on a block device
	cowctl reset test-cow
	make_loop "$PWD/a.qcow2" --read-only
	cowctl load test-cow "$REPLY"
	cmp all $COW
}

# Leaves a copy as fresh as its base, and what it was before as a.qcow2.
begin_saved()
{
	need strace
	begin_here make_brd 2048
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 2M A'
	cowctl diff test-cow a.qcow2
	cowctl reset test-cow
}

# What was checked is not what is read: who wants to write to it is made to wait, and it
# is told.
changing_image()
{
	local tracer rc=0

	begin_saved
	hold at_call pwrite64 signal=STOP:when=2 cowctl load test-cow a.qcow2 2>"$work/stderr"
	dd if=/dev/zero of=a.qcow2 bs=1 count=1 conv=notrunc status=none &
	wait_until 10 breaking
	kill -CONT "$(pgrep -x cowctl)"
	wait "$tracer" || rc=$?
	is 'the status' $rc 4
	is 'what it said' "$(<"$work/stderr")" \
		'cowctl: a.qcow2 was opened for writing by another program'
	wait $!
	status_is test-cow used=0 zeroed=0
	all_gone
}

breaking()
{
	grep -q 'LEASE *BREAKING' /proc/locks
}

interrupted_load()
{
	local rc=0

	begin_saved
	(at_call pwrite64 signal=TERM:when=2 cowctl load test-cow a.qcow2) || rc=$?
	is 'the status' $rc 143
	status_is test-cow used=0 zeroed=0
	all_gone

	# one that is killed cannot undo it
	rc=0
	(at_call pwrite64 signal=KILL:when=2 cowctl load test-cow a.qcow2) || rc=$?
	is 'the status' $rc 137
	wait_until 10 all_gone
	between 'the blocks that are there' "$(field test-cow used)" 1 511
	says 4 'has been changed already; "cowctl reset" it first' cowctl load test-cow a.qcow2
	cowctl reset test-cow
	cowctl load test-cow a.qcow2
	io $COW 'check 0 2M A'
}

# Devices of partitions are made anew also when what they made room for is interrupted.
partitions_come_back()
{
	local rc=0

	need strace kpartx sfdisk
	begin_here make_brd 2048
	cowctl create test-cow base="$BASE"
	printf '%s\n' 'label: dos' 'start=64 size=512' | sfdisk -q --no-reread --no-tell-kernel $COW
	cowctl diff test-cow a.qcow2
	cowctl reset test-cow
	cowctl load test-cow a.qcow2
	cowctl set test-cow partitions=true
	test -e ${COW}p1
	# too late for it
	(at_call clone signal=TERM:when=1 cowctl reset test-cow)
	test ! -e ${COW}p1

	cowctl remove test-cow
	unguard "$BASE"
	printf '%s\n' 'label: dos' 'start=64 size=512' | sfdisk -q --no-reread --no-tell-kernel "$BASE"
	cowctl create test-cow base="$BASE" partitions=true
	test -e ${COW}p1
	(at_call pwrite64 signal=TERM:when=1 cowctl load test-cow a.qcow2) || rc=$?
	is 'the status of load' $rc 143
	test -e ${COW}p1
	all_gone
}

commit_to_device()
{
	begin_here make_brd 2048 3
	unguard /dev/ram1
	unguard /dev/ram2
	cat "$BASE" >/dev/ram1
	cowctl create test-cow base="$BASE"
	change_at_random $COW 2M "$RANDOM"
	cowctl commit test-cow to=/dev/ram1
	cmp $COW /dev/ram1
	says 4 'is the base of test-cow itself; say force=true' cowctl commit test-cow to="$BASE"
	says 4 'is test-cow itself, or made of it' cowctl commit test-cow to=$COW
	make_dm test-under "0 4096 linear $BASE 0"
	says 4 'is in use by dm-' cowctl commit test-cow to="$BASE" force=true
	says 4 'is made of the base' cowctl commit test-cow to=/dev/mapper/test-under force=true
	make_dm test-top "0 4096 linear $COW 0"
	says 4 'is test-cow itself, or made of it' cowctl commit test-cow to=/dev/mapper/test-top
	mkfs.ext2 -q /dev/ram2
	mkdir mnt
	mount /dev/ram2 mnt
	undo unmount "$PWD/mnt"
	says 4 'is mounted on' cowctl commit test-cow to=/dev/ram2 force=true
	umount mnt
	make_dm test-other '0 4096 linear /dev/ram2 0'
	says 4 'is in use' cowctl commit test-cow to=/dev/ram2
	# the kernel tells nobody what a loop device stands on
	make_loop /dev/ram1 --read-only
	cowctl create test-c2 base="$REPLY"
	cowctl create test-c3 base="$REPLY"
	says 4 "is attached to $REPLY" cowctl commit test-c2 to=/dev/ram1 force=true
	cowctl remove test-c3
	cowctl remove test-c2
	losetup -d "$REPLY"
	unset 'undo_list[-1]'
	make_loop "$BASE"
	says 4 'is made of the base of test-cow' cowctl commit test-cow to="$REPLY" force=true
	make_loop /dev/ram1
	cowctl create test-c2 base=/dev/ram1
	says 4 'is made of the base of test-c2' cowctl commit test-cow to="$REPLY" force=true
	cowctl remove test-c2
	says 2 'to= is missing' cowctl commit test-cow
	says 1 'cannot find' cowctl commit test-cow to=/dev/none
	says 1 'is no block device or file' cowctl commit test-cow to=/dev/null
	all_gone
}

# While the base changes, nobody else may change it or make a copy of it.
commit_alone()
{
	local tracer

	need strace
	begin_here make_brd 2048
	unguard "$BASE"
	cowctl create test-cow base="$BASE"
	io $COW 'write 0 2M A'
	hold at_read signal=STOP cowctl commit test-cow to="$BASE" force=true
	says 4 'is just being changed by "cowctl commit"' cowctl create test-c2 base="$BASE"
	says 4 'is just being used by another cowctl' cowctl commit test-cow to="$BASE" force=true
	kill -CONT "$(pgrep -x cowctl)"
	wait "$tracer"
	cmp $COW "$BASE"
	cowctl create test-c2 base="$BASE"
	cowctl remove test-c2

	# the copy may go meanwhile
	hold at_read signal=STOP cowctl commit test-cow to="$BASE" force=true 2>"$work/stderr"
	cowctl remove test-cow
	kill -CONT "$(pgrep -x cowctl)"
	wait "$tracer"
	is 'what it said' "$(<"$work/stderr")" ''
	io "$BASE" 'check 0 2M A'

	# the same where the base is the loop device of a file
	truncate -s 2M disk.img
	cowctl create test-cow base=disk.img
	io $COW 'write 0 2M A'
	hold at_read signal=STOP cowctl commit test-cow to=disk.img force=true
	says 4 'is just being changed by "cowctl commit"' \
		cowctl create test-c2 base="$(member base_device test-cow)"
	kill -CONT "$(pgrep -x cowctl)"
	wait "$tracer"
	cmp $COW disk.img
}

commit_to_file()
{
	local name

	begin_here
	fill disk.img 2098000
	cowctl create test-cow base=disk.img size=3M
	change_at_random $COW 2097664 "$RANDOM"
	cp disk.img copy.img
	says 4 'is the base of test-cow itself' cowctl commit test-cow to=disk.img
	ln disk.img link.img
	says 4 'is the base of test-cow itself' cowctl commit test-cow to=link.img
	make_loop "$PWD/copy.img"
	says 4 "is attached to $REPLY" cowctl commit test-cow to=copy.img force=true
	losetup -d "$REPLY"
	unset 'undo_list[-1]'
	wait_until 10 not_attached
	truncate -s 2M short.img
	says 1 'fewer than the' cowctl commit test-cow to=short.img
	# with nowhere to say it
	fails cowctl commit test-cow to=short.img 2>&-
	cmp -n 2M short.img /dev/zero
	exec 7<copy.img
	says 4 'copy.img is in use by another program' cowctl commit test-cow to=copy.img
	exec 7<&-
	cowctl commit test-cow to=copy.img --json >report
	is 'the report' "$(jq -c 'keys' report)" '["file","name","written","zeroed"]'
	cmp copy.img $COW
	# and a copy that is longer, with something there
	(cat disk.img; head -c 1048576 /dev/urandom) >copy.img
	cowctl commit test-cow to=copy.img
	cmp -n 3145728 copy.img $COW

	truncate -s 1M open.img
	exec 7<>open.img
	says 4 'base open.img is open for writing in another program' \
		cowctl create test-c2 base=open.img
	exec 7<&-
	# each has a loop device of its own
	cowctl create test-c2 base=disk.img
	cowctl create test-c3 base=disk.img
	for name in test-cow test-c2 test-c3; do
		says 4 'is attached to /dev/loop' cowctl commit $name to=disk.img force=true
		says 4 'is the same file as /dev/loop' \
			cowctl commit $name to="$(member base_device $name)" force=true
	done
	cowctl remove test-c2
	cowctl remove test-c3
	make_loop "$PWD/disk.img"
	says 4 'is the same file as /dev/loop' cowctl commit test-cow to="$REPLY"
	losetup -d "$REPLY"
	unset 'undo_list[-1]'
	cp $COW all
	cowctl commit test-cow to=disk.img force=true
	cmp disk.img all
	cowctl reset test-cow
	cmp -n 2097152 disk.img $COW
	all_gone
}

# A loop device that shows a part of a file: the file itself is another disk.
part_of_a_file()
{
	local loop sum

	begin_here
	truncate -s 5M disk.img
	head -c 1M /dev/urandom | dd of=disk.img conv=notrunc status=none
	make_loop "$PWD/disk.img" -o 1M --sizelimit 2M
	loop=$REPLY
	io "$loop" 'write 0 end .'
	cowctl create test-cow base="$loop"
	is 'the base' "$(member base test-cow)" "$loop"
	change_at_random $COW 2M "$RANDOM"
	cowctl diff test-cow a.qcow2
	same_as a.qcow2 $COW
	cowctl diff test-cow whole.qcow2 backing="$PWD/disk.img"
	cowctl create test-c2 base="$loop"
	says 1 "disk.img, not as large as $loop" cowctl load test-c2 whole.qcow2
	cowctl load test-c2 a.qcow2 2>warning
	is 'what it warned of' "$(<warning)" ''
	cmp $COW $COW2

	cowctl remove test-c2
	sum=$(sha256sum <disk.img)
	says 4 "only a part of disk.img is the base of test-cow; say to=$loop" \
		cowctl commit test-cow to=disk.img force=true
	is 'the checksum of the file' "$(sha256sum <disk.img)" "$sum"
	head -c 1M disk.img >first
	cowctl commit test-cow to="$loop" force=true
	cmp -n 1M disk.img first
	cmp -n 2M -i 1M:0 disk.img $COW
	cmp -n 2M -i 3M:0 disk.img /dev/zero
}

not_attached()
{
	! losetup -a | grep copy.img
}

# unfrozen COMMAND...: which makes no view, and so freezes nothing
unfrozen()
{
	local rc=0

	strace -qq -o "$work/trace" -e trace=ioctl "$@" || rc=$?
	grep -q DM_TABLE_STATUS "$work/trace" || echo 'it did not look at the device'
	! grep DM_DEV_CREATE "$work/trace" || echo 'it made a view'
	return $rc
}

looks_first()
{
	need strace
	begin_here make_image 1048576
	cowctl create test-cow base="$BASE"
	says 1 'cannot find' unfrozen cowctl commit test-cow to=/dev/none
	says 4 'is the base of test-cow itself' unfrozen cowctl commit test-cow to="$BASE"
	rm "$BASE"
	says 1 'is not there; say backing=' unfrozen cowctl diff test-cow a.qcow2
}

run_tests \
	round_trips 'diff and load' \
	odd_tails 'a base that ends within a block' \
	base_grew 'a base that has grown' \
	zeroes_are_kept 'zeroes over data' \
	diff_of_one_instant 'one instant of a device that is written' \
	mounted 'a file system in use' \
	mounted_partition 'a file system on a partition' \
	two_at_once 'two diffs at once' \
	no_room_for_it 'a disk that is full' \
	interrupted 'SIGINT and SIGTERM' \
	killed 'SIGKILL' \
	no_memory 'no memory for what is overwritten' \
	base_hangs 'a base that does not answer' \
	base_is_away 'a base that is away' \
	no_qemu 'qemu-utils is missing, or too old' \
	progress_bar 'the progress on a terminal' \
	foreign_names 'an image that names other files' \
	odd_names 'odd names' \
	nbd_base 'a base on an NBD server' \
	bad_images 'images that are damaged, foreign or too much' \
	changing_image 'an image that somebody writes to' \
	interrupted_load 'an interrupted load' \
	partitions_come_back 'partitions, when it is interrupted' \
	looks_first 'what is refused, before anything is frozen' \
	commit_to_device 'commit to a device' \
	commit_alone 'the base while it is written by commit' \
	commit_to_file 'commit to a file' \
	part_of_a_file 'a base that is a part of a file'
