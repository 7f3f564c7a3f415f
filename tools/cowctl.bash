# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# Completion of cowctl's commands, names and keys for bash, taken from what
# cowctl says of itself.

_cowctl()
{
	local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
	local command='' line key values usage

	COMPREPLY=()
	for line in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
		# what is to be run may be anything
		if [[ $command = wait && $line = -- ]]; then
			compopt -o default
			[[ $previous != -- ]] || mapfile -t COMPREPLY < <(compgen -c -- "$word" | sort -u)
			return
		fi
		[[ $command || $line = -* ]] || command=$line
	done
	if [[ ! $command || $command = help ]]; then
		values=$(cowctl --help | sed -n 's/^  \([a-z]*\)  .*/\1/p')
		mapfile -t COMPREPLY < <(compgen -W "$values --help --version --json" -- "$word")
		return
	fi
	usage=$(cowctl help "$command" 2>/dev/null)

	# bash takes = as a word of its own.
	if [[ $word = '=' ]]; then
		word='' key=$previous
	elif [[ $previous = '=' ]]; then
		key=${COMP_WORDS[COMP_CWORD - 2]}
	fi
	if [[ $key ]]; then
		[[ $key =~ ^[a-z-]+$ ]] || return
		values=$(sed -n "s/^  $key=\([^ ]*\).*/\1/p" <<<"$usage")
		if [[ $values =~ BASE|PATH|FILE ]]; then
			compopt -o filenames
			mapfile -t COMPREPLY < <(compgen -f -- "$word")
		fi
		# in capitals is what stands for something
		values=${values%%[A-Z]*}
		mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -W "${values//|/ }" -- "$word")
		return
	fi
	if [[ $word = -* ]]; then
		values='--json --help'
		[[ $command != status ]] || values+=' --prometheus --watch'
		mapfile -t COMPREPLY < <(compgen -W "$values" -- "$word")
		return
	fi
	values=$(sed -n 's/^  \([a-z-]*=\).*/\1/p' <<<"$usage")
	[[ $usage != *' [stop]'* ]] || values+=' stop'
	mapfile -t COMPREPLY < <(compgen -W "$values" -- "$word")
	if [[ $command = diff || $command = load || ( $word = */* && $values = *base=* ) ]]; then
		compopt -o filenames
		mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$word")
	fi
	if [[ $previous = "$command" && ! $command =~ ^(create|serve|list|top)$ ]]; then
		# not for compgen -W, which would run what a name may have in it
		while read -r line; do
			printf -v line %q "${line%%  *}"
			[[ $line != "$word"* ]] || COMPREPLY+=("$line")
		done < <(cowctl list 2>/dev/null | sed 1d)
	fi
	[[ ${COMPREPLY[0]:-} != *= || ${#COMPREPLY[@]} != 1 ]] || compopt -o nospace
}
complete -F _cowctl cowctl
