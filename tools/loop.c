// SPDX-License-Identifier: GPL-2.0-only
/*
 * Image files as block devices: read-only loop devices that the kernel frees
 * with their last user, so that nobody has to find and detach them.
 *
 * They go through the page cache on purpose: it is what many overlays of one
 * image share, and it can be dropped at any time.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

static int open_control(void)
{
	int fd = open("/dev/loop-control", O_RDWR | O_CLOEXEC), err;

	if (fd >= 0)
		return fd;
	err = load_module("loop", NULL);
	if (err < 0)
		return err;
	fd = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	return fd >= 0 ? fd :
	       fail(-ENOPKG, "this kernel has no loop devices (the module loop)");
}

/* Attaches @config's file to a free device, whoever else is looking for one too. */
static int attach_free(int control, const struct loop_config *config, char dev[PATH_MAX])
{
	for (;;) {
		int number = ioctl(control, LOOP_CTL_GET_FREE);
		int fd, err;

		if (number < 0)
			return -errno;
		snprintf(dev, PATH_MAX, "/dev/loop%d", number);
		fd = open(dev, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return -errno;
		if (!ioctl(fd, LOOP_CONFIGURE, config))
			return fd;
		err = -errno;
		close(fd);
		if (err != -EBUSY || interrupted())
			return err;
	}
}

/*
 * Return: whether @dev is a loop device; of what is attached to it that is set which tells
 * it from others: st_rdev if it is a block device, else st_dev and st_ino.
 */
bool loop_file(dev_t dev, struct stat *file)
{
	char *path = xasprintf("/dev/loop%u", minor(dev));
	struct loop_info64 info;
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool found = fd >= 0 && !fstat(fd, &st) && st.st_rdev == dev &&
		     !ioctl(fd, LOOP_GET_STATUS64, &info);

	if (found) {
		file->st_dev = info.lo_device;
		file->st_ino = info.lo_inode;
		file->st_rdev = info.lo_rdevice;
	}
	if (fd >= 0)
		close(fd);
	free(path);
	return found;
}

/* Return: whether @dev is a loop device that shows only a part of its file. */
bool loop_is_part(dev_t dev)
{
	static const char *const names[] = { "offset", "sizelimit" };
	bool part = false;

	for (int i = 0; i < 2; i++) {
		char *file = xasprintf("/sys/dev/block/%u:%u/loop/%s", major(dev), minor(dev),
				       names[i]);
		char text[24];

		if (!read_line(file, text, sizeof(text)) && strtoull(text, NULL, 10))
			part = true;
		free(file);
	}
	return part;
}

/*
 * Return: a descriptor that keeps the loop device for @path, named in @dev, or
 * -errno. Once a mapped device uses it, the descriptor may be closed.
 */
int loop_attach(const char *path, char dev[PATH_MAX])
{
	struct loop_config config = {
		.info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
	};
	int file, control, fd;

	file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return fail(-errno, "cannot open base %s: %m", path);
	config.fd = file;
	snprintf((char *)config.info.lo_file_name, sizeof(config.info.lo_file_name), "%s", path);
	/* Not for longer than it takes to be seen as its user. */
	if (hold_file(file) == -EBUSY) {
		close(file);
		return fail(-EBUSY, "base %s is open for writing in another program", path);
	}
	control = open_control();
	if (control < 0) {
		fd = control;
	} else {
		fd = attach_free(control, &config, dev);
		if (fd < 0 && fd != -EINTR)
			fail(fd, "cannot attach base %s to a loop device: %s", path, strerror(-fd));
		close(control);
	}
	fcntl(file, F_SETLEASE, F_UNLCK);
	close(file);
	return fd;
}
