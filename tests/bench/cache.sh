#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Figures of the cache and of many overlays on one base, each beside its goal; a goal
# that is missed is a failure. `make bench-cache' runs it as it should be: `speed' in a
# virtual machine whose clock counts instructions, the others at the speed of the host.

. "$(dirname "$0")/figures.sh"

# 100 overlays read the same 64 MiB at the same time; the base is read once.
shared()
{
	local dev before i missed=() pids=()

	need nbdkit nbd-client
	begin serve_image 64M
	cowctl create test-cow0 base="$REPLY" cow-on-read=true holes=false
	dev=$(member base_device test-cow0)
	for ((i = 1; i < 100; i++)); do
		cowctl create test-cow$i base="$dev" cow-on-read=true >/dev/null
	done
	before=$(sectors_read "$dev")
	for ((i = 0; i < 100; i++)); do
		dd if=/dev/mapper/test-cow$i of=/dev/null bs=1M iflag=direct status=none &
		pids+=($!)
	done
	for i in "${pids[@]}"; do
		wait "$i"
	done
	figure 'base reads of 100 overlays / one pass' \
		"$(divide $(($(sectors_read "$dev") - before)) 131072)" 1.05
	io /dev/mapper/test-cow99 'check 0 end .'
	judge
}

# slice DEVICE: microseconds that it takes to read each block of it once
slice()
{
	set -o pipefail
	fio --name=slice --filename="$1" --rw=randread --bs=4k --ioengine=io_uring --direct=1 \
		--iodepth=64 --iodepth_batch_submit=32 --iodepth_batch_complete_min=32 \
		--iodepth_batch_complete_max=64 --gtod_reduce=1 --fixedbufs=1 \
		--registerfiles=1 --randrepeat=1 --output-format=json |
		jq '.jobs[0].read | .total_ios * 1000000 / .iops | floor'
}

# One after the other in each round, so that what changes on the host changes all.
speed()
{
	local round kind missed=()

	need fio jq
	begin make_brd 65536
	undo rm -f "$work"/{base,miss,cached,overlay}
	cowctl create test-cow base=/dev/ram0
	cowctl create test-cow2 base=/dev/ram0 cow-on-read=true
	cowctl create test-cow3 base=/dev/ram0
	dd if=/dev/ram0 of=/dev/mapper/test-cow3 bs=1M oflag=direct status=none
	for ((round = 0; round < ${BENCH_ROUNDS:-5}; round++)); do
		cowctl set test-cow cache=drop
		slice /dev/mapper/test-cow >>"$work/base"
		slice /dev/mapper/test-cow2 >>"$work/miss"
		slice /dev/mapper/test-cow2 >>"$work/cached"
		slice /dev/mapper/test-cow3 >>"$work/overlay"
	done
	for kind in base miss cached overlay; do
		printf '# us for 16384 blocks: %-8s%s\n' $kind "$(tr '\n' ' ' <"$work/$kind")" >&5
	done
	is 'misses' "$(member misses test-cow2)" $((round << 26))
	is 'hits' "$(member hits test-cow2)" $((round << 26))
	figure 'time of a cached read / of an overlay read' \
		"$(divide "$(median <"$work/cached")" "$(median <"$work/overlay")")" 1.15
	figure 'time of a miss / of a plain read of the base' \
		"$(divide "$(median <"$work/miss")" "$(median <"$work/base")")" 1.3
	judge
}

# The same for a base behind NBD, which is what a cache is for.
behind_nbd()
{
	local round missed=()

	need fio jq nbdkit nbd-client
	start_nbdkit "$work/socket" memory 64M
	begin make_nbd "$work/socket"
	undo rm -f "$work"/{base,miss}
	cowctl create test-cow base="$REPLY" holes=false
	cowctl create test-cow2 base="$REPLY" cow-on-read=true holes=false
	for ((round = 0; round < ${BENCH_ROUNDS:-5}; round++)); do
		cowctl set test-cow cache=drop
		slice /dev/mapper/test-cow >>"$work/base"
		slice /dev/mapper/test-cow2 >>"$work/miss"
	done
	is 'misses' "$(member misses test-cow2)" $((round << 26))
	figure 'time of a miss / of a plain read, base behind NBD' \
		"$(divide "$(median <"$work/miss")" "$(median <"$work/base")")" 1.3
	judge
}

# each COUNT COMMAND...: with the number as the last part of its second word, silent;
# leaves the milliseconds each took
each()
{
	local count=$1 command=$2 i start

	shift 2
	start=$(now_us)
	for ((i = 0; i < count; i++)); do
		$command "$1$i" "${@:2}" >/dev/null
	done
	REPLY=$(divide $(($(now_us) - start)) $((count * 1000)))
}

sum()
{
	awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a + b }'
}

many()
{
	local count=500 free create floor missed=()

	begin make_brd 1024
	# what the first ones leave in caches
	each 50 'cowctl create' test-cow base=/dev/ram0
	each 50 'cowctl remove' test-cow
	wait_until 10 memory_is_back
	free=$(settled)
	each $count 'cowctl create' test-cow base=/dev/ram0
	create=$REPLY
	figure 'idle kernel memory of an overlay in KiB' \
		"$(divide $((free - $(settled))) $count)" 64
	each $count 'cowctl remove' test-cow
	printf '# ms of cowctl create + remove: %s\n' "$(sum "$create" "$REPLY")" >&5
	# what device-mapper alone takes for a device
	wait_until 10 memory_is_back
	free=$(settled)
	each $count 'dmsetup create' test-cow --table '0 2048 linear /dev/ram0 0'
	printf '# idle kernel memory of a dm-linear device in KiB: %s\n' \
		"$(divide $((free - $(settled))) $count)" >&5
	each $count 'dmsetup remove' test-cow
	each $count 'dmsetup create' test-cow --table '0 2048 nbdcow /dev/ram0'
	floor=$REPLY
	each $count 'dmsetup remove' test-cow
	printf '# ms of dmsetup create + remove: %s\n' "$(sum "$floor" "$REPLY")" >&5
	printf '# ms of which two processes alone take: %s\n' "$(sum "$REPLY" "$REPLY")" >&5
	by_ioctl 16 30 'nbdcow /dev/ram0'
	figure 'ms of a creation + removal by ioctl, 16 at once' "$REPLY" 20
	by_ioctl 16 30 'linear /dev/ram0 0'
	printf '# the same for dm-linear: %s\n' "$REPLY" >&5
	# most of it is device-mapper waiting for grace periods
	by_ioctl 1 100 'nbdcow /dev/ram0'
	figure 'ms of a creation + removal by ioctl, one by one' "$REPLY" 20
	by_ioctl 1 100 'linear /dev/ram0 0'
	printf '# the same for dm-linear: %s\n' "$REPLY" >&5
	judge
}

# by_ioctl AT_ONCE COUNT TARGET: so many devices of it, by each of so many at once; leaves
# the milliseconds that one takes
by_ioctl()
{
	local count=$2 i maker start pairs pids=()

	start=$(now_us)
	for ((maker = 0; maker < $1; maker++)); do
		pairs=()
		for ((i = 0; i < count; i++)); do
			pairs+=("create test-cow$maker 2048 $3" "remove test-cow$maker")
		done
		io /dev/ram0 "${pairs[@]}" &
		pids+=($!)
	done
	for i in "${pids[@]}"; do
		wait "$i"
	done
	REPLY=$(divide $(($(now_us) - start)) $(($1 * count * 1000)))
}

# settled: KiB that are available when the kernel has freed what it frees later
settled()
{
	sync
	echo 3 >/proc/sys/vm/drop_caches
	sleep 2
	meminfo MemAvailable
}

# 64 clients at once, who come and go as they like; each finds the base and what it
# wrote itself, and nothing else.
clients()
{
	local socket=$run_dir/test-cow.sock nbdkit before rss served missed=()

	need nbdkit nbdsh
	begin make_brd 4096
	cowctl serve test-cow base=/dev/ram0 per-client=true cow-on-read=true &
	served=$!
	undo stop_nbdkit $served
	wait_until 30 test -S "$socket"
	nbdkit=$(pgrep -x nbdkit)
	load "$socket" 3
	wait_until 30 no_overlays
	before=$(find "/proc/$nbdkit/fd" | wc -l)
	rss=$(awk '/^VmRSS/ { print $2 }' "/proc/$nbdkit/status")
	load "$socket" "${BENCH_SECONDS:-20}"
	wait_until 30 no_overlays
	figure 'blocks that were not what they should be' "$(<"$work/foreign")" 0
	figure 'descriptors that nbdkit has kept' \
		$(($(find "/proc/$nbdkit/fd" | wc -l) - before)) 0
	# it keeps up to 8 MiB of buffers
	figure 'KiB that nbdkit has grown by' \
		$(($(awk '/^VmRSS/ { print $2 }' "/proc/$nbdkit/status") - rss)) 9216
	kill $served
	wait $served
	nothing_left
	judge
}

no_overlays()
{
	! dmsetup ls | grep -q '^test-cow-[0-9]*-[1-9]'
}

# load SOCKET SECONDS: leaves the number of foreign blocks in $work/foreign
load()
{
	undo rm -f "$work/foreign"
	nbdsh -c '
import random, sys, threading, time
socket, seconds, result = "'"$1"'", '"$2"', "'"$work/foreign"'"
base = open("/dev/ram0", "rb").read(1 << 20)
end = time.monotonic() + seconds
lock, foreign, connections, failed = threading.Lock(), 0, 0, []
at_once = threading.Barrier(64)

def blocks(got, want):
    return sum(got[i:i + 4096] != want[i:i + 4096] for i in range(0, len(want), 4096))

def visit(rng):
    h = nbd.NBD()
    h.connect_unix(socket)
    want, wrong = bytearray(base), 0
    for i in range(rng.randrange(1, 12)):
        offset, count = rng.randrange(240) * 4096, rng.randrange(1, 17) * 4096
        if rng.randrange(2):
            want[offset:offset + count] = rng.randbytes(4096) * (count // 4096)
            h.pwrite(bytes(want[offset:offset + count]), offset)
        wrong += blocks(h.pread(count, offset), want[offset:offset + count])
    wrong += blocks(h.pread(1 << 20, 0), want[:1 << 20])
    if rng.randrange(2):
        h.shutdown()
    return wrong

def client(number):
    global foreign, connections
    rng = random.Random(number)
    try:
        at_once.wait()
        while time.monotonic() < end:
            wrong = visit(rng)
            with lock:
                foreign += wrong
                connections += 1
    except Exception as e:
        failed.append(e)

threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(connections, "connections")
assert not failed, failed[0]
open(result, "w").write(str(foreign))'
}

run_tests \
	shared '100 overlays read one base once' \
	speed 'hits and misses' \
	behind_nbd 'misses of a base behind NBD' \
	many '500 overlays on one base' \
	clients '64 clients that come and go'
