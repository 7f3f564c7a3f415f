// SPDX-License-Identifier: GPL-2.0-only
/* What every layer needs: messages, small files, and programs run with a deadline. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cowctl.h"

#define BAR_WIDTH	40
#define KILLED_MS	5000		/* that a process may take to end then */

/* The nbdkit plugin has its own. */
void __attribute__((weak)) put_message(const char *text)
{
	fprintf(stderr, "cowctl: %s\n", text);
}

static void message(const char *fmt, va_list ap)
{
	char text[8192];

	/* Names and paths may hold terminal controls; one line, nothing else. */
	vsnprintf(text, sizeof(text), fmt, ap);
	make_printable(text);
	put_message(text);
}

/* Prints the one message of a failure. Return: @err. */
int fail(int err, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	message(fmt, ap);
	va_end(ap);
	return err;
}

void warn(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	message(fmt, ap);
	va_end(ap);
}

/*
 * How far something of @total bytes is: on a terminal a bar that moves, else a line
 * for each tenth of the way. @shown begins with -1.
 */
void show_progress(uint64_t done, uint64_t total, int *shown)
{
	int percent = done < total ? 100.0 * done / total : 100;
	char have[16], want[16], bar[BAR_WIDTH + 1];
	bool terminal = isatty(STDOUT_FILENO);

	if (percent / (terminal ? 1 : 10) == *shown)
		return;
	*shown = percent / (terminal ? 1 : 10);
	human_size(done, have);
	human_size(total, want);
	memset(bar, ' ', BAR_WIDTH);
	memset(bar, '#', BAR_WIDTH * percent / 100);
	bar[BAR_WIDTH] = '\0';
	if (terminal)
		printf("\r[%s] %3d%%  %s of %s \033[K", bar, percent, have, want);
	else
		printf("%d%% %s of %s\n", percent, have, want);
	fflush(stdout);
}

void end_progress(int shown)
{
	if (shown >= 0 && isatty(STDOUT_FILENO))
		putchar('\n');
	fflush(stdout);
}

/* Return: @err, or if it is 0 and output was lost, now or earlier, what fail() returns. */
int flush_output(int err)
{
	errno = 0;
	if ((fflush(stdout) || ferror(stdout)) && !err)
		err = fail(io_error(errno), "cannot write the output: %s",
			   errno ? strerror(errno) : "some of it is lost");
	return err;
}

/* -@error of a system call, but none that exit_code() has a meaning of its own for. */
int io_error(int error)
{
	switch (error) {
	case 0:
	case EINVAL:
	case ENODEV:
	case ENOPKG:
	case ETIME:
		return -EIO;
	case EDQUOT:
		return -ENOSPC;
	default:
		return -error;
	}
}

/* Return: 0 when all was written, or -errno. */
int write_all(int fd, const void *buf, size_t bytes, uint64_t offset)
{
	while (bytes) {
		ssize_t n = pwrite(fd, buf, bytes, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		buf = (const char *)buf + n;
		bytes -= n;
		offset += n;
	}
	return 0;
}

int exit_code(int err)
{
	switch (-err) {
	case 0:
		return EXIT_SUCCESS;
	case EINVAL:
		return EXIT_USAGE;
	case ENODEV:
		return EXIT_NO_DEVICE;
	case EEXIST:
	case EBUSY:
	case EADDRINUSE:
		return EXIT_IN_USE;
	case EPERM:
	case EACCES:
		return EXIT_NOT_PERMITTED;
	case ENOPKG:
		return EXIT_MISSING;
	case EDQUOT:
		return EXIT_CACHE_FULL;
	case ETIME:
		return EXIT_TIMEOUT;
	default:
		return EXIT_FAILURE;
	}
}

char *xasprintf(const char *fmt, ...)
{
	va_list ap;
	char *text;
	int n;

	va_start(ap, fmt);
	n = vasprintf(&text, fmt, ap);
	va_end(ap);
	if (n < 0) {
		warn("out of memory");
		abort();
	}
	return text;
}

/* The first line of a small file, without its newline. */
int read_line(const char *path, char *buf, size_t size)
{
	FILE *file = fopen(path, "re");
	int err = 0;

	if (!file)
		return -errno;
	if (!fgets(buf, size, file))
		err = -ENODATA;
	else
		buf[strcspn(buf, "\n")] = '\0';
	fclose(file);
	return err;
}

/* Whole or not at all: readers never see half a file. */
int write_file(const char *path, const char *text)
{
	char *temp = xasprintf("%s.new", path);
	int fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	int err = 0;

	if (fd < 0) {
		err = -errno;
	} else {
		err = write_all(fd, text, strlen(text), 0);
		close(fd);
		if (!err && rename(temp, path))
			err = -errno;
		if (err)
			unlink(temp);
	}
	free(temp);
	return err;
}

/* A file in the run directory, to be freed. */
char *run_path(const char *slot, const char *suffix)
{
	return xasprintf(RUN_DIR "/%s.%s", slot, suffix);
}

/* The same path from any directory, to be freed; NULL when there is no directory here. */
char *absolute_path(const char *path)
{
	char *dir, *full;

	if (*path == '/')
		return xasprintf("%s", path);
	dir = realpath(".", NULL);
	if (!dir)
		return NULL;
	full = xasprintf("%s/%s", dir, path);
	free(dir);
	return full;
}

/* Return: the size of a block device, 0 when it is away. */
uint64_t device_bytes(dev_t dev)
{
	char *file = xasprintf("/sys/dev/block/%u:%u/size", major(dev), minor(dev));
	char text[24] = "0";

	read_line(file, text, sizeof(text));
	free(file);
	return strtoull(text, NULL, 10) * SECTOR_BYTES;
}

/* TMPDIR where it names a tmpfs; otherwise nothing. */
void tmpfs_from_environment(char path[PATH_MAX])
{
	const char *dir = getenv("TMPDIR");
	const char *why = NULL;
	struct statfs fs;
	char *full;

	path[0] = '\0';
	if (!dir || !*dir)
		return;
	full = realpath(dir, NULL);
	if (!full || statfs(full, &fs) || fs.f_type != TMPFS_MAGIC)
		why = "is not on a tmpfs";
	else if (!printable(full))
		why = "contains a character that cannot be printed";
	else
		snprintf(path, PATH_MAX, "%s", full);
	if (why)
		warn("TMPDIR=%s %s; what is written stays in memory, but not there", dir, why);
	free(full);
}

/*
 * Calls @call for every block device that stands on @dev ("holders"), or that it
 * stands on ("slaves"), until it returns true. Return: whether it did.
 */
bool any_link(dev_t dev, const char *kind,
	      bool (*call)(const char *name, dev_t dev, void *arg), void *arg)
{
	char *path = xasprintf("/sys/dev/block/%u:%u/%s", major(dev), minor(dev), kind);
	DIR *dir = opendir(path);
	struct dirent *entry;
	bool found = false;

	while (dir && !found && (entry = readdir(dir))) {
		char *file = xasprintf("%s/%s/dev", path, entry->d_name), text[24];
		unsigned int maj, min;

		if (entry->d_name[0] != '.' && !read_line(file, text, sizeof(text)) &&
		    sscanf(text, "%u:%u", &maj, &min) == 2)
			found = call(entry->d_name, makedev(maj, min), arg);
		free(file);
	}
	if (dir)
		closedir(dir);
	free(path);
	return found;
}

/*
 * Opens a block device that nobody else is to have; but who looks whether that is so has
 * it for a moment. Return: the file descriptor, or -errno.
 */
int open_alone(const char *path)
{
	int64_t deadline = now_ms() + BUSY_MS;
	int fd;

	while ((fd = open(path, O_RDONLY | O_EXCL | O_CLOEXEC)) < 0 && errno == EBUSY &&
	       now_ms() < deadline)
		poll(NULL, 0, BUSY_PROBE_MS);
	return fd < 0 ? -errno : fd;
}

/* The signals that ask us to stop; not those that nohup or a shell has had ignored. */
void stop_signals(sigset_t *set)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP };
	struct sigaction action;

	sigemptyset(set);
	for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		if (!sigaction(signals[i], NULL, &action) && action.sa_handler != SIG_IGN)
			sigaddset(set, signals[i]);
}

/* Return: a descriptor that polls readable when one of them is pending, or -1. */
int open_stop_signals(void)
{
	sigset_t set;

	stop_signals(&set);
	return signalfd(-1, &set, SFD_CLOEXEC);
}

/*
 * A command that has something to undo blocks the signals that ask us to stop, by
 * lock_slot() or itself. They stay pending meanwhile; main() unblocks them.
 */
bool interrupted(void)
{
	sigset_t set;

	sigpending(&set);
	return sigismember(&set, SIGINT) || sigismember(&set, SIGTERM) ||
	       sigismember(&set, SIGHUP);
}

/* Whether standard output is a terminal, not a dumb one, and colour is not unwanted. */
bool terminal_takes_colour(void)
{
	const char *no_colour = getenv("NO_COLOR"), *term = getenv("TERM");

	return isatty(STDOUT_FILENO) && !(no_colour && *no_colour) && term && strcmp(term, "dumb");
}

int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * INT64_C(1000) + ts.tv_nsec / 1000000;
}

static void __attribute__((noreturn)) run_child(const struct run *run, int err_fd, pid_t parent)
{
	int null = open("/dev/null", O_RDWR);
	sigset_t none;

	/* A cowctl that is killed takes along what it is waiting for. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(126);
	sigemptyset(&none);
	if (!run->finish)
		sigprocmask(SIG_SETMASK, &none, NULL);
	/* A server would keep for ever what our caller has open. */
	close_range(3, ~0U, CLOSE_RANGE_CLOEXEC);
	if (run->keep_fd >= 0)
		fcntl(run->keep_fd, F_SETFD, 0);
	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	/* What is said here becomes the message, as what the program says does. */
	dup2(err_fd, STDERR_FILENO);
	if (run->in_child && run->in_child(run->arg))
		_exit(126);
	execvp(run->argv[0], (char *const *)run->argv);
	if (errno == ENOENT)
		_exit(127);
	fprintf(stderr, "it cannot be started: %m\n");
	_exit(126);
}

/* Waits for @pid_fd, until @run's deadline or a signal; reads @err_fd meanwhile. */
static int run_wait(struct run *run, int pid_fd, int err_fd)
{
	int64_t end = now_ms() + run->timeout_ms;
	int signals = run->finish ? -1 : open_stop_signals(), err = 0;
	char text[4096];

	for (;;) {
		struct pollfd fds[] = {
			{ .fd = pid_fd, .events = POLLIN },
			{ .fd = signals, .events = POLLIN },
			{ .fd = err_fd, .events = POLLIN },
		};
		int64_t left = end - now_ms();
		ssize_t n;

		if (poll(fds, 3, left > 0 ? left : 0) <= 0) {
			err = -ETIMEDOUT;
			break;
		}
		if (fds[2].revents & POLLIN) {
			n = read(err_fd, text, sizeof(text) - 1);
			text[n > 0 ? n : 0] = '\0';
			last_line(text, run->message, sizeof(run->message));
			continue;
		}
		if (fds[2].revents)
			err_fd = -1;
		if (fds[1].revents)
			err = -EINTR;
		if (fds[0].revents || fds[1].revents)
			break;
	}
	if (signals >= 0)
		close(signals);
	return err;
}

static int take_lease(int fd, int type)
{
	sigset_t set;

	/* It tells that somebody wants to open it, who is made to wait for some time. */
	sigemptyset(&set);
	sigaddset(&set, SIGIO);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return !fcntl(fd, F_SETLEASE, type) ? 0 : errno == EAGAIN ? -EBUSY : -errno;
}

/*
 * Sees to it that nobody writes to a file, if its file system can tell.
 * Return: 0 then, -EBUSY if somebody has it open for that, or another -errno.
 */
int hold_file(int fd)
{
	return take_lease(fd, F_RDLCK);
}

/* Return: whether somebody else has a file open, as far as its file system can tell. */
bool has_other_users(int fd)
{
	int err = take_lease(fd, F_WRLCK);

	fcntl(fd, F_SETLEASE, F_UNLCK);
	return err == -EBUSY;
}

/* Whether nobody has opened a file for writing since hold_file() returned 0. */
bool still_held(int fd)
{
	return fcntl(fd, F_GETLEASE) == F_RDLCK;
}

/* Waits for a child's end, but not for ever for one that was killed and hangs in the kernel. */
static void reap(pid_t pid, int pid_fd, int wait_ms, int *status)
{
	struct pollfd end = { .fd = pid_fd, .events = POLLIN };

	if (pid_fd >= 0 && wait_ms >= 0 && poll(&end, 1, wait_ms) <= 0)
		return;
	while (waitpid(pid, status, 0) < 0 && errno == EINTR)
		;
}

/*
 * Calls @call in a process of its own, for it may hang: until it returns, a signal asks
 * us to stop, unless it is to @finish, or @wait_ms, unless negative, are over.
 *
 * Return: what it returned, which is 0 or a -errno, or -EINTR, -ETIMEDOUT or another
 * -errno of ours.
 */
int call_apart(int (*call)(void *arg), void *arg, int wait_ms, bool finish)
{
	pid_t self = getpid(), pid = fork();
	struct pollfd fds[2] = { { .events = POLLIN }, { .events = POLLIN } };
	int status = 0, err = 0;

	if (pid < 0)
		return -errno;
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		_exit(getppid() != self ? EIO : -call(arg));
	}
	fds[1].fd = finish ? -1 : open_stop_signals();
	fds[0].fd = pidfd_open(pid, 0);
	if (fds[0].fd < 0)
		err = -errno;
	else if (poll(fds, 2, wait_ms) <= 0)
		err = -ETIMEDOUT;
	else if (!fds[0].revents)
		err = -EINTR;
	if (err)
		kill(pid, SIGKILL);
	reap(pid, fds[0].fd, err ? KILLED_MS : -1, &status);
	close(fds[0].fd);
	close(fds[1].fd);
	return err ?: WIFEXITED(status) ? -WEXITSTATUS(status) : -EIO;
}

/*
 * Runs a program without a shell, with no input and its output discarded.
 *
 * Return: its exit status, or -errno with the message printed: -ENOPKG when it
 * is not installed, -ETIMEDOUT and -EINTR when it had to be killed.
 */
int run(struct run *run)
{
	int fds[2], pid_fd, status, err;
	pid_t self = getpid(), pid;

	run->message[0] = '\0';
	if (pipe2(fds, O_CLOEXEC))
		return fail(-errno, "cannot make a pipe: %m");
	pid = fork();
	if (pid < 0) {
		err = -errno;
		close(fds[0]);
		close(fds[1]);
		return fail(err, "cannot start %s: %s", run->argv[0], strerror(-err));
	}
	if (!pid)
		run_child(run, fds[1], self);
	close(fds[1]);
	pid_fd = pidfd_open(pid, 0);
	err = pid_fd < 0 ? -errno : run_wait(run, pid_fd, fds[0]);
	if (err)
		kill(pid, SIGKILL);
	reap(pid, pid_fd, err ? KILLED_MS : -1, &status);
	close(pid_fd);
	close(fds[0]);
	if (err == -EINTR)
		return err;
	if (err == -ETIMEDOUT)
		return fail(err, "%s did not finish within %d seconds", run->argv[0],
			    run->timeout_ms / 1000);
	if (err)
		return fail(err, "cannot wait for %s: %s", run->argv[0], strerror(-err));
	if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
		return fail(-ENOPKG, "%s is not installed; it is in the package %s",
			    run->argv[0], run->package);
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	snprintf(run->message, sizeof(run->message), "it was killed by signal %d",
		 WTERMSIG(status));
	return 128 + WTERMSIG(status);
}

/* Return: 0 where it is loaded now, as run() otherwise; what is said in @message, if not NULL. */
int load_module(const char *name, char *message)
{
	const char *argv[] = { "modprobe", "-q", name, NULL };
	struct run modprobe = {
		.argv = argv, .package = "kmod", .timeout_ms = 60000, .keep_fd = -1,
	};
	int ret = run(&modprobe);

	if (message)
		memcpy(message, modprobe.message, sizeof(modprobe.message));
	return ret;
}
