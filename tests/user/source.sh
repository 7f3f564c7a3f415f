#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# The sources build with warnings as errors and are as clean as the kernel's
# own checkers can tell. KERNELS are the kernels to build for.

. "$(dirname "$0")/tap.sh"

# They prefer what only the kernel has.
in_user_space=PREFER_KERNEL_TYPES,PREFER_DEFINED_ATTRIBUTE_MACRO,ARRAY_SIZE,CAMELCASE
in_user_space+=,STATIC_CONST_CHAR_ARRAY,EMBEDDED_FUNCTION_NAME

# Everything anew: the compiler and sparse say each thing only once.
build_module()
{
	local tree=build/kernels/$1 release

	tests/vm/kernels "$1" && release=$(<"$tree/release") || return
	rm -rf "build/check/modules/$release"
	make -s module B=build/check WERROR=1 KDIR="$PWD/$tree/lib/modules/$release/build"
}

build_rest()
{
	rm -rf build/check/{cowctl,tools,tests}
	make -s tool test-helpers B=build/check WERROR=1
}

# checkpatch IGNORE FILE...
checkpatch()
{
	local ignore=$1

	shift
	tests/vm/kernels checkpatch || return
	# it leaves a file where it runs
	(cd "$out" && perl "$top/build/kernels/checkpatch/checkpatch.pl" -q --no-tree --no-summary \
		--strict --terse --show-types --ignore "$ignore" -f "${@/#/$top/}")
}

only_compat_knows_versions()
{
	! grep -rn -e LINUX_VERSION_CODE -e KERNEL_VERSION kernel tools --include='*.[ch]' |
		grep -v '^kernel/compat\.h:'
}

every_file_has_a_licence()
{
	local without

	without=$(grep -rL 'SPDX-License-Identifier: GPL-2.0-only' --exclude={config,settings,last.json,*.seeds} \
		Kbuild Makefile kernel tools tests demo .ci)
	echo "$without"
	[ -z "$without" ]
}

no_warning_in_documents()
{
	local document

	for document in Documentation/*.rst; do
		# docutils stops at the first one
		rst2html --strict "$document" >/dev/null || return
	done
}

scripts()
{
	grep -rlI -e '^#!/bin/bash' -e '^#!/bin/busybox sh' -e '^# shellcheck shell=' tests demo .ci
}

for kernel in ${KERNELS:-6.1 6.12}; do
	check "the module builds for $kernel without a word of gcc W=1 and sparse" \
		build_module "$kernel"
done
check 'the tool and the helpers of the tests build without a warning' build_rest
mapfile -t files < <(printf '%s\n' kernel/*.[ch] | grep -v compat.h)
check 'checkpatch has nothing to say about kernel/' checkpatch '' "${files[@]}"
check 'checkpatch has nothing to say about tools/' \
	checkpatch $in_user_space tools/*.[ch]
check 'kernel versions are looked at in compat.h only' only_compat_knows_versions
check 'every file names its licence' every_file_has_a_licence
check 'the documents are without a warning' no_warning_in_documents
mapfile -t files < <(scripts)
check 'shellcheck has nothing to say about the scripts' shellcheck "${files[@]}"
finish
