// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exports: nbdkit or nbd-server serving a mapped device in the background. nbdkit
 * does so with our plugin, or where that is not installed with its file plugin.
 *
 * A server of ours is found by its command line, which names the file
 * <name>.pid in our run directory; so it is found however cowctl ended. The
 * record <name>.export is written once the server answers: a server without
 * one is half made, a record without a server is left over, and both are
 * cleared away by the next command.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include "cowctl.h"

#define START_MS	30000
#define STOP_MS		5000
#define PROBE_MS	20

static void remove_file(const char *mangled, const char *suffix)
{
	char *path = run_path(mangled, suffix);

	unlink(path);
	free(path);
}

/* What the kernel tells of process @pid. Return: how many bytes, before a NUL; 0: none. */
static size_t read_proc(const char *pid, const char *what, char *buf, size_t size)
{
	char *path = xasprintf("/proc/%s/%s", pid, what);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, buf, size - 1);

	if (fd >= 0)
		close(fd);
	free(path);
	n = n < 0 ? 0 : n;
	buf[n] = '\0';
	return n;
}

/*
 * Return: whether process @pid is a server that was given @pid_file. It has to be root's by
 * its real user: anybody can start a set-uid program by any name. One that was killed and
 * waits in the kernel has no arguments any more; @written is what it wrote into the file.
 */
static bool runs_server(const char *pid, const char *pid_file, const char *written)
{
	char text[16384];
	size_t n = read_proc(pid, "cmdline", text, sizeof(text));

	if (n ? !is_server(text, n, pid_file) : strcmp(pid, written))
		return false;
	return read_proc(pid, "status", text, sizeof(text)) && strstr(text, "\nUid:\t0\t") &&
	       (n || !strncmp(text, "Name:\tnbd", 9));
}

/* Opens up to @max of the server's processes. Return: how many there are. */
static int find_server(const char *mangled, int *fds, int max)
{
	char *pid_file = run_path(mangled, "pid"), written[24] = "";
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	int n = 0;

	read_line(pid_file, written, sizeof(written));
	while (proc && n < max && (entry = readdir(proc))) {
		int fd;

		if (entry->d_name[0] < '1' || entry->d_name[0] > '9')
			continue;
		/* Opened first: what is checked then is what will be signalled. */
		fd = pidfd_open(atoi(entry->d_name), 0);
		if (fd < 0)
			continue;
		if (runs_server(entry->d_name, pid_file, written))
			fds[n++] = fd;
		else
			close(fd);
	}
	if (proc)
		closedir(proc);
	free(pid_file);
	return n;
}

/* Looks first where its file says, for this is asked of each of many devices. */
static bool server_runs(const char *mangled)
{
	char *pid_file = run_path(mangled, "pid"), written[24] = "";
	bool runs;
	int fd;

	read_line(pid_file, written, sizeof(written));
	runs = atoi(written) > 0 && runs_server(written, pid_file, written);
	free(pid_file);
	if (!runs && find_server(mangled, &fd, 1)) {
		close(fd);
		runs = true;
	}
	return runs;
}

/* Return: 0 and the export, or -ENOENT when the device is not exported. */
int export_find(const char *mangled, struct export *export)
{
	char *path = run_path(mangled, "export");
	char text[sizeof(export->uri) + 32];
	int err = read_line(path, text, sizeof(text));

	free(path);
	return err || parse_export_record(text, export) || !server_runs(mangled) ? -ENOENT : 0;
}

/* Return: whether it has ended. */
static bool wait_for_end(int fd, int64_t deadline)
{
	struct pollfd end = { .fd = fd, .events = POLLIN };
	int64_t left = deadline - now_ms();

	return poll(&end, 1, left > 0 ? left : 0) > 0;
}

/* Connects to the server, or binds where it shall listen. Return: 0, -errno. */
static int try_socket(const struct listen *listen,
		      int (*call)(int fd, const struct sockaddr *addr, socklen_t len))
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *info = NULL;
	int fd, err = 0, reuse = 1;

	if (listen->socket[0]) {
		memcpy(addr.sun_path, listen->socket, sizeof(addr.sun_path));
		/* it would wait for a server that is too busy to accept */
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (fd < 0 || call(fd, (struct sockaddr *)&addr, sizeof(addr)))
			err = -errno;
	} else {
		if (getaddrinfo(listen->address, listen->port, &hints, &info))
			return -EADDRNOTAVAIL;
		fd = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd >= 0)
			setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
		if (fd < 0 || call(fd, info->ai_addr, info->ai_addrlen))
			err = -errno;
		freeaddrinfo(info);
	}
	if (fd >= 0)
		close(fd);
	return err;
}

/*
 * Removes a socket that nobody listens on any more. Return: 0, also when it is not there,
 * -EEXIST if it is no socket, -EADDRINUSE if somebody listens, or another -errno.
 */
static int remove_socket(const char *path)
{
	struct listen listen = { 0 };
	struct stat st;

	if (lstat(path, &st))
		return 0;
	if (!S_ISSOCK(st.st_mode) || strlen(path) >= sizeof(listen.socket))
		return -EEXIST;
	strcpy(listen.socket, path);
	if (try_socket(&listen, connect) != -ECONNREFUSED)
		return -EADDRINUSE;
	return unlink(path) ? -errno : 0;
}

/*
 * Stops the server and removes its files; tolerates that any of it is missing. Return: 0, or
 * -EBUSY when it cannot end, for it waits in the kernel.
 */
int clear_away(const char *mangled)
{
	int fds[256], n = find_server(mangled, fds, 256);
	int64_t deadline = now_ms() + STOP_MS;
	char *path, text[PATH_MAX];
	bool ended = true;

	for (int i = 0; i < n; i++)
		pidfd_send_signal(fds[i], SIGTERM, NULL, 0);
	for (int i = 0; i < n; i++) {
		wait_for_end(fds[i], deadline);
		pidfd_send_signal(fds[i], SIGKILL, NULL, 0);
		ended = wait_for_end(fds[i], now_ms() + STOP_MS) && ended;
		close(fds[i]);
	}
	if (!ended)
		return -EBUSY;
	/* The socket's path stands in a file of its own, written before it is made. */
	path = run_path(mangled, "socket");
	if (!read_line(path, text, sizeof(text)))
		remove_socket(text);
	free(path);
	remove_file(mangled, "socket");
	remove_file(mangled, "conf");
	remove_file(mangled, "pid");
	/* Last, so that whoever is killed before can be asked to do it again. */
	remove_file(mangled, "export");
	return 0;
}

/* Refuses what is taken, before a server that says little about it does. */
int listen_check(const struct listen *listen)
{
	int err;

	if (listen->socket[0]) {
		err = remove_socket(listen->socket);
		if (err == -EEXIST)
			return fail(err, "%s exists and is not a socket; choose another socket=",
				    listen->socket);
		if (err == -EADDRINUSE)
			return fail(err, "%s is in use; choose another socket=", listen->socket);
		return err ? fail(err, "cannot remove the old socket %s: %s", listen->socket,
				  strerror(-err)) : 0;
	}
	err = try_socket(listen, bind);
	if (err == -EADDRINUSE)
		return fail(err, "port %s of %s is in use; choose another port=", listen->port,
			    listen->address);
	if (err == -EADDRNOTAVAIL)
		return fail(err, "address=%s is no address of this machine; \"ip addr\" shows %s",
			    listen->address, "those it has");
	return err ? fail(io_error(-err), "cannot listen at address %s, port %s: %s",
			  listen->address, listen->port, strerror(-err)) : 0;
}

int listen_parse(const struct args *args, struct listen *listen)
{
	const char *path = args->value[KEY_SOCKET];
	char *full, quoted[3 * sizeof(listen->socket)];
	int err = 0, zone;

	memset(listen, 0, sizeof(*listen));
	listen->port = args->value[KEY_PORT];
	listen->address = args->value[KEY_ADDRESS];
	if (listen->port || listen->address) {
		if (path)
			return fail(-EINVAL, "socket= excludes port= and address=");
		listen->port = listen->port ?: "10809";
		listen->address = listen->address ?: "127.0.0.1";
		if (parse_port(listen->port) < 0)
			return fail(-EINVAL, "port=%s is not a number from 1 to 65535",
				    listen->port);
		/* fe80::1%eth0 */
		zone = strcspn(listen->address, "%");
		snprintf(listen->uri, sizeof(listen->uri), strchr(listen->address, ':') ?
			 "nbd://[%.*s%s%s]:%s" : "nbd://%.*s%s%s:%s", zone, listen->address,
			 listen->address[zone] ? "%25" : "",
			 listen->address + zone + !!listen->address[zone], listen->port);
		return 0;
	}
	full = path ? absolute_path(path) : run_path(args->mangled, "sock");
	if (!full)
		return fail(-errno, "cannot find the current directory: %m");
	if (strlen(full) >= sizeof(listen->socket))
		err = fail(-EINVAL, "%s is too long for a socket: more than %zu bytes; %s", full,
			   sizeof(listen->socket) - 1, "say socket=PATH");
	else if (!printable(full))
		err = fail(-EINVAL, "socket=%s contains a character that cannot be printed", full);
	else
		strcpy(listen->socket, full);
	free(full);
	if (!err)
		err = percent_encode(listen->socket, quoted, sizeof(quoted));
	if (!err)
		snprintf(listen->uri, sizeof(listen->uri), "nbd+unix:///?socket=%s", quoted);
	return err;
}

/* nbd-server takes a socket's path from a file in GLib's key file syntax. */
static int write_conf(const char *path, const struct listen *listen)
{
	char *text, escaped[2 * sizeof(listen->socket)], *out = escaped;
	int err;

	for (const char *s = listen->socket; *s; s++) {
		if (*s == '\\')
			*out++ = '\\';
		*out++ = *s;
	}
	*out = '\0';
	text = xasprintf("[generic]\n%s%s\n", escaped[0] ? "unixsock = " : "", escaped);
	err = write_file(path, text);
	free(text);
	return err;
}

/*
 * What nbdkit is to load as our plugin, to be freed: the file beside cowctl, as in its
 * build tree, or what nbdkit finds by that name. It is NULL when there is none and none
 * is @needed. Return: 0, or -errno after a message.
 */
int find_plugin(bool needed, char **plugin)
{
	static const char *const argv[] = { "nbdkit", "--dump-plugin", "nbdcow", NULL };
	struct run dump = {
		.argv = argv, .package = "nbdkit", .timeout_ms = START_MS, .keep_fd = -1,
	};
	char *self = realpath("/proc/self/exe", NULL);
	int err;

	*plugin = NULL;
	if (self && strrchr(self, '/')) {
		*strrchr(self, '/') = '\0';
		*plugin = xasprintf("%s/nbdkit-nbdcow-plugin.so", self);
	}
	free(self);
	if (*plugin && !access(*plugin, R_OK))
		return 0;
	free(*plugin);
	*plugin = NULL;
	err = run(&dump);
	if (!err)
		*plugin = xasprintf("nbdcow");
	else if (err > 0 && needed)
		err = fail(-ENOPKG, "nbdkit's plugin nbdcow is not installed; %s",
			   "it comes with cowctl");
	return err < 0 ? err : 0;
}

/* What a terminal sends to all of a session, also when it goes, is not for the server. */
static int leave_session(void *arg)
{
	(void)arg;
	return setsid() < 0;
}

static int spawn(const char *server, const char *plugin, const struct cow *cow,
		 const struct listen *listen)
{
	char *pid_file = run_path(cow->mangled, "pid");
	char *conf = run_path(cow->mangled, "conf");
	char *file = plugin ? xasprintf("name=%s", cow->name) : xasprintf("file=%s", cow->path);
	const char *module = plugin ?: "file";
	const char *unix_argv[] = {
		"nbdkit", "--pidfile", pid_file, "--unix", listen->socket, module, file, NULL,
	};
	const char *tcp_argv[] = {
		"nbdkit", "--pidfile", pid_file, "--ipaddr", listen->address, "--port",
		listen->port, module, file, NULL,
	};
	char *place = listen->socket[0] ? xasprintf("10809") :
		      xasprintf("%s@%s", listen->address, listen->port);
	/*
	 * An export given as an argument has the default name, as with nbdkit. With
	 * a socket in the file the address, which must be there, is not used.
	 */
	const char *server_argv[] = {
		"nbd-server", "-C", conf, "-p", pid_file, place, cow->path, NULL,
	};
	bool nbdkit = strcmp(server, "nbd-server");
	struct run run_server = {
		.argv = !nbdkit ? server_argv : listen->socket[0] ? unix_argv : tcp_argv,
		.package = nbdkit ? "nbdkit" : server, .timeout_ms = START_MS, .keep_fd = -1,
		.in_child = leave_session,
	};
	int err = 0;

	if (!nbdkit)
		err = write_conf(conf, listen);
	if (err)
		fail(err, "cannot write %s: %s", conf, strerror(-err));
	else
		err = run(&run_server);
	if (err > 0)
		err = fail(-EIO, "cannot export %s: %s", cow->name,
			   run_server.message[0] ? run_server.message : "no reason given");
	free(pid_file);
	free(conf);
	free(file);
	free(place);
	return err;
}

/* The server is in the background: until it ends, or answers, or the deadline. */
static int wait_for_answer(const char *server, const struct cow *cow,
			   const struct listen *listen)
{
	int64_t deadline = now_ms() + START_MS;

	while (try_socket(listen, connect)) {
		int fd;

		if (interrupted())
			return -EINTR;
		if (now_ms() > deadline)
			return fail(-ETIMEDOUT, "cannot export %s: %s does not answer", cow->name,
				    server);
		if (!find_server(cow->mangled, &fd, 1))
			return fail(-EIO, "cannot export %s: %s ended; see the system log",
				    cow->name, server);
		wait_for_end(fd, now_ms() + PROBE_MS);
		close(fd);
	}
	return 0;
}

int write_run_file(const char *slot, const char *suffix, const char *text)
{
	char *path = run_path(slot, suffix);
	int err = write_file(path, text);

	if (err)
		fail(err, "cannot write %s: %s", path, strerror(-err));
	free(path);
	return err;
}

/* What serves it: what is asked for, or else our plugin, or without it nbdkit's. */
static int choose_server(const struct args *args, const char **server, char **plugin)
{
	int err;

	*server = args->value[KEY_SERVER];
	*plugin = NULL;
	if (!*server || !strcmp(*server, "nbdcow")) {
		err = find_plugin(*server, plugin);
		*server = *plugin ? "nbdcow" : "nbdkit";
		return err;
	}
	if (strcmp(*server, "nbdkit") && strcmp(*server, "nbd-server"))
		return fail(-EINVAL, "server=%s is neither nbdcow, nbdkit nor nbd-server",
			    *server);
	return 0;
}

static int stop(const char *mangled, const char *name)
{
	return clear_away(mangled) ?
	       fail(-EBUSY, "the server of %s waits for the base, and ends when that is back",
		    name) : 0;
}

static int start(const struct cow *cow, const struct args *args, const char *server,
		 const char *plugin)
{
	struct export export;
	struct listen listen;
	char *record;
	int err;

	if (!export_find(cow->mangled, &export))
		return fail(-EEXIST, "%s is already exported at %s", cow->name, export.uri);
	err = stop(cow->mangled, cow->name) ?: listen_parse(args, &listen);
	if (!err)
		err = listen_check(&listen);
	if (!err && listen.socket[0])
		err = write_run_file(cow->mangled, "socket", listen.socket);
	if (err)
		return err;
	err = spawn(server, plugin, cow, &listen);
	if (!err)
		err = wait_for_answer(server, cow, &listen);
	if (!err) {
		record = xasprintf("%s %s\n", server, listen.uri);
		err = write_run_file(cow->mangled, "export", record);
		free(record);
	}
	if (err || interrupted())
		clear_away(cow->mangled);
	return err ? err : interrupted() ? -EINTR : 0;
}

static void warn_if_mounted(const struct cow *cow)
{
	char *where = mounted_on(makedev(cow->major, cow->minor));
	struct part *parts;
	int n = parts_find(cow, &parts);

	for (int i = 0; i < n && !where; i++)
		where = mounted_on(makedev(parts[i].major, parts[i].minor));
	if (where)
		warn("%s is mounted on %s; a client that writes to it destroys its file system",
		     cow->name, where);
	free(where);
	free(parts);
}

int export_start(const struct cow *cow, const struct args *args)
{
	const char *server;
	char *plugin;
	int err = choose_server(args, &server, &plugin);

	if (!err)
		err = start(cow, args, server, plugin);
	if (!err)
		warn_if_mounted(cow);
	free(plugin);
	return err;
}

/* Its device has gone: clears away what a server that was killed has left. */
void export_forget(const char *mangled)
{
	char *path = run_path(mangled, "export");

	if (!access(path, F_OK))
		clear_away(mangled);
	free(path);
}

int export_stop(const char *mangled, const char *name)
{
	char *path = run_path(mangled, "export");
	bool known = !access(path, F_OK) || server_runs(mangled);
	int err;

	free(path);
	err = stop(mangled, name);
	return known || err ? err : fail(-ENODEV, "%s is not exported", name);
}
