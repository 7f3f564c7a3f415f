#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, a command of cowctl that fails, is interrupted or killed in the
# middle, or meets another one, leaves something behind, or something that its next
# run stumbles over.

. "$(dirname "$0")/cowctl-common.sh"

COW=/dev/mapper/test-cow

# The system calls that change something, or wait for another program ...
calls=(ioctl mkdir openat mknodat rename unlink clone poll wait4 pidfd_send_signal)
# ... but for those that only ask, or change nothing any more.
questions='DM_VERSION|DM_LIST_VERSIONS|DM_LIST_DEVICES|DM_DEV_STATUS|DM_TABLE_STATUS'
questions+='|BLKGETSIZE64|TCGETS|EEXIST|ENOENT|ESRCH|O_RDONLY|O_RDWR[)]|O_RDWR[|]O_CLOEXEC[)]'

# strace takes its time in an emulated machine. STEPS_OFFSET=N repeats a run.
every=${EVERY_STEP:-6}
offset=${STEPS_OFFSET:-$((RANDOM % every))}

# list_steps COMMAND...: runs it and leaves its steps in $steps, as CALL=NUMBER.
list_steps()
{
	local i first

	strace -qq -o "$work/trace" -e "trace=$(IFS=,; echo "${calls[*]}")" "$@"
	mapfile -t steps < <(awk -F '(' -v questions="$questions" '/^[a-z0-9_]+\(/ {
		count[$1]++
		if ($0 !~ questions)
			print $1 "=" count[$1]
	}' "$work/trace")
	echo "${#steps[@]} steps of $*, with STEPS_OFFSET=$offset: ${steps[*]}"
	between 'the number of steps' ${#steps[@]} 1 100
	# at least one, however few there are
	first=$((offset % ${#steps[@]}))
	for i in "${!steps[@]}"; do
		[ $(((i - first) % every)) = 0 ] || unset "steps[i]"
	done
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
	echo "$call $n of $2 $3: status $rc: $(<"$work/output")"
}

# disturb WHAT BEFORE AFTER COMMAND...: the command, once with nothing and once with
# WHAT happening at each of its steps; these functions prepare it and look at the end.
disturb()
{
	local what=$1 before=$2 after=$3 step rc=0 killed=0 sure=0

	shift 3
	$before
	list_steps "$@"
	$after "$@"
	for step in "${steps[@]}"; do
		$before
		at "$step" "$what" "$@"
		[ "$rc" != 137 ] || killed=$((killed + 1))
		# how often it waits, and what it looks at, may differ
		[[ $step = @(poll|wait4|openat)=* ]] || sure=1
		$after "$@"
	done
	[ "$what" != signal=SIGKILL ] || between 'how often it was killed' $killed $sure 100
}

# after_kill STATUS COMMAND...: it was killed, if it had that step; it works when given
# again, or has nothing to do any more and says so with that status.
after_kill()
{
	local status=$1 again=0

	shift
	[ "$rc" = 137 ] || [ "$rc" = 0 ] || fail "its status was $rc"
	"$@" || again=$?
	[ $again = 0 ] || [ $again = "$status" ] || fail "given again its status was $again"
}

# all_or_nothing STATUS: it ended by itself, or with that status and one sentence.
all_or_nothing()
{
	[ "$rc" != 0 ] || return 0
	is 'the status' "$rc" "$1"
	[ "$rc" = 143 ] || is 'the number of sentences' "$(grep -c ^cowctl: "$work/output")" 1
}

#
# What there is; asked of the kernel without a program for each question, for they take
# most of the time in an emulated machine.
#

exists()
{
	[ -e /dev/mapper/test-cow ]
}

# servers: how many serve copies of ours, in $REPLY
servers()
{
	local file args

	REPLY=0
	for file in /proc/[0-9]*/cmdline; do
		mapfile -d '' -t args 2>/dev/null <"$file" || continue
		[[ ${args[0]:-} = *nbd* && ${args[*]} = *"$run_dir/test"* ]] || continue
		REPLY=$((REPLY + 1))
	done 2>/dev/null
}

not_exported()
{
	! compgen -G "$run_dir/test*" || fail 'files are left'
	servers
	is 'the number of servers' $REPLY 0
}

nothing_left()
{
	local file text

	for file in /sys/block/*/dm/name /sys/block/loop*/loop/backing_file; do
		[ -e "$file" ] || continue
		read -r text <"$file"
		case $text in
		test-cow* | "$work"/*.img) fail "left: $file" ;;
		esac
	done
	! compgen -G '/sys/block/nbd*/pid' || fail 'a connection is left'
	! exists || fail 'a node is left'
	not_exported
}

sweep()
{
	cowctl unexport test-cow
	cowctl remove test-cow
	return 0
}

# $device, $image, $uri and $tcp: bases, of which all but the first take steps before
# the copy is made
make_bases()
{
	need cowctl strace nbdkit nbd-client
	need_module nbd
	make_brd 1024
	device=base=$REPLY
	make_image 1M
	image=base=$REPLY
	undo rm -f "$work"/{socket,socket.pid,tcp.pid}
	start_nbdkit "$work/socket" -r file "$work/disk.img"
	uri="base=nbd+unix:///?socket=$work/socket"
	run_nbdkit "$work/tcp.pid" -i 127.0.0.1 -p 10999 -r file "$work/disk.img"
	tcp=base=nbd://127.0.0.1:10999
	undo sweep
}

# make_bases, and a copy
make_copy()
{
	make_bases
	cowctl create test-cow "$device"
}

#
# Create and remove
#

after_killed_create()
{
	after_kill 4 "$@"
	test -b /dev/mapper/test-cow
	cowctl remove test-cow
	nothing_left
}

killed_create()
{
	local base

	make_bases
	for base in "$device" "$image" "$uri"; do
		disturb signal=SIGKILL : after_killed_create cowctl create test-cow "$base"
	done
}

# The program that connects runs at some time, while cowctl waits for it.
killed_with_nbd_client()
{
	local rc=0

	make_bases
	mkdir "$work/bin"
	undo rm -r "$work/bin"
	# shellcheck disable=SC2016 # it is the script's
	printf '#!/bin/bash\nkill -9 $PPID\n' >"$work/bin/nbd-client"
	chmod +x "$work/bin/nbd-client"
	PATH=$work/bin:$PATH cowctl create test-cow "$uri" || rc=$?
	is 'the status' $rc 137
	after_killed_create cowctl create test-cow "$uri"

	# shellcheck disable=SC2016 # it is the script's
	printf '#!/bin/bash\nkill -9 $$\n' >"$work/bin/nbd-client"
	rc=0
	PATH=$work/bin:$PATH cowctl create test-cow "$uri" 2>"$work/output" || rc=$?
	all_or_nothing 1
	grep 'cannot connect to .*: it was killed by signal 9' "$work/output"
	nothing_left
}

after_stopped_create()
{
	all_or_nothing 143
	[ "$rc" != 0 ] || cowctl remove test-cow
	nothing_left
}

stopped_create()
{
	make_bases
	disturb signal=SIGTERM : after_stopped_create cowctl create test-cow "$tcp"
}

after_failed_create()
{
	all_or_nothing 1
	[ "$rc" != 0 ] || cowctl remove test-cow
	nothing_left
}

failed_create()
{
	local base rc=0
	local -a calls=(ioctl mkdir openat rename clone)

	make_bases
	for base in "$image" "$uri"; do
		disturb error=EIO : after_failed_create cowctl create test-cow "$base"
	done
	# The record of a connection is written by the process that becomes nbd-client.
	strace -f -qq -o "$work/trace" -e trace=rename -e inject=rename:error=ENOSPC \
		cowctl create test-cow "$uri" >"$work/output" 2>&1 || rc=$?
	after_failed_create
	grep "cannot write $run_dir/test-cow.nbd: No space" "$work/output"
}

create_over_nbd()
{
	cowctl create test-cow "$uri"
}

after_killed_remove()
{
	after_kill 3 "$@"
	nothing_left
}

connections()
{
	cat /sys/block/nbd*/pid 2>/dev/null | wc -l
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
			is "base after '$(<"$work/output")'" "base=$(member base test-cow)" "$2"
			is_whole
		fi
		cowctl rebase test-cow "$3" holes=false
		is base "base=$(member base test-cow)" "$3"
		is_whole
		cowctl rebase test-cow "$2" holes=false
	done
	cowctl remove test-cow
	nothing_left
}

killed_rebase()
{
	make_bases
	changed_copy signal=SIGKILL "$uri" "${uri/:\/\/\//:///other}"
	changed_copy signal=SIGKILL "$image" "$tcp"
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
	make_bases
	disturb signal=SIGKILL create_over_nbd after_killed_remove cowctl remove test-cow
}

after_failed_remove()
{
	all_or_nothing 1
	if exists || compgen -G '/sys/block/nbd*/pid'; then
		cowctl remove test-cow
	fi
	nothing_left
}

failed_remove()
{
	local -a calls=(ioctl clone)

	make_bases
	disturb error=EIO create_over_nbd after_failed_remove cowctl remove test-cow
}

# After a kill the next create takes away what is left of the connection as well.
create_after_killed_remove()
{
	make_bases
	cowctl create test-cow "$uri"
	dmsetup remove --retry test-cow
	compgen -G '/sys/block/nbd*/pid'
	cowctl create test-cow "$image"
	! compgen -G '/sys/block/nbd*/pid' || fail 'the connection is left'
	cowctl remove test-cow
	nothing_left
}

#
# Partitions
#

# make_disk: an image with a partition; $disk is the base
make_disk()
{
	need cowctl strace kpartx sfdisk
	make_file parted.img 4M
	echo 'start=2048,size=2048' | sfdisk -q "$REPLY"
	guard_sparse "$REPLY"
	disk=base=$REPLY
	undo sweep
}

# A copy whose partition was not made yet when create was killed is there already.
after_killed_partitions()
{
	after_kill 4 "$@"
	cowctl set test-cow partitions=true
	test -b /dev/mapper/test-cowp1
	cowctl remove test-cow
	nothing_left
}

copy_of_disk()
{
	exists || cowctl create test-cow "$disk"
}

after_killed_set_partitions()
{
	after_kill 0 "$@"
	test -b /dev/mapper/test-cowp1
	cowctl set test-cow partitions=false
	test ! -e /dev/mapper/test-cowp1
}

with_partitions()
{
	copy_of_disk
	cowctl set test-cow partitions=true
}

after_killed_unset_partitions()
{
	after_kill 0 "$@"
	test ! -e /dev/mapper/test-cowp1
}

served_copy()
{
	cowctl create test-cow "$disk" partitions=true cow-on-read="$work/switch"
}

killed_partitions()
{
	make_disk
	disturb signal=SIGKILL : after_killed_partitions \
		cowctl create test-cow "$disk" partitions=true
	disturb signal=SIGKILL copy_of_disk after_killed_set_partitions \
		cowctl set test-cow partitions=true
	disturb signal=SIGKILL with_partitions after_killed_unset_partitions \
		cowctl set test-cow partitions=false
	cowctl remove test-cow
	disturb signal=SIGKILL served_copy after_killed_remove cowctl remove test-cow
}

#
# Set and reset
#

after_killed_set()
{
	after_kill 0 "$@"
	status_is test-cow limit=256
	cowctl set test-cow limit=none
}

write_to_it()
{
	io /dev/mapper/test-cow 'write 4k 64k A'
}

after_killed_reset()
{
	after_kill 0 "$@"
	io /dev/mapper/test-cow 'check 0 end .'
	status_is test-cow used=0
}

killed_change()
{
	make_copy
	disturb signal=SIGKILL : after_killed_set cowctl set test-cow limit=1M
	disturb signal=SIGKILL write_to_it after_killed_reset cowctl reset test-cow
}

new_copy()
{
	! exists || cowctl remove test-cow
	cowctl create test-cow "$device"
}

after_killed_growth()
{
	after_kill 0 "$@"
	io $COW 'size 2M'
}

after_killed_watch()
{
	after_kill 0 "$@"
	is 'cow-on-read' "$(member cow_on_read test-cow)" "$work/switch"
	cowctl set test-cow cow-on-read=false
	not_exported
}

after_killed_prefetch()
{
	after_kill 4 "$@"
	cowctl prefetch test-cow stop
	cowctl set test-cow cache=drop
}

slow_prefetch()
{
	cowctl prefetch test-cow rate=4K wait=false >/dev/null
}

after_killed_stop()
{
	after_kill 0 "$@"
	is 'the prefetch' "$(member prefetch.state test-cow)" stopped
	cowctl set test-cow cache=drop
}

copy_over_nbd()
{
	exists || create_over_nbd
}

after_killed_queue()
{
	after_kill 0 "$@"
	is 'it connects anew' "$(member reconnects test-cow)" true
	cowctl set test-cow on-base-error=error
	is 'it connects anew' "$(member reconnects test-cow)" false
}

killed_reconnects()
{
	need jq
	make_bases
	disturb signal=SIGKILL copy_over_nbd after_killed_queue \
		cowctl set test-cow on-base-error=queue
	cowctl remove test-cow
	disturb signal=SIGKILL : after_killed_create \
		cowctl create test-cow "$uri" on-base-error=queue
}

killed_services()
{
	need jq
	make_copy
	disturb signal=SIGKILL slow_prefetch after_killed_stop cowctl prefetch test-cow stop
	disturb signal=SIGKILL : after_killed_watch \
		cowctl set test-cow "cow-on-read=$work/switch"
	disturb signal=SIGKILL : after_killed_prefetch cowctl prefetch test-cow
	disturb signal=SIGKILL new_copy after_killed_growth cowctl set test-cow size=2M
}

#
# Diff, load and commit
#

is_suspended()
{
	[ "$(dmsetup info -c --noheadings -o suspended test-cow)" = Suspended ]
}

# Whatever was there when it was killed, the same command makes the whole file.
after_killed_diff()
{
	[ "$rc" = 137 ] || [ "$rc" = 0 ] || fail "its status was $rc"
	rm -f "$work/diff.qcow2"
	"$@"
	! is_suspended || fail 'it is suspended'
	! dmsetup ls | grep ^cowctl-view || fail 'a view is left'
	# shellcheck disable=SC2010 # these are the test's
	is 'the files' "$(ls -A "$work" | grep diff)" diff.qcow2
	qemu-img check -q "$work/diff.qcow2"
	rm "$work/diff.qcow2"
}

reset_it()
{
	cowctl reset test-cow
}

after_killed_map()
{
	after_kill 0 "$@"
	# shellcheck disable=SC2010 # these are the test's
	is 'the files' "$(ls -A "$work" | grep map)" map.svg
	[ "$(tail -n 1 "$work/map.svg")" = '</svg>' ]
	rm "$work/map.svg"
}

# Some of the changes may be there.
after_killed_load()
{
	[ "$rc" = 137 ] || [ "$rc" = 0 ] || fail "its status was $rc"
	cowctl reset test-cow
	"$@"
	io $COW 'check 4k 64k A' 'check 68k 956k .'
}

after_killed_commit()
{
	after_kill 0 "$@"
	cmp $COW "$work/target"
}

killed_copies()
{
	local -a calls=(ioctl openat rename renameat2 unlink clone)

	need qemu-img qemu-nbd
	make_copy
	write_to_it
	undo rm -f "$work"/{diff,saved}.qcow2 "$work/.diff.qcow2.cowctl-part" "$work/target"
	undo rm -f "$work"/{,.}map.svg*
	disturb signal=SIGKILL : after_killed_map cowctl map test-cow output="$work/map.svg"
	disturb signal=SIGKILL : after_killed_diff cowctl diff test-cow "$work/diff.qcow2"
	cp "${device#base=}" "$work/target"
	disturb signal=SIGKILL : after_killed_commit cowctl commit test-cow to="$work/target"
	cowctl diff test-cow "$work/saved.qcow2"
	disturb signal=SIGKILL reset_it after_killed_load \
		cowctl load test-cow "$work/saved.qcow2"
}

#
# Exports
#

after_killed_export()
{
	after_kill 4 "$@"
	servers
	is 'the number of servers' $REPLY 1
	is 'the address' "$(cowctl --json status test-cow | jq -r .export.uri)" \
		"nbd+unix:///?socket=$run_dir/test-cow.sock"
	test -S "$run_dir/test-cow.sock"
	cowctl unexport test-cow
	not_exported
}

killed_export()
{
	need jq nbdinfo
	make_copy
	disturb signal=SIGKILL : after_killed_export cowctl export test-cow
}

# nbd-server takes a long time to answer, and to end; only its own step is looked at.
killed_export_by_nbd_server()
{
	local -a calls=(rename)

	need jq nbd-server
	make_copy
	disturb signal=SIGKILL : after_killed_export cowctl export test-cow server=nbd-server
}

after_failed_export()
{
	all_or_nothing 1
	if [ "$rc" = 0 ]; then
		cowctl unexport test-cow
	fi
	not_exported
}

failed_export()
{
	local -a calls=(ioctl openat rename clone)

	make_copy
	disturb error=EIO : after_failed_export cowctl export test-cow
}

after_stopped_export()
{
	all_or_nothing 143
	if [ "$rc" = 0 ]; then
		cowctl unexport test-cow
	fi
	not_exported
}

stopped_export()
{
	make_copy
	disturb signal=SIGTERM : after_stopped_export cowctl export test-cow port=10998
}

export_it()
{
	cowctl export test-cow
}

after_killed_unexport()
{
	after_kill 3 "$@"
	not_exported
}

killed_unexport()
{
	make_copy
	disturb signal=SIGKILL export_it after_killed_unexport cowctl unexport test-cow
}

#
# Serve
#

# It ends well, also after one that was killed, and then all is gone.
after_killed_serve()
{
	after_kill 0 "$@"
	nothing_left
}

# Until it listens, which it says; then it is told to end, and does that at its leisure. It
# is the shell that becomes cowctl, for that is what strace looks at.
killed_serve()
{
	local serve

	# shellcheck disable=SC2016 # it is the inner shell's
	serve='rm -f "$1"
		while sleep 0.1 && kill -0 $$; do [ ! -s "$1" ] || kill $$; done 2>/dev/null &
		exec cowctl serve test-cow "$2" per-client=true holes=false >"$1"'
	make_bases
	undo rm -f "$work/address"
	disturb signal=SIGKILL : after_killed_serve sh -c "$serve" - "$work/address" "$uri"
}

#
# Two at once
#

waits_for_lock()
{
	grep -q -e '-> OFDLCK' /proc/locks
}

# meet 'COMMAND' CALL=NUMBER STATUS 'COMMAND' STATUS [PATTERN]: in the midst of the first,
# after that system call, comes the second; what it says must match.
meet()
{
	local -a first second
	local tracer pid one=0 two=0 call=${2%=*}

	read -ra first <<<"$1"
	read -ra second <<<"$4"
	strace -qq -o "$work/trace" -e "trace=$call" \
		-e "inject=$call:signal=SIGSTOP:when=${2#*=}" \
		cowctl "${first[@]}" >"$work/first" 2>&1 &
	tracer=$!
	wait_until 60 grep -qs 'stopped by SIGSTOP' "$work/trace"
	pid=$(pgrep -P $tracer)
	undo_list+=("kill -CONT $pid 2>/dev/null || :")
	cowctl "${second[@]}" >"$work/second" 2>&1 &
	second=("$!")
	wait_until 60 waits_for_lock
	# who only looks need not wait
	cowctl list
	kill -CONT "$pid"
	unset 'undo_list[-1]'
	wait "$tracer" || one=$?
	wait "${second[0]}" || two=$?
	rm "$work/trace"
	echo "$1: status $one: $(<"$work/first")"
	echo "$4: status $two: $(<"$work/second")"
	is "the status of '$1'" $one "$3"
	is "the status of '$4' in the midst of '$1'" $two "$5"
	[ "$two" = 0 ] || is 'the number of sentences' "$(grep -c ^cowctl: "$work/second")" 1
	grep "${6:-}" "$work/second" || [ -z "${6:-}" ] || fail "said nothing about '$6'"
}

two_at_once()
{
	local create

	make_bases
	create="create test-cow $image"
	meet "$create" ioctl=8 0 "$create" 4 'exists already'
	meet 'export test-cow' rename=1 0 'export test-cow' 4 'already exported at'
	meet 'unexport test-cow' unlink=1 0 'unexport test-cow' 3 'is not exported'
	meet 'export test-cow' rename=1 0 'remove test-cow' 4 'is exported at'
	meet 'unexport test-cow' unlink=1 0 'remove test-cow' 0
	nothing_left
	meet "$create" ioctl=8 0 'remove test-cow' 0
	nothing_left
	meet "$create" ioctl=8 0 'export test-cow' 0 nbd+unix
	meet 'set test-cow limit=1M' ioctl=5 0 'reset test-cow' 0
	meet 'reset test-cow' ioctl=5 0 'set test-cow limit=2M' 0
	status_is test-cow limit=512
	cowctl unexport test-cow
	meet 'remove test-cow' ioctl=5 0 'remove test-cow' 3 'there is no device'
	nothing_left
	cowctl create test-cow "$uri"
	meet 'remove test-cow' ioctl=5 0 "$create" 0 /dev/mapper/test-cow
	is 'the loop device' "$(losetup -n -O NAME -j "$work/disk.img")" \
		"$(cowctl status test-cow | sed -n 's/^  base device *//p')"
	meet 'remove test-cow' ioctl=5 0 'export test-cow' 3 'there is no device'
	nothing_left
}

run_tests \
	killed_create 'create, killed at each step and given again' \
	killed_with_nbd_client 'create, killed while nbd-client runs, and the other way round' \
	stopped_create 'create, told to stop at each step' \
	failed_create 'create, with a failure at each step' \
	killed_rebase 'rebase, killed at each step and given again' \
	stopped_rebase 'rebase, told to stop at each step' \
	failed_rebase 'rebase, with a failure at each step' \
	killed_remove 'remove, killed at each step and given again' \
	failed_remove 'remove, with a failure at each step' \
	create_after_killed_remove 'create after a remove that was not finished' \
	killed_partitions 'partitions with create and set, killed and given again' \
	killed_change 'set and reset, killed at each step and given again' \
	killed_services 'set and prefetch of what goes on, killed and given again' \
	killed_reconnects 'what connects the base anew, killed and given again' \
	killed_copies 'map, diff, load and commit, killed at each step and given again' \
	killed_export 'export, killed at each step and given again' \
	killed_export_by_nbd_server 'export by nbd-server, killed and given again' \
	failed_export 'export, with a failure at each step' \
	stopped_export 'export, told to stop at each step' \
	killed_unexport 'unexport, killed at each step and given again' \
	killed_serve 'serve, killed at each step and given again' \
	two_at_once 'two commands at once for one name'
