#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, somebody else pays for the memory of an overlay, or a service
# whose memory is used up by its overlay is killed instead of told.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
CGROUPS=/sys/fs/cgroup
MIB=$((1 << 20))
MAX=$((24 * MIB))

# test-a, which makes devices, and test-b, which writes to them
fixture()
{
	local name

	grep -qw memory $CGROUPS/cgroup.controllers || return 0
	echo +memory >$CGROUPS/cgroup.subtree_control
	for name in test-a test-b; do
		mkdir $CGROUPS/$name
		undo rmdir $CGROUPS/$name
	done
	echo 0 >$CGROUPS/test-a/memory.swap.max
	make_file base 16G
	make_loop "$REPLY"
	base=$REPLY
	guard "$base" 'write 0 4M .' 'write 1G 2M .' 'write 2G 2M .'
}

# make_cow_in CGROUP SECTORS BASE: the cgroup's limit is on from then on, and
# somebody lives in it
make_cow_in()
{
	[ -e $CGROUPS/test-a ] || skip 'needs the memory controller of cgroup v2'
	echo max >$CGROUPS/test-a/memory.max
	sleep 1000 &
	bystander=$!
	undo end_bystander
	echo $bystander >"$CGROUPS/$1/cgroup.procs"
	killed="$(event test-a oom_kill) $(event test-b oom_kill)"
	within_cgroup "$CGROUPS/$1" dmsetup create test-cow --table "0 $2 nbdcow $3"
	undo dmsetup remove --retry test-cow
	echo $MAX >$CGROUPS/test-a/memory.max
}

end_bystander()
{
	kill "$bystander"
	wait_until 10 empty
}

empty()
{
	! grep -q . $CGROUPS/test-a/cgroup.procs
}

# event CGROUP NAME: how often it happened
event()
{
	sed -n "s/^$2 //p" "$CGROUPS/$1/memory.events"
}

# shmem_within CGROUP LEAST MOST: in KiB
shmem_within()
{
	local bytes

	bytes=$(sed -n 's/^shmem //p' "$CGROUPS/$1/memory.stat")
	[ "$bytes" -ge $(($2 * 1024)) ] && [ "$bytes" -le $(($3 * 1024)) ]
}

nobody_was_killed()
{
	is 'the number of killed processes' \
		"$(event test-a oom_kill) $(event test-b oom_kill)" "$killed"
	kill -0 "$bystander" || fail 'the bystander was killed'
}

# Whole blocks, blocks that the base is read for, and the page cache's.
charged_to_the_creator()
{
	local -a partial=()
	local i

	make_cow_in test-a 33554432 "$base"
	for ((i = 0; i < 256; i++)); do
		partial+=("write $((i * 8 + 1))s 1s A")
	done
	within_cgroup $CGROUPS/test-b io $COW 'write 4M 8M A' "${partial[@]}" 'write 9G 1M B'
	within_cgroup $CGROUPS/test-b io -b $COW 'write 12M 2M B' 'flush' 'drop'
	status_is test-cow used=$((2048 + 256 + 256 + 512))
	# the kernel's numbers are a few seconds old
	wait_until 10 shmem_within test-a 12000 12800
	wait_until 10 shmem_within test-b 0 128
	# and when it is taken back
	within_cgroup $CGROUPS/test-b io $COW 'discard 0 8G'
	wait_until 10 shmem_within test-a 768 1280
	nobody_was_killed
}

# fill: the creator's memory is used up when this returns
fill()
{
	make_cow_in test-a "$1" "$2"
	within_cgroup $CGROUPS/test-b io $COW 'write 4M 12M A'
	is 'refused' "$(field test-cow refused)" 0
	# in small requests, since each block of one waits for memory
	fails within_cgroup $CGROUPS/test-b \
		dd if=/dev/zero of=$COW bs=8k seek=2048 count=4096 oflag=direct
	between 'memory of test-a' "$(<$CGROUPS/test-a/memory.current)" $((MAX - MIB / 2)) $MAX
	[ "$(field test-cow refused)" -gt 0 ] || fail 'nothing was refused'
	between 'used blocks' "$(field test-cow used)" 3072 6143
	nobody_was_killed
}

full()
{
	local -a clear=() check=()
	local i used

	fill 33554432 "$base"
	used=$(field test-cow used)
	within_cgroup $CGROUPS/test-b io $COW 'fails ENOMEM write 8G 4k C' \
		'fails ENOMEM write 513s 1s C' 'check 8G 8k 0' 'check 0 4M .' \
		'check 4M 12M A' 'write 4M 1M C' 'write 5M 512 C' \
		'check 4M 1M C' 'is 5M CAAAAAAA' 'check 6M 10M A'
	status_is test-cow health=full used="$used"
	nobody_was_killed

	# each in a range of 64 MiB of its own, where nothing is known yet: more
	# of them than the kernel has charged in advance
	for ((i = 0; i < 256; i++)); do
		clear+=("discard $((4096 + i * 32 + 1))M 1M")
	done
	check=('check 1G 2M .' 'discard 1025M 512k' 'zeroout 2G 1M' 'check 1G 1M .'
		'check 1025M 512k 0' 'check 1050112k 512k .' 'check 2G 1M 0' 'check 2049M 1M .')
	within_cgroup $CGROUPS/test-b io $COW "${clear[@]}" "${check[@]}"
	status_is test-cow used="$used" zeroed=$((256 * 256 + 128 + 256))
	nobody_was_killed

	# it heals
	within_cgroup $CGROUPS/test-b io $COW 'discard 4M 2M' 'write 8G 1M C' 'check 8G 1M C' \
		'check 6M 10M A'
	status_is test-cow health=ok
	echo $((2 * MAX)) >$CGROUPS/test-a/memory.max
	within_cgroup $CGROUPS/test-b io $COW 'write 10G 12M C' 'check 10G 12M C' 'check 6M 10M A'
	nobody_was_killed
}

# Making room for what comes after a reset must not take what is not there;
# the map of 16 TiB is the largest part of that.
reset_when_full()
{
	[ -e $CGROUPS/test-a ] || skip 'needs the memory controller of cgroup v2'
	make_dm test-zero "0 $((1 << 35)) zero"
	fill $((1 << 35)) /dev/mapper/test-zero
	dmsetup message test-cow 0 reset || :
	nobody_was_killed
	within_cgroup $CGROUPS/test-b io $COW 'discard 0 end'
	dmsetup message test-cow 0 reset
	status_is test-cow used=0 zeroed=0 health=ok
	within_cgroup $CGROUPS/test-b io $COW 'write 4M 12M A' 'check 4M 12M A'
	nobody_was_killed
}

less_than()
{
	[ "$(<$CGROUPS/test-a/memory.current)" -lt "$1" ]
}

# Whoever takes the device away: the creator gets everything back.
removal()
{
	local before

	[ -e $CGROUPS/test-a ] || skip 'needs the memory controller of cgroup v2'
	# what the device before had comes back a moment after it is gone
	wait_until 10 less_than $MIB
	before=$(<$CGROUPS/test-a/memory.current)
	make_cow_in test-a 33554432 "$base"
	within_cgroup $CGROUPS/test-b io $COW 'write 4M 16M A' 'discard 1G 1M' 'write 3G 4k A'
	[ "$(<$CGROUPS/test-a/memory.current)" -ge $((before + 16 * MIB)) ] ||
		fail 'the memory was not charged'
	dmsetup remove --retry test-cow
	unset 'undo_list[-1]'
	wait_until 10 less_than $((before + MIB))
	nobody_was_killed
}

run_tests \
	charged_to_the_creator 'the creator of a device is charged, not the writer' \
	full 'no memory left: errors, but nobody is killed; discards work' \
	reset_when_full 'no memory left: a reset' \
	removal 'removing the device gives all back'
