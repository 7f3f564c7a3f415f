// SPDX-License-Identifier: GPL-2.0-only
/*
 * Connections to NBD servers, made and ended with nbd-client.
 *
 * Which connection is ours is known from the moment it can exist: before the
 * process becomes nbd-client it writes its own process id to <name>.nbd, and
 * the kernel shows the id of the process that connected a device in
 * /sys/block/nbdN/pid. Where both agree, the connection was made for <name>,
 * however cowctl ended. The file goes away after the connection.
 *
 * No timeout is set: a base that is slow must not turn into one that fails.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cowctl.h"

#define CONNECT_MS	30000
#define MAX_DEVICES	1024

static char *record_path(const char *mangled)
{
	return run_path(mangled, "nbd");
}

/* Return: the id of the process that connected /dev/nbdN, 0 when it is free. */
static long connected_by(const char *dev)
{
	char *path = xasprintf("/sys/block/%s/pid", dev + strlen("/dev/"));
	char text[24];
	long pid = read_line(path, text, sizeof(text)) ? 0 : strtol(text, NULL, 10);

	free(path);
	return pid;
}

struct record {
	const char *path;
	const char *dev;
	const char *uri;
};

/* Runs in the process that is about to become nbd-client. */
static int write_record(void *arg)
{
	const struct record *record = arg;
	char *text = xasprintf("%ld %s %s\n", (long)getpid(), record->dev, record->uri);
	int err = write_file(record->path, text);

	free(text);
	if (err)
		fprintf(stderr, "cannot write %s: %s\n", record->path, strerror(-err));
	return err;
}

/* Return: -ENOENT when no connection was made for this name. */
int nbd_find(const char *mangled, struct nbd_link *link)
{
	char *path = record_path(mangled);
	char text[sizeof(link->uri) + 64];
	int err = read_line(path, text, sizeof(text));
	long pid;

	free(path);
	if (err)
		return err == -ENODATA ? -ENOENT : err;
	pid = parse_nbd_record(text, link);
	if (pid < 0)
		return -ENOENT;
	link->connected = connected_by(link->dev) == pid;
	return 0;
}

static int disconnect(const struct nbd_link *link)
{
	const char *argv[] = { "nbd-client", "-d", link->dev, NULL };
	struct run client = {
		.argv = argv, .package = "nbd-client", .timeout_ms = CONNECT_MS, .keep_fd = -1,
		.finish = true,
	};
	int err = run(&client);

	return err > 0 ? fail(-EIO, "cannot disconnect %s: %s", link->dev, client.message) : err;
}

/* Ends the connection under whoever waits for the server's answer. */
void nbd_cut(const char *mangled)
{
	struct nbd_link link;

	if (!nbd_find(mangled, &link) && link.connected) {
		warn("base %s does not answer; its connection is ended", link.uri);
		disconnect(&link);
	}
}

/* Ends the connection that was made for this name, if there is one. */
int nbd_release(const char *mangled)
{
	struct nbd_link link;
	char *path;
	int err = nbd_find(mangled, &link), fd;

	if (err)
		return err == -ENOENT ? 0 : err;
	if (link.connected) {
		fd = open_alone(link.dev);
		if (fd == -EBUSY)
			return fail(-EBUSY, "%s stays connected to %s, for somebody else %s",
				    link.dev, link.uri, "uses it too; that has to end first");
		if (fd >= 0)
			close(fd);
		err = disconnect(&link);
		if (err)
			return err;
	}
	path = record_path(mangled);
	unlink(path);
	free(path);
	return 0;
}

static int need_module(void)
{
	int err;

	if (!access("/sys/module/nbd", F_OK))
		return 0;
	err = load_module("nbd", NULL);
	if (err < 0)
		return err;
	return err ? fail(-ENOPKG, "this kernel has no NBD client (the module nbd)") : 0;
}

/* Return: 0 and the parts of an address of a base, or -EINVAL with the message printed. */
int nbd_check(const char *text, struct nbd_uri *uri)
{
	switch (-parse_nbd_uri(text, uri)) {
	case 0:
		break;
	case EPROTONOSUPPORT:
		return fail(-EINVAL, "base %s: neither nbd:// nor nbd+unix://; for others %s",
			    text, "connect with nbd-client and give base=/dev/nbdN");
	case ENAMETOOLONG:
		return fail(-EINVAL, "base %s: a part of the address is too long", text);
	case ENOTSUP:
		return fail(-EINVAL, "base %s: nbd-client cannot use an address that %s", text,
			    "begins with '-' or has '=' in it");
	default:
		return fail(-EINVAL, "base %s is not of the form %s", text,
			    "nbd://host[:port][/export] or nbd+unix:///[export]?socket=PATH");
	}
	return 0;
}

/* Return: 0, -errno with the message printed, or -EAGAIN: @dev is taken. */
static int connect_to(const char *dev, const struct nbd_uri *uri, const struct record *record,
		      int lock_fd)
{
	bool is_unix = uri->socket[0];
	const char *argv[] = {
		"nbd-client", "-readonly", "-name", uri->export,
		is_unix ? uri->socket : uri->host, is_unix ? "-unix" : uri->port, dev, NULL,
	};
	struct run client = {
		.argv = argv, .package = "nbd-client", .timeout_ms = CONNECT_MS,
		.keep_fd = lock_fd, .in_child = write_record, .arg = (void *)record,
	};
	int err = run(&client);

	if (err <= 0)
		return err;
	/* It has reached the server, but the kernel did not accept the device. */
	if (connected_by(dev) || strstr(client.message, "Failed to setup device"))
		return -EAGAIN;
	return fail(-EIO, "nbd-client cannot connect to %s: %s", record->uri,
		    client.message[0] ? client.message : "no reason given");
}

/*
 * What is written down of an address has to hold in any directory. Return: it, to be freed,
 * or NULL where @text does as it is, or the socket's path would be too long.
 */
static char *make_absolute(const char *text, struct nbd_uri *uri)
{
	char quoted[3 * sizeof(uri->socket)], *path;
	bool fits;

	if (!uri->socket[0] || uri->socket[0] == '/')
		return NULL;
	path = absolute_path(uri->socket);
	fits = path && strlen(path) < sizeof(uri->socket) && printable(path) &&
	       !percent_encode(path, quoted, sizeof(quoted));
	if (fits)
		strcpy(uri->socket, path);
	free(path);
	return fits ? xasprintf("%.*s?socket=%s", (int)strcspn(text, "?"), text, quoted) : NULL;
}

/*
 * Connects a free device to the server at @text, for the mapped device of this
 * name, and names it in @dev. nbd-client inherits @lock_fd: were we killed, the
 * lock would still be held until it is certain whether it has connected.
 *
 * Return: a descriptor of @dev, or -errno.
 */
int nbd_connect(const char *mangled, const char *text, int lock_fd, char dev[PATH_MAX])
{
	char *path = record_path(mangled);
	struct record record = { .path = path, .dev = dev };
	struct nbd_uri uri;
	int err = nbd_check(text, &uri), fd = -1;
	char *absolute = err ? NULL : make_absolute(text, &uri);

	record.uri = absolute ?: text;
	if (!err)
		err = need_module();
	for (int i = 0; !err && fd < 0; i++) {
		if (i == MAX_DEVICES) {
			err = fail(-EBUSY, "no free NBD device for base %s", text);
			break;
		}
		snprintf(dev, PATH_MAX, "/dev/nbd%d", i);
		if (connected_by(dev))
			continue;
		err = connect_to(dev, &uri, &record, lock_fd);
		if (err == -EAGAIN) {
			err = 0;
			continue;
		}
		if (err)
			break;
		fd = open(dev, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			err = fail(-errno, "cannot open %s: %m", dev);
	}
	if (err)
		nbd_release(mangled);
	free(absolute);
	free(path);
	return err ? err : fd;
}

/* What was connected under one name belongs to another from here on. */
int nbd_rename(const char *from, const char *to)
{
	char *old = record_path(from), *new = record_path(to);
	int err = rename(old, new) && errno != ENOENT ? -errno : 0;

	if (err)
		fail(err, "cannot rename %s to %s: %s", old, new, strerror(-err));
	free(old);
	free(new);
	return err;
}

/*
 * The name that a second connection for a device has until it takes the place of
 * the first one. No device has it, for a ~ is always mangled.
 */
void nbd_next_slot(const char *mangled, char slot[SLOT_BYTES])
{
	snprintf(slot, SLOT_BYTES, "%s~", mangled);
}
