#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# If this fails, clients of an export by nbdkit's plugin read or lose something else
# than the device holds, or are told nonsense about its holes, sizes and abilities.

. "$(dirname "$0")/cowctl-common.sh"

[[ $(uname -r) != 6.1.* ]] || under address

# begin_export KIB [key=value...]: a copy of a RAM disk, exported; its address is $uri
begin_export()
{
	local kib=$1

	shift
	need nbdkit nbdinfo nbdsh
	begin make_brd "$kib"
	cowctl create test-cow base="$REPLY" "$@"
	cowctl export test-cow server=nbdcow
	uri="nbd+unix:///?socket=$run_dir/test-cow.sock"
}

# client PYTHON: with a connection h
client()
{
	nbdsh -u "$uri" -c 'h.set_strict_mode(0)' -c "$1"
}

# cached: blocks in the cache of the base
cached()
{
	dmsetup status test-cow | awk '{ print $11 + 0 }'
}

# has_cached BLOCKS: or more; nothing says how far ahead it reads
has_cached()
{
	[ "$(cached)" -ge "$1" ]
}

abilities()
{
	begin_export 4096
	nbdinfo --json "$uri" >"$work/info"
	is 'what it can' "$(jq -c '.exports[0] | [.can_cache, .can_df, .can_fast_zero, .can_flush,
		.can_fua, .can_multi_conn, .can_trim, .can_zero, .is_read_only, .is_rotational]' \
		"$work/info")" '[true,true,true,true,true,true,true,true,false,false]'
	is 'its sizes' "$(jq -c '.exports[0] | [."export-size", .block_minimum, .block_preferred,
		.block_maximum, .block_size_minimum, .block_size_preferred, .block_size_maximum] |
		map(select(.))' "$work/info")" '[4194304,512,4096,67108864]'
	rm "$work/info"
}

extents()
{
	local want

	begin_export 65536 size=65M
	is 'past the base there is nothing' "$(map "$uri")" '0+67108864:0 67108864+1048576:3'
	client '
h.trim(1 << 20, 4 << 20)
h.pwrite(b"A" * 8192, (4 << 20) + 65536)
h.trim(9000, (8 << 20) + 100)
h.pwrite(b"A" * 4096, 64 << 20)'
	want='0+4194304:0 4194304+65536:3 4259840+8192:0 4268032+974848:3 5242880+3149824:0 '
	want+='8392704+4096:3 8396800+58716160:0 67112960+1044480:3'
	is 'the map' "$(map "$uri")" "$want"
	# of the overlay and of the base is not told apart, nor are the two kinds of holes
	dmsetup message test-cow 0 holes 4096 16 4112 16
	client '
def show(metacontext, offset, entries, error):
    print(offset, entries)
    return 0
h2 = nbd.NBD()
h2.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h2.connect_uri("'"$uri"'")
h2.block_status(1 << 20, (16 << 20) - 512, show)
h2.block_status(4096, 16 << 20, show, nbd.CMD_FLAG_REQ_ONE)
h2.block_status(512, (64 << 20) + 4096 - 512, show)' >"$work/out"
	undo rm -f "$work/out"
	is 'block status' "$(tr '\n' ' ' <"$work/out")" \
		"16776704 [512, 0, 131072, 3, 916992, 0] 16777216 [4096, 3] 67112448 [512, 0] "
	cowctl reset test-cow force=true
	is 'after a reset' "$(map "$uri")" \
		'0+16777216:0 16777216+131072:3 16908288+50200576:0 67108864+1048576:3'
}

# More runs than the kernel tells at once.
many_extents()
{
	begin_export 65536
	dd if=/dev/zero of=/dev/mapper/test-cow bs=1M count=32 oflag=direct status=none
	client '
for block in range(0, 8192, 2):
    h.trim(4096, block * 4096)'
	is 'the number of runs' "$(map "$uri" | wc -w)" 8192
	is 'the holes' "$(nbdinfo --map --totals "$uri" | sed 's/\x1b\[[0-9;]*m//g' |
		awk '$3 == 3 || $2 == "25.0%" { print $1 }' | head -n 1)" $((4096 * 4096))
}

# reads what writes wrote, and nothing else has changed, whatever the alignment
odd_requests()
{
	begin_export 4096
	client '
import random
random.seed(4)
size = h.get_size()
want = bytearray(h.pread(size, 0))
for i in range(300):
    count = random.choice([1, 100, 511, 512, 513, 4096, 5000, 16000, 70000, 300000])
    offset = random.randrange(0, size - count)
    kind = random.randrange(4)
    if kind == 0:
        data = random.randbytes(count)
        h.pwrite(data, offset, nbd.CMD_FLAG_FUA if i % 2 else 0)
        want[offset:offset + count] = data
    elif kind < 3:
        h.zero(count, offset, [0, nbd.CMD_FLAG_NO_HOLE][kind - 1])
        want[offset:offset + count] = bytes(count)
    got = h.pread(count, offset)
    assert got == want[offset:offset + count], (i, kind, count, offset)
for offset in range(0, size, 1 << 20):
    assert h.pread(1 << 20, offset) == want[offset:offset + (1 << 20)], offset
h.pwrite(bytes(512), size - 512)
try:
    h.pwrite(bytes(512), size - 511)
    raise SystemExit("wrote past the end")
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
open("'"$work"'/want", "wb").write(want[:-512] + bytes(512))'
	undo rm -f "$work/want"
	# others, who use the page cache, see it too
	cmp "$work/want" /dev/mapper/test-cow
}

# Of a sparse base nothing is read but its data, and the copy is as sparse.
# SPARSE_MIB tells how much data there is.
sparse_copy()
{
	local mib=${SPARSE_MIB:-64} dev before start bytes end

	need nbdkit nbd-client nbdinfo nbdcopy
	begin make_file sparse.img 102400M
	dd if=/dev/urandom of="$work/sparse.img" bs=1M seek=50000 count="$mib" conv=notrunc \
		status=none
	guard_sparse "$work/sparse.img"
	undo rm -f "$work"/{socket,socket.pid,out}
	start_nbdkit "$work/socket" file "$work/sparse.img"
	undo sweep
	cowctl create test-cow base="nbd+unix:///?socket=$work/socket"
	wait_until 30 idle
	cowctl export test-cow server=nbdcow
	uri="nbd+unix:///?socket=$run_dir/test-cow.sock"
	start=$((50000 << 20)) bytes=$((mib << 20)) end=$(((50000 + mib) << 20))
	is 'the map' "$(map "$uri")" \
		"0+$start:3 $start+$bytes:0 $end+$(((102400 << 20) - end)):3"
	dev=$(member base_device test-cow)
	before=$(sectors_read "$dev")
	nbdcopy "$uri" null:
	is 'sectors read' $(($(sectors_read "$dev") - before)) $((mib * 2048))
	nbdcopy "$uri" "$work/out"
	is 'the size of the copy' "$(stat -c %s "$work/out")" $((102400 << 20))
	between 'what is allocated of it in KiB' "$(du -k "$work/out" | cut -f 1)" \
		$((mib << 10)) $(((mib << 10) + 64))
	cmp -i "$start" -n "$bytes" "$work/sparse.img" "$work/out"
}

# A device that ends within a block, and within a page.
odd_sizes()
{
	need nbdkit nbdinfo nbdsh
	begin make_brd 1024
	make_cow test-cow 2043 "$REPLY"
	cowctl export test-cow server=nbdcow
	undo cowctl unexport test-cow
	uri="nbd+unix:///?socket=$run_dir/test-cow.sock"
	is 'the map' "$(map "$uri")" '0+1046016:0'
	client '
size = h.get_size()
assert size == 2043 * 512, size
last = size - size % 4096
h.pwrite(b"E" * 512, size - 512)
assert h.pread(512, size - 512) == b"E" * 512
h.zero(size - last, last)
assert h.pread(size - last, last) == bytes(size - last)
h.trim(last, 0)
assert h.pread(4096, 0) == bytes(4096)'
	# the last block is not a whole one: what was written to it stays
	is 'the map' "$(map "$uri")" '0+1044480:3 1044480+1536:0'
}

zeroes()
{
	begin_export 16384
	client '
h.zero(1 << 20, 0)
h.zero(1 << 20, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.zero(1 << 20, 2 << 20, nbd.CMD_FLAG_NO_HOLE)
try:
    h.zero(1 << 20, 3 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    raise SystemExit("not faster than to write, and done nevertheless")
except nbd.Error as e:
    assert e.errno == "ENOTSUP", e
assert h.pread(3 << 20, 0) == bytes(3 << 20)
assert h.pread(4096, 3 << 20) != bytes(4096)'
	is 'holes, but not where none is wanted' "$(map "$uri")" '0+2097152:3 2097152+14680064:0'
	is 'used' "$(member used test-cow)" 1048576
}

# Who writes is told that there is no room, at once.
no_space()
{
	begin_export 16384 limit=64K
	client '
h.pwrite(b"A" * 65536, 0)
for call in (lambda: h.pwrite(b"B" * 4096, 65536),
             lambda: h.zero(4096, 65536, nbd.CMD_FLAG_NO_HOLE),
             lambda: h.pwrite(b"B" * 300, 65536)):
    try:
        call()
        raise SystemExit("there was room")
    except nbd.Error as e:
        assert e.errno == "ENOSPC", e
h.flush()
assert h.pread(65536, 0) == b"A" * 65536
h.pwrite(b"C" * 65536, 0)
h.zero(4096, 65536)
h.trim(4096, 0)
h.pwrite(b"B" * 4096, 131072)
assert h.pread(4096, 131072) == b"B" * 4096'
	is 'refused' "$(member writes_refused test-cow)" 3
}

# One view for all connections, other users of the device, and after a reset.
one_view()
{
	begin_export 4096
	client '
import os, subprocess
a = nbd.NBD()
a.connect_uri("'"$uri"'")
base = h.pread(65536, 0)
a.pwrite(b"A" * 4096, 0)
assert h.pread(4096, 0) == b"A" * 4096
f = os.open("/dev/mapper/test-cow", os.O_RDWR)
assert os.pread(f, 4096, 0) == b"A" * 4096
h.pwrite(b"B" * 4096, 0)
assert os.pread(f, 4096, 0) == b"B" * 4096
os.pwrite(f, b"C" * 4096, 4096)
assert a.pread(4096, 4096) == b"C" * 4096
a.trim(8192, 0)
assert os.pread(f, 8192, 0) == bytes(8192)
os.close(f)
subprocess.check_call(["cowctl", "reset", "test-cow", "force=true"])
assert h.pread(65536, 0) == base and a.pread(65536, 0) == base'
}

# What was asked to be cached is, when the answer has come; then the base is not read.
cache_requests()
{
	begin_export 65536
	client '
under_way = [h.aio_cache(1 << 20, i << 20) for i in range(8)]
while under_way:
    h.poll(-1)
    under_way = [c for c in under_way if not h.aio_command_completed(c)]
h.cache(512, (32 << 20) + 4096)'
	is 'cached blocks' "$(cached)" $((8 * 256 + 1))
	dmsetup status test-cow | awk '{ print $16 }' >"$work/before"
	undo rm -f "$work/before"
	client 'h.pread(8 << 20, 0)'
	is 'read from the base' "$(dmsetup status test-cow | awk '{ print $16 }')" \
		"$(<"$work/before")"
	is 'used' "$(member used test-cow)" 0
}

# Beside a prefetch of somebody else's a request waits for nothing, and reads nothing in vain.
cache_beside_a_prefetch()
{
	begin_export 65536
	# the first 1 MiB, then for 1024 seconds nothing
	dmsetup message test-cow 0 prefetch 0 1024 1
	wait_until 10 has_cached 256
	dmsetup status test-cow | awk '{ print $16 }' >"$work/before"
	undo rm -f "$work/before"
	client 'h.cache(1 << 20, 32 << 20)'
	is 'read from the base' "$(dmsetup status test-cow | awk '{ print $16 }')" \
		"$(<"$work/before")"
	dmsetup message test-cow 0 cow_on_cache on
	client 'h.cache(65536, 32 << 20)'
	wait_until 10 has_cached 272
	dmsetup message test-cow 0 prefetch stop
	client 'h.cache(1 << 20, 48 << 20)'
	has_cached 528
}

# Whoever writes a part of a sector leaves alone what others write in it meanwhile.
parts_of_sectors()
{
	begin_export 4096
	client '
a, b = h, nbd.NBD()
b.set_strict_mode(0)
b.connect_uri("'"$uri"'")
for i in range(1, 31):
    data = [nbd.Buffer.from_bytearray(bytearray([n]) * 256) for n in (i, 255 - i)]
    under_way = []
    for sector in range(32):
        under_way.append((a, a.aio_pwrite(data[0], sector * 512)))
        under_way.append((b, b.aio_pwrite(data[1], sector * 512 + 256)))
    while under_way:
        for c in a, b:
            if c.aio_in_flight():
                c.poll(1)
        under_way = [(c, n) for c, n in under_way if not c.aio_command_completed(n)]
    want = (bytes([i]) * 256 + bytes([255 - i]) * 256) * 32
    assert h.pread(16384, 0) == want, "a part is lost"'
}

# Connections see the size that the device had when they were made.
growth()
{
	begin_export 4096
	client '
import subprocess
subprocess.check_call(["cowctl", "set", "test-cow", "size=8M"])
assert h.get_size() == 4 << 20
h.pwrite(b"A" * 512, 0)
b = nbd.NBD()
b.connect_uri("'"$uri"'")
assert b.get_size() == 8 << 20
assert b.pread(512, 0) == b"A" * 512 and b.pread(4096, 6 << 20) == bytes(4096)
b.pwrite(b"B" * 512, 6 << 20)'
	is 'the map' "$(map "$uri")" '0+4194304:0 4194304+2097152:3 6291456+4096:0 6295552+2093056:3'
}

# nbdkit by hand
plugin()
{
	local plugin

	plugin=$(dirname "$(realpath "$(command -v cowctl)")")/nbdkit-nbdcow-plugin.so
	[ -e "$plugin" ] || skip 'needs the plugin'
	nbdkit "$plugin" "$@"
}

# refuses PATTERN ARGUMENT...
refuses()
{
	local pattern=$1

	shift
	fails plugin -f -U "$work/s" "$@" 2>"$work/stderr"
	cat "$work/stderr"
	grep -q "$pattern" "$work/stderr" || fail "said nothing about '$pattern'"
}

by_hand()
{
	need nbdkit nbdinfo
	begin make_brd 1024
	undo rm -f "$work/s" "$work/stderr"
	refuses 'there is no device test-cno' test-cno
	refuses 'per-client and per-export-name' base="$REPLY" per-client=1 per-export-name=1
	refuses 'per-client= is for overlays .* need base=' per-client=1
	refuses 'limit= is for overlays' limit=1G
	refuses 'cannot find base\|No such file' base=/no/such
	refuses 'is no block device' base="$work"
	refuses 'limit=x is no size' base="$REPLY" limit=x
	refuses 'max-clients=0' base="$REPLY" max-clients=0
	refuses 'unknown parameter colour' colour=red
	cowctl create test-cow base="$REPLY"
	# shellcheck disable=SC2016 # it is the variable of nbdkit's shell
	plugin -U - test-cow --run 'nbdinfo --json "$uri"' | jq -e '.exports[0].is_read_only == false'
	# shellcheck disable=SC2016
	plugin -r -U - test-cow --run 'nbdinfo --json "$uri"' | jq -e '.exports[0].is_read_only'
}

# export takes the plugin when it is there, else nbdkit's own.
servers()
{
	local cowctl plugins

	need nbdkit nbdsh
	begin make_brd 1024
	cowctl create test-cow base="$REPLY" cow-on-cache=true
	cowctl export test-cow
	is 'the server' "$(member export.server test-cow)" nbdcow
	cowctl unexport test-cow
	cowctl export test-cow server=nbdkit
	is 'the server' "$(member export.server test-cow)" nbdkit
	# what is to be cached is read ahead
	nbdsh -u "nbd+unix:///?socket=$run_dir/test-cow.sock" -c 'h.cache(65536, 131072)'
	wait_until 10 has_cached 16
	cowctl unexport test-cow
	plugins=$(pkg-config nbdkit --variable=plugindir)
	[ ! -e "$plugins/nbdkit-nbdcow-plugin.so" ] ||
		skip 'it is installed, too'
	cowctl=$(realpath "$(command -v cowctl)")
	cp "$cowctl" "$work/alone"
	undo rm "$work/alone"
	"$work/alone" export test-cow
	is 'the server' "$(member export.server test-cow)" nbdkit
	"$work/alone" unexport test-cow
	says 6 'plugin nbdcow is not installed' "$work/alone" export test-cow server=nbdcow
	says 6 'plugin nbdcow is not installed' "$work/alone" serve test-cow base="$REPLY"
	# among those of nbdkit
	undo rm -r "$work/plugins"
	mkdir "$work/plugins"
	cp "${cowctl%/*}/nbdkit-nbdcow-plugin.so" "$work/plugins"
	# shellcheck disable=SC2016 # it is the script's
	unshare -m bash -ec 'mount --bind "$1" "$2"
		"$3" export test-cow' - "$work/plugins" "$plugins" "$work/alone"
	is 'the server' "$(member export.server test-cow)" nbdcow
	cowctl unexport test-cow
}

run_tests \
	abilities 'abilities and block sizes' \
	extents 'extents before and after trims, writes and a reset' \
	many_extents 'more extents than the kernel tells at once' \
	odd_requests 'requests of any size and alignment' \
	sparse_copy 'a sparse base is copied as such' \
	odd_sizes 'a device that ends within a block' \
	zeroes 'zeroes: fast ones, and those that must not be holes' \
	no_space 'a full overlay, told to the one who writes' \
	one_view 'one view for connections, the device and after a reset' \
	cache_requests 'cache requests' \
	cache_beside_a_prefetch 'cache requests beside a prefetch of somebody else' \
	parts_of_sectors 'two clients write different parts of a sector' \
	growth 'a device that grows' \
	by_hand 'nbdkit with the plugin, and wrong parameters' \
	servers 'which server export takes'
