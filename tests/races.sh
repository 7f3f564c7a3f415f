#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, two programs that write to neighbouring sectors at the same
# time lose each other's data, or a discard or reset brings old data back.
#
# The base is held still while a write of one sector waits for it, so each
# order of events is certain.

. "$(dirname "$0")/common.sh"

COW=/dev/mapper/test-cow
RELEASE='resume test-gate'
RESET='message test-cow reset'

fixture()
{
	make_brd 2048
	make_gate /dev/ram0
	make_cow test-cow 4096 /dev/mapper/test-gate
	undo dmsetup resume test-gate
}

# The gate is closed, a write of sector 1 waits, COMMAND... What has not waited
# for the base must be there at once, and afterwards.
race()
{
	undo io $COW "$RELEASE" "$RESET" 'message test-cow limit none'
	io $COW "${CLOSE_GATE[@]}" 'submit write 1s 1s A' 'held test-gate 1' 'pending 1' "$@"
}

whole_write()
{
	race 'write 0 4k B' 'is 0 BBBBBBBB' 'pending 1' "$RELEASE" reap 'is 0 BABBBBBB' \
		'check 4k end .' \
		'status test-cow used=1'
}

partial_write()
{
	race 'submit write 3s 2s B' "inflight $COW 2" "$RELEASE" reap 'is 0 .A.BB...' \
		'check 4k end .' \
		'status test-cow used=1'
}

overlapping_partial_writes()
{
	race 'submit write 0s 3s B' 'submit write 2s 3s C' "inflight $COW 3" "$RELEASE" reap \
		'is 0 B??CC...' \
		'status test-cow used=1'
}

discard()
{
	race 'discard 0 4k' 'is 0 00000000' 'pending 1' "$RELEASE" reap 'is 0 0A000000' \
		'status test-cow used=1 zeroed=0'
}

zeroing()
{
	race 'zeroout 0 8k' 'is 0 0000000000000000' 'pending 1' "$RELEASE" reap \
		'is 0 0A00000000000000' \
		'status test-cow used=1 zeroed=1'
}

discard_and_partial_write()
{
	race 'discard 0 4k' 'write 5s 1s B' 'is 0 00000B00' 'pending 1' "$RELEASE" reap \
		'is 0 0A000B00' \
		'status test-cow used=1 zeroed=0'
}

whole_write_and_discard()
{
	race 'write 0 4k B' 'discard 0 4k' 'is 0 00000000' 'pending 1' "$RELEASE" reap \
		'is 0 0A000000' \
		'status test-cow used=1 zeroed=0'
}

discard_and_whole_write()
{
	race 'discard 0 4k' 'write 0 4k B' 'is 0 BBBBBBBB' 'pending 1' "$RELEASE" reap \
		'is 0 BABBBBBB' \
		'status test-cow used=1 zeroed=0'
}

# The waiting write was there before the reset, and ends after it.
reset()
{
	race "$RESET" 'pending 1' "$RELEASE" reap 'is 0 .A......' \
		'status test-cow used=1'
}

whole_write_and_reset()
{
	race 'write 0 4k B' 'write 4k 4k B' "$RESET" 'pending 1' \
		"$RELEASE" reap 'is 0 .A......' 'check 4k end .' \
		'status test-cow used=1'
}

discard_and_reset()
{
	race 'discard 0 8k' "$RESET" 'pending 1' \
		"$RELEASE" reap 'is 0 .A......' 'check 4k end .' \
		'status test-cow used=1 zeroed=0'
}

# A discard, a reset and a whole write later the block is somebody else's.
reset_and_whole_write()
{
	race "$RESET" 'write 0 4k B' 'pending 1' \
		"$RELEASE" reap 'is 0 BABBBBBB' \
		'status test-cow used=1'
}

# Suspending waits for the write, and later writes wait for the resume.
suspend()
{
	race 'bg suspend test-cow' 'asleep dm_wait' 'pending 2' "$RELEASE" reap join \
		'bg write 8k 4k B' 'pending 1' 'resume test-cow' join \
		'is 0 .A......' 'check 8k 4k B' \
		'status test-cow used=2'
}

new_table()
{
	race 'load test-cow 4096 nbdcow /dev/mapper/test-under 2 limit 1' 'bg resume test-cow' \
		'asleep dm_wait' 'pending 2' "$RELEASE" reap join 'is 0 .A......' \
		'fails ENOSPC write 8k 4k B' 'status test-cow used=1 limit=1' \
		'load test-cow 4096 nbdcow /dev/mapper/test-gate' 'resume test-cow'
}

last_block_taken()
{
	undo io $COW "$RELEASE" "$RESET" 'message test-cow limit none'
	io $COW "${CLOSE_GATE[@]}" 'message test-cow limit 1' 'fails ENOSPC submit write 1s 1s A' \
		'held test-gate 1' 'write 4k 4k B' 'pending 1' "$RELEASE" reap \
		'is 0 ........' 'check 4k 4k B' 'status test-cow used=1 health=full'
}

MEND=('load test-under 4096 linear /dev/ram0 0' 'resume test-under')

base_error()
{
	undo io $COW "$RELEASE" "$RESET" "${MEND[@]}"
	io $COW "${CLOSE_GATE[@]}" 'load test-under 4096 error' 'fails EIO submit write 1s 1s A' \
		'held test-gate 1' 'resume test-under' "$RELEASE" reap \
		'status test-cow used=0 health=base-error' "${MEND[@]}" \
		'check 0 end .' 'status test-cow used=0 health=ok'
}

# The write that waits fails, the one that did not need the base stays.
whole_write_and_base_error()
{
	undo io $COW "$RELEASE" "$RESET" "${MEND[@]}"
	io $COW "${CLOSE_GATE[@]}" 'load test-under 4096 error' 'fails EIO submit write 1s 1s A' \
		'held test-gate 1' 'write 0 4k B' 'resume test-under' "$RELEASE" reap \
		'is 0 BBBBBBBB' 'status test-cow used=1' "${MEND[@]}" 'check 4k end .'
}

# More than the kernel wants to have in flight at once; none may be forgotten.
many()
{
	local -a writes=() checks=()
	local i

	for ((i = 1; i < 300; i++)); do
		writes+=("submit write $((8 * i + 1))s 1s A")
		checks+=("is $((8 * i))s .A......")
	done
	race "${writes[@]}" 'held test-gate 256' 'pending 300' "$RELEASE" reap \
		'is 0 .A......' "${checks[@]}" 'status test-cow used=300'
}

# across TAGS COMMAND...: a read of blocks of which the second is stored is one read of
# the base. While that waits, the commands are done; then it must have found the tags.
across()
{
	undo io $COW "$RELEASE" "$RESET"
	io $COW 'write 4k 4k A' "${CLOSE_GATE[@]}" "bg is 0 $1" 'held test-gate 1' "${@:2}" \
		'pending 1' "$RELEASE" join
}

read_and_rewrite()
{
	across '........BBBBBBBB........' 'write 4k 4k B'
}

read_and_install()
{
	across 'BBBBBBBBAAAAAAAA........' 'write 0 4k B'
}

read_and_discard()
{
	across '........0000000000000000' 'discard 4k 8k'
}

read_and_reset()
{
	across '........................' "$RESET"
}

read_and_reset_and_install()
{
	across '................BBBBBBBB' "$RESET" 'write 8k 4k B'
}

# Where too much would be read in vain, there is a read for each.
far_apart()
{
	undo io $COW "$RELEASE" "$RESET"
	io $COW 'write 4k 20k A' 'write 32k 8k A' "${CLOSE_GATE[@]}" \
		'bg check 0 28k ?' 'held test-gate 2' "$RELEASE" join \
		"${CLOSE_GATE[@]}" 'bg check 28k 16k ?' 'held test-gate 2' "$RELEASE" join \
		'check 0 4k .' 'check 4k 20k A' 'check 24k 8k .' 'check 32k 8k A' 'check 40k 4k .'
}

# A base that does not answer is no reason for anything else to wait.
everything_else_goes_on()
{
	race 'write 64k 64k B' 'bg check 0 4k ?' 'held test-gate 2' 'submit write 9s 1s A' \
		'held test-gate 3' 'write 64k 3k C' 'is 64k CCCCCCBB' 'check 68k 60k B' \
		'write 128k 4k D' 'discard 68k 4k' 'check 68k 4k 0' 'check 128k 4k D' flush \
		'message test-cow limit 100' 'pending 3' "$RELEASE" reap join \
		'is 0 .A......' 'is 8s .A......' 'status test-cow used=18 limit=100'
}

run_tests \
	whole_write 'a whole block is written meanwhile' \
	partial_write 'other sectors of the block are written meanwhile' \
	overlapping_partial_writes 'overlapping sectors are written meanwhile' \
	discard 'the block is discarded meanwhile' \
	zeroing 'the block is zeroed meanwhile' \
	discard_and_partial_write 'the block is discarded and written in part meanwhile' \
	whole_write_and_discard 'the block is written and discarded meanwhile' \
	discard_and_whole_write 'the block is discarded and written meanwhile' \
	reset 'the overlay is reset meanwhile' \
	whole_write_and_reset 'the block is written and the overlay reset meanwhile' \
	discard_and_reset 'the block is discarded and the overlay reset meanwhile' \
	reset_and_whole_write 'the overlay is reset and the block written meanwhile' \
	suspend 'the device is suspended meanwhile' \
	new_table 'the device gets a new table meanwhile' \
	last_block_taken 'the overlay becomes full meanwhile' \
	base_error 'the base fails' \
	whole_write_and_base_error 'the block is written and the base fails' \
	read_and_rewrite 'a block is rewritten while a read across it waits for the base' \
	read_and_install 'a block of the base is written while a read of it waits' \
	read_and_discard 'blocks are discarded while a read across them waits' \
	read_and_reset 'the overlay is reset while a read across it waits' \
	read_and_reset_and_install 'the overlay is reset and written to while a read waits' \
	far_apart 'a read across many stored blocks does not read the base in vain' \
	many 'more partial writes than the kernel has descriptors for' \
	everything_else_goes_on 'a base that does not answer holds up nothing else'
