// SPDX-License-Identifier: GPL-2.0-only
/*
 * Processes that go on working for a device after cowctl has ended, at most one
 * of each kind. Such a process holds a lock of its own on /run/cowctl/NAME.KIND,
 * which says what it works on. The kernel tells who holds a lock, and takes it
 * away with the process: no process id is written down that could be stale.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cowctl.h"

#define STOP_MS	10000

/* Return: the id of the process that holds the lock of the file, or 0. */
static pid_t find_holder(int fd)
{
	struct flock lock = { .l_type = F_WRLCK };

	return fcntl(fd, F_GETLK, &lock) || lock.l_type == F_UNLCK ? 0 : lock.l_pid;
}

/* Return: the process that holds the lock of the file, as a pidfd, or -1. */
static int open_holder(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC), process = -1;
	pid_t pid;

	if (fd < 0)
		return -1;
	pid = find_holder(fd);
	if (pid)
		process = pidfd_open(pid, 0);
	/* It may have ended before, and another one have its id. */
	if (process >= 0 && find_holder(fd) != pid) {
		close(process);
		process = -1;
	}
	close(fd);
	return process;
}

/* Return: 0 and what it works on, or -ENOENT when there is no such process. */
int helper_find(const char *mangled, const char *kind, char *text, size_t size)
{
	char *path = run_path(mangled, kind);
	int process = open_holder(path);
	int err = process < 0 ? -ENOENT : read_line(path, text, size);

	if (process >= 0)
		close(process);
	free(path);
	return err;
}

/* Ends it, and returns when it has ended. */
void helper_stop(const char *mangled, const char *kind)
{
	char *path = run_path(mangled, kind);
	int process = open_holder(path);

	if (process >= 0) {
		struct pollfd end = { .fd = process, .events = POLLIN };

		pidfd_send_signal(process, SIGTERM, NULL, 0);
		if (poll(&end, 1, STOP_MS) <= 0) {
			pidfd_send_signal(process, SIGKILL, NULL, 0);
			poll(&end, 1, STOP_MS);
		}
		close(process);
	}
	unlink(path);
	free(path);
}

/* Tells whoever waits in helper_start() that all went well so far, or not. */
void helper_ready(int ready_fd, int err)
{
	if (write(ready_fd, &err, sizeof(err)) < 0)
		return;		/* nobody waits any more */
}

/* Return: a descriptor that holds the lock until the process ends, or -errno. */
static int lock_record(const char *path, const char *text)
{
	struct flock lock = { .l_type = F_WRLCK };
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), err;

	if (fd < 0)
		return -errno;
	err = fcntl(fd, F_SETLK, &lock) ? -errno : write_all(fd, text, strlen(text), 0);
	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

/* Nothing of who started it is kept: no descriptor, no directory, no terminal. */
static int detach(int ready_fd)
{
	int null = open("/dev/null", O_RDWR);
	sigset_t none;

	setsid();
	if (null < 0 || chdir("/"))
		return -errno;
	dm_close();
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	if (dup2(ready_fd, 3) < 0 || close_range(4, ~0U, 0) || fcntl(3, F_SETFD, FD_CLOEXEC))
		return -errno;
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	return 0;
}

static void __attribute__((noreturn))
run_helper(const char *path, const char *text, void (*work)(void *arg, int ready_fd), void *arg,
	   int ready_fd)
{
	int err = detach(ready_fd);
	int lock = err ? err : lock_record(path, text);

	if (lock < 0) {
		helper_ready(3, lock);
		_exit(EXIT_FAILURE);
	}
	work(arg, 3);
	unlink(path);
	_exit(EXIT_SUCCESS);
}

/*
 * Runs @work in the background until it returns, in place of an earlier process
 * of this kind.
 *
 * Return: what it gave to helper_ready(), -EIO when it ended without, and
 * -ETIMEDOUT when it has said nothing for @wait_ms and goes on; in silence.
 */
int helper_start(const char *mangled, const char *kind, const char *text,
		 void (*work)(void *arg, int ready_fd), void *arg, int wait_ms)
{
	char *path = run_path(mangled, kind);
	struct pollfd ready;
	int fds[2], err;
	pid_t pid;

	helper_stop(mangled, kind);
	if (pipe2(fds, O_CLOEXEC)) {
		err = -errno;
		goto out;
	}
	pid = fork();
	if (!pid) {
		/* Not a child of ours: a server would never wait for its end. */
		pid = fork();
		if (!pid)
			run_helper(path, text, work, arg, fds[1]);
		_exit(pid < 0);
	}
	err = pid < 0 ? -errno : 0;
	if (!err)
		waitpid(pid, NULL, 0);
	close(fds[1]);
	ready = (struct pollfd){ .fd = fds[0], .events = POLLIN };
	if (!err && poll(&ready, 1, wait_ms) <= 0)
		err = -ETIMEDOUT;
	else if (!err && read(fds[0], &err, sizeof(err)) != sizeof(err))
		err = -EIO;
	close(fds[0]);
out:
	free(path);
	return err;
}
