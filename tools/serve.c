// SPDX-License-Identifier: GPL-2.0-only
/*
 * serve: nbdkit in the foreground, with our plugin, which makes the overlays.
 * Here the base is made ready for it, and given back when it has ended.
 *
 * nbdkit ends with us (--exit-with-parent) and the overlays with nbdkit. What a
 * killed serve can leave, an NBD connection and files in the run directory, is
 * known by the name with "~serve" behind it, and the next one clears it away.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cowctl.h"

#define START_MS	30000
#define STOP_MS		10000
#define PROBE_MS	20
#define LISTEN_FD	3		/* the first that systemd passes */

struct server {
	const struct args *args;
	char slot[NAME_BYTES + 8];
	char *plugin;
	struct listen listen;
	int fds;			/* sockets that systemd has passed to us */
	struct base base;
	uint64_t cache_limit_blocks;
	bool holes;			/* of the base are to be learned */
	int keeper_fd;
	pid_t pid;			/* of nbdkit, also when it has ended */
	int pid_fd;			/* while it runs */
};

/* Parameters of the plugin that are given as they are. */
static const enum key passed_on[] = {
	KEY_PER_CLIENT, KEY_PER_EXPORT_NAME, KEY_MAX_CLIENTS, KEY_LIMIT, KEY_COW_ON_READ,
	KEY_COW_ON_CACHE, KEY_CACHE_LIMIT,
};

#define PASSED_ON (sizeof(passed_on) / sizeof(passed_on[0]))

static int parse_args(struct server *server)
{
	const struct args *args = server->args;
	bool per_client, per_name, flag;
	uint64_t blocks, clients;
	int err;

	err = need_base(args, "serve") ?:
	      parse_flag(args, KEY_PER_CLIENT, false, &per_client) ?:
	      parse_flag(args, KEY_PER_EXPORT_NAME, false, &per_name) ?:
	      parse_flag(args, KEY_COW_ON_READ, false, &flag) ?:
	      parse_flag(args, KEY_COW_ON_CACHE, false, &flag) ?:
	      parse_flag(args, KEY_HOLES, true, &server->holes) ?:
	      parse_blocks(args, KEY_LIMIT, &blocks) ?:
	      parse_blocks(args, KEY_CACHE_LIMIT, &server->cache_limit_blocks) ?:
	      parse_number(args, KEY_MAX_CLIENTS, &clients);
	if (!err && per_client && per_name)
		err = fail(-EINVAL, "per-client=true excludes per-export-name=true");
	return err;
}

/* Sockets from systemd stay closed for all programs but nbdkit. */
static int take_sockets(struct server *server)
{
	const struct args *args = server->args;
	const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");

	if (!pid || !fds || strtol(pid, NULL, 10) != getpid())
		return 0;
	server->fds = strtol(fds, NULL, 10);
	if (server->fds < 1)
		return server->fds = 0;
	if (args->value[KEY_SOCKET] || args->value[KEY_PORT] || args->value[KEY_ADDRESS])
		return fail(-EINVAL, "systemd has passed sockets to listen on; leave out %s",
			    args->value[KEY_SOCKET] ? "socket=" : args->value[KEY_PORT] ?
			    "port=" : "address=");
	for (int i = 0; i < server->fds; i++)
		if (fcntl(LISTEN_FD + i, F_SETFD, FD_CLOEXEC))
			return fail(-errno, "LISTEN_FDS=%s, but descriptor %d is not open", fds,
				    LISTEN_FD + i);
	return 0;
}

static void __attribute__((noreturn)) become_nbdkit(const struct server *server, char **argv)
{
	int null = open("/dev/null", O_RDONLY);
	sigset_t none;
	char pid[24];

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	dup2(null, STDIN_FILENO);
	dup2(STDERR_FILENO, STDOUT_FILENO);
	for (int i = 0; i < server->fds; i++)
		fcntl(LISTEN_FD + i, F_SETFD, 0);
	if (server->fds) {
		snprintf(pid, sizeof(pid), "%ld", (long)getpid());
		setenv("LISTEN_PID", pid, 1);
	}
	execvp(argv[0], argv);
	_exit(errno == ENOENT ? 127 : 126);
}

static int spawn(struct server *server)
{
	const struct args *args = server->args;
	char *base = device_path(major(server->base.dev), minor(server->base.dev));
	char *pid_file = run_path(server->slot, "pid"), *argv[32 + PASSED_ON];
	size_t n = 0, words;
	int err = 0;

	argv[n++] = "nbdkit";
	argv[n++] = "--foreground";
	argv[n++] = "--exit-with-parent";
	argv[n++] = "--pidfile";
	argv[n++] = pid_file;
	if (server->listen.socket[0]) {
		argv[n++] = "--unix";
		argv[n++] = server->listen.socket;
	} else if (!server->fds) {
		argv[n++] = "--ipaddr";
		argv[n++] = (char *)server->listen.address;
		argv[n++] = "--port";
		argv[n++] = (char *)server->listen.port;
	}
	argv[n++] = server->plugin;
	words = n;
	argv[n++] = xasprintf("name=%s", args->name);
	argv[n++] = xasprintf("base=%s", base);
	for (size_t i = 0; i < PASSED_ON; i++)
		if (args->value[passed_on[i]])
			argv[n++] = xasprintf("%s=%s", key_name(passed_on[i]),
					      args->value[passed_on[i]]);
	argv[n] = NULL;
	server->pid = fork();
	if (!server->pid)
		become_nbdkit(server, argv);
	if (server->pid > 0)
		server->pid_fd = pidfd_open(server->pid, 0);
	if (server->pid_fd < 0) {
		err = fail(-errno, "cannot start nbdkit: %m");
		if (server->pid > 0 && !kill(server->pid, SIGKILL))
			waitpid(server->pid, NULL, 0);
	}
	while (n > words)
		free(argv[--n]);
	free(pid_file);
	free(base);
	return err;
}

/* Return: 0, or -errno with what its end means. */
static int reap(struct server *server)
{
	int status;

	while (waitpid(server->pid, &status, 0) < 0 && errno == EINTR)
		;
	close(server->pid_fd);
	server->pid_fd = -1;
	if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
		return fail(-ENOPKG, "nbdkit is not installed; it is in the package nbdkit");
	if (WIFSIGNALED(status))
		return fail(-EIO, "nbdkit was killed by signal %d", WTERMSIG(status));
	return fail(-EIO, "nbdkit has ended with status %d", WEXITSTATUS(status));
}

static bool ended(const struct server *server, int wait_ms)
{
	struct pollfd end = { .fd = server->pid_fd, .events = POLLIN };

	return poll(&end, 1, wait_ms) > 0;
}

/* nbdkit writes its process id once it listens. */
static int wait_until_ready(struct server *server)
{
	char *pid_file = run_path(server->slot, "pid"), text[24];
	int64_t deadline = now_ms() + START_MS;
	int err = 0;

	while (!err && read_line(pid_file, text, sizeof(text))) {
		bool over = ended(server, PROBE_MS);

		/* Ctrl-C is for both. */
		if (interrupted())
			err = -EINTR;
		else if (over)
			err = reap(server);
		else if (now_ms() > deadline)
			err = fail(-ETIMEDOUT, "nbdkit does not begin to listen");
	}
	free(pid_file);
	return err;
}

static void stop(struct server *server)
{
	pidfd_send_signal(server->pid_fd, SIGTERM, NULL, 0);
	if (!ended(server, STOP_MS))
		pidfd_send_signal(server->pid_fd, SIGKILL, NULL, 0);
	/* It may wait in the kernel for a base that does not answer. */
	if (!ended(server, STOP_MS))
		nbd_cut(server->slot);
	if (ended(server, STOP_MS))
		waitpid(server->pid, NULL, 0);
	close(server->pid_fd);
	server->pid_fd = -1;
}

/* Until it ends, which is a failure, or a signal asks us to. */
static int wait_for_end(struct server *server)
{
	int signals = open_stop_signals(), err = 0;
	struct pollfd fds[] = {
		{ .fd = server->pid_fd, .events = POLLIN },
		{ .fd = signals, .events = POLLIN },
	};
	struct signalfd_siginfo info;

	while (!fds[0].revents && !fds[1].revents)
		poll(fds, 2, -1);
	if (!fds[1].revents)
		err = reap(server);
	else if (read(signals, &info, sizeof(info)) < 0)
		err = -errno;
	close(signals);
	return err;
}

/* Whether a mapped device is a copy that nbdkit or we made, or any that is just going. */
static bool is_ours(const char *name, dev_t dev, void *arg)
{
	char *file = xasprintf("/sys/block/%s/dm/name", name), text[NAME_BYTES] = "";
	const struct server *server = arg;
	size_t length = strlen(server->args->mangled);
	int err = read_line(file, text, sizeof(text));
	long pid;

	(void)dev;
	free(file);
	if (err)
		return !strncmp(name, "dm-", 3);
	return !strncmp(text, server->args->mangled, length) &&
	       sscanf(text + length, "-%ld-", &pid) == 1 &&
	       (pid == server->pid || pid == getpid());
}

/* The kernel removes copies that nobody has open any more a little later. */
static void wait_for_copies(struct server *server)
{
	int64_t deadline = now_ms() + STOP_MS;

	while (any_link(server->base.dev, "holders", is_ours, server) && now_ms() < deadline)
		poll(NULL, 0, PROBE_MS);
}

/* Asks the server of the base for its holes. */
static int learn_holes(const struct server *server, dev_t keeper)
{
	struct cow cow;
	int err;

	if (!server->holes || !strstr(server->base.text, "://"))
		return 0;
	err = dm_find_number(major(keeper), minor(keeper), &cow);
	if (!err)
		holes_start(server->slot, cow.uuid, server->base.text, server->base.bytes);
	return err;
}

/*
 * A copy of our own, which nobody uses: what the kernel knows of a base, its holes
 * and its cache, goes with the last copy, but shall not go with the last client.
 */
static int keep_base(struct server *server)
{
	uint64_t sectors = server->base.bytes / BLOCK_BYTES * (BLOCK_BYTES / SECTOR_BYTES);
	struct cow_table table = {
		.major = major(server->base.dev), .minor = minor(server->base.dev),
		.limit_blocks = NO_LIMIT, .cache_limit_blocks = server->cache_limit_blocks,
	};
	char params[256], name[NAME_BYTES];
	dev_t dev;
	int err;

	/* Of what is too small or too long nbdkit's plugin complains. */
	if (!sectors || snprintf(name, sizeof(name), "%s-%ld-0", server->args->mangled,
				 (long)getpid()) >= (int)sizeof(name))
		return 0;
	err = format_table(&table, params, sizeof(params));
	if (err)
		return err;
	server->keeper_fd = dm_server_open(name, sectors, params, O_RDONLY, &dev);
	return server->keeper_fd < 0 ? server->keeper_fd : learn_holes(server, dev);
}

static int serve(struct server *server)
{
	int err = spawn(server);

	if (!err)
		err = wait_until_ready(server);
	if (!err && !server->fds) {
		report_server(server->args, "nbdcow", server->listen.uri);
		fflush(stdout);
	}
	if (!err)
		err = wait_for_end(server);
	if (server->pid_fd >= 0)
		stop(server);
	return err;
}

/*
 * Stops this one, or what a serve that was killed has left.
 * Return: @err, or what went wrong now, with its message.
 */
static int stop_server(const struct server *server, int err)
{
	bool ended = !clear_away(server->slot);

	return err || ended ? err :
	       fail(-EBUSY, "nbdkit waits for base %s; it ends when that is back or fails",
		    server->args->value[KEY_BASE]);
}

static int prepare(struct server *server, int lock)
{
	const struct args *args = server->args;
	const char *base = args->value[KEY_BASE];
	int err = dm_need_target();

	if (err)
		return err;
	dm_server_sweep();
	err = stop_server(server, 0) ?: nbd_release(server->slot);
	if (!err && !server->fds)
		err = listen_parse(args, &server->listen) ?: listen_check(&server->listen);
	if (!err)
		err = check_base(base) ?: open_base(base, server->slot, lock, &server->base);
	if (!err)
		err = keep_base(server);
	if (!err && server->listen.socket[0])
		err = write_run_file(server->slot, "socket", server->listen.socket);
	return err ?: interrupted() ? -EINTR : 0;
}

int cmd_serve(const struct args *args)
{
	struct server server = { .args = args, .base = NO_BASE, .keeper_fd = -1,
				 .pid_fd = -1 };
	int err = parse_args(&server), lock;

	if (!err)
		err = take_sockets(&server);
	if (err)
		return err;
	err = find_plugin(true, &server.plugin);
	if (err)
		return err;
	snprintf(server.slot, sizeof(server.slot), "%s~serve", args->mangled);
	lock = lock_slot(server.slot, LOCK_TRY);
	if (lock == -EBUSY)
		fail(lock, "another serve of the name %s is running", args->name);
	if (lock < 0) {
		free(server.plugin);
		return lock;
	}
	err = prepare(&server, lock);
	if (!err)
		err = serve(&server);
	err = stop_server(&server, err);
	holes_stop(server.slot);
	if (server.keeper_fd >= 0)
		close(server.keeper_fd);
	if (server.base.fd >= 0)
		wait_for_copies(&server);
	close_base(&server.base);
	nbd_release(server.slot);
	free(server.plugin);
	close(lock);
	return err;
}
