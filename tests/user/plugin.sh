#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# nbdkit's plugin builds with the sanitizers, and nbdkit loads it. The tests of the
# plugin and of serve run it so where they say "under".

# shellcheck source=tests/user/tap.sh
. "$(dirname "$0")/tap.sh"

# The programs that nbdkit starts are none of ours.
make_guard()
{
	echo '#include <stdlib.h>
		__attribute__((constructor)) static void loaded(void) { unsetenv("LD_PRELOAD"); }' |
		gcc -fPIC -c -x c -o "$out/guard.o" -
}

# build NAME LIBRARY SANITIZERS: the plugin, and beside it an nbdkit that takes it instead
# of another one. What is found is written to files that begin with $SANITIZER_LOG.
build()
{
	local dir=$out/$1 library nbdkit

	nbdkit=$(command -v nbdkit) || return
	library=$(gcc -print-file-name="$2.so")
	# Ended after the sanitizer's, it waits for a lock for ever, with any plugin.
	library+=$(ldd "$nbdkit" | awk '/libp11-kit/ { print ":" $3 }')
	rm -rf "$dir"
	make_guard && make -s plugin B="build/user/plugin/$1" LDFLAGS="$out/guard.o -Wl,-z,nodelete" \
		CFLAGS="-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$3" ||
		return
	# nbdkit closes no handles when it is told to end
	echo 'leak:nbdcow_open' >"$dir/suppressions"
	cat >"$dir/nbdkit" <<-END
		#!/bin/bash
		declare -a args run=($nbdkit)
		for arg; do
			if [[ \$arg = */nbdkit-nbdcow-plugin.so ]]; then
				arg=$dir/nbdkit-nbdcow-plugin.so
				run=(setarch -R env LD_PRELOAD=$library $nbdkit)
			fi
			args+=("\$arg")
		done
		options=log_path=\${SANITIZER_LOG:-stderr}
		export ASAN_OPTIONS=\$options UBSAN_OPTIONS=\$options TSAN_OPTIONS=\$options
		export LSAN_OPTIONS=suppressions=$dir/suppressions:print_suppressions=0
		exec "\${run[@]}" "\${args[@]}"
	END
	chmod +x "$dir/nbdkit"
	"$dir/nbdkit" --dump-plugin "$dir/nbdkit-nbdcow-plugin.so"
}

# check NAME LIBRARY SANITIZERS
check()
{
	build "$@" >"$out/log" 2>&1
	result $? "the plugin builds and loads with the sanitizers $3" "$out/log"
}

check address libasan address,undefined
check thread libtsan thread
finish
