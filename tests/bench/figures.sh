# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What the scripts with figures share.

. "$(dirname "${BASH_SOURCE[0]}")/../cowctl-common.sh"

# To be seen whatever becomes of the test.
exec 5>&1

# figure WHAT VALUE GOAL: at most that
figure()
{
	[[ $2 =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || fail "$1: '$2' is no number"
	printf '# %-50s %8s   goal: %s\n' "$1" "$2" "$3" >&5
	awk -v value="$2" -v goal="$3" 'BEGIN { exit !(value + 0 <= goal + 0) }' ||
		missed+=("$1")
}

judge()
{
	[ ${#missed[@]} = 0 ] || fail "missed: ${missed[*]}"
}

# divide A B: with three digits behind the point
divide()
{
	awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a / b }'
}

now_us()
{
	echo "${EPOCHREALTIME/./}"
}

median()
{
	sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}
