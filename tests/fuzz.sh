#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, some mixture of operations that nobody thought of loses data.
#
# FUZZ_SECONDS tells how long to look (default 60), FUZZ_SEED which run to
# repeat.

. "$(dirname "$0")/common.sh"

# The bases end within a block, shortly after a leaf of the map does: 64.25 MiB
# and three sectors. One is slow in half of what is used most, so that reads of
# it overlap with what follows.
fixture()
{
	local sectors=$((131072 + 512 + 3))

	need fuzz
	make_brd 66560
	need_module dm-delay
	make_dm test-fast "0 $sectors linear /dev/ram0 0"
	make_dm test-slow "0 1024 delay /dev/ram0 0 1
1024 130304 linear /dev/ram0 1024
131328 $((sectors - 131328)) delay /dev/ram0 131328 1"
	undo remove_rest
	seconds=${FUZZ_SECONDS:-60}
	bases=(/dev/mapper/test-fast /dev/mapper/test-slow)
}

# What a failing run leaves behind.
remove_rest()
{
	if dmsetup info nbdcow-fuzz >/dev/null 2>&1; then
		dmsetup remove --force --retry nbdcow-fuzz
	fi
}

# play SECONDS OPTION...
play()
{
	local -a seed=()

	[ -z "${FUZZ_SEED:-}" ] || seed=(--seed "$FUZZ_SEED")
	fuzz --seconds "$1" "${seed[@]}" "${@:2}" "${bases[@]}"
}

one_thread()
{
	play $((seconds / 4)) --threads 1
}

threads()
{
	play $((seconds * 3 / 4)) --threads 4
}

run_tests \
	one_thread 'one thread, whose reads are certain' \
	threads 'four threads on the same blocks'
