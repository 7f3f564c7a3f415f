#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# A rare meeting of requests would lose data: the models in tests/model, in every
# interleaving, and whether spin notices when a protection is missing.
#
# MODEL_LONG=1 adds runs of some minutes and gigabytes.

# shellcheck source=tests/user/tap.sh
. "$(dirname "$0")/tap.sh"

tab=$'\t'

# verify NAME OPTIMIZATION -DNAME=VALUE...: makes and runs a verifier of $model in
# $out/$model-NAME
verify()
{
	local dir=$out/$model-$1 optimization=$2

	shift 2
	rm -rf "$dir"
	mkdir -p "$dir"
	cd "$dir" || return
	spin "$@" -a "$top/tests/model/$model.pml" >log 2>&1 &&
		"${CC:-gcc}" "$optimization" -w -DSAFETY -DCOLLAPSE -DMEMLIM=3800 -o pan pan.c \
			>>log 2>&1 &&
		./pan -m100000 -w24 >>log 2>&1
	cd "$top" || return
}

# What the verifier says of itself: states, seconds.
numbers()
{
	sed -n 's/^ *\([0-9]*\) states, stored$/\1 states/p
		s/^pan: elapsed time \(.*\) seconds$/\1 s/p' "$out/$model-$1/log" | paste -sd ,
}

# holds NAME TITLE -DNAME=VALUE...: nothing is wrong, and nothing was left out
holds()
{
	local name=$1 title=$2

	shift 2
	verify "$name" -O2 "$@" && grep -q 'errors: 0$' "$out/$model-$name/log" &&
		! grep -qiE 'search not completed|max search depth' "$out/$model-$name/log"
	result $? "$model: $title" "$out/$model-$name/log"
	echo "# $(numbers "$name")"
}

# found NAME -DNAME=VALUE...: without that protection something goes wrong
found()
{
	local name=$1

	shift
	verify "$name" -O0 -DMUTANT="$name" "$@"
	grep -q '^pan:1: assertion violated' "$out/$model-$name/log" &&
		grep -q 'errors: 1$' "$out/$model-$name/log"
	result $? "$model: $name is noticed" "$out/$model-$name/log"
	echo "# $(numbers "$name")"
}

# What the model can do without.
mutants()
{
	sed -n "1,/^#ifndef MUTANT/s/^#define \([A-Z_]*\)[ $tab].*/\1/p" "$top/tests/model/$model.pml"
}

if ! command -v spin >/dev/null; then
	skipped 'the model' 'needs spin'
	finish
fi

model=overlay
three=(-DMEMORY=0)
two=(-DOPS2=0)
holds two 'two clients, and allocations that fail' "${two[@]}" -DFAIL=1
holds three 'three clients' "${three[@]}"
# reads, partial writes, discards
holds swapped 'three clients on one layer, while memory is short' -DLAYERS=1 -DKINDS=21
# two reads; growth; a discard and a partial write
growth=(-DMEMORY=0 -DOPS0=2 -DOPS2=2 -DKIND1=0 -DKIND2=0 -DKIND3=6 -DKIND4=4 -DKIND5=2)
holds growth 'five operations around growth' "${growth[@]}"
# a read, a write and a reset
neighbour=(-DMEMORY=0 -DLAYERS=2 -DNEIGHBOUR=1 -DKIND1=0 -DKIND2=1 -DKIND3=5)
holds neighbour 'another block of the same large page' "${neighbour[@]}"
if [ -n "${MODEL_LONG:-}" ]; then
	holds long1 'three clients on one layer, everything, while memory is short' -DLAYERS=1
	holds long2 'two operations each of two clients on one layer' "${two[@]}" -DLAYERS=1 \
		-DMEMORY=0 -DOPS0=2 -DOPS1=2
fi

# With two clients unless it takes more.
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
	NO_LAST_LOOK)
		options=("${neighbour[@]}") ;;
	GRACE_UNLOCKED)
		options=("${growth[@]}") ;;
	esac
	found "$mutant" "${options[@]}"
done < <(mutants)

model=view
holds view 'a view and two clients'
holds view_kept 'a view that is not lost' -DFAIL=0
[ -z "${MODEL_LONG:-}" ] ||
	holds long3 'a view and three writers' -DCLIENTS=3 -DFAIL=0 -DLAST_KIND=WRITE
while read -r mutant; do
	found "$mutant"
done < <(mutants)

model=cache
holds cache 'two clients'
# what nobody disturbs
quiet=(-DADDERS=0 -DERRORS=0 -DFAIL=0 -DDROPS=0 -DTABLES=1)
holds once 'three clients that read the base once' "${quiet[@]}" -DCLIENTS=3
[ -z "${MODEL_LONG:-}" ] || holds long4 'three clients and a base that fails' -DCLIENTS=3 \
	-DADDERS=0 -DFAIL=0 -DDROPS=0 -DTABLES=1
while read -r mutant; do
	options=()
	[ "$mutant" != NO_STALE ] || options=("${quiet[@]}")
	found "$mutant" "${options[@]}"
done < <(mutants)
finish
