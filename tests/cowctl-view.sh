#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, cowctl shows something else than what was changed.

. "$(dirname "$0")/cowctl-common.sh"

# ranges NAME: "start+length:state" for each
ranges()
{
	cowctl changes "$1" --json | jq -r '.ranges[] | "\(.start)+\(.length):\(.state)"' | xargs
}

all_states()
{
	begin make_brd 1024
	cowctl create test-cow base="$REPLY" size=2M
	is 'the changes of a fresh copy' "$(cowctl changes test-cow --json | jq -c .ranges)" '[]'
	# beside each other, at both ends, and past the end of the base
	io /dev/mapper/test-cow 'write 0 4k A' 'write 64k 8k B' 'discard 72k 4k' 'discard 0 4k' \
		'write 1020k 8k C' 'discard 1500k 4k' 'write 2044k 4k D'
	is 'the changes' "$(ranges test-cow)" '0+4096:zeroed 65536+8192:written 73728+4096:zeroed 1044480+8192:written 2093056+4096:written'
	is 'the sums' "$(cowctl changes test-cow --json | jq -c '[.written, .zeroed, .partitions]')" \
		'[20480,8192,[]]'
	cowctl changes test-cow | grep -E '^ +65536 +8192 +8\.0 KiB +written +-$'
	cowctl changes test-cow | grep -x '20.0 KiB written, 8.0 KiB zeroed'
	says 3 'there is no device test-cno' cowctl changes test-cno
}

# scatter STEP: writes every STEPth of the 16384 blocks of test-cow
scatter()
{
	python3 -c '
with open("/dev/mapper/test-cow", "r+b", buffering=0) as f:
    for block in range(0, 16384, '"$1"'):
        f.seek(block * 4096)
        f.write(b"A" * 4096)'
	sync /dev/mapper/test-cow
}

# More ranges than one answer of the kernel has room for.
many_ranges()
{
	need python3
	begin make_brd 1024
	cowctl create test-cow base="$REPLY" size=64M
	scatter 2
	cowctl changes test-cow --json >"$work/changes"
	undo rm "$work/changes"
	is 'the number of ranges' "$(jq '.ranges | length' "$work/changes")" 8192
	is 'those that are wrong' "$(jq -c '[.ranges | to_entries[] | select(.value.start !=
		.key * 8192 or .value.length != 4096 or .value.state != "written")]' "$work/changes")" '[]'
}

# A device that goes away between two answers of the kernel leaves no half of a report.
whole_or_nothing()
{
	local calls

	need strace python3
	begin make_brd 64
	cowctl create test-cow base="$REPLY" size=64M
	scatter 4
	strace -qq -o "$work/trace" -e trace=ioctl cowctl changes test-cow --json >"$work/changes"
	undo rm -f "$work"/{changes,trace}
	jq -e '.ranges | length == 4096' "$work/changes"
	calls=$(grep -c DM_TARGET_MSG "$work/trace")
	between 'the number of answers' "$calls" 2 1000
	calls=$(grep -n DM_TARGET_MSG "$work/trace" | tail -n 1)
	says 1 'cannot get the map of test-cow: No such device or address' strace -qq -o "$work/trace" \
		-e trace=ioctl -e "inject=ioctl:error=ENXIO:when=${calls%%:*}" \
		cowctl changes test-cow --json
}

# Each range is told of the partition it lies in, and is cut at its end.
partitions()
{
	need sfdisk
	begin make_brd 4096
	cowctl create test-cow base="$REPLY"
	printf '2048,2048\n4096,\n' | sfdisk -q --no-reread --no-tell-kernel -X dos /dev/mapper/test-cow
	io /dev/mapper/test-cow 'write 2040k 16k A'
	is 'the partitions' "$(cowctl changes test-cow --json |
		jq -c '[.ranges[] | [.start, .length, .partition]]')" \
		'[[0,4096,null],[2088960,8192,1],[2097152,8192,2]]'
	is 'the sums' "$(cowctl changes test-cow --json |
		jq -c '[.partitions[] | [.number, .start, .length, .changed]]')" \
		'[[1,1048576,1048576,8192],[2,2097152,2097152,8192]]'
	cowctl changes test-cow | grep -x '  partition 2   8.0 KiB'
}

drawing()
{
	local rows sysctl=/proc/sys/fs/protected_symlinks

	need python3
	begin make_brd 4096
	cowctl create test-cow base="$REPLY"
	# a character is a block
	io /dev/mapper/test-cow 'write 8k 4k A' 'discard 252k 8k'
	mapfile -t rows < <(cowctl map test-cow)
	is 'the first line' "${rows[0]}" \
		'test-cow: 4.0 MiB, of which 4.0 KiB are written and 8.0 KiB zeroed; a character is 4.0 KiB'
	is 'the first row' "${rows[1]}" "..#$(printf '.%.0s' {1..60})0"
	is 'the second row' "${rows[2]}" "0$(printf '.%.0s' {1..63})"
	is 'the number of lines' "${#rows[@]}" 18

	undo rm -f "$work/map.svg"
	cowctl map test-cow output="$work/map.svg"
	is 'the squares' "$(grep -c '<rect x=' "$work/map.svg")" 24
	python3 -c 'import sys, xml.dom.minidom; xml.dom.minidom.parse(sys.argv[1])' "$work/map.svg"
	says 1 'cannot write' cowctl map test-cow output="$work/none/map.svg"
	cowctl map test-cow output=/dev/null
	test -c /dev/null
	says 1 'cannot write' cowctl map test-cow output=/dev/full
	test -c /dev/full
	says 2 'no JSON' cowctl map test-cow --json

	# what others have left in its directory is not written to
	mkdir "$work/svg"
	undo rm -rf "$work/svg"
	echo precious >"$work/svg/other"
	ln -s other "$work/svg/map.svg.cowctl-part"
	(umask 027 && cowctl map test-cow output="$work/svg/map.svg")
	is 'the file of the link' "$(<"$work/svg/other")" precious
	is 'its mode' "$(stat -c '%F %a' "$work/svg/map.svg")" 'regular file 640'
	is 'what is there' "$(ls "$work/svg")" "$(printf '%s\n' map.svg other)"
	undo eval "echo $(<$sysctl) >$sysctl"
	echo 1 >$sysctl
	chmod 1777 "$work/svg"
	ln -s other "$work/svg/link.svg"
	chown -h nobody "$work/svg/link.svg"
	cowctl map test-cow output="$work/svg/link.svg"
	is 'the file of the link' "$(<"$work/svg/other")" precious
	grep -c '<rect x=' "$work/svg/link.svg" | grep -x 24
	cowctl map test-cow output=/dev/stdout | grep -c '<rect x=' | grep -x 24
	# a file without a name
	exec 7<>"$work/svg/other"
	rm "$work/svg/other"
	cowctl map test-cow output=/proc/self/fd/7
	grep -c '<rect x=' "/proc/$BASHPID/fd/7" | grep -x 24
	exec 7>&-
}

prometheus()
{
	begin make_brd 1024
	cowctl create 'test-c"1' base="$REPLY" limit=64K
	cowctl create test-c2 base="$REPLY"
	io /dev/mapper/test-c2 'write 0 8k A'
	cowctl status --prometheus >"$work/metrics"
	undo rm -f "$work/metrics"
	grep -Fx "nbdcow_used_bytes{name=\"test-c2\",base=\"$REPLY\"} 8192" "$work/metrics"
	grep -Fx "nbdcow_limit_bytes{name=\"test-c2\",base=\"$REPLY\"} +Inf" "$work/metrics"
	grep -Fx "nbdcow_limit_bytes{name=\"test-c\\\"1\",base=\"$REPLY\"} 65536" "$work/metrics"
	grep -Fx 'nbdcow_health{name="test-c2",state="ok"} 1' "$work/metrics"
	grep -Fx '# TYPE nbdcow_writes_refused_total counter' "$work/metrics"
	fails grep -vE '^(# (HELP|TYPE) nbdcow_[a-z_]+ .+|nbdcow_[a-z_]+\{.*\} ([0-9]+|\+Inf))$' "$work/metrics"
	is 'of one device' "$(cowctl status test-c2 --prometheus | grep -c '^nbdcow_size_bytes')" 1
	says 2 'belongs to status' cowctl list --prometheus
	says 2 'exclude each other' cowctl status --prometheus --json
	cowctl remove 'test-c"1'
}

run_tests \
	all_states 'changes in all states' \
	many_ranges 'many changes' \
	whole_or_nothing 'a report of changes is whole' \
	partitions 'changes by partition' \
	drawing 'a map' \
	prometheus 'metrics'
