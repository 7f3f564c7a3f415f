# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What the tests of cowctl share, beside what all tests do.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_dir=/run/cowctl

# under SANITIZER: nbdkit runs the plugin that tests/user/plugin.sh has built with it, if it
# has. What it finds fails the test.
under()
{
	local tools=${BASH_SOURCE%/*}/../tools dir=${BASH_SOURCE%/*}/../build/user/plugin/$1

	if [ -x "$dir/nbdkit" ] && [ -z "$(find "$tools" -newer "$dir/nbdkit")" ]; then
		PATH=$(realpath "$dir"):$PATH
		sanitizer=$1
		echo "# with the $1 sanitizer"
	fi
}

no_reports()
{
	local rc=0

	! grep -hs . "$work"/report.* || rc=1
	rm -f "$work"/report.*
	return $rc
}

# says STATUS PATTERN COMMAND...: it fails with that status and one sentence.
says()
{
	local status=$1 pattern=$2 got=0

	shift 2
	"$@" >"$work/stdout" 2>"$work/stderr" || got=$?
	cat "$work/stderr"
	is "the exit status of '$*'" "$got" "$status"
	is 'what it printed' "$(<"$work/stdout")" ''
	is 'the number of sentences' "$(grep -c '' "$work/stderr")" 1
	grep -q "^cowctl: .*$pattern" "$work/stderr" || fail "said nothing about '$pattern'"
}

# The command fails, as wait_until can wait for it.
not()
{
	! "$@"
}

# The processes of cowctl, without what init has yet to take notice of.
running_cowctls()
{
	pgrep -ax -r D,R,S,T,t cowctl
}

# Nothing goes on in the background for any copy.
idle()
{
	! running_cowctls
}

# waiting N [NAME]: at least so many requests wait for the base
waiting()
{
	[ "$(member queued "${2:-test-cow}")" -ge "$1" ]
}

# let_go [NAME]: nobody waits for the base any more, whatever became of it
let_go()
{
	local name=${1:-test-cow}

	[ ! -e "/dev/mapper/$name" ] || cowctl set "$name" on-base-error=error
}

# kill_nbdkit SOCKET DEVICE: the server dies, whoever is connected to it
kill_nbdkit()
{
	kill -KILL "$(<"$1.pid")"
	wait_until 10 not dd if="$2" of=/dev/null bs=4k count=1 iflag=direct status=none
}

# member MEMBER NAME: of the JSON
member()
{
	cowctl --json status "$2" | jq -r ".$1"
}

# unmount DIRECTORY: if it is mounted
unmount()
{
	! mountpoint -q "$1" || umount "$1"
}

# sectors_read DEVICE: from it, ever
sectors_read()
{
	stat_of "$(sysfs_of "$1")" 2
}

# map URI: of an export, as OFFSET+LENGTH:TYPE in one line
map()
{
	nbdinfo --map "$1" | sed 's/\x1b\[[0-9;]*m//g' |
		awk '{ printf "%s%s+%s:%s", s, $1, $2, $3; s = " " }'
}

# Whatever tests made with cowctl; all their names begin with test.
sweep()
{
	local name

	rm -f "$run_dir"/test*.export
	for name in $(find /dev/mapper "$run_dir" -name 'test-c*' -printf '%f\n' |
			sed 's/^\(test-c[a-z0-9]*\).*/\1/' | sort -ur); do
		cowctl unexport "$name"
		cowctl remove "$name"
	done 2>/dev/null
	return 0
}

run_files()
{
	find "$run_dir" -name 'test*'
}

connected()
{
	cat /sys/block/nbd*/pid 2>/dev/null
}

# Nothing is there that a test has made with cowctl.
nothing_left()
{
	! dmsetup ls | grep '^test-c' && ! losetup -a | grep "($work" && ! connected &&
		! run_files | grep . && ! pgrep -af "$run_dir/test" && idle
}

# Nothing that listens for TCP can be reached from elsewhere.
only_on_loopback()
{
	! awk '$4 == "0A" && $2 !~ /^(..00007F|00000000000000000000000001000000):/' \
		/proc/net/tcp /proc/net/tcp6 | grep .
}

# make_image BYTES: an image file that must not change
make_image()
{
	local loop

	make_file disk.img "$1"
	loop=$(losetup -f --show "$work/disk.img")
	io "$loop" 'write 0 end .'
	losetup -d "$loop"
	image_sum=$(sha256sum <"$work/disk.img")
	undo image_is_unchanged
	REPLY=$work/disk.img
}

# Of several that a test has made only the last is still there in the end.
image_is_unchanged()
{
	[ ! -e "$work/disk.img" ] ||
		is 'the checksum of the image' "$(sha256sum <"$work/disk.img")" "$image_sum"
}

# guard_sparse FILE: one that is too large to be read must not be written to either
guard_sparse()
{
	undo was_written "$1" "$(stat -c %y "$1")"
}

# was_written FILE TIME: last
was_written()
{
	is "the time of ${1##*/}" "$(stat -c %y "$1")" "$2"
}

# serve_image BYTES [FILTER...]: exports an image at $work/socket
serve_image()
{
	make_image "$1"
	shift
	undo rm -f "$work"/{socket,socket.pid}
	start_nbdkit "$work/socket" -r "$@" file "$work/disk.img"
	REPLY="nbd+unix:///?socket=$work/socket"
}

# begin COMMAND...: makes the base
begin()
{
	need cowctl jq
	if [ -n "${sanitizer:-}" ]; then
		export SANITIZER_LOG=$work/report
		undo no_reports
	fi
	"$@"
	undo sweep
}

# without DIRECTORY COMMAND...: for it the directory is empty
without()
{
	local directory=$1

	shift
	# shellcheck disable=SC2016 # they are the inner shell's
	unshare -m bash -c 'mount -t tmpfs tmpfs "$1" && shift && "$@"' bash "$directory" "$@"
}
