// SPDX-License-Identifier: GPL-2.0-only
/*
 * cowctl wait: until so much of a device is used. The kernel tells when it is 80 %
 * and 100 % of the limit; what lies between has to be looked for.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cowctl.h"

#define LOOK_MS		1000
#define LIMIT_LOOK_MS	10000	/* for what the kernel does not tell: that the limit went */

struct wait {
	const struct args *args;
	unsigned int percent;		/* of the limit; 0: not so */
	uint64_t bytes;
	uint64_t timeout_ms;
	uint64_t refused;		/* writes, before */
	char uuid[NAME_BYTES + 2];
};

static int parse(const struct args *args, struct wait *wait)
{
	const char *text = args->value[KEY_THRESHOLD];
	int err;

	wait->args = args;
	wait->timeout_ms = INT64_MAX;
	if (!text)
		return fail(-EINVAL, "wait: threshold= is missing; see \"cowctl help wait\"");
	if (args->command && !*args->command)
		return fail(-EINVAL, "wait: the command after -- is missing");
	err = parse_threshold(text, &wait->percent, &wait->bytes);
	if (err)
		return fail(-EINVAL, err == -ERANGE ?
			    "threshold=%s is out of range: from 1 byte, or 1%% to 100%%" :
			    "threshold=%s is neither a size (4G) nor a percentage (80%%)", text);
	return parse_time(args, KEY_TIMEOUT, 0, &wait->timeout_ms);
}

/*
 * A device that is full, of which something else is the limit, cannot be used further. Its
 * health may tell of the base instead.
 */
static bool reached(const struct wait *wait, const struct cow_status *status)
{
	if (!wait->percent)
		return status->used_blocks >= count_blocks(wait->bytes);
	return !strcmp(status->health, "full") || status->writes_refused > wait->refused ||
	       (double)status->used_blocks * 100 >=
	       (double)status->limit_blocks * wait->percent;
}

/* Looks whenever something has happened. Return: 0 when it is reached. */
static int watch(const struct wait *wait, struct cow *cow, int events, int signals)
{
	bool told = wait->percent == 80 || wait->percent == 100;
	int64_t start = now_ms();

	for (;;) {
		struct pollfd fds[] = {
			{ .fd = signals, .events = POLLIN },
			{ .fd = events, .events = POLLIN },
		};
		int err = dm_arm_events(events), ms = told ? LIMIT_LOOK_MS : LOOK_MS;
		int64_t left;

		if (err)
			return fail(err, "cannot wait for device-mapper: %s", strerror(-err));
		err = dm_find(wait->args->mangled, cow);
		if (err && err != -ENODEV)
			return err;
		if (err || cow->state != COW_LIVE || strcmp(cow->uuid, wait->uuid))
			return fail(-ENODEV, "%s was removed before it reached threshold=%s",
				    wait->args->name, wait->args->value[KEY_THRESHOLD]);
		if (wait->percent && cow->status.limit_blocks == NO_LIMIT)
			return fail(-EINVAL, "%s has no limit; give threshold= as a size",
				    wait->args->name);
		if (reached(wait, &cow->status))
			return 0;
		left = (int64_t)wait->timeout_ms - (now_ms() - start);
		if (left <= 0)
			return fail(-ETIME, "%s did not reach threshold=%s within %s seconds",
				    wait->args->name, wait->args->value[KEY_THRESHOLD],
				    wait->args->value[KEY_TIMEOUT]);
		/* The signal stays pending, and ends us. */
		if (poll(fds, 2, left < ms ? left : ms) > 0 && fds[0].revents)
			return -EINTR;
	}
}

static void set_number(const char *name, uint64_t blocks)
{
	char text[24] = "none";

	if (blocks != NO_LIMIT)
		snprintf(text, sizeof(text), "%" PRIu64, blocks * BLOCK_BYTES);
	setenv(name, text, 1);
}

/* Becomes the command, which gets its own mask of signals and no descriptor of ours. */
static int run_command(const struct wait *wait, const struct cow *cow, const sigset_t *mask)
{
	char **command = wait->args->command;
	int err;

	setenv("COWCTL_NAME", cow->name, 1);
	set_number("COWCTL_USED", cow->status.used_blocks);
	set_number("COWCTL_LIMIT", cow->status.limit_blocks);
	dm_close();
	sigprocmask(SIG_SETMASK, mask, NULL);
	umask(wait->args->umask);
	execvp(*command, command);
	err = errno == ENOENT ? -ENOPKG : -errno;
	return fail(err, "cannot run %s: %m", *command);
}

int cmd_wait(const struct args *args)
{
	struct wait wait = { 0 };
	struct cow cow;
	sigset_t set, mask;
	int err = parse(args, &wait) ?: find_cow(args, &cow), events, signals;

	if (err)
		return err;
	memcpy(wait.uuid, cow.uuid, sizeof(wait.uuid));
	wait.refused = cow.status.writes_refused;
	events = dm_events();
	if (events < 0)
		return fail(events, "cannot wait for device-mapper: %s", strerror(-events));
	stop_signals(&set);
	sigprocmask(SIG_BLOCK, &set, &mask);
	signals = open_stop_signals();
	err = watch(&wait, &cow, events, signals);
	close(signals);
	close(events);
	if (!err && args->json)
		print_json(describe(&cow));
	/* The command takes our place before main() could look whether this was lost. */
	if (args->command)
		err = flush_output(err);
	return err || !args->command ? err : run_command(&wait, &cow, &mask);
}
