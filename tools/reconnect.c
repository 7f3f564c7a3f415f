// SPDX-License-Identifier: GPL-2.0-only
/*
 * on-base-error=queue over NBD: a connection that was lost stays lost, for nobody can
 * connect its device anew while a copy holds it. A process of the copy's own waits for
 * the base to fail, connects to the server once more and moves the copy there.
 */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "cowctl.h"

#define KIND		"reconnect"
#define START_MS	30000
#define FIRST_PAUSE_MS	1000
#define LAST_PAUSE_MS	10000
#define ANSWER_S	3		/* that a server may take for its first words */

struct reconnect {
	const struct cow *cow;		/* as it was when it began */
	bool holes;			/* ask for them, as with create and rebase */
	int64_t tried;			/* when it did last */
	int64_t pause;			/* from then to the next time */
};

/* Return: 0, -ENODEV when there is nothing to be done for this device any more, -errno. */
static int look(const struct reconnect *reconnect, struct cow *cow)
{
	int err = dm_find(reconnect->cow->mangled, cow);

	if (!err && (cow->state != COW_LIVE || strcmp(cow->uuid, reconnect->cow->uuid) ||
		     !cow->table.queue_errors))
		err = -ENODEV;
	return err;
}

static bool greets(const struct sockaddr *addr, socklen_t length)
{
	struct timeval limit = { .tv_sec = ANSWER_S };
	int fd = socket(addr->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char words[8];
	bool does;

	if (fd < 0)
		return false;
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	does = !connect(fd, addr, length) &&
	       recv(fd, words, sizeof(words), MSG_WAITALL) == sizeof(words) &&
	       !memcmp(words, "NBDMAGIC", sizeof(words));
	close(fd);
	return does;
}

/* Looked at before the lock is taken, which nobody is to wait for because of us. */
static bool server_is_there(const struct nbd_uri *uri)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *list = NULL;
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	bool there = false;

	if (uri->socket[0]) {
		memcpy(addr.sun_path, uri->socket, sizeof(addr.sun_path));
		return greets((struct sockaddr *)&addr, sizeof(addr));
	}
	if (getaddrinfo(uri->host, uri->port, &hints, &list))
		return false;
	for (struct addrinfo *info = list; info && !there; info = info->ai_next)
		there = greets(info->ai_addr, info->ai_addrlen);
	freeaddrinfo(list);
	return there;
}

/*
 * Whoever has the lock, or what fails, is left alone until the next time. A server that
 * cannot read some of its blocks answers the same way over another connection, for which
 * the cache would be given up again and again.
 */
static void try(const struct reconnect *reconnect, const struct cow *cow)
{
	char *source = base_source(cow);
	struct nbd_uri uri;
	sigset_t set;
	int lock;

	if (!parse_nbd_uri(source, &uri) && server_is_there(&uri) && !base_answers(cow)) {
		lock = lock_slot(cow->mangled, LOCK_TRY);
		if (lock >= 0) {
			rebase_again(cow, source, lock, reconnect->holes);
			close(lock);
			stop_signals(&set);
			sigprocmask(SIG_UNBLOCK, &set, NULL);
		}
	}
	free(source);
}

/* Return: how long to wait for the next event, -1: for ever. */
static int try_in_time(struct reconnect *reconnect, const struct cow *cow)
{
	int64_t now = now_ms();

	/* What fails soon after it was moved is not tried any faster for that. */
	if (now - reconnect->tried > 2 * LAST_PAUSE_MS)
		reconnect->pause = 0;
	if (now - reconnect->tried >= reconnect->pause) {
		try(reconnect, cow);
		reconnect->tried = now_ms();
		reconnect->pause = !reconnect->pause ? FIRST_PAUSE_MS :
				   reconnect->pause * 2 < LAST_PAUSE_MS ? reconnect->pause * 2 :
				   LAST_PAUSE_MS;
		now = reconnect->tried;
	}
	return reconnect->tried + reconnect->pause - now;
}

/* Runs in a process of its own. */
static void work(void *arg, int ready_fd)
{
	struct reconnect *reconnect = arg;
	int events = dm_events(), err = events < 0 ? events : 0;
	struct pollfd event = { .fd = events, .events = POLLIN };
	struct cow cow;

	if (!err)
		err = dm_arm_events(events);
	helper_ready(ready_fd, err);
	while (!err) {
		int wait_ms = -1;

		err = look(reconnect, &cow);
		if (err == -ENODEV)
			break;
		if (err)
			wait_ms = LAST_PAUSE_MS;
		else if (!strcmp(cow.status.health, "base-error"))
			wait_ms = try_in_time(reconnect, &cow);
		poll(&event, 1, wait_ms);
		err = dm_arm_events(events);
	}
}

/*
 * Lets the process run, anew, if this device as it is now needs one; otherwise ends
 * the one that may be there.
 */
int reconnect_start(const char *mangled, bool holes)
{
	struct reconnect reconnect = { .holes = holes };
	struct nbd_uri uri;
	struct cow cow;
	char *source;
	int err = dm_find(mangled, &cow);

	if (err)
		return err;
	source = base_source(&cow);
	if (!*cow.uuid || !cow.table.queue_errors || parse_nbd_uri(source, &uri)) {
		reconnect_stop(mangled);
		goto out;
	}
	if (uri.socket[0] && uri.socket[0] != '/')
		warn("base %s: it is not connected anew when it is lost, for the path of its %s",
		     source, "socket is too long when it is absolute");
	reconnect.cow = &cow;
	reconnect.tried = now_ms();
	err = helper_start(mangled, KIND, source, work, &reconnect, START_MS);
	if (err) {
		reconnect_stop(mangled);
		err = fail(err, "cannot wait for base %s: %s", source, strerror(-err));
	}
out:
	free(source);
	return err;
}

bool reconnect_runs(const char *mangled)
{
	char text[sizeof(KIND)];

	return !helper_find(mangled, KIND, text, sizeof(text));
}

void reconnect_stop(const char *mangled)
{
	helper_stop(mangled, KIND);
}
