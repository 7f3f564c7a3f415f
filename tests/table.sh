#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, tools cannot load tables that the documentation allows, or a
# mistyped table is taken for something else, or costs memory for ever.

. "$(dirname "$0")/common.sh"

fixture()
{
	make_brd 1024
	dev=$REPLY
	number=$(stat -c '%Hr:%Lr' "$dev")
}

# accepts TABLE PRINTED: both without start, length and target
accepts()
{
	local line

	make_dm test-cow "0 2048 nbdcow $1"
	line=$(dmsetup table test-cow)
	is 'the table' "$line" "0 2048 nbdcow $2"
	io /dev/mapper/test-cow 'write 4k 4k A'
	dmsetup load test-cow --table "$line"
	dmsetup resume test-cow
	is 'the table after loading it again' "$(dmsetup table test-cow)" "$line"
	io /dev/mapper/test-cow 'check 0 4k .' 'check 4k 4k A' 'check 8k 4k .'
	dmsetup remove --retry test-cow
	unset 'undo_list[-1]'
}

accepts_the_grammar()
{
	make_tmpfs tmpfs

	accepts "$dev" "$number 0"
	accepts "$number" "$number 0"
	accepts "$dev 0" "$number 0"
	accepts "$dev 2 limit 100" "$number 2 limit 100"
	accepts "$dev 2 LIMIT 100" "$number 2 limit 100"
	accepts "$dev 2 tmpfs $work/tmpfs" "$number 2 tmpfs $work/tmpfs"
	accepts "$dev 4 limit 1 tmpfs $work/tmpfs" "$number 4 limit 1 tmpfs $work/tmpfs"
	accepts "$dev 4 tmpfs $work/tmpfs limit 9223372036854775807" \
		"$number 4 limit 9223372036854775807 tmpfs $work/tmpfs"
}

# rejects MESSAGE TABLE
rejects()
{
	expected+=("$1")
	tables+=("$2")
	echo "<6>tests: rejects" >/dev/kmsg
	fails dmsetup create test-cow --table "0 2048 nbdcow$2"
}

# Whether the kernel gave all the reasons that rejects() expects.
check_reasons()
{
	local -a said
	local i

	# what others say in between is none of it
	mapfile -t said < <(kernel_log | grep -e 'tests: rejects' -e 'nbdcow: ' |
		sed -n '/tests: rejects/{n;p}')
	is 'the number of reasons' "${#said[@]}" "${#expected[@]}"
	for i in "${!expected[@]}"; do
		[[ ${said[i]} == *"nbdcow: ${expected[i]}"* ]] ||
			fail "'${tables[i]}': the kernel said ${said[i]}, not '${expected[i]}'"
	done
	fails dmsetup info test-cow
}

rejects_the_rest()
{
	local -a expected=() tables=()
	local count='Invalid number of feature arguments' unknown='Unknown feature argument'
	local cache='cache_limit takes a number of 4 KiB blocks'
	local limit='limit takes a number of 4 KiB blocks' tmpfs='tmpfs takes the absolute path'

	rejects 'No base device given' ''
	rejects 'Cannot open the base device' ' /dev/no-such-device'
	rejects 'Cannot open the base device' " $work"
	rejects "$count" " $dev x"
	rejects "$count" " $dev -1"
	rejects "$count" " $dev 1"
	rejects "$count" " $dev 3 limit 4"
	rejects "$count" " $dev 10 limit 1 limit 1 limit 1 limit 1 limit 1"
	rejects 'More arguments than' " $dev 0 limit 4"
	rejects 'More arguments than' " $dev 2 limit 4 limit 4"
	rejects "$unknown" " $dev 1 blue"
	rejects "$unknown" " $dev 2 limits 4"
	rejects "$limit" " $dev 1 limit"
	rejects "$limit" " $dev 2 limit 0"
	rejects "$limit" " $dev 2 limit -4"
	rejects "$limit" " $dev 2 limit +4"
	rejects "$limit" " $dev 2 limit 4k"
	rejects "$limit" " $dev 2 limit 0x10"
	rejects "$limit" " $dev 2 limit none"
	rejects "$limit" " $dev 2 limit 9223372036854775808"
	rejects "$limit" " $dev 2 limit 99999999999999999999"
	rejects "$limit" " $dev 4 limit 4 limit 5"
	rejects "$cache" " $dev 1 cache_limit"
	rejects "$cache" " $dev 2 cache_limit 0"
	rejects "$cache" " $dev 4 cache_limit 4 cache_limit 4"
	rejects "$unknown" " $dev 2 cow_on_read on"
	rejects "$tmpfs" " $dev 1 tmpfs"
	rejects "$tmpfs" " $dev 2 tmpfs tmp"
	rejects "$tmpfs" " $dev 4 tmpfs $work tmpfs $work"
	rejects 'tmpfs: no such directory' " $dev 2 tmpfs $work/none"
	rejects 'tmpfs: the directory is not on a tmpfs' " $dev 2 tmpfs /proc"
	check_reasons
}

# A base that somebody may write to through a file system or as swap.
rejects_a_busy_base()
{
	local -a expected=() tables=()
	local loop

	make_file swap 1M
	make_loop "$REPLY"
	loop=$REPLY
	mkswap "$loop"
	swapon "$loop"
	undo swapoff "$loop"
	rejects 'The base device is in use' " $loop"
	check_reasons
}

rejects_itself()
{
	make_cow test-cow 2048 "$dev"
	mark_log itself
	fails dmsetup load test-cow --table '0 2048 nbdcow /dev/mapper/test-cow'
	kernel_log | grep -F 'nbdcow: A device cannot be its own base'
}

# A rejected table leaves the live one, its data and its memory as they were.
rejected_reload()
{
	local before

	make_cow test-cow 2048 "$dev" 2 limit 100
	io /dev/mapper/test-cow 'write 4k 512 A' 'discard 8k 4k'
	before=$(dmsetup table test-cow; dmsetup status test-cow)
	fails dmsetup load test-cow --table "0 2048 nbdcow $dev 2 limit 0"
	fails dmsetup load test-cow --table "0 2048 nbdcow $dev 2 tmpfs $work"
	fails dmsetup load test-cow --table "0 2048 nbdcow /dev/none"
	is 'table and status' "$(dmsetup table test-cow; dmsetup status test-cow)" "$before"
	io /dev/mapper/test-cow 'is 0 ........A.......00000000........'
}

# What libdevmapper and the kernel would split at or drop is written as %XX.
tmpfs_with_odd_names()
{
	local dir=$'a b\\c%20\n\xc3\xbc' name=a%20b%5Cc%2520%0A%C3%BC line

	make_tmpfs "$dir"
	make_cow test-cow 2048 "$dev" 2 tmpfs "$work/${name,,}"
	line="0 2048 nbdcow $number 2 tmpfs $work/$name"
	is 'the table' "$(dmsetup table test-cow)" "$line"
	io /dev/mapper/test-cow 'write 0 64k A'
	is 'the KiB used in the tmpfs' "$(df --output=used "$work/$dir" | tail -n 1 | tr -d ' ')" 64
	dmsetup load test-cow --table "$line"
	dmsetup resume test-cow
	io /dev/mapper/test-cow 'check 0 64k A' 'check 64k 64k .'
	fails dmsetup load test-cow --table "0 2048 nbdcow $number 0"
	kernel_log | grep -F 'tmpfs cannot change'
}

# Whose lookup waits: that is the business of this device alone.
tmpfs_on_a_file_system_that_hangs()
{
	local disk pid

	need mkfs.ext4
	need_module ext4
	make_file disk 4194304
	make_loop "$REPLY"
	disk=$REPLY
	mkfs.ext4 -q -O ^has_journal "$disk"
	make_dm test-under "0 8192 linear $disk 0"
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount -t ext4 /dev/mapper/test-under "$work/mnt"
	undo wait_until 10 umount "$work/mnt"
	undo wait_until 10 dmsetup remove test-cow2
	echo 3 >/proc/sys/vm/drop_caches
	dmsetup suspend --nolockfs test-under
	undo dmsetup resume test-under
	dmsetup create test-cow --table "0 2048 nbdcow $dev 2 tmpfs $work/mnt/none" &
	pid=$!
	wait_until 10 asleep $pid
	dmsetup create test-cow2 --table "0 2048 nbdcow $dev" &
	wait_until 10 test ! -d /proc/$!
	wait $!
	dmsetup resume test-under
	fails wait $pid
}

# asleep PID: it waits for a device
asleep()
{
	grep -q '^State:.D' "/proc/$1/status"
}

# Else another line of the table could open the base for writing.
alone_in_a_table()
{
	local -a expected=() tables=()

	fails dmsetup create test-cow --table "0 1024 nbdcow $dev
1024 16 zero"
	fails dmsetup create test-cow --table "0 1024 nbdcow $dev
1024 1024 nbdcow $dev"
	is 'the number of reasons' "$(kernel_log | grep -c 'must appear alone in table')" 2
	check_reasons
}

# 100 tables of each kind, twice.
rejected_tables_cost_nothing()
{
	local printk=/proc/sys/kernel/printk slab available inodes kind
	local -a commands=()

	make_cow test-cow 2048 "$dev"
	make_dm test-zero '0 2048 zero'
	commands=("reject 100 test-cow 2048 nbdcow $dev 2 tmpfs /dev/shm")
	for kind in "$dev x" "$dev 2 limit 0" "$dev 2 tmpfs /proc" "$dev 2 blue 4"; do
		commands+=("reject 100 test-zero 2048 nbdcow $kind")
	done
	# no need to have it all on the console
	undo eval "echo '$(<$printk)' >$printk"
	echo 1 >$printk
	# the first time may fill caches
	io /dev/mapper/test-cow "${commands[@]}"
	slab=$(meminfo SUnreclaim)
	available=$(meminfo MemAvailable)
	inodes=$(tmpfs_inodes)
	io /dev/mapper/test-cow "${commands[@]}"
	# KASAN keeps what was freed; on such kernels kmemleak tells
	[ ! -e /sys/kernel/debug/kmemleak ] || return 0
	wait_until 5 grown_at_most "$slab" "$available" "$inodes"
}

# grown_at_most SLAB AVAILABLE INODES: since there was so much; some is freed a little later
grown_at_most()
{
	(
		between 'kernel memory' "$(meminfo SUnreclaim)" 0 $(($1 + 300))
		between 'available memory' "$(meminfo MemAvailable)" $(($2 - 2000)) $(($2 * 2))
		between 'files on tmpfs' "$(tmpfs_inodes)" 0 $(($3 + 50))
	)
}

# 0 if the kernel does not tell
tmpfs_inodes()
{
	local slab=/sys/kernel/slab/shmem_inode_cache n=0

	if [ -e $slab/objects ]; then
		echo 1 >$slab/shrink
		read -r n _ <$slab/objects
	fi
	echo "$n"
}

module_stays_while_used()
{
	local player i

	# a table that nobody has taken over yet is a use
	dmsetup create test-cow --notable
	undo dmsetup remove --retry test-cow
	dmsetup load test-cow --table "0 4096 nbdcow $dev"
	fails rmmod dm-nbdcow
	dmsetup resume test-cow
	dmsetup suspend test-cow
	fails rmmod dm-nbdcow
	dmsetup resume test-cow
	io /dev/mapper/test-cow "model $(blockdev --getsize64 "$dev")" 'random 1 1000' verify &
	player=$!
	for ((i = 0; i < 20; i++)); do
		fails rmmod dm-nbdcow
	done
	wait $player
	is 'the number of words of a status' "$(dmsetup status test-cow | wc -w)" 19
}

# Right after the last device, of which parts are still being freed.
module_goes()
{
	local i

	[ "$refcnt_before" = 0 ] || skip 'others use the module'
	for i in 1 2 3 4 5; do
		make_cow test-cow 262144 "$dev"
		io /dev/mapper/test-cow 'write 0 1M A' 'write 9s 1s B' 'write 70M 64k A' \
			'discard 0 64M'
		dmsetup remove --retry test-cow
		unset 'undo_list[-1]'
		rmmod dm-nbdcow
		modprobe dm-nbdcow
	done
}

read_only_device()
{
	make_dm test-cow "0 2048 nbdcow $dev" --readonly
	fails dd if=/dev/zero of=/dev/mapper/test-cow bs=4096 count=1 oflag=direct conv=notrunc
	io /dev/mapper/test-cow 'check 0 end .'
	status_is test-cow used=0
}

run_tests \
	accepts_the_grammar 'accepts what the grammar allows, and the line it prints' \
	rejects_the_rest 'rejects anything else, and says what was expected' \
	rejects_a_busy_base 'rejects a base that somebody may write to' \
	rejects_itself 'rejects a device as its own base' \
	rejected_reload 'a rejected reload changes nothing' \
	tmpfs_with_odd_names 'a tmpfs whose path has blanks and backslashes' \
	tmpfs_on_a_file_system_that_hangs 'a tmpfs on a file system that hangs' \
	alone_in_a_table 'rejects a table with other lines' \
	rejected_tables_cost_nothing 'rejected tables leak nothing' \
	module_stays_while_used 'the module cannot go while a device uses it' \
	module_goes 'the module can go when no device is left' \
	read_only_device 'a read-only device'
