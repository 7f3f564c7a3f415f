# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What the test scripts share. A script sources this file, defines a function
# for each test, and ends with
#
#	run_tests FUNCTION 'what it shows' [FUNCTION 'what it shows']...
#
# Arguments of the script select tests by function; V=1 shows their output as
# it comes. Each test runs in a shell of its own, which ends at the first
# command that fails. What it makes is registered with `undo' and goes away in
# reverse order. Then the bases must be unchanged, the kernel log without a
# warning, and all memory back.
#
# Functions that make something leave its name in $REPLY.
#
# If the script has a function `fixture', what that makes is there for all tests.

undo_list=() guards=() guard_dirs=() guard_sums=() guard_writes=()

set -u
shopt -s inherit_errexit

PATH=${BASH_SOURCE%/*}:${BASH_SOURCE%/*}/../build/tests:$PATH
# Without a running udev nobody would answer libdevmapper.
[ -e /run/udev/control ] || export DM_DISABLE_UDEV=1

MODULE=/sys/module/dm_nbdcow
LEAVES=/sys/kernel/slab/nbdcow_leaf
KMEMLEAK=/sys/kernel/debug/kmemleak

fail()
{
	echo "$*"
	exit 1
}

skip()
{
	echo "$*" >"$work/skip"
	exit 4
}

# Runs a command when the test ends.
undo()
{
	undo_list+=("$(printf '%q ' "$@")")
}

# The command must fail.
fails()
{
	if "$@"; then
		fail "should have failed: $*"
	fi
}

# is WHAT GOT WANTED
is()
{
	[ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"
}

# between WHAT GOT LEAST MOST
between()
{
	if [ "$2" -lt "$3" ] || [ "$2" -gt "$4" ]; then
		fail "$1 is $2, not within $3 and $4"
	fi
}

# Waits until a command succeeds; the first argument tells how many seconds that
# may take on a quiet machine.
wait_until()
{
	local end=$((SECONDS + 6 * $1))

	shift
	until "$@"; do
		[ $SECONDS -lt "$end" ] || fail "waited in vain: $*"
		sleep 0.05
	done
}

need()
{
	local program

	for program; do
		command -v "$program" >/dev/null || skip "needs $program"
	done
}

need_module()
{
	modprobe "$@" || skip "needs the kernel module $1"
}

mount_configfs()
{
	mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
}

# counted FILE NAME: a number there; first all CPUs, if they are many, tell what
# they have counted.
counted()
{
	local refresh=/proc/sys/vm/stat_refresh name value

	[ ! -e $refresh ] || echo 1 >$refresh
	while read -r name value _; do
		[ "$name" != "$2" ] || echo "$value"
	done <"$1"
}

# A line of /proc/meminfo, in KiB
meminfo()
{
	counted /proc/meminfo "$1:"
}

# Pages in the caches of all bases; hardly anybody else counts there.
cache_pages()
{
	counted /proc/vmstat nr_kernel_misc_reclaimable
}

# The directory of a block device in /sys.
sysfs_of()
{
	local number

	# where udev makes them, names are links
	number=$(stat -Lc '%Hr:%Lr' "$1")
	echo "/sys/dev/block/$number"
}

# stat_of DIRECTORY FIELD...: what such a device has counted, by numbers from 0
stat_of()
{
	local dir=$1 i
	local -a stat fields=()

	shift
	read -ra stat <"$dir/stat"
	for i; do
		fields+=("${stat[i]}")
	done
	echo "${fields[*]}"
}

#
# Bases
#

# make_brd KIB [COUNT]: RAM disks /dev/ram0 and so on, filled with what bases hold.
make_brd()
{
	local i

	! grep -q '^brd ' /proc/modules || fail 'brd is in use'
	need_module brd "rd_nr=${2:-1}" "rd_size=$1"
	# udev looks at what was written to
	undo wait_until 10 rmmod brd
	for ((i = 0; i < ${2:-1}; i++)); do
		guard "/dev/ram$i" 'write 0 end .'
	done
	REPLY=/dev/ram0
}

# make_file NAME BYTES: a sparse file in $work.
make_file()
{
	truncate -s "$2" "$work/$1"
	undo rm -f "$work/$1"
	REPLY=$work/$1
}

# make_tmpfs NAME [OPTION...]: in $work
make_tmpfs()
{
	local dir=$work/$1

	shift
	mkdir "$dir"
	undo rmdir "$dir"
	mount -t tmpfs "$@" tmpfs "$dir" || return
	undo umount "$dir"
}

# make_loop FILE [OPTION...]
make_loop()
{
	local file=$1

	shift
	REPLY=$(losetup -f --show "$@" "$file")
	undo losetup -d "$REPLY"
}

# make_loop_base BYTES [OPTION...]: filled with what bases hold, but read-only
make_loop_base()
{
	local bytes=$1 file

	shift
	make_file "base$bytes" "$bytes"
	file=$REPLY
	make_loop "$file" "$@"
	guard "$REPLY" 'write 0 end .'
}

# start_nbdkit SOCKET ARGUMENT...
start_nbdkit()
{
	local socket=$1

	shift
	# an earlier one leaves it behind
	rm -f "$socket"
	run_nbdkit "$socket.pid" -U "$socket" "$@"
}

# run_nbdkit PIDFILE ARGUMENT...: nbdkit is in the background before it writes
# the file, and leaves it there when it ends
run_nbdkit()
{
	local file=$1 pid

	shift
	rm -f "$file"
	nbdkit -P "$file" "$@"
	wait_until 10 grep -qs . "$file"
	pid=$(<"$file")
	undo stop_nbdkit "$pid"
}

stop_nbdkit()
{
	[ -d "/proc/$1" ] || return 0
	kill "$1" || :
	wait_until 10 test ! -d "/proc/$1"
}

# make_nbd SOCKET [OPTION...]: an nbd device that is connected to the socket
make_nbd()
{
	local socket=$1 dev

	shift
	need_module nbd
	for dev in /sys/block/nbd*; do
		[ -e "$dev/pid" ] || break
	done
	dev=/dev/${dev##*/}
	nbd-client -unix "$socket" "$dev" "$@"
	undo nbd-client -d "$dev"
	wait_until 10 test -e "/sys/block/${dev##*/}/pid"
	REPLY=$dev
}

# make_dm NAME TABLE [OPTION...]
make_dm()
{
	dmsetup create "$1" --table "$2" "${@:3}"
	undo dmsetup remove --retry "$1"
	REPLY=/dev/mapper/$1
}

# make_gate BASE: /dev/mapper/test-gate, which lets all reads through to
# /dev/mapper/test-under, and that to the base. The commands of io in CLOSE_GATE
# make it hold each read until `resume test-gate'.
make_gate()
{
	local sectors

	sectors=$(blockdev --getsz "$1")
	need_module dm-delay
	make_dm test-under "0 $sectors linear $1 0"
	make_dm test-gate "0 $sectors linear /dev/mapper/test-under 0"
	# shellcheck disable=SC2034 # for the scripts
	CLOSE_GATE=(
		"load test-gate $sectors delay /dev/mapper/test-under 0 600000" 'resume test-gate'
		"load test-gate $sectors linear /dev/mapper/test-under 0"
	)
}

# How much was ever written to and discarded on a device, if it counts that.
writes_to()
{
	stat_of "$1" 4 6 11 13
}

# guard DEVICE [COMMAND...]: after these commands of io it must not change. Of a
# big one only the writes are counted.
guard()
{
	local dir sum=-

	dir=$(sysfs_of "$1")
	if [ "$(<"$dir/size")" -le 524288 ]; then
		sum=$(io "$@" sum)
	elif [ $# -gt 1 ]; then
		io "$@"
	fi
	guards+=("$1")
	guard_dirs+=("$dir")
	guard_sums+=("$sum")
	guard_writes+=("$(writes_to "$dir")")
}

# Stops guarding a device that went away or is meant to change.
unguard()
{
	local i

	for i in "${!guards[@]}"; do
		if [ "${guards[i]}" = "$1" ]; then
			unset "guards[i]"
		fi
	done
}

check_guards()
{
	local i sum

	for i in "${!guards[@]}"; do
		if [ "${guard_sums[i]}" != - ]; then
			sum=$(io "${guards[i]}" sum)
			is "checksum of the base ${guards[i]}" "$sum" "${guard_sums[i]}"
		fi
		is "writes to the base ${guards[i]}" "$(writes_to "${guard_dirs[i]}")" \
			"${guard_writes[i]}"
	done
}

#
# Overlays
#

# make_cow NAME SECTORS BASE [FEATURE ARGUMENTS]
make_cow()
{
	local name=$1 table="0 $2 nbdcow $3"

	shift 3
	make_dm "$name" "$table${*:+ $*}"
}

# reload NAME SECTORS BASE [FEATURE ARGUMENTS]
reload()
{
	local name=$1 table="0 $2 nbdcow $3"

	shift 3
	dmsetup load "$name" --table "$table${*:+ $*}"
	dmsetup resume "$name"
}

# field NAME FIELD: of the status line
field()
{
	local line

	line=$(dmsetup status "$1")
	field_of "$line" "$2"
}

# field_of LINE FIELD
field_of()
{
	local -a words

	read -ra words <<<"$1"
	case $2 in
	health)		echo "${words[3]}" ;;
	used)		echo "${words[4]%/*}" ;;
	limit)		echo "${words[4]#*/}" ;;
	peak)		echo "${words[5]}" ;;
	zeroed)		echo "${words[6]}" ;;
	metadata)	echo "${words[7]}" ;;
	refused)	echo "${words[8]}" ;;
	errors)		echo "${words[9]}" ;;
	cached)		echo "${words[10]%/*}" ;;
	evicted)	echo "${words[13]}" ;;
	prefetch)	echo "${words[16]}" ;;
	queued)		echo "${words[17]}" ;;
	*)		fail "the status has no field $2" ;;
	esac
}

# status_is NAME FIELD=VALUE...
status_is()
{
	local name=$1 line pair

	shift
	line=$(dmsetup status "$name")
	for pair; do
		is "${pair%%=*} in '$line'" "$(field_of "$line" "${pair%%=*}")" "${pair#*=}"
	done
}

# prefetch_is NAME STATE:DONE/TOTAL
prefetch_is()
{
	[ "$(field "$1" prefetch)" = "$2" ]
}

# soon COMMAND: one of io works on $COW with RWF_NOWAIT, though not necessarily at
# once. A device that does not claim it answers EOPNOTSUPP, and one that never dares
# anything EAGAIN for ever.
soon()
{
	local tries said

	for ((tries = 0; tries < 100; tries++)); do
		if said=$(io "$COW" "nowait $1"); then
			return 0
		fi
		[[ $said == *'Resource temporarily unavailable' ]] || break
		sleep 0.05
	done
	fail "nowait $1: $said"
}

#
# Overlays that are swapped out
#

SWAPPED=/sys/fs/cgroup/test-swapped

# swap_to DEVICE: the kernel swaps there; makes a memory cgroup, $SWAPPED
swap_to()
{
	local swap=$1

	need mkswap swapon
	[ -e /sys/fs/cgroup/cgroup.controllers ] || skip 'needs cgroup v2'
	echo +memory >/sys/fs/cgroup/cgroup.subtree_control || skip 'needs the memory controller'
	mkdir $SWAPPED
	undo rmdir $SWAPPED
	[ -e $SWAPPED/memory.reclaim ] || skip 'needs memory.reclaim'
	# older kernels would reach a RAM disk itself without any bio
	make_dm test-swap "0 $(blockdev --getsz "$swap") linear $swap 0"
	mkswap /dev/mapper/test-swap
	swapon -p 30000 /dev/mapper/test-swap
	undo swapoff /dev/mapper/test-swap
}

# make_swapped_cow NAME SECTORS BASE DEVICE [ARG...]: the kernel swaps to DEVICE; what
# the overlay stores is all that is in $SWAPPED
make_swapped_cow()
{
	local name=$1 sectors=$2 base=$3

	swap_to "$4"
	shift 4
	within_cgroup $SWAPPED dmsetup create "$name" --table "0 $sectors nbdcow $base $*"
	undo dmsetup remove --retry "$name"
}

# within_cgroup DIRECTORY COMMAND...
within_cgroup()
(
	echo $BASHPID >"$1/cgroup.procs"
	shift
	exec "$@"
)

#
# The runner
#

mark_log()
{
	log_mark="tests: $1 $$.$((++log_marks))"
	echo "<6>$log_mark" >/dev/kmsg
}

# What the kernel said since the mark, but for data races that others have (KCSAN).
kernel_log()
{
	log_since_mark | awk '
	index($0, "==================================================================") {
		if (!inside++) {
			report = $0
			next
		}
		inside = 0
		if (report !~ /KCSAN/ || report ~ /\[dm_nbdcow\]/)
			print report "\n" $0
		next
	}
	inside { report = report "\n" $0; next }
	{ print }
	END { if (inside) print report }'
}

log_since_mark()
{
	local -a lines
	local i

	mapfile -t lines < <(dmesg)
	for ((i = ${#lines[@]}; i > 0; i--)); do
		[[ ${lines[i - 1]} != *"$log_mark" ]] || break
	done
	[ "$i" = ${#lines[@]} ] || printf '%s\n' "${lines[@]:i}"
}

# Any of these in the log is a failure; errors of I/O are not.
bug='WARNING:|BUG:|BUG at|KASAN|KCSAN|UBSAN|ODEBUG|Oops|general protection'
bug+='|blocked for more than|possible (circular|recursive)|inconsistent lock'
bug+='|suspicious RCU|sleeping function|corruption|refcount_t|DEBUG_LOCKS'
bug+='|Objects remaining|[Bb]ad page|detected stall'
complaint="$bug|Call Trace|page allocation failure|Out of memory|invoked oom-killer"

check_log()
{
	local log

	log=$(kernel_log)
	if [[ $log =~ $complaint ]]; then
		echo "the kernel complains: ${BASH_REMATCH[0]}"
		return 1
	fi
}

# Lets kmemleak look for memory that nobody knows any more. It tells what is some
# seconds old and looks the same as at the last scan.
find_leaks()
{
	echo scan >$KMEMLEAK && sleep 6 && echo scan >$KMEMLEAK
}

# What of it the module has allocated, once for each place.
module_leaks()
{
	awk '/^unreferenced/ { record = "" } { record = record $0 "\n" }
		/\[dm_nbdcow\]/ && !($0 in seen) { printf "%s", record; seen[$0]; record = "" }' $KMEMLEAK
}

# Leaves of the maps of all overlays.
leaves()
{
	local objects=0

	if [ -e $LEAVES/objects ]; then
		# empties the lists of each CPU, which count as used
		echo 1 >$LEAVES/shrink
		read -r objects _ <$LEAVES/objects
	fi
	echo "$objects"
}

# References to the module; a built-in one has none.
refcnt()
{
	[ ! -e $MODULE/refcnt ] || echo "$(<$MODULE/refcnt)"
}

note_memory()
{
	total_used_before=$(<$MODULE/parameters/total_used)
	refcnt_before=$(refcnt)
	leaves_before=$(leaves)
	shmem_before=$(meminfo Shmem)
	cache_before=$(cache_pages)
}

# The kernel frees some of it a little later.
memory_is_back()
{
	[ "$(<$MODULE/parameters/total_used)" = "$total_used_before" ] &&
		[ "$(refcnt)" = "$refcnt_before" ] &&
		[ "$(leaves)" -le "$leaves_before" ] &&
		[ "$(cache_pages)" -le "$cache_before" ] &&
		[ "$(meminfo Shmem)" -le $((shmem_before + 1024)) ]
}

check_memory()
{
	(wait_until 10 memory_is_back) >/dev/null && return 0
	echo "left behind: $(meminfo Shmem) KiB of shared memory (before: $shmem_before)," \
		"$(<$MODULE/parameters/total_used) blocks (before: $total_used_before)," \
		"$(refcnt) references to the module (before: $refcnt_before)," \
		"$(leaves) leaves of maps (before: $leaves_before)," \
		"$(cache_pages) pages in caches (before: $cache_before)"
	return 1
}

run_undo()
{
	local i rc=0

	set +e
	trap - ERR
	for ((i = ${#undo_list[@]} - 1; i >= 0; i--)); do
		# one that ends the shell must not keep the others from running
		(eval "${undo_list[i]}") || { echo "cannot undo: ${undo_list[i]}"; rc=1; }
	done
	return $rc
}

# The end of a test's shell, whatever ended it.
end_test()
{
	local rc=$?

	trap - EXIT ERR INT TERM
	set +eE
	[ $rc != 0 ] || (check_guards) || rc=1
	(run_undo) || { [ $rc = 4 ] || rc=1; }
	exit $rc
}

report_error()
{
	echo "${BASH_SOURCE[1]}:${BASH_LINENO[0]}: failed: $BASH_COMMAND"
}

run_one()
(
	undo_list=()
	trap end_test EXIT
	trap 'exit 130' INT TERM
	trap report_error ERR
	set -eE
	"$1"
)

# result STATUS TITLE: a line of TAP, and what there is to say about a failure
result()
{
	local status=$1

	ran=$((ran + 1))
	# a command that failed with 4 is no skip
	[ "$status" != 4 ] || [ -s "$work/skip" ] || status=1
	case $status in
	0)	echo "ok $ran $2"
		passed=$((passed + 1)) ;;
	4)	echo "ok $ran $2 # SKIP $(<"$work/skip")" ;;
	*)	echo "not ok $ran $2"
		failed=$((failed + 1))
		{ [ -n "${V:-}" ] || cat "$work/log"; cat "$work/after"; } | sed 's/^\(# \)\?/# /'
		kernel_log | tail -n 50 | sed 's/^/# log: /' ;;
	esac
}

run_test()
{
	local rc

	mark_log "$1"
	note_memory
	: >"$work/skip"
	if [ -n "${V:-}" ]; then
		run_one "$1" 2>&1 | tee "$work/log"
		rc=${PIPESTATUS[0]}
	else
		run_one "$1" >"$work/log" 2>&1
		rc=$?
	fi
	{ check_log && check_memory; } >"$work/after" || rc=1
	result "$rc" "$2"
}

end_script()
{
	local rc=$?

	trap - EXIT ERR INT TERM
	set +eE
	if [ $rc != 0 ] && [ -n "${in_fixture:-}" ]; then
		{
			sed 's/^/# /' "$work/log"
			echo 'Bail out! What the tests need could not be made.'
		} >&"$tap"
	fi
	run_undo
	rm -rf "$work"
	exit $rc
}

# The fixture, its tests, and the end of it as one more test.
run_with_fixture()
{
	local i rc=0 used refs leaves shmem cache

	# not local: at the end of the script that would be forgotten
	in_fixture=1
	trap report_error ERR
	set -eE
	note_memory
	used=$total_used_before refs=$refcnt_before leaves=$leaves_before shmem=$shmem_before
	cache=$cache_before
	# what ends the script in there leaves the output as it is
	exec {tap}>&1
	fixture >"$work/log" 2>&1
	exec {tap}>&-
	set +eE
	trap - ERR
	in_fixture=
	for i in "${!names[@]}"; do
		run_test "${names[i]}" "${titles[i]}"
	done
	mark_log fixture
	(run_undo) >"$work/log" 2>&1 || rc=1
	undo_list=()
	total_used_before=$used refcnt_before=$refs leaves_before=$leaves shmem_before=$shmem
	cache_before=$cache
	{ check_log && check_memory; } >"$work/after" || rc=1
	result $rc 'all that the tests had is given back'
}

run_tests()
{
	local -a names=() titles=()
	local i only ran=0 passed=0 failed=0 log_marks=0

	only=" ${script_args[*]} "
	while [ $# -gt 0 ]; do
		if [ ${#script_args[@]} = 0 ] || [[ $only == *" $1 "* ]]; then
			names+=("$1")
			titles+=("$2")
		fi
		shift 2
	done
	echo 'TAP version 13'
	if [ "$(id -u)" != 0 ]; then
		echo '1..0 # SKIP needs root'
		return 4
	elif ! modprobe dm-nbdcow || [ ! -e $MODULE/parameters/total_used ]; then
		echo '1..0 # SKIP needs the module dm-nbdcow'
		return 4
	fi
	work=$(mktemp -d)
	trap end_script EXIT
	trap 'exit 130' INT TERM
	# or the kernel drops some of the marks
	echo on >/proc/sys/kernel/printk_devkmsg 2>/dev/null || :

	if declare -F fixture >/dev/null; then
		echo "1..$((${#names[@]} + 1))"
		run_with_fixture
	else
		echo "1..${#names[@]}"
		for i in "${!names[@]}"; do
			run_test "${names[i]}" "${titles[i]}"
		done
	fi
	[ $failed = 0 ] || return 1
	[ $passed != 0 ] || return 4
}

script_args=("$@")
