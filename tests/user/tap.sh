# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What the scripts in this directory share: results in TAP, programs in $out,
# which is below build/.

set -u

here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$(dirname "$here")")
out=$top/build/user/$(basename "$0" .sh)
mkdir -p "$out"
cd "$top" || exit 1

tap_count=0 tap_failed=0

# The beginning of a file, as comments.
log()
{
	sed -n '1,60s/^\(# \)\?/# /p' "$1"
}

# result EXIT-STATUS TITLE [LOG]
result()
{
	tap_count=$((tap_count + 1))
	if [ "$1" = 0 ]; then
		echo "ok $tap_count $2"
	else
		echo "not ok $tap_count $2"
		tap_failed=$((tap_failed + 1))
		[ -z "${3:-}" ] || log "$3"
	fi
}

# check TITLE COMMAND...
check()
{
	local title=$1

	shift
	"$@" >"$out/log" 2>&1
	result $? "$title" "$out/log"
}

skipped()
{
	tap_count=$((tap_count + 1))
	echo "ok $tap_count $1 # SKIP $2"
}

finish()
{
	echo "1..$tap_count"
	[ $tap_failed = 0 ]
	exit
}

echo 'TAP version 13'
