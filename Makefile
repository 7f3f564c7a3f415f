# SPDX-License-Identifier: GPL-2.0-only

KDIR := /lib/modules/$(shell uname -r)/build
RELEASE := $(shell sed -n 's/.*UTS_RELEASE "\(.*\)"/\1/p' $(KDIR)/include/generated/utsrelease.h 2>/dev/null)
MODULE := build/modules/$(RELEASE)$(VARIANT)/dm-nbdcow.ko

.PHONY: module tool
module: $(MODULE)

# Headers name the compiler their kernel was built with; without it, any will do.
KCC = $(shell sed -n 's/^CC = .*)\(gcc-[0-9]*\)$$/\1/p' $(KDIR)/.kernelvariables 2>/dev/null)
KMAKE = $(MAKE) -C $(KDIR) $(if $(shell command -v $(KCC)),,CC=gcc)

# Kbuild works beside the sources it is given, so it is given links to ours.
$(MODULE): Kbuild $(wildcard kernel/*.[ch])
	$(Q)mkdir -p $(@D)/kernel
	$(Q)ln -sf $(CURDIR)/Kbuild $(@D)/
	$(Q)ln -sf $(CURDIR)/kernel/*.[ch] $(@D)/kernel/
	$(Q)flock $(@D) $(KMAKE) M=$(CURDIR)/$(@D) modules
	$(Q)touch $@

tool:
	$(Q)if [ -e tools/Makefile ]; then $(MAKE) -C tools; fi
