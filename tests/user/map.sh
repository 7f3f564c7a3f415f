#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Blocks would be read from the wrong place, or memory be lost: kernel/map.c, as
# it is, under the sanitizers of the compilers.
#
# SEED=N repeats a run; FUZZ_SECONDS (default 5) is for libFuzzer, which needs
# the packages clang and libclang-rt-dev.

# shellcheck source=tests/user/tap.sh
. "$(dirname "$0")/tap.sh"

CC=${CC:-gcc}
seed=${SEED:-$RANDOM$RANDOM}
flags=(-std=gnu11 -g -O2 -Wall -Wextra -Wshadow -Werror -pthread -I"$out/include" -I"$here")
# shellcheck disable=SC2054 # the comma is the compiler's
asan=(-fsanitize=address,undefined -fno-sanitize-recover=all)
sources=(kernel/map.c tests/fuzz_map.c tests/user/kernel-shim.c)

# The shim stands for each kernel header.
make_headers()
{
	local header

	mkdir -p "$out/include/linux"
	sed -n 's/^#include <linux\/\(.*\)>$/\1/p' kernel/map.[ch] | sort -u |
		while read -r header; do
			# libc includes some of the same name for its own ends
			cat >"$out/include/linux/$header" <<-END
				#include "kernel-shim.h"
				#if __has_include_next(<linux/$header>)
				#include_next <linux/$header>
				#endif
			END
		done
}

# Some kernels place things where the thread sanitizer does not expect them.
fixed_addresses()
{
	if setarch -R true 2>/dev/null; then
		setarch -R "$@"
	else
		"$@"
	fi
}

# run_map_test PROGRAM WHICH COMPILER-OPTION...: its results become ours
run_map_test()
{
	local program=$out/$1 which=$2 rc line failed=$tap_failed

	shift 2
	"$CC" "${flags[@]}" "$@" -o "$program" "${sources[@]}" tests/map_test.c \
		>"$program.log" 2>&1
	rc=$?
	[ $rc = 0 ] || { result $rc "${program##*/}: build" "$program.log"; return; }

	fixed_addresses "$program" "$which" "$seed" >"$program.log" 2>&1
	rc=$?
	while read -r line; do
		case $line in
		'ok '*)		result 0 "${program##*/}: ${line#ok * }" ;;
		'not ok '*)	result 1 "${program##*/}: ${line#not ok * }" ;;
		esac
	done <"$program.log"
	[ $rc = 0 ] || [ "$tap_failed" != "$failed" ] ||
		result $rc "${program##*/}: exit status $rc"
	[ $rc = 0 ] || log "$program.log"
}

# The test itself is tested: without the release the sanitizer must complain. The
# threads have to meet for that, which they may not do with the first seed.
check_release_is_needed()
{
	local program=$out/no-release i rc=1

	if "$CC" "${flags[@]}" -fsanitize=thread -DSHIM_RELEASE=__ATOMIC_RELAXED -o "$program" \
		"${sources[@]}" tests/map_test.c >"$program.log" 2>&1; then
		for ((i = 0; i < 20 && rc; i++)); do
			fixed_addresses "$program" threads $((seed + i)) >"$program.log" 2>&1 ||
				! grep -q '^SUMMARY.*map_test.c.*reader' "$program.log" || rc=0
		done
	fi
	(exit $rc)
	result $? 'a publish without release is noticed' "$program.log"
}

fuzz()
{
	local title="${FUZZ_SECONDS:-5} seconds of libFuzzer" program=$out/fuzz_map

	if ! echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
		clang -fsanitize=fuzzer -x c -o "$program" - 2>"$program.log"; then
		skipped "$title" 'needs clang and libclang-rt-dev'
		return
	fi
	# only the map is looked at for coverage
	clang "${flags[@]}" "${asan[@]}" -fsanitize=fuzzer-no-link -c -o "$out/map.o" \
		kernel/map.c 2>"$program.log" &&
		clang "${flags[@]}" "${asan[@]}" -c -o "$out/fuzz_map.o" tests/fuzz_map.c \
			2>"$program.log" &&
		clang "${flags[@]}" "${asan[@]}" -fsanitize=fuzzer -o "$program" "$out/map.o" \
			"$out/fuzz_map.o" tests/user/kernel-shim.c 2>"$program.log" &&
		mkdir -p "$out/corpus" &&
		"$program" -seed="$seed" -max_total_time="${FUZZ_SECONDS:-5}" -len_control=0 \
			-max_len=800 -artifact_prefix="$out/" "$out/corpus" >"$program.log" 2>&1
	result $? "$title" "$program.log"
	sed -n 's/^Done /# /p' "$program.log"
}

echo "# SEED=$seed"
make_headers
run_map_test map single "${asan[@]}"
run_map_test threads threads -fsanitize=thread
check_release_is_needed
fuzz
finish
