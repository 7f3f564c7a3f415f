#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# A rare meeting of requests would lose data: tests/model/overlay.pml, in every
# interleaving, and whether spin notices when a protection is missing.
#
# MODEL_LONG=1 adds runs of some minutes and gigabytes.

# shellcheck source=tests/user/tap.sh
. "$(dirname "$0")/tap.sh"

model=$top/tests/model/overlay.pml
tab=$'\t'

# verify NAME OPTIMIZATION -DNAME=VALUE...: makes and runs a verifier in $out/NAME
verify()
{
	local dir=$out/$1 optimization=$2

	shift 2
	rm -rf "$dir"
	mkdir -p "$dir"
	cd "$dir" || return
	spin "$@" -a "$model" >log 2>&1 &&
		"${CC:-gcc}" "$optimization" -w -DSAFETY -DCOLLAPSE -DMEMLIM=3800 -o pan pan.c \
			>>log 2>&1 &&
		./pan -m100000 -w24 >>log 2>&1
	cd "$top" || return
}

# What the verifier says of itself: states, seconds.
numbers()
{
	sed -n 's/^ *\([0-9]*\) states, stored$/\1 states/p
		s/^pan: elapsed time \(.*\) seconds$/\1 s/p' "$out/$1/log" | paste -sd ,
}

# holds NAME TITLE -DNAME=VALUE...: nothing is wrong, and nothing was left out
holds()
{
	local name=$1 title=$2

	shift 2
	verify "$name" -O2 "$@" && grep -q 'errors: 0$' "$out/$name/log" &&
		! grep -qE 'search not completed|max search depth' "$out/$name/log"
	result $? "$title" "$out/$name/log"
	echo "# $(numbers "$name")"
}

# found NAME -DNAME=VALUE...: without that protection something goes wrong
found()
{
	local name=$1

	shift
	verify "$name" -O0 -DMUTANT="$name" "$@"
	grep -q '^pan:1: assertion violated' "$out/$name/log" &&
		grep -q 'errors: 1$' "$out/$name/log"
	result $? "$name is noticed" "$out/$name/log"
	echo "# $(numbers "$name")"
}

if ! command -v spin >/dev/null; then
	skipped 'the model' 'needs spin'
	finish
fi

three=(-DMEMORY=0)
two=(-DOPS2=0)
holds two 'two clients, and allocations that fail' "${two[@]}" -DFAIL=1
holds three 'three clients' "${three[@]}"
# reads, partial writes, discards
holds swapped 'three clients on one layer, while memory is short' -DLAYERS=1 -DKINDS=21
# two reads; growth; a discard and a partial write
growth=(-DMEMORY=0 -DOPS0=2 -DOPS2=2 -DKIND1=0 -DKIND2=0 -DKIND3=6 -DKIND4=4 -DKIND5=2)
holds growth 'five operations around growth' "${growth[@]}"
if [ -n "${MODEL_LONG:-}" ]; then
	holds long1 'three clients on one layer, everything, while memory is short' -DLAYERS=1
	holds long2 'two operations each of two clients' "${two[@]}" -DMEMORY=0 -DOPS0=2 -DOPS1=2
fi

# Whatever the model can do without, with two clients unless it takes more.
while read -r mutant; do
	options=("${two[@]}")
	case $mutant in
	# a read, a partial write and a reset
	NO_LOOK|LAYER_TWICE)
		options=("${three[@]}" -DKIND1=0 -DKIND2=2 -DKIND3=5) ;;
	# two reads; a discard and a partial write
	LOOK_BEFORE_FIND)
		options=("${two[@]}" -DMEMORY=0 -DOPS0=2 -DOPS1=2 -DKIND1=0 -DKIND2=0 -DKIND3=4
			-DKIND4=2) ;;
	GRACE_UNLOCKED)
		options=("${growth[@]}") ;;
	esac
	found "$mutant" "${options[@]}"
done < <(sed -n "/^#define NO_SECOND_LOOK/,/^#ifndef MUTANT/s/^#define \([A-Z_]*\)[ $tab].*/\1/p" \
	"$model")
finish
