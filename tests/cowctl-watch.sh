#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, cowctl shows or reports something else than what happens, or does
# not tell when a copy has filled.

. "$(dirname "$0")/cowctl-common.sh"

schema=$(realpath "$(dirname "$0")/../Documentation/cowctl.schema.json")

# device NAME: how top --json sees it, look by look, from standard input
device()
{
	jq -c --arg name "$1" '[.devices[] | select(.name == $name)][0]'
}

# at_least NUMBER FILE: so many lines it has
at_least()
{
	[ "$(wc -l <"$2")" -ge "$1" ]
}

# last_look CONDITION: so it is in $work/looks
last_look()
{
	tail -n 1 "$work/looks" | jq -e "$1" >/dev/null
}

two_copies()
{
	begin make_brd 1024
	cowctl create test-c1 base="$REPLY" limit=256K
	cowctl create test-c2 base="$REPLY"
}

# Plain lines: a heading, and at each look a line for each copy.
lines()
{
	local -a rows
	local start

	two_copies
	undo sweep
	cowctl create 'test-c3 ä' base="$REPLY" limit=1M
	undo cowctl remove 'test-c3 ä'
	io /dev/mapper/test-c1 'write 0 64k A'
	io /dev/mapper/test-c2 'write 0 128k A'
	mapfile -t rows < <(cowctl top count=2 delay=0.1 | sed 's/^[0-9:]\{8\}/T/')
	is 'the number of lines' ${#rows[@]} 7
	is 'the heading' "${rows[0]}" \
		'TIME     NAME       USED LIMIT          USE% GROWTH FULL OVERLAY CACHE  BASE ERRORS     HEALTH'
	is 'the first line' "${rows[1]}" \
		'T test-c2    128K  none             -      -    -       -     -     -      0         ok'
	is 'the second line' "${rows[2]}" \
		'T test-c1     64K  256K ##......  25%      -    -       -     -     -      0         ok'
	is 'the third line' "${rows[3]}" \
		'T test-c3 ä    0B  1.0M ........   0%      -    -       -     -     -      0         ok'
	is 'the first line of the next look' "${rows[4]}" \
		'T test-c2    128K  none             -     0B    -      0B    0B    0B      0         ok'
	cowctl top sort=name count=1 | sed -n 2p | grep 'test-c1'
	start=${EPOCHREALTIME/[.,]/}
	cowctl top count=3 delay=0.5
	between 'the time for three looks' $((${EPOCHREALTIME/[.,]/} - start)) 1000000 20000000
	is 'the lines of one' "$(cowctl status test-c1 --watch count=2 delay=0.1 | wc -l)" 3
	io /dev/mapper/test-c1 'write 0 256k A' 'fails ENOSPC write 256k 4k A'
	cowctl top count=1 | grep 'test-c1 .* 100%      -   0s .* 1       full$'

	says 2 'needs --watch' cowctl status test-c1 count=1
	says 2 'exclude each other' cowctl status --watch --prometheus
	says 2 'sort=size' cowctl top sort=size
	says 2 'delay=0.05 is out of range' cowctl top delay=0.05
	says 2 'delay=x is no number of seconds' cowctl top delay=x
	says 2 'count=0 is no number' cowctl top count=0
	says 3 'no device test-cno' cowctl status test-cno --watch
	says 1 'cannot write the output' bash -c 'cowctl top count=2 delay=0.1 >/dev/full'
}

# sum_of RATE NAME: each rate for as long as it was so: what happened
sum_of()
{
	jq -s --arg rate "$1" --arg name "$2" '. as $looks | [range(1; length) as $i |
		($looks[$i].devices[] | select(.name == $name).per_second[$rate]) *
		($looks[$i].time - $looks[$i - 1].time) / 1000] | add | round' "$work/looks"
}

# Each rate is of what was read where, between one look and the next.
rates()
{
	local looks=$work/looks

	two_copies
	cowctl set test-c1 cow-on-read=true
	undo rm -f "$looks"
	cowctl top --json sort=rate delay=1 >"$looks" &
	wait_until 20 grep -q . "$looks"
	io /dev/mapper/test-c1 'write 0 64k A' 'check 0 64k A' 'check 64k 32k .' 'check 64k 16k .'
	io /dev/mapper/test-c2 'check 128k 128k .'
	wait_until 20 at_least $(($(wc -l <"$looks") + 2)) "$looks"
	kill %1
	wait
	is 'the rates at first' "$(head -n 1 "$looks" | device test-c1 | jq -c '[.per_second, .full_in]')" \
		'[null,null]'
	between 'what was read from the overlay' "$(sum_of overlay_reads test-c1)" 64000 67000
	between 'what was read into the cache' "$(sum_of misses test-c1)" 32000 33500
	between 'what was read from the cache' "$(sum_of hits test-c1)" 16000 17000
	between 'what was read past the cache' "$(sum_of base_reads test-c2)" 128000 134000
	is 'what was read from the other overlay' "$(sum_of overlay_reads test-c2)" 0
	# The growth until it is full is what is left.
	between 'what is left' "$(device test-c1 <"$looks" | jq 'select(.full_in) |
		.full_in * .per_second.used' | head -n 1)" 160000 240000
	is 'the one that grows' "$(tail -n 1 "$looks" | jq -r '.devices[0].name')" test-c1
}

# Copies come, go, and are replaced by others of their name while top runs.
coming_and_going()
{
	local looks=$work/looks

	two_copies
	undo rm -f "$looks"
	io /dev/mapper/test-c1 'write 0 64k A' 'check 0 64k A'
	cowctl top --json delay=0.1 >"$looks" &
	wait_until 20 grep -q per_second...[^n] "$looks"
	cowctl remove test-c1
	wait_until 20 last_look 'all(.devices[]; .name != "test-c1")'
	cowctl create test-c1 base="$REPLY"
	wait_until 20 last_look 'any(.devices[]; .name == "test-c1")'
	cowctl remove test-c2
	cowctl remove test-c1
	wait_until 20 last_look '.devices == []'
	kill %1
	wait
	is 'what was less than nothing' "$(jq -c '.devices[].per_second // empty | select(.used < 0)' "$looks")" ''
	cowctl create test-c1 base="$REPLY"
	cowctl status test-c1 --watch delay=0.1 >"$work/stdout" 2>"$work/stderr" &
	wait_until 20 grep -q test-c1 "$work/stdout"
	cowctl remove test-c1
	rc=0
	wait $! || rc=$?
	is 'the status when the only one is removed' $rc 3
	grep 'no device test-c1' "$work/stderr"
}

# screen COLUMNS ROWS KEYS COMMAND...: what it draws on such a terminal, where these keys
# are typed; then how the terminal is
screen()
{
	local width=$1 height=$2 keys=$3

	shift 3
	# shellcheck disable=SC2016 # the inner shell's
	timeout 60 python3 - "$width" "$height" "$keys" "$@" <<-'END'
		import fcntl, os, pty, signal, struct, sys, termios
		columns, rows, keys = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
		pid, fd = pty.fork()
		if not pid:
		    signal.signal(signal.SIGINT, signal.SIG_DFL)
		    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
		    os.environ["TERM"] = "vt100"
		    os.execvp("bash", ["bash", "-c", 'stty -g; "$@"; echo "status $?"; stty -g',
		                       "bash"] + sys.argv[4:])
		out = b""
		while True:
		    try:
		        data = os.read(fd, 4096)
		    except OSError:
		        break
		    if not data:
		        break
		    out += data
		    if keys and out.count(b"\033[J") >= 2:
		        os.write(fd, keys)
		        keys = b""
		os.waitpid(pid, 0)
		sys.stdout.buffer.write(out.replace(b"\r", b""))
	END
}

# The last frame of what screen has printed into $work/screen
frame()
{
	awk -v RS='\033\\[H' 'END { sub(/\033\[J.*/, ""); print }' "$work/screen" |
		sed 's/\x1b\[[?0-9]*[a-zA-Z]//g' | sed '$d'
}

terminal()
{
	local keys i

	need python3
	two_copies
	undo rm -f "$work/screen"
	for i in c3 c4 c5 c6 c7 cthathasalongname; do
		dmsetup create "test-$i" --table '0 256 nbdcow /dev/ram0'
	done
	io /dev/mapper/test-c1 'write 0 256k A'
	for keys in $'\003' 'xq'; do
		screen 80 7 "$keys" cowctl top delay=0.1 >"$work/screen"
		is 'the status' "$(grep -c '^.*status 0$' "$work/screen")" 1
		is 'how the terminal was left' "$(tail -n 1 "$work/screen")" "$(head -n 1 "$work/screen")"
		grep -q $'\033\[?25h' "$work/screen"
	done
	grep -q $'\033\[31mtest-c1' "$work/screen"
	frame >"$work/stdout"
	cat "$work/stdout"
	is 'the number of lines' "$(wc -l <"$work/stdout")" 6
	is 'the last line' "$(tail -n 1 "$work/stdout")" 'and 5 more'
	is 'the heading' "$(head -n 1 "$work/stdout")" \
		'NAME             USED LIMIT          USE% GROWTH FULL OVERLAY CACHE  BASE ERRORS'
	sed -n 2p "$work/stdout" | grep -x 'all 8            256K.*[MG] \.\{8\}   0%     0B    -      0B    0B    0B      0'
	is 'the line of the first' "$(sed -n 3p "$work/stdout")" \
		'test-c1          256K  256K ######## 100%     0B   0s      0B    0B    0B      0'
	screen 40 24 q cowctl top delay=0.1 >"$work/screen"
	frame >"$work/stdout"
	is 'the widest line' "$(wc -L <"$work/stdout")" 40
	is 'the line of the first' "$(sed -n 3p "$work/stdout")" \
		'test-c1   256K ######## 100%     0B   0s'
	# Without colour, and where nothing can be drawn over
	NO_COLOR=1 screen 80 7 q cowctl status test-c1 --watch delay=0.1 >"$work/screen"
	is 'the lines of one' "$(frame | wc -l)" 2
	fails grep -q $'\033\[31m' "$work/screen"
	is 'lines on a dumb terminal' "$(screen 80 7 '' env TERM=dumb cowctl top count=1 | grep -c '^[0-9:]*  *test-c')" 8
}

# limit_of_all TOTAL_LIMIT: as top shows it
limit_of_all()
{
	echo "$1" >$MODULE/parameters/total_limit
	screen 80 7 q cowctl top delay=0.1 >"$work/screen"
	frame | awk 'NR == 2 { print $4, $5 }'
}

# What the module takes as total_limit, cowctl understands.
total_limits()
{
	need python3
	two_copies
	undo rm -f "$work/screen"
	undo eval "echo '$(<$MODULE/parameters/total_limit)' >$MODULE/parameters/total_limit"
	is 'the limit' "$(limit_of_all 0)" '0B ########'
	is 'the limit' "$(limit_of_all 0x100000)" '1.0M ........'
	is 'the limit' "$(limit_of_all 2m)" '2.0M ........'
	is 'the limit' "$(limit_of_all none)" 'none -'
	[[ $(limit_of_all 200%) = [0-9]*[GM]\ ........ ]] || fail 'a percentage is none'
}

# Of many copies all are there, and each is known again at the next look.
many()
{
	local table='' i

	begin make_brd 64
	for ((i = 0; i < 60; i++)); do
		table+="test-cm$i,,,rw,0 128 nbdcow /dev/ram0;"
	done
	dmsetup create --concise "$table"
	undo eval 'dmsetup remove test-cm{0..59}'
	is 'the number of copies' "$(cowctl top count=1 | grep -c '^[0-9:]* test-cm')" 60
	is 'those that are known again' "$(cowctl top count=2 delay=0.1 --json |
		jq -s '[.[1].devices[] | select(.per_second)] | length')" 60
}

# It has opened the last of its descriptors, and has nothing to do.
sleeps()
{
	find "/proc/$1/fd" -lname '*signalfd*' | grep -q . && grep -q '^State:.*sleeping' "/proc/$1/status"
}

# waits ARGUMENT...: in the background, as $waiter; what it prints goes to $work
waits()
{
	cowctl wait "$@" >"$work/stdout" 2>"$work/stderr" &
	waiter=$!
	wait_until 20 sleeps "$waiter"
}

# ended STATUS: so it did
ended()
{
	local rc=0

	wait "$waiter" || rc=$?
	cat "$work/stderr"
	is 'the exit status' $rc "$1"
}

thresholds()
{
	two_copies
	says 2 'threshold= is missing' cowctl wait test-c1
	says 2 'threshold=101% is out of range' cowctl wait test-c1 threshold=101%
	says 2 'threshold=x is neither' cowctl wait test-c1 threshold=x
	says 2 'test-c2 has no limit' cowctl wait test-c2 threshold=80%
	says 2 'after -- is missing' cowctl wait test-c1 threshold=80% --
	says 2 'one argument too many: true' cowctl wait test-c1 true threshold=80%
	says 3 'no device test-cno' cowctl wait test-cno threshold=80%
	says 8 'test-c1 did not reach threshold=80% within 0 seconds' \
		cowctl wait test-c1 threshold=80% timeout=0
	says 8 'within 0.3 seconds' cowctl wait test-c1 threshold=1K timeout=0.3
	says 8 'within 0 seconds' cowctl wait test-c1 threshold=18446744073709551615 timeout=0

	# told by the kernel: a block less is not enough
	io /dev/mapper/test-c1 'write 0 204k A'
	waits test-c1 threshold=80%
	says 8 'did not reach' cowctl wait test-c1 threshold=80% timeout=0
	io /dev/mapper/test-c1 'write 204k 4k A'
	ended 0
	is 'what it printed' "$(<"$work/stdout")" ''
	waits test-c1 threshold=100%
	io /dev/mapper/test-c1 'write 208k 48k A'
	ended 0
	# found by looking
	waits test-c2 threshold=5K
	io /dev/mapper/test-c2 'write 0 8k A'
	ended 0
	# a limit that comes down to what is used
	cowctl set test-c1 limit=1M
	waits test-c1 threshold=80%
	cowctl set test-c1 limit=300K
	ended 0
}

# All copies together are full; the health tells of the base.
full_and_away()
{
	local param=$MODULE/parameters/total_limit

	begin make_brd 1024
	make_dm test-under '0 2048 linear /dev/ram0 0'
	cowctl create test-c1 base="$REPLY" limit=256K
	undo sweep
	undo eval "echo $(<$param) >$param"
	echo 64K >$param
	io /dev/mapper/test-c1 'write 0 64k A' 'load test-under 2048 error' 'resume test-under' \
		'fails EIO check 128k 4k .'
	is 'health' "$(member health test-c1)" base-error
	waits test-c1 threshold=100%
	io /dev/mapper/test-c1 'fails ENOSPC write 64k 4k A'
	ended 0
}

ends_of_wait()
{
	local threshold

	two_copies
	waits test-c1 threshold=80%
	cowctl remove test-c1
	ended 3
	grep 'test-c1 was removed before it reached threshold=80%' "$work/stderr"
	waits test-c2 threshold=1M
	cowctl remove test-c2
	cowctl create test-c2 base="$REPLY"
	ended 3
	# looked for once a second, and where the kernel tells the rest less often
	for threshold in 50% 80%; do
		cowctl set test-c2 limit=256K
		waits test-c2 threshold=$threshold timeout=60
		cowctl set test-c2 limit=none
		ended 2
		grep 'test-c2 has no limit; give threshold= as a size' "$work/stderr"
	done
	waits test-c2 threshold=1M
	kill -TERM "$waiter"
	ended 143
	is 'what it said' "$(<"$work/stderr")" ''
	# What runs in the background is not to care for Ctrl-C.
	waits test-c2 threshold=100K
	kill -INT "$waiter"
	io /dev/mapper/test-c2 'write 0 100k A'
	ended 0
}

hooks()
{
	local rc

	two_copies
	# shellcheck disable=SC2016 # the hook's own
	is 'the environment' "$(cowctl wait test-c1 timeout=60 threshold=80% -- \
		bash -c 'echo "$COWCTL_NAME $COWCTL_USED $COWCTL_LIMIT $1"' x '*' &
		io /dev/mapper/test-c1 'write 0 208k A'
		wait)" 'test-c1 212992 262144 *'
	io /dev/mapper/test-c2 'write 0 4k A'
	is 'without a limit' "$(cowctl wait test-c2 threshold=4K -- printenv COWCTL_LIMIT)" none
	says 7 '' bash -c 'cowctl wait test-c2 threshold=4K -- bash -c "echo cowctl: x >&2; exit 7"'
	says 6 'cannot run test-none' cowctl wait test-c2 threshold=4K -- test-none
	says 5 'cannot run /dev/null' cowctl wait test-c2 threshold=4K -- /dev/null
	says 8 'did not reach' cowctl wait test-c2 threshold=8K timeout=0 -- echo no
	# Signals end the command as they would any other.
	cowctl wait test-c2 threshold=4K -- sleep 60 &
	wait_until 20 grep -qx sleep "/proc/$!/comm"
	is 'the signals that it holds back' "$(grep SigBlk "/proc/$!/status")" \
		"$(grep SigBlk /proc/self/status)"
	is 'its descriptors' "$(find "/proc/$!/fd" -lname '*mapper*')" ''
	kill $!
	rc=0
	wait $! || rc=$?
	is 'its status' $rc 143
	# Of what is lost nobody learns from the command.
	rc=0
	cowctl wait test-c2 threshold=4K --json -- touch "$work/ran" >/dev/full || rc=$?
	is 'the status' $rc 1
	test ! -e "$work/ran"
}

# Every report is as the schema has it, which has all members and no others.
reports()
{
	local -a made
	local server

	need nbdkit sfdisk python3 qemu-img qemu-nbd
	python3 -c 'import jsonschema' || skip 'needs python3-jsonschema'
	begin make_brd 4096
	undo rm -f "$work"/*.json
	cowctl create test-c1 base="$REPLY" limit=1M --json >"$work/create.json"
	cowctl list --json >"$work/list.json"
	printf '2048,2048\n4096,\n' | sfdisk -q --no-reread --no-tell-kernel -X dos /dev/mapper/test-c1
	io /dev/mapper/test-c1 'write 1020k 16k A' 'discard 2040k 4k' 'check 2M 64k .'
	cowctl export test-c1 --json >"$work/export.json"
	cowctl status test-c1 --json >"$work/status.json"
	cowctl changes test-c1 --json >"$work/changes.json"
	cowctl wait test-c1 threshold=4K --json >"$work/wait.json"
	cowctl unexport test-c1
	cowctl serve test-c3 base="$REPLY" --json >"$work/serve.json" &
	server=$!
	undo kill $server
	wait_until 20 grep -q '}' "$work/serve.json"
	kill $server
	wait $server
	unset 'undo_list[-1]'
	cowctl prefetch test-c1 --json >"$work/prefetch.json"
	cowctl top count=2 delay=0.1 --json >"$work/top.json"
	cowctl status test-c1 --watch count=1 --json >>"$work/top.json"
	cowctl create test-c2 base="$REPLY" cow-on-read="$work/none"
	cowctl list --json >"$work/list.2.json"
	cowctl rebase test-c2 base="$REPLY" --json >"$work/rebase.json"
	cowctl diff test-c1 "$work/a.qcow2" --json >"$work/diff.json"
	undo rm -f "$work"/a.{qcow2,img}
	cowctl load test-c2 "$work/a.qcow2" --json >"$work/load.json"
	cp --sparse=always "$REPLY" "$work/a.img"
	cowctl commit test-c1 to="$work/a.img" --json >"$work/commit.json"
	made=("$work"/*.json)
	is 'the number of reports' ${#made[@]} 14
	python3 - "$schema" "${made[@]}" <<-'END'
		import json, os, sys, jsonschema
		schema = json.load(open(sys.argv[1]))
		jsonschema.Draft7Validator.check_schema(schema)
		for path in sys.argv[2:]:
		    name = os.path.basename(path).split(".")[0]
		    report = dict(schema, **{"$ref": "#/definitions/" + name})
		    report["allOf"] = [{"$ref": report.pop("$ref")}]
		    validator = jsonschema.Draft7Validator(report)
		    text = open(path).read()
		    values = [json.loads(line) for line in text.splitlines()] if name == "top" else [json.loads(text)]
		    for value in values:
		        validator.validate(value)
		        print(name, "is valid")
		        # or it would accept anything
		        first = value[0] if isinstance(value, list) else value
		        first["more"] = 1
		        assert not validator.is_valid(value), name
		        del first["more"], first[next(iter(first))]
		        assert not validator.is_valid(value), name
	END
	jq -se 'all(.[]; .devices | length == 1) and .[1].devices[0].per_second.used == 0' "$work/top.json"
}

run_tests \
	lines 'top as lines' \
	rates 'rates of growth and reads' \
	coming_and_going 'copies that come and go' \
	terminal 'top on terminals' \
	total_limits 'the limit of all copies together' \
	many 'top of many copies' \
	thresholds 'waiting for thresholds' \
	full_and_away 'a copy that is full while its base is away' \
	ends_of_wait 'the ends of waiting' \
	hooks 'commands at a threshold' \
	reports 'reports and their schema'
