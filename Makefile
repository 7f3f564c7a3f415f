# SPDX-License-Identifier: GPL-2.0-only
#
# dm-nbdcow; `make help' tells what there is to make.

KDIR ?= /lib/modules/$(shell uname -r)/build
PREFIX ?= /usr/local
CFLAGS ?= -O2 -g
STOCK_KERNELS := 6.1 6.12 7.3
DEBUG_KERNELS := debug kcsan

# Where nbdkit looks for plugins; empty without its header.
plugin_dir := $(shell pkg-config nbdkit --variable=plugindir 2>/dev/null)

V ?= 0
Q := $(if $(filter 1,$(V)),,@)
say = @printf '  %-8s %s\n' $(1) '$(2)'
export PATH := $(PATH):/usr/sbin:/sbin

# B is where one kind of build goes: build/, or a directory in it for the checks.
B := build
release := $(shell sed -n 's/.*UTS_RELEASE "\(.*\)"/\1/p' \
	$(KDIR)/include/generated/utsrelease.h 2>/dev/null)
ko := $(B)/modules/$(release)/dm-nbdcow.ko

.PHONY: all
all: tool $(if $(plugin_dir),,no-plugin) $(if $(release),module,no-module)

.PHONY: help
help:
	@echo 'Try it, on Debian 12 or 13; these install what they need from Debian (as root or'
	@echo 'with sudo) and run in throw-away virtual machines with stock Debian kernels:'
	@echo '  make demo            the whole story on a real disk image, in a few minutes'
	@echo '  make check           all checks and tests; ends with "N passed, N failed"'
	@echo '                       KERNELS="6.1 6.12": the kernels to test on'
	@echo '                       TESTS="data limit": only these scripts of tests/'
	@echo '  make check-kernels   the tests in virtual machines on each supported kernel'
	@echo '  make check-debug     the same on kernels built to find faults (KASAN, KCSAN...);'
	@echo '                       both end with a table, and take KERNELS and TESTS as well'
	@echo '  make fuzz            the fuzzer for an hour, on the newest kernel and two CPUs;'
	@echo '                       FUZZ_SECONDS=3600, FUZZ_SEED=N'
	@echo '  make bench           what requests cost, here and on peers: tables, JSON and plots'
	@echo '                       in build/bench/, in one or two hours'
	@echo '  make bench-quick     the same of some, compared with the last ones kept'
	@echo '  make bench-cache     figures of the cache and of many overlays, each beside its goal'
	@echo '  RUNNING_KERNEL=1     with demo or check, as root: here and now, no virtual machine'
	@echo '  tests/vm/run COMMAND any command in such a machine; its first lines tell more'
	@echo
	@echo 'Use it on this machine:'
	@echo '  make                 the tool, and the module for the running kernel'
	@echo '  make install         both, and the man page; as root, then: modprobe dm-nbdcow'
	@echo '  make uninstall       takes them away again'
	@echo '                       PREFIX=$(PREFIX), DESTDIR=; KDIR=headers of another kernel'
	@echo
	@echo 'Parts:'
	@echo '  make tool            build/cowctl, and the plugin if nbdkit-plugin-dev is there'
	@echo '  make plugin          build/nbdkit-nbdcow-plugin.so'
	@echo '  make module          build/modules/RELEASE/dm-nbdcow.ko'
	@echo '  make deps            installs the packages that demo and check need'
	@echo '  make clean           removes what was built; keeps downloaded kernels and images'
	@echo '  make distclean       removes build/ as a whole'
	@echo '  V=1                  shows each command'

#
# The module
#

.PHONY: module no-module need-headers
module: need-headers
	$(Q)$(MAKE) $(if $(Q),-s) --no-print-directory $(ko)

no-module:
	@echo "no module: the headers of kernel $$(uname -r) are missing" \
		"(on Debian: apt install linux-headers-$$(uname -r))"

need-headers:
	@[ -n '$(release)' ] || { $(MAKE) -s no-module >&2; exit 1; }

# Debian's headers name the compiler of their kernel; where it is missing any will do.
# tests/vm/kernels may have put the one of a newer Debian beside them.
chroot := $(wildcard $(KDIR)/chroot)
kcc = $(shell sed -n 's/^CC = .*\(gcc-[0-9]*\)$$/\1/p' $(KDIR)/.kernelvariables 2>/dev/null)
kmake = $(if $(chroot),tests/vm/chroot $(chroot) make,$(MAKE)) -C $(KDIR) $(if $(Q),-s) \
	$(if $(kcc),$(if $(chroot)$(shell command -v $(kcc)),,CC=gcc)) \
	$(if $(WERROR),KCFLAGS=-Werror W=1 C=1 CF=-Wsparse-error)

# Kbuild builds beside the sources, so it is given links to them.
$(ko): Kbuild $(wildcard kernel/*.[ch])
	$(call say,MODULE,$@)
	$(Q)mkdir -p $(@D)/kernel
	$(Q)ln -sf $(CURDIR)/Kbuild $(@D)/
	$(Q)ln -sf $(CURDIR)/kernel/*.[ch] $(@D)/kernel/
	$(Q)flock $(@D) $(kmake) M=$(CURDIR)/$(@D) modules
	$(Q)touch $@

# What makes the requests of the benchmarks.
bench_ko := $(B)/modules/$(release)/bench/dm-bio-bench.ko
.PHONY: bench-module
bench-module: need-headers $(bench_ko)
$(bench_ko): $(addprefix tests/bench/, Kbuild dm-bio-bench.c)
	$(call say,MODULE,$@)
	$(Q)mkdir -p $(@D)
	$(Q)ln -sf $(addprefix $(CURDIR)/, $^) $(@D)/
	$(Q)$(kmake) M=$(CURDIR)/$(@D) modules

#
# The tool, and the helpers of the tests
#

libraries := devmapper json-c blkid
# Loaded only where it is used, see tools/nbd-calls.h.
loaded := libnbd
warnings := -Wall -Wextra -Wshadow -Wno-missing-field-initializers $(if $(WERROR),-Werror)
plugin_source := tools/nbdkit-nbdcow-plugin.c
tool_objects := $(patsubst tools/%.c,$(B)/tools/%.o,$(filter-out $(plugin_source),$(wildcard tools/*.c)))
# The plugin has some files of the tool in it.
plugin_objects := $(patsubst %,$(B)/plugin/%.o,nbdkit-nbdcow-plugin dm loop parse util)

.PHONY: tool plugin no-plugin test-helpers man
tool: $(B)/cowctl $(if $(plugin_dir),plugin)
plugin: $(B)/nbdkit-nbdcow-plugin.so
no-plugin:
	@echo 'no nbdkit plugin: its header is missing (on Debian: apt install nbdkit-plugin-dev)'
man: build/cowctl.8
test-helpers:
	$(Q)$(MAKE) --no-print-directory $(if $(Q),-s) -C tests OUTPUT=../$(B)/tests \
		CFLAGS='$(CFLAGS) $(if $(WERROR),-Werror)' LDFLAGS='$(LDFLAGS)'

$(B)/cowctl: $(tool_objects)
	$(call say,LINK,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) $^ $$(pkg-config --libs $(libraries)) -o $@

$(B)/tools/%.o: tools/%.c $(wildcard tools/*.h) Makefile
	$(call say,CC,$@)
	$(Q)pkg-config --exists $(libraries) $(loaded) || { echo >&2 "no tool: pkg-config," \
		"libdevmapper-dev, libjson-c-dev, libblkid-dev or libnbd-dev is missing" \
		"('make deps' installs all that is needed)"; exit 1; }
	$(Q)mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 -D_GNU_SOURCE $(warnings) $(CFLAGS) $$(pkg-config --cflags $(libraries) $(loaded)) -c $< -o $@

$(B)/nbdkit-nbdcow-plugin.so: $(plugin_objects)
	$(call say,LINK,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -shared -pthread $^ $$(pkg-config --libs devmapper) -o $@

$(B)/plugin/%.o: tools/%.c $(wildcard tools/*.h) Makefile
	$(call say,CC,$@)
	$(Q)mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 -D_GNU_SOURCE -fPIC -fvisibility=hidden $(warnings) $(CFLAGS) \
		$$(pkg-config --cflags devmapper nbdkit) -c $< -o $@

build/%.8: Documentation/%.8.rst
	$(call say,MAN,$@)
	$(Q)mkdir -p $(@D)
	$(Q)rst2man --strict $< >$@.part
	$(Q)mv $@.part $@

#
# On this machine
#

modules := $(DESTDIR)/lib/modules
sbin := $(DESTDIR)$(PREFIX)/sbin
man8 := $(DESTDIR)$(PREFIX)/share/man/man8
completions := $(DESTDIR)$(PREFIX)/share/bash-completion/completions
share := $(DESTDIR)$(PREFIX)/share/cowctl
with_man := $(shell command -v rst2man)

.PHONY: install uninstall
install: module tool $(if $(plugin_dir),,no-plugin) $(if $(with_man),man)
	$(Q)install -D -m 644 $(ko) $(modules)/$(release)/updates/dm-nbdcow.ko
	$(Q)[ -n '$(DESTDIR)' ] || depmod -a $(release)
	$(Q)install -D -m 755 $(B)/cowctl $(sbin)/cowctl
	$(Q)install -D -m 644 tools/cowctl.bash $(completions)/cowctl
	$(Q)install -D -m 644 Documentation/cowctl.schema.json $(share)/cowctl.schema.json
ifneq ($(plugin_dir),)
	$(Q)install -D -m 644 $(B)/nbdkit-nbdcow-plugin.so $(DESTDIR)$(plugin_dir)/nbdkit-nbdcow-plugin.so
endif
ifneq ($(with_man),)
	$(Q)install -D -m 644 build/cowctl.8 $(man8)/cowctl.8
else
	@echo 'no man page: rst2man is missing (on Debian: apt install python3-docutils)'
endif

uninstall:
	$(Q)for ko in $(modules)/*/updates/dm-nbdcow.ko; do \
		[ -e "$$ko" ] || continue; \
		rm -f "$$ko"; \
		ko=$${ko#$(modules)/}; \
		[ -n '$(DESTDIR)' ] || depmod -a "$${ko%%/*}"; \
	done
	$(Q)rm -f $(sbin)/cowctl $(man8)/cowctl.8 $(completions)/cowctl \
		$(if $(plugin_dir),$(DESTDIR)$(plugin_dir)/nbdkit-nbdcow-plugin.so)
	$(Q)rm -rf $(share)

#
# Try and check
#

packages := build-essential pkg-config kmod libdevmapper-dev libjson-c-dev libblkid-dev libnbd-dev \
	libelf-dev xz-utils zstd pahole debian-archive-keyring qemu-system-x86 qemu-utils \
	busybox-static nbdkit nbdkit-plugin-dev nbd-client libnbd-bin dmsetup e2fsprogs fdisk \
	kpartx mmdebstrap uidmap
check_packages := python3-docutils sparse shellcheck perl clang libclang-rt-dev nbd-server fio jq \
	gdisk strace liburing-dev spin python3-libnbd python3-jsonschema procps xxd

# to build kernels
debug_packages := flex bison bc

bench_packages := python3-matplotlib

.PHONY: deps demo-deps debug-deps bench-deps
deps debug-deps bench-deps: packages += $(check_packages)
debug-deps bench-deps: packages += $(debug_packages)
bench-deps: packages += $(bench_packages)
deps demo-deps debug-deps bench-deps:
	$(Q)missing=; for package in $(packages); do \
		[ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || \
			missing="$$missing $$package"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	sudo=; \
	if [ "$$(id -u)" != 0 ]; then \
		sudo=$$(command -v sudo) || { \
			echo "run as root: apt-get install$$missing" >&2; exit 1; }; \
	fi; \
	echo "installing$$missing"; \
	$$sudo apt-get update -q && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
		-o DPkg::Lock::Timeout=600 $$missing

.PHONY: demo check check-kernels check-debug fuzz bench bench-quick bench-cache
demo: demo-deps
	$(Q)demo/run
# They take long in emulation, and the kernel's part in them is small: once will do.
check: export LEFT_OUT = 6.1/cowctl 6.1/cowctl-filter 6.1/cowctl-steps 6.1/cowctl-view \
	6.12/cowctl-cache 6.12/cowctl-change 6.12/cowctl-diff 6.12/cowctl-watch 6.12/plugin
check check-kernels check-debug: export ALL_KERNELS = $(STOCK_KERNELS) $(DEBUG_KERNELS)
check: deps
	$(Q)tests/run-tests
check-kernels: export KERNELS ?= $(STOCK_KERNELS)
check-kernels: export EVERY_STEP = 1
check-kernels: deps
	$(Q)tests/run-tests --table
check-debug: export KERNELS ?= $(DEBUG_KERNELS)
check-debug: debug-deps
	$(Q)tests/run-tests --table
FUZZ_SECONDS ?= 3600
fuzz: debug-deps
	$(Q)tests/vm/run -k smp -t $$(($(FUZZ_SECONDS) * 2 + 600)) \
		env V=1 FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) tests/fuzz.sh

bench bench-quick bench-cache: bench-deps
bench:
	$(Q)tests/bench/run
bench-quick bench-cache: bench-%:
	$(Q)tests/bench/run $*

.PHONY: clean distclean
clean:
	$(Q)rm -rf build/cowctl build/cowctl.8 build/*.so build/tools build/plugin build/tests build/modules build/check build/user build/vm
distclean:
	$(Q)rm -rf build
