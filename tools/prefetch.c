// SPDX-License-Identifier: GPL-2.0-only
/*
 * cowctl prefetch: the kernel reads the base into its cache; here it is told to,
 * and watched.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

#define LOOK_MS		200

struct prefetch {
	uint64_t start_block;
	uint64_t blocks;
	uint64_t kib_per_second;	/* 0: as fast as it goes */
	bool wait;
};

static int parse(const struct args *args, struct prefetch *prefetch)
{
	const char *range = args->value[KEY_RANGE], *rate = args->value[KEY_RATE];
	uint64_t start = 0, end = UINT64_MAX, bytes = 0;
	int err = range ? parse_range(range, &start, &end) : 0;

	if (err)
		return fail(-EINVAL, err == -ERANGE ?
			    "range=%s is out of range: it must end after its start" :
			    "range=%s is not of the form START-END (1G-2G)", range);
	err = rate ? parse_size(rate, &bytes) : 0;
	if (err || (rate && (bytes < 1024 || bytes / 1024 > UINT32_MAX)))
		return fail(-EINVAL, "rate=%s is no size from 1K to less than 4T (100M)",
			    rate);
	prefetch->kib_per_second = bytes / 1024;
	prefetch->start_block = start / BLOCK_BYTES;
	prefetch->blocks = count_blocks(end) - prefetch->start_block;
	return parse_flag(args, KEY_WAIT, true, &prefetch->wait);
}

static int start(const struct args *args, const struct cow *cow, const struct prefetch *prefetch)
{
	uint64_t base_bytes = cow->status.base_size_sectors * SECTOR_BYTES;
	char rate[24] = "", *message;
	int err;

	if (base_bytes && prefetch->start_block * BLOCK_BYTES >= base_bytes)
		return fail(-EINVAL, "range=%s begins past the end of the base, which has %" PRIu64
			    " bytes", args->value[KEY_RANGE], base_bytes);
	if (prefetch->kib_per_second)
		snprintf(rate, sizeof(rate), " %" PRIu64, prefetch->kib_per_second);
	message = xasprintf("prefetch %" PRIu64 " %" PRIu64 "%s", prefetch->start_block,
			    prefetch->blocks, rate);
	err = dm_ask(makedev(cow->major, cow->minor), message, NULL);
	free(message);
	if (err == -EBUSY)
		return fail(err, "%s: a prefetch is under way; \"cowctl prefetch %s stop\" ends it",
			    args->name, args->name);
	return err ? fail(err == -EINVAL ? -EIO : err, "cannot prefetch %s: %s", args->name,
			  strerror(-err)) : 0;
}

/* A device tells of the last one only: that of a client of its export may be it by now. */
static bool is_ours(const struct cow *cow, const struct prefetch *prefetch)
{
	uint64_t blocks = cow->status.base_size_sectors * SECTOR_BYTES / BLOCK_BYTES;

	blocks -= prefetch->start_block < blocks ? prefetch->start_block : blocks;
	/* an older module does not tell the base's size */
	return !cow->status.base_size_sectors || cow->status.prefetch_total ==
	       (prefetch->blocks < blocks ? prefetch->blocks : blocks);
}

static int result(const struct args *args, const struct cow *cow,
		  const struct prefetch *prefetch)
{
	const char *state = cow->status.prefetch;

	if (*state && !is_ours(cow, prefetch))
		return fail(-ECANCELED, "%s: another prefetch has taken the place of this one",
			    args->name);
	if (!strcmp(state, "done"))
		return 0;
	if (!strcmp(state, "full"))
		return fail(-EDQUOT, "%s: there is no more room in the cache of the base",
			    args->name);
	if (!strcmp(state, "failed"))
		return fail(-EIO, "%s: the base cannot be read", args->name);
	return fail(-ECANCELED, "%s: the prefetch was stopped", args->name);
}

static int watch(const struct args *args, struct cow *cow, const struct prefetch *prefetch)
{
	sighandler_t on_sigpipe = signal(SIGPIPE, SIG_IGN);
	char uuid[sizeof(cow->uuid)];
	int shown = -1, signals = open_stop_signals(), err;

	memcpy(uuid, cow->uuid, sizeof(uuid));
	for (;;) {
		struct pollfd fds[] = {
			{ .fd = signals, .events = POLLIN },
			{ .fd = STDOUT_FILENO },	/* a pipe that nobody reads any more */
		};

		err = find_cow(args, cow);
		if (!err && strcmp(cow->uuid, uuid))
			err = fail(-ENODEV, "%s is another device by now", args->name);
		if (err)
			break;
		if (!args->json)
			show_progress(cow->status.prefetch_done * BLOCK_BYTES,
				      cow->status.prefetch_total * BLOCK_BYTES, &shown);
		if (strcmp(cow->status.prefetch, "running") || !is_ours(cow, prefetch))
			break;
		/* The signal stays pending, and ends us when all is done. */
		poll(fds, 2, LOOK_MS);
		if (fds[0].revents || (fds[1].revents & POLLERR)) {
			dm_ask(makedev(cow->major, cow->minor), "prefetch stop", NULL);
			err = -EINTR;
			break;
		}
	}
	close(signals);
	signal(SIGPIPE, on_sigpipe);
	if (err == -EINTR && !interrupted())
		raise(SIGPIPE);
	end_progress(shown);
	return err ? err : result(args, cow, prefetch);
}

int cmd_prefetch(const struct args *args)
{
	struct prefetch prefetch;
	int err = parse(args, &prefetch), lock;
	struct cow cow;

	if (err)
		return err;
	if (args->stop && (args->value[KEY_RANGE] || args->value[KEY_RATE] ||
			   args->value[KEY_WAIT]))
		return fail(-EINVAL, "prefetch stop takes no keys");
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = find_cow(args, &cow);
	if (!err && args->stop)
		err = dm_message(args, "prefetch stop");
	else if (!err)
		err = start(args, &cow, &prefetch);
	/* Others may change the device meanwhile, or stop this. */
	close(lock);
	if (!err && !args->stop && prefetch.wait)
		err = watch(args, &cow, &prefetch);
	return err || !args->json ? err : report(args);
}
