// SPDX-License-Identifier: GPL-2.0-only
/*
 * cow-on-read=PATH: a process of the device's own, which switches it on while
 * PATH exists and off while not, and ends with the device.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "cowctl.h"

#define KIND		"watch"
#define START_MS	30000
#define CHANGES		(IN_CREATE | IN_DELETE | IN_MOVE | IN_DELETE_SELF | IN_MOVE_SELF | \
			 IN_ONLYDIR)

struct watch {
	const char *uuid;
	const char *path;
	int inotify;
	int wd;			/* of the directory that is watched, or -1 */
};

/* Return: the watch of the deepest directory on the way to the path, or -1. */
static int watch_deepest(const struct watch *watch)
{
	char *dir = xasprintf("%s", watch->path), *slash;
	int wd = -1;

	while (wd < 0 && (slash = strrchr(dir, '/'))) {
		*slash = '\0';
		wd = inotify_add_watch(watch->inotify, *dir ? dir : "/", CHANGES);
	}
	free(dir);
	return wd;
}

/* Where directories come and go meanwhile, the second look finds it. */
static void watch_path(struct watch *watch)
{
	for (;;) {
		int wd = watch_deepest(watch);

		if (wd == watch->wd)
			return;
		if (watch->wd >= 0)
			inotify_rm_watch(watch->inotify, watch->wd);
		watch->wd = wd;
	}
}

static void drain(int fd)
{
	char events[4096];

	while (read(fd, events, sizeof(events)) > 0)
		;
}

/* Runs in a process of its own. */
static void work(void *arg, int ready_fd)
{
	struct watch *watch = arg;
	int events = dm_events(), err, state = -1;

	watch->wd = -1;
	watch->inotify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	err = events < 0 ? events : watch->inotify < 0 ? -errno : 0;
	while (!err) {
		struct pollfd fds[] = {
			{ .fd = watch->inotify, .events = POLLIN },
			{ .fd = events, .events = POLLIN },
		};
		int exists;

		err = dm_arm_events(events);
		drain(watch->inotify);
		watch_path(watch);
		if (watch->wd < 0)
			err = -ENOSPC;
		exists = !access(watch->path, F_OK);
		if (!err && exists != state)
			err = dm_send(watch->uuid, exists ? "cow_on_read on" : "cow_on_read off");
		if (err || !dm_exists(watch->uuid))
			break;
		if (state < 0)
			helper_ready(ready_fd, 0);
		state = exists;
		poll(fds, 2, -1);
	}
	if (err)
		helper_ready(ready_fd, err);
}

int watch_start(const struct cow *cow, const char *path)
{
	struct watch watch = { .uuid = cow->uuid, .path = path };
	int err;

	if (!*cow->uuid)
		return fail(-EINVAL, "%s was not made by cowctl; cow-on-read=%s needs that",
			    cow->name, path);
	err = helper_start(cow->mangled, KIND, path, work, &watch, START_MS);
	if (!err)
		return 0;
	watch_stop(cow->mangled);
	return fail(err, "cannot watch %s: %s", path, strerror(-err));
}

/* Return: 0 and the path that switches cow-on-read of this device, or -errno. */
int watch_find(const char *mangled, char path[PATH_MAX])
{
	return helper_find(mangled, KIND, path, PATH_MAX);
}

void watch_stop(const char *mangled)
{
	helper_stop(mangled, KIND);
}
