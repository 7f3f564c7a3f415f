#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, clients of "cowctl serve" see what is not theirs, lose what is, or
# leave something behind when they or the server go.

. "$(dirname "$0")/cowctl-common.sh"

[[ $(uname -r) != 6.1.* ]] || under thread

socket=$run_dir/test-cow.sock
uri="nbd+unix:///?socket=$socket"

# serve key=value...: in the background; its process is $server
serve()
{
	local end=$((SECONDS + 60))

	rm -f "$work/served" "$work/errors"
	env --default-signal=INT,HUP cowctl serve test-cow "$@" >"$work/served" 2>"$work/errors" &
	server=$!
	undo stop_server "$server"
	undo rm -f "$work/served" "$work/errors"
	until [ -s "$work/served" ]; do
		if [ ! -d "/proc/$server" ] || [ $SECONDS -gt $end ]; then
			cat "$work/errors"
			fail "did not begin to serve: $*"
		fi
		sleep 0.05
	done
}

stop_server()
{
	[ ! -d "/proc/$1" ] || kill "$1"
	wait_until 20 test ! -d "/proc/$1"
}

# stops SIGNAL: the server, as it should
stops()
{
	local rc=0

	kill "-$1" "$server"
	wait "$server" || rc=$?
	is "the exit status after SIG$1" $rc 0
	nothing_left
}

begin_serve()
{
	need nbdkit nbdsh
	begin "$@"
	unset server
}

# clients PYTHON: it finds connect(EXPORT), and BASE, what the base begins with
clients()
{
	nbdsh -c '
import time
def connect(export=""):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.connect_uri("nbd+unix:///" + export + "?socket='"$socket"'")
    return h
BASE = open("'"$base"'", "rb").read(1 << 20)' -c "$1"
}

# copies: the names of all, but for the one that serve itself has
copies()
{
	dmsetup ls | awk -v keeper="test-cow-$server-0" '/^test-cow-/ && $1 != keeper { print $1 }'
}

overlays()
{
	copies | wc -l
}

overlays_are()
{
	[ "$(overlays)" = "$1" ]
}

private_views()
{
	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" per-client=true
	is 'the address' "$(<"$work/served")" "$uri"
	only_on_loopback
	clients '
a, b = connect(), connect()
assert not a.can_multi_conn()
a.pwrite(b"A" * 65536, 0)
b.pwrite(b"B" * 4096, 4096)
b.trim(4096, 8192)
assert a.pread(1 << 20, 0) == b"A" * 65536 + BASE[65536:]
assert b.pread(1 << 20, 0) == BASE[:4096] + b"B" * 4096 + bytes(4096) + BASE[12288:]
a.shutdown()
assert b.pread(4096, 4096) == b"B" * 4096
assert connect().pread(1 << 20, 0) == BASE'
	wait_until 20 overlays_are 0
	stops TERM
}

# It waits for its own copies to go, and for nobody else.
beside_a_copy()
{
	local start

	begin_serve make_brd 4096
	base=$REPLY
	undo cowctl remove test-other
	cowctl create test-other "base=$base"
	serve base="$base" per-client=true
	clients 'connect().pwrite(b"A" * 4096, 0)'
	start=$SECONDS
	kill "$server"
	wait "$server"
	between 'the seconds it took' $((SECONDS - start)) 0 8
	is 'the copies' "$(dmsetup ls | awk '/^test-/ { print $1 }')" test-other
}

one_view()
{
	begin_serve make_image 4M
	base=$REPLY
	serve base="$base"
	is 'overlays' "$(overlays)" 0
	clients '
a, b = connect(), connect("x")
assert a.can_multi_conn()
a.pwrite(b"A" * 65536, 0)
assert b.pread(65536, 0) == b"A" * 65536
a.shutdown()
b.shutdown()
assert connect().pread(65536, 0) == b"A" * 65536'
	is 'overlays' "$(overlays)" 1
	cowctl list | grep '^test-cow-.* 64.0 KiB '
	stops INT
	image_is_unchanged
}

export_names()
{
	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" per-export-name=true max-clients=3
	clients '
a, a2, b = connect("ann"), connect("ann"), connect("b%20%C3%A4")
assert a.can_multi_conn()
a.pwrite(b"A" * 4096, 0)
assert a2.pread(4096, 0) == b"A" * 4096
assert b.pread(4096, 0) == BASE[:4096]
b.pwrite(b"B" * 4096, 0)
for h in a, a2, b:
    h.shutdown()
a, b = connect("ann"), connect("b%20%C3%A4")
assert a.pread(4096, 0) == b"A" * 4096 and b.pread(4096, 0) == b"B" * 4096
try:
    connect("c%0a")
    raise SystemExit("took a name with a newline")
except nbd.Error as e:
    print(e)
assert connect().pread(4096, 0) == BASE[:4096]
try:
    connect("d")
    raise SystemExit("one too many")
except nbd.Error as e:
    print(e)
l = nbd.NBD()
l.set_opt_mode(True)
l.connect_uri("nbd+unix:///?socket='"$socket"'")
names = []
l.opt_list(lambda name, description: names.append(name))
l.opt_abort()
assert sorted(names) == ["", "ann", "b \u00e4"], names'
	grep 'cannot be printed' "$work/errors"
	grep 'there are 3 export names already, as many as max-clients allows' "$work/errors"
	is 'overlays' "$(overlays)" 3
	stops TERM
}

limits()
{
	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" per-client=true limit=64K cache-limit=1M max-clients=2
	# also when there is no client
	is 'the limit of the cache' "$(member cache_limit "test-cow-$server-0")" 1048576
	clients '
a, b = connect(), connect()
a.pwrite(b"A" * 65536, 0)
try:
    a.pwrite(b"A" * 4096, 65536)
    raise SystemExit("there was room")
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
b.pwrite(b"B" * 65536, 65536)
assert a.pread(4096, 0) == b"A" * 4096 and a.pread(4096, 65536) == BASE[65536:69632]
try:
    connect()
    raise SystemExit("one too many")
except nbd.Error as e:
    print(e)
a.shutdown()
for i in range(1200):
    try:
        c = connect()
        break
    except nbd.Error as e:
        time.sleep(0.05)
assert c.pread(1 << 20, 0) == BASE'
	grep 'there are 2 clients already, as many as max-clients allows' "$work/errors"
	stops TERM
}

# Each of many at once has its own, and all of them one base.
many_clients()
{
	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" per-client=true cow-on-read=true
	clients '
hs = [connect() for i in range(64)]
for i, h in enumerate(hs):
    h.pwrite(bytes([i]) * 8192, 4096 * i)
for i, h in enumerate(hs):
    want = bytearray(BASE)
    want[4096 * i:4096 * i + 8192] = bytes([i]) * 8192
    assert h.pread(1 << 20, 0) == want, i
import subprocess
made = subprocess.check_output(["dmsetup", "ls"]).decode().split()
made = [name for name in made if name.startswith("test-cow-")]
assert len(made) == 64 + 1 and "test-cow-'"$server"'-0" in made, made'
	wait_until 60 overlays_are 0
	stops TERM
}

# Clients come and go, some in the middle of what they do.
coming_and_going()
{
	local i pids=()

	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" per-client=true
	for i in 1 2 3 4; do
		clients '
import random
random.seed('$i')
end = time.monotonic() + 15
rounds = 0
while time.monotonic() < end or rounds < 3:
    h = connect()
    assert h.pread(1 << 20, 0) == BASE, "not the base"
    want = bytearray(BASE)
    for n in range(random.randrange(20)):
        count, offset = random.randrange(1, 70000), random.randrange(900000)
        tag = random.randbytes(1) * count
        h.pwrite(tag, offset)
        want[offset:offset + count] = tag
    assert h.pread(1 << 20, 0) == want, "not ours"
    end_of_it = random.randrange(3)
    if end_of_it == 0:
        h.shutdown()
    elif end_of_it == 1:
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(1 << 20)), 0)
    h = None
    rounds += 1
print(rounds, "rounds")' &
		pids+=($!)
	done
	for i in "${pids[@]}"; do
		wait "$i"
	done
	wait_until 20 overlays_are 0
	stops TERM
}

# One that waits for the base does not hold up those of other clients.
cache_requests()
{
	begin_serve make_brd 4096
	make_gate "$REPLY"
	base=/dev/mapper/test-under
	serve base=/dev/mapper/test-gate per-client=true
	clients '
import subprocess
def gate(*commands):
    subprocess.check_call(["io", "/dev/mapper/test-under", *commands])
a, b = connect(), connect()
a.cache(4096, 0)
gate("'"${CLOSE_GATE[0]}"'", "'"${CLOSE_GATE[1]}"'", "'"${CLOSE_GATE[2]}"'")
slow = a.aio_cache(4096, 1 << 20)
time.sleep(1)
quick = b.aio_cache(4096, 0)
end = time.monotonic() + 60
while not b.aio_command_completed(quick):
    if time.monotonic() > end:
        gate("resume test-gate")
        raise SystemExit("it waits for the other one")
    b.poll(1000)
assert not a.aio_command_completed(slow)
gate("resume test-gate")
while not a.aio_command_completed(slow):
    a.poll(-1)'
	stops TERM
}

# Once the copy that is nobody's has been prefetched, no client needs the base.
prefetched()
{
	local dev before

	begin_serve make_image 4M
	base=$REPLY
	serve base="$base" per-client=true
	dev=$(member base_device "test-cow-$server-0")
	cowctl prefetch "test-cow-$server-0"
	before=$(sectors_read "$dev")
	clients '
a, b = connect(), connect()
a.pwrite(b"A" * 4096, 0)
assert a.pread(1 << 20, 0) == b"A" * 4096 + BASE[4096:]
assert b.pread(1 << 20, 0) == BASE
import json, subprocess
hits = [c["hits"] for c in json.loads(subprocess.check_output(["cowctl", "--json", "list"]))]
assert sorted(hits) == [0, (1 << 20) - 4096, 1 << 20], hits'
	is 'sectors read from the base' "$(sectors_read "$dev")" "$before"
	stops TERM
}

# What serves a client can be changed while it does.
set_served()
{
	local name

	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" per-export-name=true
	clients 'connect("a")'
	name=$(copies)
	clients '
import subprocess
def change(key):
    subprocess.check_call(["cowctl", "set", "'"$name"'", key])
a, b = connect("a"), connect("b")
change("limit=64K")
a.pwrite(b"A" * 65536, 0)
try:
    a.pwrite(b"A" * 4096, 65536)
    raise SystemExit("there was room")
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
b.pwrite(b"B" * 131072, 0)
change("limit=none")
a.pwrite(b"A" * 4096, 65536)
a.shutdown()
assert connect("a").pread(69632, 0) == b"A" * 69632'
	is 'the limit' "$(member limit "$name")" null
	stops TERM
}

# What is read ahead through a copy stays for all, if that is asked for.
read_ahead()
{
	local name

	begin_serve make_brd 4096
	base=$REPLY
	serve base="$base" cow-on-cache=true
	clients 'connect().pread(4096, 0)'
	name=$(copies)
	is 'cow-on-cache' "$(member cow_on_cache "$name")" true
	is 'cached' "$(member cached "$name")" 0
	dd if="/dev/mapper/$name" of=/dev/null bs=4k count=16 status=none
	between 'cached' "$(member cached "test-cow-$server-0")" 4096 4194304
	stops TERM
}

# fill_tmpfs: a client writes as much as fits there, and then a block
fill_tmpfs()
{
	local room

	# the thread sanitizer keeps 512 KiB of its own there
	room=$(stat -fc %a "$work/tmpfs")
	[ "$room" -ge 32 ]
	clients '
room = '"$room"' * 4096
a = connect()
a.pwrite(b"A" * room, 0)
try:
    a.pwrite(b"A" * 4096, room)
    raise SystemExit("there was room")
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
assert a.pread(1 << 20, 0) == b"A" * room + BASE[room:]'
}

# All that clients change is stored where TMPDIR says, and no more than fits there.
tmpdir()
{
	local plugin

	begin_serve make_brd 4096
	base=$REPLY
	make_tmpfs tmpfs -o size=768k
	TMPDIR=$work/tmpfs serve base="$base"
	fill_tmpfs
	is 'tmpfs' "$(member tmpfs "$(copies)")" "$work/tmpfs"
	stops TERM

	plugin=$(dirname "$(realpath "$(command -v cowctl)")")/nbdkit-nbdcow-plugin.so
	undo rm -f "$work"/{socket,socket.pid}
	TMPDIR=$work/tmpfs start_nbdkit "$work/socket" "$plugin" base="$base" name=test-cow
	socket=$work/socket fill_tmpfs
	is 'tmpfs' "$(member tmpfs "$(copies)")" "$work/tmpfs"
	stop_nbdkit "$(<"$work/socket.pid")"
	nothing_left
}

remove_left_over()
{
	! dmsetup info "$1" || dmsetup remove --retry "$1"
}

# Whatever ends the server, overlays go with it; what could be left, the next one takes away.
killed()
{
	local nbdkit sectors start id

	begin_serve make_brd 4096
	base=$REPLY
	sectors=$(blockdev --getsz "$base")
	serve base="$base" per-client=true
	clients '
import subprocess
a, b = connect(), connect()
a.pwrite(b"A" * 4096, 0)
subprocess.check_call(["pkill", "-KILL", "-x", "nbdkit", "-P", "'"$server"'"])'
	wait_until 20 overlays_are 0
	wait_until 20 test ! -d "/proc/$server"
	grep 'nbdkit was killed by signal 9' "$work/errors"
	nothing_left

	serve base="$base" per-client=true
	nbdkit=$(pgrep -x nbdkit -P "$server")
	kill -KILL "$server"
	wait_until 20 test ! -d "/proc/$nbdkit"
	wait_until 20 overlays_are 0
	wait_until 20 not dmsetup info "test-cow-$server-0"

	# killed just after it had made a device, which was not open yet: its own one ...
	id=$(stat -Lc %i /proc/self/ns/pid 2>/dev/null) || id=0
	dmsetup create test-cow-1-0 -u "NBDCOW-SERVER-$id-$server-1-0" \
		--table "0 $sectors nbdcow $base"
	undo remove_left_over test-cow-1-0
	# ... and those of clients
	dmsetup create test-cow-1-1 -u "NBDCOW-SERVER-$id-$nbdkit-1-0" \
		--table "0 $sectors nbdcow $base"
	undo remove_left_over test-cow-1-1
	dmsetup create test-cow-1-2 -u "NBDCOW-SERVER-$id-$nbdkit-2-0" --notable
	undo remove_left_over test-cow-1-2
	# one that is being made just now, and others that are none of its business
	start=$(sed 's/.*) //' /proc/$$/stat | cut -d ' ' -f 20)
	dmsetup create test-cow-1-3 -u "NBDCOW-SERVER-$id-$$-$start-0" \
		--table "0 $sectors nbdcow $base"
	undo dmsetup remove --retry test-cow-1-3
	dmsetup create test-cow-1-4 -u "NBDCOW-SERVER-4-$nbdkit-1-0" --table "0 $sectors nbdcow $base"
	undo dmsetup remove --retry test-cow-1-4
	dmsetup create test-cow-1-5 -u "NBDCOW-SERVER" --table "0 $sectors nbdcow $base"
	undo dmsetup remove --retry test-cow-1-5
	serve base="$base" per-client=true
	is 'what is left' "$(copies | sort | tr '\n' ' ')" 'test-cow-1-3 test-cow-1-4 test-cow-1-5 '
}

over_nbd()
{
	need nbdkit nbd-client
	begin_serve serve_image 4M
	base=$work/disk.img
	serve base="$REPLY" per-client=true
	clients '
a, b = connect(), connect()
a.pwrite(b"A" * 4096, 0)
assert b.pread(1 << 20, 0) == BASE and a.pread(4096, 0) == b"A" * 4096'
	stops TERM

	# the connection of one that was killed
	serve base="nbd+unix:///?socket=$work/socket" per-client=true
	kill -KILL "$server"
	wait_until 20 not pgrep -f "$run_dir/test-cow~serve.pid"
	is 'connections' "$(connected | wc -l)" 1
	serve base="nbd+unix:///?socket=$work/socket" per-client=true
	is 'connections' "$(connected | wc -l)" 1
	stops TERM
	image_is_unchanged
}

# learned PROCESSES: as many of cowctl are left
learned()
{
	[ "$(running_cowctls | wc -l)" = "$1" ]
}

# What the server of the base knows to be zero every client is told, also after all
# others have gone.
holes()
{
	local want='0+2097152:3 2097152+4096:0 2101248+1071640576:3'

	need nbdkit nbd-client nbdinfo
	begin_serve make_file sparse.img 1G
	printf x | dd of="$work/sparse.img" bs=1M seek=2 conv=notrunc status=none
	guard_sparse "$work/sparse.img"
	undo rm -f "$work"/{nbd,nbd.pid}
	start_nbdkit "$work/nbd" file "$work/sparse.img"
	serve base="nbd+unix:///?socket=$work/nbd" per-client=true
	# it waits for them, but only a moment
	wait_until 30 learned 1
	is 'the map' "$(map "$uri")" "$want"
	wait_until 20 overlays_are 0
	is 'the map after that' "$(map "$uri")" "$want"
	stops TERM
	serve base="nbd+unix:///?socket=$work/nbd" holes=false
	is 'the map without holes' "$(map "$uri")" '0+1073741824:0'
	stops TERM
}

# One that takes its time is not waited for, and not when it ends either.
slow_holes()
{
	need nbdkit nbd-client nbdinfo
	begin_serve :
	# gone only after who may still wait for it
	undo rm -f "$work"/{nbd,nbd.pid,go}
	start_nbdkit "$work/nbd" eval get_size='echo 1M' can_extents='exit 0' \
		pread="head -c \$3 /dev/zero | tr '\\0' x" \
		extents="while [ ! -e '$work/go' ]; do sleep 0.1; done
			echo '0 65536 zero'; echo '65536 983040'"
	undo touch "$work/go"
	serve base="nbd+unix:///?socket=$work/nbd" per-client=true
	is 'the map' "$(map "$uri")" '0+1048576:0'
	touch "$work/go"
	wait_until 30 learned 1
	is 'the map' "$(map "$uri")" '0+65536:3 65536+983040:0'
	stops TERM
	rm "$work/go"
	serve base="nbd+unix:///?socket=$work/nbd" per-client=true
	learned 2
	stops TERM
}

# A base that does not answer, in the middle of what a client reads, holds up nobody's end.
hanging_base()
{
	local hanging reader

	need nbdkit nbd-client
	begin_serve :
	dd if=/dev/urandom of="$work/disk.img" bs=1M count=4 status=none
	undo rm -f "$work"/{disk.img,nbd,nbd.pid}
	start_nbdkit "$work/nbd" -r file "$work/disk.img"
	hanging=$(<"$work/nbd.pid")
	serve base="nbd+unix:///?socket=$work/nbd"
	undo kill -CONT "$hanging"
	kill -STOP "$hanging"
	nbdsh -u "$uri" -c 'h.pread(65536, 1 << 20)' &
	reader=$!
	wait_until 20 waits_in_kernel
	stops TERM
	wait $reader && fail 'there was an answer'
	grep 'does not answer; its connection is ended' "$work/errors"
}

# A thread of nbdkit's waits for the base.
waits_in_kernel()
{
	grep -qs blkdev_direct_IO /proc/"$(pgrep -x nbdkit -P "$server")"/task/*/stack
}

# A copy that waits for its server, as the base of those of clients.
waiting_base()
{
	local reader

	need nbd-client
	begin_serve serve_image 4M
	cowctl create test-c2 base="$REPLY" on-base-error=queue
	serve base=/dev/mapper/test-c2 per-client=true
	kill_nbdkit "$work/socket" "$(member base_device test-c2)"
	nbdsh -u "$uri" -c 'h.pwrite(b"A" * 4096, 1 << 20)
image = open("'"$work/disk.img"'", "rb").read()
assert h.pread(65536, 1 << 20) == b"A" * 4096 + image[(1 << 20) + 4096:][:61440]' &
	reader=$!
	undo let_go test-c2
	wait_until 20 waiting 1 test-c2
	start_nbdkit "$work/socket" -r file "$work/disk.img"
	wait $reader
	kill "$server"
	wait "$server"
	cowctl remove test-c2
	nothing_left
}

# The sockets of systemd, which are open already and come with the environment.
activated()
{
	begin_serve make_brd 4096
	base=$REPLY
	undo rm -f "$work/s" "$work/errors"
	python3 -c '
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
if s.fileno() == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(s.fileno(), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])' "$work/s" \
		cowctl serve test-cow base="$base" per-client=true 2>"$work/errors" &
	server=$!
	undo stop_server "$server"
	wait_until 20 test -S "$work/s"
	socket=$work/s clients '
a, b = connect(), connect()
a.pwrite(b"A" * 4096, 0)
assert b.pread(1 << 20, 0) == BASE and a.pread(4096, 0) == b"A" * 4096'
	stops TERM
	LISTEN_FDS=1 LISTEN_PID=1 says 2 'max-clients=x' \
		cowctl serve test-cow base="$base" max-clients=x
}

tcp()
{
	need nbdcopy
	begin_serve make_brd 1024
	base=$REPLY
	serve base="$base" per-client=true port=10998
	is 'the address' "$(<"$work/served")" nbd://127.0.0.1:10998
	only_on_loopback
	undo rm -f "$work/out"
	nbdcopy nbd://127.0.0.1:10998 "$work/out"
	cmp "$work/out" "$base"
	stops HUP
}

# Ctrl-C reaches nbdkit, too, here one that does not get as far as to listen, and first.
interrupted_start()
{
	local rc=0 pid

	begin_serve make_brd 1024
	mkdir "$work/bin"
	undo rm -rf "$work/bin"
	ln -s "$(command -v sleep)" "$work/bin/slow"
	printf '#!/bin/sh\nexec "%s" 600\n' "$work/bin/slow" >"$work/bin/nbdkit"
	chmod +x "$work/bin/nbdkit"
	PATH=$work/bin:$PATH env --default-signal=INT setsid cowctl serve test-cow base="$REPLY" \
		2>"$work/stderr" &
	pid=$!
	wait_until 10 pgrep -x slow
	kill -STOP $pid
	kill -INT -- -$pid
	wait_until 10 not pgrep -x -r D,R,S,T,t slow
	kill -CONT $pid
	wait $pid || rc=$?
	is 'what it said' "$(<"$work/stderr")" ''
	is 'the status' $rc 130
	nothing_left
}

cannot_serve()
{
	begin_serve make_brd 1024
	base=$REPLY
	says 2 'base= is missing' cowctl serve test-cow
	says 2 'per-client=true excludes' cowctl serve test-cow base="$base" per-client=true \
		per-export-name=true
	says 2 'per-client=yes is neither' cowctl serve test-cow base="$base" per-client=yes
	says 2 'max-clients=0 is no number' cowctl serve test-cow base="$base" max-clients=0
	says 2 'max-clients=1K is no number' cowctl serve test-cow base="$base" max-clients=1K
	says 2 'limit=x is no size' cowctl serve test-cow base="$base" limit=x
	says 2 'excludes port=' cowctl serve test-cow base="$base" socket=/tmp/s port=1
	says 1 'cannot find base /no/such' cowctl serve test-cow base=/no/such
	fails cowctl serve test-cow base="$base" socket="$work/none/s" 2>"$work/stderr"
	grep 'cowctl: nbdkit has ended with status 1' "$work/stderr"
	serve base="$base" per-client=true
	says 4 'another serve of the name test-cow is running' cowctl serve test-cow base="$base"
	says 4 'is in use' cowctl serve test-cow2 base="$base" socket="$socket"
	cowctl create test-cow base="$base"
	says 4 'is in use' cowctl export test-cow
	cowctl remove test-cow
	stops TERM
	mkfs.ext2 -q "$base"
	unguard "$base"
	mkdir "$work/mnt"
	undo rmdir "$work/mnt"
	mount "$base" "$work/mnt"
	undo umount "$work/mnt"
	says 4 'is mounted on' cowctl serve test-cow base="$base"
}

run_tests \
	private_views 'an overlay for each client' \
	beside_a_copy 'another copy of the base does not hold up its end' \
	one_view 'one overlay for all clients' \
	export_names 'an overlay for each export name' \
	limits 'limits, and the most clients' \
	many_clients '64 clients at once' \
	coming_and_going 'clients that come and go under load' \
	prefetched 'a base that is prefetched is not read for clients' \
	set_served 'what serves a client is changed' \
	read_ahead 'what is read ahead stays' \
	tmpdir 'changes are stored in TMPDIR, by serve and by the plugin alone' \
	killed 'servers that are killed' \
	cache_requests 'cache requests of several clients' \
	over_nbd 'a base behind NBD' \
	holes 'clients are told the holes of the base' \
	slow_holes 'holes that are told late' \
	hanging_base 'a base that does not answer' \
	waiting_base 'a copy that waits for its server as the base' \
	activated 'sockets from systemd' \
	tcp 'a TCP port' \
	interrupted_start 'Ctrl-C while it starts' \
	cannot_serve 'what cannot be served'
