#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# cowctl would misread what people type or what the kernel prints, or its manual
# page would tell something else than its help. Under the sanitizers.
#
# SEED=N repeats a run; FUZZ_SECONDS (default 5) is for libFuzzer, which needs
# the packages clang and libclang-rt-dev.

# shellcheck source=tests/user/tap.sh
. "$(dirname "$0")/tap.sh"

CC=${CC:-gcc}
shopt -s extglob
seed=${SEED:-$RANDOM$RANDOM}
read -ra libraries < <(pkg-config --cflags --libs devmapper json-c blkid)
# shellcheck disable=SC2054 # the comma is the compiler's
flags=(-std=gnu11 -D_GNU_SOURCE -g -O1 -Wall -Wextra -Wshadow -Werror
	-Wno-missing-field-initializers -fsanitize=address,undefined -fno-sanitize-recover=all)
man=Documentation/cowctl.8.rst
schema=Documentation/cowctl.schema.json

build()
{
	"$CC" "${flags[@]}" -o "$out/cowctl" tools/!(nbdkit-*).c "${libraries[@]}" &&
		"$CC" "${flags[@]}" -o "$out/parsers_test" tests/user/parsers_test.c tools/parse.c
}

parsers()
{
	local line

	"$out/parsers_test" >"$out/parsers.log" 2>&1
	parsers_rc=$?
	while read -r line; do
		case $line in
		'ok '*)		result 0 "parsers: ${line#ok * }" ;;
		'not ok '*)	result 1 "parsers: ${line#not ok * }" ;;
		esac
	done <"$out/parsers.log"
	[ $parsers_rc = 0 ] || result $parsers_rc 'parsers' "$out/parsers.log"
}

# Inputs to start from: the lines of parsers.seeds.
make_corpus()
{
	local line n=0

	mkdir -p "$out/corpus"
	while IFS= read -r line; do
		n=$((n + 1))
		printf %s "$line" >"$out/corpus/$n"
	done <tests/user/parsers.seeds
}

build_fuzzer()
{
	local source

	# only what is tried is looked at for coverage
	for source in parse cowctl image-info; do
		clang "${flags[@]}" -fsanitize=fuzzer-no-link -Dmain=cowctl_main \
			-c -o "$out/$source.o" tools/$source.c || return
	done
	clang "${flags[@]}" -fsanitize=fuzzer -Wl,--wrap=fail -o "$out/parsers_fuzz" \
		tests/user/parsers_fuzz.c tools/util.c "$out"/{parse,cowctl,image-info}.o \
		"${libraries[@]}"
}

fuzz()
{
	local title="${FUZZ_SECONDS:-5} seconds of libFuzzer on the parsers" log=$out/fuzz.log

	if ! echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
		clang -fsanitize=fuzzer -x c -o "$out/parsers_fuzz" - 2>"$log"; then
		skipped "$title" 'needs clang and libclang-rt-dev'
		return
	fi
	build_fuzzer >"$log" 2>&1 && make_corpus &&
		"$out/parsers_fuzz" -seed="$seed" -max_total_time="${FUZZ_SECONDS:-5}" -max_len=600 \
			-close_fd_mask=1 -artifact_prefix="$out/" "$out/corpus" >"$log" 2>&1
	result $? "$title" <(grep -a -e '^line ' -e '^input: ' -e ERROR -e SUMMARY -e Test "$log" ||
		cat "$log")
	sed -n 's/^Done /# /p' "$log"
}

commands()
{
	"$out/cowctl" --help | sed -n 's/^  \([a-z]\+\) .*/\1/p'
}

options()
{
	grep -o -e '--[a-z]\+'
}

# key=... at the beginning of a line of help
keys_of_help()
{
	"$out/cowctl" help "$1" | sed -n 's/^  \([a-z-]\+\)=.*/\1/p'
}

# the part of the manual page about a command
man_section()
{
	awk -v name="$1" 'previous == name && /^-+$/ { on = 1 }
		on && /^[A-Z ]+$/ { exit }
		on && previous ~ /^[a-z]+$/ && previous != name && /^-+$/ { exit }
		on { print }
		{ previous = $0 }' "$man"
}

keys_of_man()
{
	man_section "$1" | sed -n 's/^\*\*\([a-z-]\+\)=.*/\1/p'
}

same()
{
	diff -u --label 'the help' --label 'the manual page' <(sort -u "$1") <(sort -u "$2") &&
		[ -s "$1" ]
}

same_commands()
{
	commands >"$out/help.txt"
	awk '/^-+$/ && previous ~ /^[a-z]+$/ { print previous } { previous = $0 }' "$man" |
		grep -v '^cowctl$' >"$out/man.txt"
	same "$out/help.txt" "$out/man.txt"
}

same_options()
{
	"$out/cowctl" --help | options >"$out/help.txt"
	sed -n 's/^\(--[a-z]\+\)$/\1/p' "$man" >"$out/man.txt"
	same "$out/help.txt" "$out/man.txt"
}

same_keys()
{
	local command

	for command in $(commands); do
		[ "$command" != help ] || continue
		keys_of_help "$command" >"$out/help.txt"
		keys_of_man "$command" >"$out/man.txt"
		diff -u --label "help $command" --label 'the manual page' \
			<(sort -u "$out/help.txt") <(sort -u "$out/man.txt") || return
	done
}

# The usage of a command, as the synopsis has it without its markup.
same_synopsis()
{
	local command usage

	for command in $(commands); do
		[ "$command" != help ] || continue
		usage=$("$out/cowctl" help "$command" | sed -n 's/^Usage: //p')
		sed -n 's/^| //p' "$man" | sed 's/\\ //g; s/\*//g' | grep -qxF "$usage" || {
			echo "the synopsis lacks: $usage"
			return 1
		}
	done
}

# On a terminal of 80 columns; the usage is as long as it is.
help_fits()
{
	local command

	for command in $(commands); do
		! "$out/cowctl" help "$command" | grep -v '^Usage: ' | expand | grep '.\{81\}' ||
			return
	done
}

# Each object of the JSON is described: all its members, and no others.
json_is_described()
{
	local bad

	bad=$(jq -c '.definitions | to_entries[] | .key as $name |
		.value | .. | objects | select(has("properties")) |
		select(.additionalProperties != false or
			(.required + [.properties | to_entries[] | .key as $key |
				select(.value.description // "" | startswith("Only with")) | $key] |
				sort) != (.properties | keys) or
			any(.properties[]; (.description // "") == "")) |
		[$name, (.properties | keys)]' "$schema") && [ -z "$bad" ] && return
	echo "incomplete: $bad"
	return 1
}

json_members_are_documented()
{
	local member

	for member in $(jq -r '.. | objects | .properties? // empty | keys[]' "$schema" | sort -u); do
		grep -q "\*$member\*" "$man" || { echo "not documented: $member"; return 1; }
	done
}

# wants STATUS PATTERN ARGUMENT...: one sentence on stderr, nothing on stdout
wants()
{
	local status=$1 pattern=$2 got

	shift 2
	"$out/cowctl" "$@" >"$out/stdout" 2>"$out/stderr"
	got=$?
	cat "$out/stdout" "$out/stderr"
	if [ "$got" != "$status" ] || [ -s "$out/stdout" ] ||
		[ "$(grep -c '' "$out/stderr")" != 1 ] ||
		! grep -q "^cowctl: .*$pattern" "$out/stderr"; then
		echo "status $got, wanted $status and '$pattern': cowctl $*"
		return 1
	fi
}

wrong_arguments()
{
	wants 2 'no command cretae; did you mean create' cretae &&
	wants 2 'no command xyz; see' xyz &&
	wants 2 'no command foo; see' foo &&
	wants 2 'no command ??31m; see' $'\xc2\x9b31m' &&
	wants 2 'no command xyz' help xyz &&
	wants 2 'one argument too many: x$' help create x &&
	wants 2 'neither nbd:// nor nbd+unix://' create base=nbds://x &&
	wants 2 'neither nbd:// nor nbd+unix://' serve base=nbds://x &&
	wants 2 'no option --jsn' list --jsn &&
	wants 2 'no option -x' -x list &&
	wants 2 'no option -xj' list -xj &&
	wants 2 'no option -xj' --json -xj list &&
	wants 2 'one argument too many: b; did you mean base=b' create a b &&
	wants 2 'one argument too many: b$' create base=x a b &&
	wants 2 'one argument too many: a' list a &&
	wants 2 'does not know bse=; did you mean base=' create bse=x &&
	wants 2 'does not know colour=' create colour=x &&
	wants 2 'does not know base=' remove base=x &&
	wants 2 'base= has no value' create base= &&
	wants 2 'base= is missing; see' create a &&
	wants 2 'base= is missing; did you mean base=Makefile' create Makefile &&
	wants 2 'prefetch does not know stop=' prefetch stop=true &&
	wants 2 'one argument too many: c' prefetch a stop c &&
	wants 2 '--watch belongs to status, not to list' list --watch &&
	wants 2 'one argument too many: a' top a &&
	wants 2 'one argument too many: --x' remove -- a --x &&
	wants 2 'base= is given twice' create base=a base=b &&
	wants 2 'the name "" is empty' remove '' &&
	wants 2 'contains a slash or backslash' remove 'a\b' &&
	wants 2 'cannot be printed' remove $'a\nb' &&
	wants 2 'longer than 127 bytes' remove "$(printf %0128d 0)" &&
	wants 2 'count as four' remove "$(printf '%032d' 0 | tr 0 ' ')" &&
	wants 2 'is reserved' remove control
}

wrong_names()
{
	local command name

	for command in $(commands); do
		[[ $command != @(help|list|top|diff|load) ]] || continue
		for name in '' / a/b ../x 'a\b' . .. control $'a\nb' $'a\e[31m' $'\xff' $'\xc2\x9b' \
			"$(printf %0128d 0)" "$(printf %032d 0 | tr 0 ' ')"; do
			# what has a slash in it is a base to them
			[[ $command = @(create|rebase|serve) && $name = */* ]] ||
				wants 2 'the name' "$command" "$name" || return
		done
	done
}

right_questions()
{
	"$out/cowctl" --version | grep -qx 'cowctl [0-9.]*' &&
		"$out/cowctl" --help | grep -q '^Usage: ' &&
		"$out/cowctl" help | cmp - <("$out/cowctl" --help) &&
		"$out/cowctl" help help | cmp - <("$out/cowctl" --help) &&
		"$out/cowctl" create --help | cmp - <("$out/cowctl" help create)
}

nothing_to_do()
{
	"$out/cowctl" >"$out/stdout"
	[ $? = 2 ] && grep -q '^Usage: ' "$out/stdout"
}

no_root()
{
	local command dir rc=0

	# nobody may be kept from what is below the home of root
	dir=$(mktemp -d) || return
	chmod 755 "$dir"
	install -m 755 "$out/cowctl" "$dir"
	for command in $(commands); do
		[ "$command" != help ] || continue
		setpriv --reuid=65534 --regid=65534 --clear-groups \
			"$dir/cowctl" "$command" 2>"$out/stderr"
		if [ $? != 5 ] || ! grep -q 'must be root' "$out/stderr"; then
			cat "$out/stderr"
			rc=1
		fi
	done
	rm -r "$dir"
	return "$rc"
}

no_device_mapper()
{
	wants 6 'this kernel has no device-mapper' list &&
	wants 6 'this kernel has no device-mapper' status &&
	wants 6 'this kernel has no device-mapper' remove &&
	wants 6 'this kernel has no device-mapper' create base=/dev/null
}

full_output()
{
	"$out/cowctl" --help >/dev/full 2>"$out/stderr"
	[ $? = 1 ] && grep -q 'cannot write the output' "$out/stderr"
}

# completes WANTED WORD...: what is offered for the last word
completes()
{
	local wanted=$1 got

	shift
	# The completion's own complaint: it is not called by readline.
	# shellcheck disable=SC2016 # the inner shell's
	got=$(PATH=$out:$PATH bash -c '. tools/cowctl.bash
		cowctl()
		{
			if [ "$1" = list ]; then echo "$LIST"; else command cowctl "$@"; fi
		}
		COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
		_cowctl
		echo "${COMPREPLY[*]}"' bash cowctl "$@" 2>"$out/stderr")
	[ "$got" = "$wanted" ] && return
	echo "cowctl $* is completed by '$got', not '$wanted'"
	return 1
}

# completes_names WANTED WORD...: where these copies are
completes_names()
{
	LIST="$(printf '%-8s  %s\n' NAME SIZE lab '1.0 MiB' 'lab two' '1.0 MiB' "\$(id)" '1.0 MiB')" \
		completes "$@"
}

completion()
{
	completes 'remove reset rebase' re && completes 'unexport' une &&
	completes 'status' help sta &&
	completes 'round=' create rou && completes 'cow-on-read= cow-on-cache=' set cow cow-on &&
	completes 'used rate name' top sort = && completes 'threshold= timeout=' wait cow t &&
	completes 'truncate' wait cow -- trunc && completes '' wait cow -- true t && completes 'true false' create cow-on-cache = && completes 'down' create round = d &&
	completes '/proc/tty' set cow cow-on-read = /proc/tt && completes '/proc/tty' create /proc/tt &&
	completes 'stop' prefetch cow s && completes '--watch' status --w && completes '' list --w &&
	completes_names 'lab lab\ two' remove l && completes_names 'lab\ two' status 'lab\ ' &&
	completes_names '\$\(id\)' wait '\$' && completes_names 'limit=' create l &&
	completes '--json' list --j && completes '--json' --j && completes '' nonsense x
}

echo "# SEED=$seed"
check 'cowctl and the test of its parsers build with the sanitizers' build
parsers
fuzz
check 'help, version' right_questions
check 'without a command there is help, and a status of 2' nothing_to_do
check 'wrong arguments get one sentence and a status of 2' wrong_arguments
check 'wrong names do with each command' wrong_names
if [ "$(id -u)" = 0 ]; then
	check 'without root each command says so, and has a status of 5' no_root
else
	skipped 'without root each command says so' 'needs root to give it up'
fi
if [ "$(id -u)" = 0 ] && ! grep -q device-mapper /proc/misc; then
	check 'without a device-mapper there is one sentence, and a status of 6' no_device_mapper
else
	skipped 'without a device-mapper there is one sentence' 'needs root, and a kernel without one'
fi
check 'output that cannot be written is a failure' full_output
check 'the manual page has the commands of the help' same_commands
check 'the help fits into 80 columns' help_fits
check 'the manual page has the options of the help' same_options
check 'the manual page has the keys of the help of each command' same_keys
check 'the manual page has the usage of each command' same_synopsis
check 'the schema describes all of the JSON' json_is_described
check 'the manual page has all members of the JSON' json_members_are_documented
check 'bash completes commands, keys and values' completion
check 'the manual page is without a warning' rst2man --strict "$man" "$out/cowctl.8"
finish
