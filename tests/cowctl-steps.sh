#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a command of cowctl that fails, is interrupted or killed in the
# middle leaves something behind, or something that its next run stumbles over.

. "$(dirname "$0")/common.sh"

run_dir=/run/cowctl
COW=/dev/mapper/test-cow

# The system calls that change something, or wait for another program ...
calls=(ioctl mkdir rename unlink clone poll wait4)
# ... but for those that only ask.
questions='DM_VERSION|DM_LIST_VERSIONS|DM_LIST_DEVICES|DM_DEV_STATUS|DM_TABLE_STATUS'
questions+='|BLKGETSIZE64|TCGETS|EEXIST'

# list_steps COMMAND...: runs it and leaves its steps in $steps, as CALL=NUMBER.
list_steps()
{
	strace -qq -o "$work/trace" -e "trace=$(IFS=,; echo "${calls[*]}")" "$@"
	mapfile -t steps < <(awk -F '(' -v questions="$questions" '/^[a-z0-9]+\(/ {
		count[$1]++
		if ($0 !~ questions)
			print $1 "=" count[$1]
	}' "$work/trace")
	echo "${#steps[@]} steps of $*: ${steps[*]}"
	between 'the number of steps' ${#steps[@]} 4 100
}

# at STEP WHAT COMMAND...: runs it, and at that step WHAT happens, in strace's words.
# Leaves the status in $rc; 0 may also mean that it had no such step this time.
at()
{
	local call=${1%=*} n=${1#*=} what=$2

	shift 2
	rc=0
	strace -qq -o "$work/trace" -e "trace=$call" -e "inject=$call:$what:when=$n" "$@" \
		>"$work/output" 2>&1 || rc=$?
	echo "$call $n of $2 $3: status $rc"
}

connections()
{
	cat /sys/block/nbd*/pid 2>/dev/null | wc -l
}

nothing_left()
{
	fails dmsetup info test-cow
	is 'the loop devices left' "$(losetup -a | grep "($work" || :)" ''
	is 'the number of connections left' "$(connections)" 0
	not_exported
}

not_exported()
{
	is 'the files left' "$(find $run_dir -name 'test*')" ''
	is 'the servers left' "$(pgrep -af "$run_dir/test" || :)" ''
}

exists()
{
	cowctl status test-cow >/dev/null 2>&1
}

sweep()
{
	cowctl unexport test-cow
	cowctl remove test-cow
	return 0
}

# What bases hold.
make_image_content()
{
	local loop

	loop=$(losetup -f --show "$work/disk.img")
	io "$loop" 'write 0 end .'
	losetup -d "$loop"
}

# $image and $uri: bases that take a step before the copy is made
make_bases()
{
	need cowctl strace nbdkit nbd-client
	need_module nbd
	make_file disk.img 1M
	make_image_content
	image=base=$work/disk.img
	undo rm -f "$work/socket"
	start_nbdkit "$work/socket" file "$work/disk.img"
	uri="base=nbd+unix:///?socket=$work/socket"
	undo sweep
}

# After a kill the same command works, and then there is nothing but its result.
killed_create()
{
	local base step rc

	make_bases
	for base in "$image" "$uri"; do
		list_steps cowctl create test-cow "$base"
		cowctl remove test-cow
		for step in "${steps[@]}"; do
			at "$step" signal=SIGKILL cowctl create test-cow "$base"
			[ "$rc" = 137 ] || [ "$rc" = 0 ]
			exists || cowctl create test-cow "$base"
			cowctl remove test-cow
			nothing_left
		done
	done
}

# A signal to stop: either all is done or nothing.
stopped_create()
{
	local step rc

	make_bases
	list_steps cowctl create test-cow "$uri"
	cowctl remove test-cow
	for step in "${steps[@]}"; do
		at "$step" signal=SIGTERM cowctl create test-cow "$uri"
		case $rc in
		0)	cowctl remove test-cow ;;
		143)	;;
		*)	fail "exit status $rc: $(<"$work/output")" ;;
		esac
		nothing_left
	done
}

# A system call that fails: again all or nothing, and one sentence if it is nothing.
failed_create()
{
	local base step rc
	local -a calls=(ioctl mkdir rename clone)

	make_bases
	for base in "$image" "$uri"; do
		list_steps cowctl create test-cow "$base"
		cowctl remove test-cow
		for step in "${steps[@]}"; do
			at "$step" error=EIO cowctl create test-cow "$base"
			if [ "$rc" = 0 ]; then
				cowctl remove test-cow
			else
				is 'the number of sentences' "$(grep -c ^cowctl: "$work/output")" 1
			fi
			nothing_left
		done
	done
}

# What was written is there, and one base, well connected.
is_whole()
{
	io $COW 'check 0 4k A' 'check 4k 1020k .'
	is 'what is left beside the base' \
		$(($(connections) + $(losetup -a | grep -c "($work" || :))) 1
}

# A rebase that is killed can be given again. One that fails or is told to stop leaves
# all as it was.
# changed_copy WHAT FROM TO
changed_copy()
{
	local step rc

	need jq
	cowctl create test-cow "$2" holes=false
	io $COW 'write 0 4k A'
	list_steps cowctl rebase test-cow "$3" holes=false
	cowctl rebase test-cow "$2" holes=false
	for step in "${steps[@]}"; do
		at "$step" "$1" cowctl rebase test-cow "$3" holes=false
		if [ "$rc" != 0 ] && [ "$1" != signal=SIGKILL ]; then
			is "base after '$(<"$work/output")'" "base=$(base)" "$2"
			is_whole
		fi
		cowctl rebase test-cow "$3" holes=false
		is base "base=$(base)" "$3"
		is_whole
		cowctl rebase test-cow "$2" holes=false
	done
	cowctl remove test-cow
	nothing_left
}

base()
{
	cowctl status test-cow --json | jq -r .base
}

killed_rebase()
{
	make_bases
	changed_copy signal=SIGKILL "$uri" "${uri/:\/\/\//:///other}"
}

failed_rebase()
{
	local -a calls=(ioctl mkdir rename clone)

	make_bases
	changed_copy error=EIO "$uri" "$image"
}

stopped_rebase()
{
	make_bases
	changed_copy signal=SIGTERM "$image" "$uri"
}

killed_remove()
{
	local step rc again

	make_bases
	cowctl create test-cow "$uri"
	list_steps cowctl remove test-cow
	for step in "${steps[@]}"; do
		cowctl create test-cow "$uri"
		at "$step" signal=SIGKILL cowctl remove test-cow
		again=0
		cowctl remove test-cow || again=$?
		[ $again = 0 ] || [ $again = 3 ]
		nothing_left
	done
}

# After a kill the next create takes away what is left of the connection as well.
create_after_killed_remove()
{
	make_bases
	cowctl create test-cow "$uri"
	dmsetup remove --retry test-cow
	is 'the number of connections' "$(connections)" 1
	cowctl create test-cow "$image"
	is 'the number of connections' "$(connections)" 0
	cowctl remove test-cow
	nothing_left
}

killed_export()
{
	local step rc again

	make_bases
	need nbdinfo
	cowctl create test-cow "$image"
	list_steps cowctl export test-cow
	cowctl unexport test-cow
	for step in "${steps[@]}"; do
		at "$step" signal=SIGKILL cowctl export test-cow
		again=0
		cowctl export test-cow || again=$?
		[ $again = 0 ] || [ $again = 4 ]
		is 'the number of servers' "$(pgrep -fc "$run_dir/test-cow.pid")" 1
		nbdinfo --size "nbd+unix:///?socket=$run_dir/test-cow.sock"
		cowctl unexport test-cow
		not_exported
	done
}

killed_unexport()
{
	local step rc again

	make_bases
	cowctl create test-cow "$image"
	cowctl export test-cow
	list_steps cowctl unexport test-cow
	for step in "${steps[@]}"; do
		cowctl export test-cow
		at "$step" signal=SIGKILL cowctl unexport test-cow
		again=0
		cowctl unexport test-cow || again=$?
		[ $again = 0 ] || [ $again = 3 ]
		not_exported
	done
}

run_tests \
	killed_create 'create, killed at each step and given again' \
	stopped_create 'create, told to stop at each step' \
	failed_create 'create, with a failure at each step' \
	killed_rebase 'rebase, killed at each step and given again' \
	stopped_rebase 'rebase, told to stop at each step' \
	failed_rebase 'rebase, with a failure at each step' \
	killed_remove 'remove, killed at each step and given again' \
	create_after_killed_remove 'create after a remove that was not finished' \
	killed_export 'export, killed at each step and given again' \
	killed_unexport 'unexport, killed at each step and given again'
