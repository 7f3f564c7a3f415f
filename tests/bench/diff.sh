#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Figures of cowctl diff, each beside its goal; a goal that is missed is a failure.
# `make bench-cache' runs it in a virtual machine at the speed of the host.

. "$(dirname "$0")/figures.sh"

COW=/dev/mapper/test-cow

# sparse SIZE: a copy of a file that is one hole; qemu reads and skips nothing faster
sparse()
{
	make_file base.img "$1"
	begin make_loop "$REPLY"
	undo rm -f "$work"/{copy,changes,image}
	cowctl create test-cow base="$REPLY"
}

# change SIZES BYTES OF: writes so much, in pieces of these sizes, all over it
change()
{
	fio --name=change --filename=$COW --rw=randwrite --bsrange="$1" --blockalign=4k \
		--io_size="$2" --size="$3" --norandommap --randrepeat=1 --ioengine=libaio \
		--iodepth=16 --direct=1 --minimal >/dev/null
}

# took COMMAND...: leaves the microseconds
took()
{
	local start

	start=$(now_us)
	"$@"
	REPLY=$(($(now_us) - start))
}

# What is changed is read piece by piece, as large as they are or 1 MiB, and written one
# behind the other into a file: no copy of these bytes could do less.
copy()
{
	python3 -c '
import json, mmap, os, sys
ranges = json.load(open(sys.argv[1]))["ranges"]
src = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT)
dst = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
buf = memoryview(mmap.mmap(-1, 1 << 20))
for r in ranges:
    start, left = r["start"], r["length"]
    while left:
        n = min(left, len(buf))
        os.preadv(src, [buf[:n]], start)
        os.write(dst, buf[:n])
        start, left = start + n, left - n
os.fsync(dst)' "$work/changes" $COW "$work/copy"
}

# Runs a diff; leaves in $own the most KiB that cowctl had, and in $all, together with
# what it runs.
watched_diff()
{
	local pid process name value sum

	own=0 all=0
	cowctl diff test-cow "$work/image" &
	pid=$!
	while kill -0 $pid; do
		sum=0
		for process in $pid $(pgrep -P $pid); do
			while read -r name value _; do
				[ "$name" = VmHWM: ] || continue
				sum=$((sum + value))
				[ "$process" != $pid ] || own=$value
			done <"/proc/$process/status" || :	# it has ended
		done
		[ $sum -le "$all" ] || all=$sum
		sleep 0.2
	done 2>/dev/null
	wait $pid
}

# scattered SIZES: 1 GiB in such pieces on a base of 1 TiB
scattered()
{
	local copies=() diffs=() round own all missed=()

	need fio python3 qemu-nbd
	sparse 1T
	change "$1" "${BENCH_BYTES:-1G}" 1T
	cowctl changes test-cow --json >"$work/changes"
	printf '# pieces: %s\n' "$(jq '.ranges | length' "$work/changes")" >&5
	for ((round = 0; round < ${BENCH_ROUNDS:-3}; round++)); do
		took copy
		copies+=("$REPLY")
		rm "$work/copy"
		took cowctl diff test-cow "$work/image"
		diffs+=("$REPLY")
		rm "$work/image"
	done
	printf '# us to copy: %s\n# us of diff: %s\n' "${copies[*]}" "${diffs[*]}" >&5
	figure "diff of pieces of $1 / copying them" \
		"$(divide "$(printf '%s\n' "${diffs[@]}" | median)" \
			"$(printf '%s\n' "${copies[@]}" | median)")" 3
	watched_diff
	figure 'KiB of memory of cowctl' "$own" 65536
	figure 'KiB of memory of cowctl and qemu' "$all" 65536
	judge
}

mixed()
{
	scattered 4k-128k
}

# What the manual of nbdkit has for it: qemu-img reads both disks as a whole.
recipe()
{
	qemu-img create -q -f qcow2 -b $COW -F raw "$work/image"
	qemu-img rebase -f qcow2 -b "$work/base.img" -F raw "$work/image"
}

against_rebase()
{
	local diff missed=()

	need fio qemu-img qemu-nbd
	sparse 20G
	change 4k-128k 200M 20G
	took cowctl diff test-cow "$work/image"
	diff=$REPLY
	qemu-img compare -f qcow2 -F raw "$work/image" $COW
	rm "$work/image"
	took recipe
	printf '# us of diff: %s, of create and rebase: %s\n' "$diff" "$REPLY" >&5
	figure 'diff of 200 MiB of 20 GiB / create and rebase' "$(divide "$diff" "$REPLY")" 0.05
	judge
}

# rate COMMAND...: leaves the sectors in a second that are written meanwhile
rate()
{
	local before dir

	dir=$(sysfs_of $COW)
	before=$(stat_of "$dir" 6)
	took "$@"
	REPLY=$((($(stat_of "$dir" 6) - before) * 1000000 / REPLY))
}

under_load()
{
	local load alone missed=()

	need fio qemu-nbd
	sparse 1G
	dd if=/dev/zero of=$COW bs=1M count=1024 oflag=direct status=none
	fio --name=load --filename=$COW --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 \
		--direct=1 --time_based --runtime=3600 --minimal >/dev/null &
	load=$!
	undo kill $load
	wait_until 30 busy
	rate sleep 10
	alone=$REPLY
	rate cowctl diff test-cow "$work/image"
	printf '# KiB/s of the load: %s, during the diff: %s\n' $((alone / 2)) $((REPLY / 2)) >&5
	figure 'speed of a load / while a diff is made' "$(divide "$alone" "$REPLY")" 2
	judge
}

# The load has begun: dd has written 1 GiB.
busy()
{
	[ "$(stat_of "$(sysfs_of $COW)" 6)" -gt $(((1 << 21) + 10000)) ]
}

run_tests \
	mixed '1 GiB of changes on 1 TiB' \
	against_rebase 'qemu-img create and rebase' \
	under_load 'a diff of a copy that is written'
