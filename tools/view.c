// SPDX-License-Identifier: GPL-2.0-only
/*
 * A device as it was at one instant, while it is in use: a device-mapper device of
 * our own, for which the kernel keeps what is overwritten from then on.
 *
 * The device is suspended around that instant, so that a file system on it is as a
 * snapshot has it. A child sees to this, so that nothing that happens to cowctl can
 * leave the device suspended. The view goes away with us, however we end; only one
 * that is killed before it has opened its view, or when it has done with it, leaves
 * that to the next one's sweep.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cowctl.h"

#define LOOK_MS		100
#define REMOVE_MS	5000
#define RESUME_TRIES	10
/* What is read of a view is for later, what uses the device is for now. */
#define NICENESS	10

static void about(struct dm_ioctl *request, dev_t dev, uint32_t flags)
{
	*request = (struct dm_ioctl){
		.version = { DM_VERSION_MAJOR, 0, 0 },
		.data_size = sizeof(*request),
		.data_start = sizeof(*request),
		.flags = flags,
		.dev = (minor(dev) & 0xff) | major(dev) << 8 |
		       (uint64_t)(minor(dev) & ~0xff) << 12,
	};
}

static void only_interrupts(int signal)
{
	(void)signal;
}

/* Devices that are to be quiet: those of the partitions, and last the whole. */
struct quiet {
	dev_t dev;
	bool suspended;			/* by us */
};

/* Return: 0 or an errno. One that somebody else has suspended stays so. */
static int make_quiet(int control, struct quiet *quiet)
{
	struct dm_ioctl request;

	about(&request, quiet->dev, 0);
	if (ioctl(control, DM_DEV_STATUS, &request))
		return errno;
	if (request.flags & DM_SUSPEND_FLAG)
		return 0;
	about(&request, quiet->dev, DM_SUSPEND_FLAG);
	if (ioctl(control, DM_DEV_SUSPEND, &request))
		return errno;
	quiet->suspended = true;
	return 0;
}

static void resume(int control, dev_t dev)
{
	struct dm_ioctl request;
	int tries = 0;

	do
		about(&request, dev, 0);
	while (ioctl(control, DM_DEV_SUSPEND, &request) && ++tries < RESUME_TRIES);
}

/*
 * The child. All its memory is there before it begins: the device may be what the
 * machine swaps to, or runs from. The only signal that reaches it, also when its @parent
 * is killed, ends its wait for the device to become quiet.
 */
static void __attribute__((noreturn))
freeze(int control, struct quiet *quiet, int n, dev_t view, pid_t parent)
{
	struct sigaction action = { .sa_handler = only_interrupts };
	struct dm_ioctl show;
	int err = 0, i;
	sigset_t set;

	sigaction(SIGTERM, &action, NULL);
	sigfillset(&set);
	sigdelset(&set, SIGTERM);
	sigprocmask(SIG_SETMASK, &set, NULL);
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	if (mlockall(MCL_CURRENT))
		_exit(errno);
	for (i = 0; i < n && !err; i++) {
		err = getppid() == parent ? make_quiet(control, &quiet[i]) : EINTR;
		/* The device of a partition may have gone. */
		if (err == ENXIO && i < n - 1)
			err = 0;
	}
	about(&show, view, 0);
	if (!err && ioctl(control, DM_DEV_SUSPEND, &show))
		err = errno;
	while (i--)
		if (quiet[i].suspended)
			resume(control, quiet[i].dev);
	_exit(err);
}

/* Waits for the child, and tells it when we are to stop. Return: -ECHILD if it was killed. */
static int wait_for_freeze(pid_t pid)
{
	struct pollfd fds[] = {
		{ .fd = pidfd_open(pid, 0), .events = POLLIN },
		{ .fd = open_stop_signals(), .events = POLLIN },
	};
	bool stopping = false;
	int status;

	while (fds[0].fd >= 0 &&
	       (poll(fds, stopping ? 1 : 2, stopping ? LOOK_MS : -1) < 0 || !fds[0].revents)) {
		/* again and again, for it may not have come to its wait yet */
		stopping = true;
		kill(pid, SIGTERM);
	}
	waitpid(pid, &status, 0);
	close(fds[0].fd);
	close(fds[1].fd);
	return WIFEXITED(status) ? -WEXITSTATUS(status) : -ECHILD;
}

/* Return: how many devices are to be quiet, in *@list (to be freed). */
static int list_quiet(const struct cow *cow, struct quiet **list)
{
	struct part *parts;
	int n = 0, nr_parts;

	*list = NULL;
	/* Reads that wait for the base, or would, fail when the device is suspended. */
	if (cow->status.queued || (cow->table.queue_errors && !base_answers(cow)))
		return 0;
	nr_parts = parts_find(cow, &parts);
	*list = calloc(nr_parts + 1, sizeof(**list));
	for (; *list && n < nr_parts; n++)
		(*list)[n].dev = makedev(parts[n].major, parts[n].minor);
	if (*list)
		(*list)[n++].dev = makedev(cow->major, cow->minor);
	free(parts);
	return *list ? n : -ENOMEM;
}

static int freeze_view(const struct view *view)
{
	const struct cow *cow = &view->cow;
	int control = dm_events(), err, n;
	struct quiet *quiet;
	pid_t self = getpid(), pid;

	if (control < 0)
		return control;
	n = list_quiet(cow, &quiet);
	if (n < 0) {
		close(control);
		return n;
	}
	/* A table that was left would come into force with the resume. */
	dm_clear(cow->mangled);
	pid = fork();
	if (!pid)
		freeze(control, quiet, n, view->dev, self);
	err = pid < 0 ? -errno : wait_for_freeze(pid);
	/* if it was killed */
	while (err == -ECHILD && n--)
		resume(control, quiet[n].dev);
	free(quiet);
	close(control);
	return err;
}

static int make_view(struct view *view)
{
	char *path;
	int err, fd;

	dm_server_sweep();
	snprintf(view->name, sizeof(view->name), "cowctl-view-%ld", (long)getpid());
	view->fd = dm_view_open(view->name, &view->cow, &view->dev);
	if (view->fd < 0)
		return view->fd;
	err = freeze_view(view);
	if (err)
		return err == -EINTR ? err : fail(io_error(-err), "cannot freeze %s: %s",
						  view->cow.name, strerror(-err));
	/* again, for only now it has its size */
	path = xasprintf("/dev/dm-%u", minor(view->dev));
	fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		err = fail(-errno, "cannot open %s: %m", path);
	free(path);
	if (err)
		return err;
	close(view->fd);
	view->fd = fd;
	if (getpriority(PRIO_PROCESS, 0) < NICENESS)
		setpriority(PRIO_PROCESS, 0, NICENESS);
	return 0;
}

/*
 * Freezes the device that is meant, unless @check of it fails, and lowers our priority.
 * The view is to be closed as soon as it is read.
 */
int view_open(const struct args *args, struct view *view,
	      int (*check)(const struct cow *cow, void *arg), void *arg)
{
	int lock = lock_name(args), err;

	view->fd = -1;
	if (lock < 0)
		return lock;
	err = find_cow(args, &view->cow) ?: check(&view->cow, arg);
	if (!err)
		err = interrupted() ? -EINTR : make_view(view);
	close(lock);
	if (err)
		view_close(view);
	return err;
}

/* Whole blocks, to memory aligned to them. */
int view_read(const struct view *view, void *buf, size_t bytes, uint64_t offset)
{
	while (bytes) {
		ssize_t n = pread(view->fd, buf, bytes, offset);
		int error = n < 0 ? errno : EIO;

		if (n < 0 && error == EINTR)
			continue;
		if (n <= 0 && dm_view_failed(view->dev))
			return fail(-ENOMEM, "no memory to keep what is overwritten in %s",
				    view->cow.name);
		if (n <= 0)
			return fail(io_error(error), "cannot read %s: %s", view->cow.name,
				    strerror(error));
		buf = (char *)buf + n;
		bytes -= n;
		offset += n;
	}
	return 0;
}

/* When this returns, the device is as free as before. */
void view_close(struct view *view)
{
	int64_t deadline = now_ms() + REMOVE_MS;

	if (view->fd < 0)
		return;
	/* The kernel would remove it a little later than we say that all is done. */
	dm_cancel_remove(view->name);
	close(view->fd);
	view->fd = -1;
	/* udev may look at it just now */
	while (dm_server_remove(view->name, false) == -EBUSY) {
		if (now_ms() > deadline) {
			dm_server_remove(view->name, true);
			break;
		}
		poll(NULL, 0, LOOK_MS);
	}
}
