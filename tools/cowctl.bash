# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# Completion of cowctl's commands, names and keys for bash, taken from what
# cowctl says of itself.

_cowctl()
{
	local word=${COMP_WORDS[COMP_CWORD]} command='' line key values

	COMPREPLY=()
	for line in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
		# what is to be run may be anything
		[[ $command != wait || $line != -- ]] || { compopt -o default; return; }
		[[ $command || $line = -* ]] || command=$line
	done

	# bash takes = as a word of its own.
	if [[ $word = '=' ]]; then
		word='' key=${COMP_WORDS[COMP_CWORD - 1]}
	elif [[ ${COMP_WORDS[COMP_CWORD - 1]} = '=' ]]; then
		key=${COMP_WORDS[COMP_CWORD - 2]}
	fi
	if [[ $key ]]; then
		[[ $key =~ ^[a-z-]+$ ]] || return
		values=$(cowctl help "$command" 2>/dev/null | sed -n "s/^  $key=\([^ ]*\).*/\1/p")
		case $values in
		BASE|PATH|FILE*)
			compopt -o filenames
			mapfile -t COMPREPLY < <(compgen -f -- "$word")
			;;
		*[a-z]*)
			mapfile -t COMPREPLY < <(compgen -W "${values//[|A-Z]/ }" -- "$word")
			;;
		esac
		return
	fi
	if [[ ! $command || $command = help ]]; then
		values=$(cowctl --help | sed -n 's/^  \([a-z]*\)  .*/\1/p')
		mapfile -t COMPREPLY < <(compgen -W "$values --help --version" -- "$word")
		return
	fi
	if [[ $word = -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W '--json --help --prometheus --watch' -- "$word")
		return
	fi
	while read -r line; do
		key=${line%%=*}=
		[[ $key != "$word"* ]] || COMPREPLY+=("$key")
	done < <(cowctl help "$command" 2>/dev/null | sed -n 's/^  \([a-z-]*=\).*/\1/p')
	if [[ $command = diff || $command = load ]]; then
		compopt -o filenames
		mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$word")
	fi
	if [[ ${COMP_WORDS[COMP_CWORD - 1]} = "$command" && ! $command =~ ^(create|list|top)$ ]]; then
		for line in /dev/mapper/*; do
			line=${line##*/}
			[[ $line != "$word"* || $line = control ]] || COMPREPLY+=("$line")
		done
	fi
	[[ ${COMPREPLY[0]:-} != *= || ${#COMPREPLY[@]} != 1 ]] || compopt -o nospace
}
complete -F _cowctl cowctl
