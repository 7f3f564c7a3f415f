/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Device-mapper by its ioctls, for thousands of calls in a second. Each call
 * returns 0 or -errno.
 */
#ifndef DMCTL_H
#define DMCTL_H

#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* Less than a page: for more the kernel complains aloud when it has no memory. */
struct dm_call {
	struct dm_ioctl head;
	union {
		struct {
			struct dm_target_spec spec;
			char params[3072];
		} table;
		struct {
			struct dm_target_msg head;
			char text[3072];
		} message;
	};
};

static inline int dm_call(unsigned long request, const char *name, uint32_t flags,
			  struct dm_call *call)
{
	int fd = open("/dev/mapper/control", O_RDWR | O_CLOEXEC), ret;

	if (fd < 0)
		return -errno;
	call->head.version[0] = DM_VERSION_MAJOR;
	call->head.data_size = sizeof(*call);
	call->head.data_start = offsetof(struct dm_call, table);
	call->head.flags = flags;
	snprintf(call->head.name, sizeof(call->head.name), "%s", name);
	ret = ioctl(fd, request, call) ? -errno : 0;
	close(fd);
	return ret;
}

static inline int dm_create(const char *name)
{
	struct dm_call call = { 0 };

	return dm_call(DM_DEV_CREATE, name, 0, &call);
}

/* Whoever else looks at new devices, as udev does, has them open for a moment. */
static inline int dm_remove(const char *name)
{
	struct dm_call call;
	int ret, tries = 500;

	do {
		memset(&call, 0, sizeof(call));
		ret = dm_call(DM_DEV_REMOVE, name, 0, &call);
	} while (ret == -EBUSY && --tries && !usleep(10000));
	return ret;
}

/* Leaves the device's minor number, by which /dev/dm-* is named, in @number. */
static inline int dm_minor(const char *name, unsigned int *number)
{
	struct dm_call call = { 0 };
	int ret = dm_call(DM_DEV_STATUS, name, 0, &call);

	*number = minor(call.head.dev);
	return ret;
}

/* @flags: DM_READONLY_FLAG or 0 */
static inline int dm_load_flags(const char *name, uint64_t sectors, const char *target,
				const char *params, uint32_t flags)
{
	struct dm_call call = { .head.target_count = 1, .table.spec.length = sectors };

	snprintf(call.table.spec.target_type, sizeof(call.table.spec.target_type), "%s", target);
	snprintf(call.table.params, sizeof(call.table.params), "%s", params);
	call.table.spec.next = sizeof(call.table);
	return dm_call(DM_TABLE_LOAD, name, flags, &call);
}

static inline int dm_load(const char *name, uint64_t sectors, const char *target,
			  const char *params)
{
	return dm_load_flags(name, sectors, target, params, 0);
}

/* @flags: DM_NOFLUSH_FLAG, DM_SKIP_LOCKFS_FLAG or both */
static inline int dm_suspend(const char *name, uint32_t flags)
{
	struct dm_call call = { 0 };

	return dm_call(DM_DEV_SUSPEND, name, DM_SUSPEND_FLAG | flags, &call);
}

/* Takes over the table that was loaded last, if there is one. */
static inline int dm_resume(const char *name)
{
	struct dm_call call = { 0 };

	return dm_call(DM_DEV_SUSPEND, name, 0, &call);
}

static inline int dm_message(const char *name, const char *text)
{
	struct dm_call call = { 0 };

	snprintf(call.message.text, sizeof(call.message.text), "%s", text);
	return dm_call(DM_TARGET_MSG, name, 0, &call);
}

/* Leaves the status line's words after the target's name in @call->table.params. */
static inline int dm_status(const char *name, struct dm_call *call)
{
	memset(call, 0, sizeof(*call));
	return dm_call(DM_TABLE_STATUS, name, DM_NOFLUSH_FLAG, call);
}

#endif
